// SPDX-License-Identifier: Apache-2.0
// The name of the library of operators, and of the devices that have kernels. tests/cuda_host has a twin of this file,
// by which the kernels of CUDA become operators of the CPU in a library of their own.
#pragma once

#include <torch/csrc/stable/library.h>

#define MMDCN_OPERATORS(library) STABLE_TORCH_LIBRARY_FRAGMENT(mmdcn, library)
#define MMDCN_CPU_KERNELS(library) STABLE_TORCH_LIBRARY_IMPL(mmdcn, CPU, library)
#define MMDCN_CUDA_KERNELS(library) STABLE_TORCH_LIBRARY_IMPL(mmdcn, CUDA, library)
