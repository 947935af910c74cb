// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "../core/checks.h"
#include "../core/library.h"
#include "../core/stable_ops.h"

namespace mmdcn {

inline void check_nms(const Tensor& boxes,   // [N, 4]
                      const Tensor& scores,  // [N]
                      int64_t offset) {
  check_rank(boxes, "boxes", 2);
  check_shape(boxes, "boxes", {boxes.size(0), 4});
  check_shape(scores, "scores", {boxes.size(0)});
  check_floating(boxes, "boxes");
  check_floating(scores, "scores");
  MMDCN_CHECK(scores.device() == boxes.device(), "scores must be on the device of boxes");
  check_below_2_31({boxes.size(0)}, "the number of boxes");
  MMDCN_CHECK(offset == 0 || offset == 1, "offset must be 0 or 1, got ", offset);
}

// Indices of the boxes, highest score first. torch's sort decides ties, as in mmcv.
inline Tensor by_score(const Tensor& scores) { return call_torch("aten::argsort", "", scores, int64_t{0}, true); }

inline Tensor index_select(const Tensor& tensor, const Tensor& index) {
  return call_torch("aten::index_select", "", tensor, int64_t{0}, index);
}

}  // namespace mmdcn
