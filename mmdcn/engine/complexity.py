# SPDX-License-Identifier: Apache-2.0
"""What mmengine needs in order to count the operators in `get_model_complexity_info`."""

from collections.abc import Sequence
from math import prod
from typing import Any

from mmengine.analysis import complexity_analysis
from mmengine.analysis.jit_handles import conv_flop_count, generic_activation_jit, get_shape


def deform_conv2d_flops(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """Count the multiply-adds of `mmdcn::deform_conv2d`, each as one flop, as mmengine does.

    Those are the convolution's, B * C_out * H_out * W_out * K * C_in / groups, and four for each of the
    B * C_in * K * H_out * W_out bilinear samples, as mmengine counts a `grid_sample`. Finding the places and scaling
    by the mask is not counted: it is done once per offset group, not per channel.

    Args:
        inputs: The values of a traced graph that the operator takes, in the order of its schema.
        outputs: Those that it gives.
    """
    image, weight, output = get_shape(inputs[0]), get_shape(inputs[3]), get_shape(outputs[0])
    columns = image[0] * image[1] * prod(weight[2:]) * prod(output[2:])
    return conv_flop_count(image, weight, output) + 4 * columns


complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS['mmdcn::deform_conv2d'] = deform_conv2d_flops
complexity_analysis._DEFAULT_SUPPORTED_ACT_OPS['mmdcn::deform_conv2d'] = generic_activation_jit()
