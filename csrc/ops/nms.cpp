// SPDX-License-Identifier: Apache-2.0
#include "../core/library.h"

MMDCN_OPERATORS(m) {
  m.def(
      "nms("
      "Tensor boxes, "   // [N, 4], (x1, y1, x2, y2)
      "Tensor scores, "  // [N]
      "float iou_threshold, int offset"
      ") -> Tensor");  // [M], the boxes that are kept, the highest score first
  m.def(
      "soft_nms("
      "Tensor boxes, Tensor scores, float iou_threshold, float sigma, float min_score, "
      "int method, "  // 0: naive, 1: linear, 2: gaussian
      "int offset"
      ") -> (Tensor dets, Tensor indices)");  // [M, 5] with the new scores, [M]
  m.def(
      "nms_match("
      "Tensor boxes, Tensor scores, float iou_threshold"
      ") -> Tensor");  // [N], the index of the box that suppresses each box; a kept box has its own index
  // For exported detectors: the shapes do not depend on the data.
  m.def(
      "nms_mask("
      "Tensor boxes, "   // [B, N, 4], (x1, y1, x2, y2)
      "Tensor scores, "  // [B, N]; those that do not exceed score_threshold are not kept
      "float iou_threshold, float score_threshold"
      ") -> Tensor");  // [B, N], true for the boxes that are kept
}
