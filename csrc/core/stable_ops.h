// SPDX-License-Identifier: Apache-2.0
// The few torch operators that torch::stable has no function for, and names for tensors seen as matrices.
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

// The dispatcher reads as many arguments as the operator has, however many there are. torch sees to those of its native
// operators (aten) when a later version has more; of any other the schema has to be compared first.
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

// The tensor in a type, without its history: a worker thread is not below autograd, as the thread that calls an
// operator is, and torch would refuse to write results of a tensor that requires a gradient to `out`.
inline Tensor values_as(const Tensor& self, torch::headeronly::ScalarType type) {
  return torch::stable::to(call_torch("aten::detach", "", self), type);
}

inline Tensor empty_matrix(const Tensor& like, torch::headeronly::ScalarType type, int64_t rows, int64_t columns) {
  return torch::stable::empty({rows, columns}, type, std::nullopt, like.device());
}

// The memory format that suits a [B, C, H, W] tensor's strides: channels last if the channels lie next to each
// other and the pixels do not. mmdcn.ops._fake.memory_format is its twin.
inline torch::headeronly::MemoryFormat memory_format(const Tensor& images) {
  const bool channels_last = images.size(1) > 1 && images.stride(1) == 1 && images.stride(3) >= images.size(1);
  return channels_last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous;
}

// A gradient of a tensor; one that is not needed has no elements.
inline Tensor empty_gradient(bool needed, const Tensor& tensor, torch::headeronly::ScalarType type,
                             torch::headeronly::MemoryFormat format = torch::headeronly::MemoryFormat::Contiguous) {
  if (!needed) return torch::stable::empty({0}, type, std::nullopt, tensor.device());
  return torch::stable::empty(tensor.sizes(), type, std::nullopt, tensor.device(), std::nullopt, format);
}

}  // namespace mmdcn
