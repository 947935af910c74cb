// SPDX-License-Identifier: Apache-2.0
#include "../core/library.h"

MMDCN_OPERATORS(m) {
  m.def(
      "deform_roi_pool("
      "Tensor input, "    // [B, C, H, W]
      "Tensor rois, "     // [N, 5], (image, x1, y1, x2, y2) of each region
      "Tensor? offset, "  // [N, 2, ph, pw], (x, y) of each bin
      "SymInt[2] output_size, float spatial_scale, SymInt sampling_ratio, float gamma, "
      "bool aligned=True"  // as in RoIAlign
      ") -> Tensor");      // [N, C, ph, pw]
  m.def(
      "deform_roi_pool_backward("
      "Tensor grad_output, "  // [N, C, ph, pw]
      "Tensor input, Tensor rois, Tensor? offset, "
      "float spatial_scale, SymInt sampling_ratio, float gamma, "
      "bool[] output_mask, "  // which of the two gradients to compute; the other is returned without elements
      "bool deterministic, "  // ignored: the kernels always give the same bits in each run
      "bool aligned=True"
      ") -> (Tensor grad_input, Tensor grad_offset)");
}
