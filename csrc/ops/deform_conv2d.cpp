// SPDX-License-Identifier: Apache-2.0
#include "../core/library.h"

MMDCN_OPERATORS(m) {
  m.def(
      "deform_conv2d("
      "Tensor input, "   // [B, C_in, H, W]
      "Tensor offset, "  // [B, 2*G*K, H_out, W_out], (y, x) of each tap
      "Tensor? mask, "   // [B, G*K, H_out, W_out]
      "Tensor weight, "  // [C_out, C_in/groups, kh, kw]
      "Tensor? bias, "   // [C_out]
      "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, "
      "SymInt groups, SymInt offset_groups, "
      "bool allow_tf32=False, "     // on CUDA, float32 products may use TF32
      "Tensor? packed_weight=None"  // on a CPU: the weight as deform_conv2d_pack_weight returns it
      ") -> Tensor");               // [B, C_out, H_out, W_out]
  m.def("deform_conv2d_pack_weight(Tensor weight, SymInt groups) -> Tensor");
  m.def(
      "deform_conv2d_backward("
      "Tensor grad_output, "  // [B, C_out, H_out, W_out]
      "Tensor input, Tensor offset, Tensor? mask, Tensor weight, "
      "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, "
      "SymInt groups, SymInt offset_groups, "
      "bool[] output_mask, "  // which of the four gradients to compute; the others are returned without elements
      "bool deterministic, "  // the same bits in each run, at some cost in time and memory on CUDA
      "bool allow_tf32=False"
      ") -> (Tensor grad_input, Tensor grad_offset, Tensor grad_mask, Tensor grad_weight)");
}
