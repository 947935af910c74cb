// SPDX-License-Identifier: Apache-2.0
// The twin of csrc/core/library.h: what is registered for CUDA are operators of the CPU here.
#pragma once

#include <torch/csrc/stable/library.h>

#define MMDCN_OPERATORS(library) STABLE_TORCH_LIBRARY_FRAGMENT(mmdcn_host, library)
#define MMDCN_CUDA_KERNELS(library) STABLE_TORCH_LIBRARY_IMPL(mmdcn_host, CPU, library)
