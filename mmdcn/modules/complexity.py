# SPDX-License-Identifier: Apache-2.0
"""FLOPs of the operators for mmengine's `get_model_complexity_info`."""

from collections.abc import Sequence
from typing import Any

from mmengine.analysis.jit_handles import generic_activation_jit, get_shape

from mmdcn._private_hooks import count_in_mmengine
from mmdcn.ops._flops import PER_SAMPLE, convolution_size, samples_of_bins


def deform_conv2d_flops(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """Count the multiply-adds of `mmdcn::deform_conv2d`, each as one flop, as mmengine does.

    These are B * C_out * H_out * W_out * K * C_in / groups of the convolution, and four for each of the
    B * C_in * K * H_out * W_out bilinear samples, as mmengine counts a `grid_sample`. Locating the samples and scaling
    by the mask are not counted: they are done once per offset group, not per channel.

    Args:
        inputs: The values of a traced graph that the operator takes, in the order of its schema.
        outputs: The values that it returns.
    """
    product, samples = convolution_size(get_shape(inputs[0]), get_shape(inputs[3]), get_shape(outputs[0]))
    return product + PER_SAMPLE * samples


def deform_roi_pool_flops(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """Count four multiply-adds for each bilinear sample of `mmdcn::deform_roi_pool`.

    A graph does not contain the regions. With a `sampling_ratio` of 0 each bin counts one sample, which is a lower
    bound.

    Args:
        inputs: The values of a traced graph that the operator takes, in the order of its schema.
        outputs: The values that it returns.
    """
    spatial_scale, sampling_ratio = (value.toIValue() for value in inputs[4:6])
    return PER_SAMPLE * samples_of_bins(None, get_shape(outputs[0]), spatial_scale, sampling_ratio)


for _name, _count in (('deform_conv2d', deform_conv2d_flops), ('deform_roi_pool', deform_roi_pool_flops)):
    count_in_mmengine(f'mmdcn::{_name}', _count, generic_activation_jit())
