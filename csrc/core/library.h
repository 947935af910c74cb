// SPDX-License-Identifier: Apache-2.0
// The name of the operator library, and the devices that have kernels. tests/cuda_host replaces this file to register
// the CUDA kernels as CPU operators in a separate library.
#pragma once

#include <torch/csrc/stable/library.h>

#define MMDCN_OPERATORS(library) STABLE_TORCH_LIBRARY_FRAGMENT(mmdcn, library)
#define MMDCN_CPU_KERNELS(library) STABLE_TORCH_LIBRARY_IMPL(mmdcn, CPU, library)
#define MMDCN_CUDA_KERNELS(library) STABLE_TORCH_LIBRARY_IMPL(mmdcn, CUDA, library)
