// SPDX-License-Identifier: Apache-2.0
// The torch operators for which torch::stable has no function, and helpers for tensors.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <array>
#include <optional>
#include <vector>

namespace mmdcn {

using torch::stable::Tensor;

// The dispatcher reads as many arguments as the operator's schema has, whatever is passed. For native operators (aten)
// torch handles a later version with more arguments; for all others, compare the schema first.
template <typename... Args>
Tensor call_torch(const char* name, const char* overload, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

inline Tensor contiguous_as(const Tensor& tensor, torch::headeronly::ScalarType type) {
  return torch::stable::contiguous(torch::stable::to(tensor, type));
}

inline Tensor permute(const Tensor& self, const std::vector<int64_t>& dims) {
  return call_torch("aten::permute", "", self, dims);
}

inline Tensor slice(Tensor self, int64_t dim, int64_t start, int64_t length) {
  return torch::stable::narrow(self, dim, start, length);
}

// Converts a tensor and detaches it. Worker threads do not run below autograd as the calling thread does, and there
// torch refuses to write results of a tensor that requires a gradient to `out`.
inline Tensor values_as(const Tensor& self, torch::headeronly::ScalarType type) {
  return torch::stable::to(call_torch("aten::detach", "", self), type);
}

inline Tensor empty_matrix(const Tensor& like, torch::headeronly::ScalarType type, int64_t rows, int64_t columns) {
  return torch::stable::empty({rows, columns}, type, std::nullopt, like.device());
}

// The memory format that matches a [B, C, H, W] tensor's strides: channels last if the channels are adjacent and the
// pixels are not. mmdcn.ops._fake.memory_format must give the same.
inline torch::headeronly::MemoryFormat memory_format(const Tensor& images) {
  const bool channels_last = images.size(1) > 1 && images.stride(1) == 1 && images.stride(3) >= images.size(1);
  return channels_last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous;
}

// Allocates the gradient of a tensor; a gradient that is not needed has no elements.
inline Tensor empty_gradient(bool needed, const Tensor& tensor, torch::headeronly::ScalarType type,
                             torch::headeronly::MemoryFormat format = torch::headeronly::MemoryFormat::Contiguous) {
  if (!needed) return torch::stable::empty({0}, type, std::nullopt, tensor.device());
  return torch::stable::empty(tensor.sizes(), type, std::nullopt, tensor.device(), std::nullopt, format);
}

}  // namespace mmdcn
