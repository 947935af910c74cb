// SPDX-License-Identifier: Apache-2.0
// The host code. See Note [NMS on CUDA].
#include "nms.cuh"

#include "../core/dispatch.h"
#include "../core/library.h"
#include "../core/readable_errors.h"
#include "../ops/nms.h"
#include "device.cuh"

namespace mmdcn {
namespace {

Tensor nms(const Tensor& boxes, const Tensor& scores, double iou_threshold, int64_t offset) {
  check_nms(boxes, scores, offset);
  const int32_t device = boxes.get_device_index();
  const DeviceGuard guard(device);
  const Tensor order = by_score(scores);
  const int64_t count = boxes.size(0), words = (count + kWordBits - 1) / kWordBits;
  if (count == 0) return order;
  const ScalarType type = compute_type(boxes.scalar_type());
  const Tensor sorted = contiguous_as(index_select(boxes, order), type);
  const Tensor overlaps = empty_matrix(boxes, ScalarType::Long, count, words);
  const Tensor suppressed = torch::stable::empty({words}, ScalarType::Long, std::nullopt, boxes.device());
  const Tensor kept = torch::stable::empty({count}, ScalarType::Bool, std::nullopt, boxes.device());
  clear(suppressed.data_ptr(), words * static_cast<int64_t>(sizeof(uint64_t)), device);
  dispatch_compute(type, [&](auto zero) {
    using T = decltype(zero);
    const Pairs<T> pairs{data<const T>(sorted), count, words, static_cast<T>(iou_threshold), static_cast<T>(offset)};
    launch(FindOverlaps<T>{pairs, data<uint64_t>(overlaps)}, device);
  });
  launch(KeepBest{data<const uint64_t>(overlaps), data<uint64_t>(suppressed), data<bool>(kept), count, words}, device);
  return call_torch("aten::masked_select", "", order, kept);
}

}  // namespace

MMDCN_CUDA_KERNELS(m) { m.impl("nms", TORCH_BOX(&Readable<&nms>::call)); }

}  // namespace mmdcn
