# SPDX-License-Identifier: Apache-2.0
"""Benchmark cases of deformable convolution: shapes and implementations."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measure import Build, Call, compiled_mmcv_ops
from torch import Tensor

import mmdcn

PACKAGES = ('torch', 'mmdcn', 'onedl-mmcv', 'mmcv', 'onnxruntime', 'openvino', 'torchvision', 'deformops')
BASELINE = 'conv2d'
WALL_GROUPS = ('batch-1', 'new-batch-1')  # kernels so short that the time of the host dominates


@dataclass(frozen=True)
class Case:
    """One layer. The defaults are those of a 3x3 convolution of ResNet-50."""

    name: str
    channels: int
    height: int  # height of the output
    width: int
    batch: int = 2
    kernel: int = 3
    stride: int = 1
    groups: int = 1
    offset_groups: int = 1
    mask: bool = True
    dtype: torch.dtype = torch.float32
    offset_dtype: torch.dtype | None = None  # dtype of offset and mask; None for that of the input
    operator: bool = False  # also measure the operator without the public function
    deformops: bool = False  # also measure deformops, which autotunes 40 configurations per shape
    new_kernels: bool = False  # also measure the kernels that have not passed their tests on a GPU


# The 3x3 convolutions of ResNet-50's stages, for an image of 800 x 1344 pixels.
C3 = Case('c3', 128, 100, 168)
C4 = Case('c4', 256, 50, 84)
C5 = Case('c5', 512, 25, 42)
STAGES = (C3, C4, C5)
DETECTOR = Case('160 x 160 detector', 64, 20, 20, batch=8)
VARIANTS = (
    replace(C4, name='c4 stride 2', stride=2, height=25, width=42),
    replace(C4, name='c4 4 offset groups', offset_groups=4),
    replace(C4, name='c4 32 groups', groups=32),
    replace(C4, name='c4 no mask', mask=False),
    replace(C4, name='c4 1x1', kernel=1),
    replace(C4, name='c4 5x5', kernel=5),
    DETECTOR,
)
GROUPS = (
    C4,
    replace(C4, name='c4 32 groups', groups=32),
    replace(C4, name='c4 depthwise', groups=C4.channels),
    replace(C4, name='c4 64 offset groups', offset_groups=64),
    replace(C4, name='c4 1x1', kernel=1),
)


def stages(name: str, **changes: Any) -> tuple[Case, ...]:
    return tuple(replace(stage, name=f'{stage.name} {name}', **changes) for stage in STAGES)


def square(size: int, channels: int, batch: int) -> tuple[Case, ...]:
    """Return the 3x3 convolutions of c3 to c5 for a square image; `channels` is the number in c3."""
    return tuple(
        Case(f'c{i + 3}, {size} x {size}, batch {batch}', channels << i, size // 8 >> i, size // 8 >> i, batch)
        for i in range(3)
    )


SMALL = (
    Case('tiny: 1x4x6x6', 4, 6, 6, batch=1, operator=True),
    *square(160, 64, 8),  # the demo's detector: a ResNet-18 of half width
    *square(320, 128, 1),
    *square(640, 128, 1),
)


def low(dtype: torch.dtype, **changes: Any) -> dict[str, Any]:
    """Return the settings of a low-precision layer on a GPU, whose offsets stay float32."""
    return {'dtype': dtype, 'offset_dtype': torch.float32, **changes}


CASES = {
    'cpu': {
        'stages': STAGES,
        'batch-1': stages('batch 1', batch=1),
        'bf16': stages('bf16', dtype=torch.bfloat16),
        'variants': VARIANTS,
        'small': SMALL,
        'groups': GROUPS,
        'busy': (*STAGES, DETECTOR),
    },
    'cuda': {
        'stages': stages('fp32', batch=16),
        'fp16': stages('fp16', **low(torch.float16, batch=16)),
        'bf16': stages('bf16', **low(torch.bfloat16, batch=16)),
        'batch-1': stages('fp16 batch 1', **low(torch.float16, batch=1)),
        'variants': VARIANTS,
        'deformops': stages('bf16', **low(torch.bfloat16, batch=16, deformops=True)),
        'new': stages('bf16', **low(torch.bfloat16, batch=16, new_kernels=True)),
        'new-batch-1': stages('fp16 batch 1', **low(torch.float16, batch=1, new_kernels=True)),
    },
}


@dataclass
class Inputs:
    """The tensors and settings of a case. `make_inputs` returns them contiguous."""

    input: Tensor  # [B, C, H, W]
    offset: Tensor  # [B, 2*G*K, H_out, W_out], standard normal
    weight: Tensor  # [C, C/groups, kh, kw]
    mask: Tensor | None  # [B, G*K, H_out, W_out]
    stride: int
    padding: int
    groups: int
    offset_groups: int

    def channels_last(self) -> 'Inputs':
        return replace(
            self,
            input=self.input.contiguous(memory_format=torch.channels_last),
            weight=self.weight.contiguous(memory_format=torch.channels_last),
        )

    def one_type(self) -> 'Inputs':
        """Convert offsets and mask to the dtype of the input, for implementations that need a single dtype."""
        mask = None if self.mask is None else self.mask.to(self.input.dtype)
        return replace(self, offset=self.offset.to(self.input.dtype), mask=mask)

    def channels_inside(self) -> 'Inputs':
        """Move channels last: input [B, H, W, C], offset [B, H_out, W_out, G, K, 2], mask [B, H_out, W_out, G, K]."""

        def inside(tensor: Tensor, *inner: int) -> Tensor:
            return tensor.movedim(1, -1).unflatten(-1, (self.offset_groups, -1, *inner)).contiguous()

        image = self.input.movedim(1, -1).contiguous()
        mask = None if self.mask is None else inside(self.mask)
        return replace(self, input=image, offset=inside(self.offset, 2), mask=mask)

    def leaves(self) -> 'Inputs':
        """Copy the tensors into leaves that require gradients."""

        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach().clone(memory_format=torch.preserve_format).requires_grad_()

        mask = None if self.mask is None else leaf(self.mask)
        return replace(self, input=leaf(self.input), offset=leaf(self.offset), weight=leaf(self.weight), mask=mask)


def make_inputs(case: Case, device: str) -> Inputs:
    torch.manual_seed(0)
    taps, size = case.kernel**2, (case.height, case.width)
    options: dict[str, Any] = dict(device=device, dtype=case.dtype)
    places: dict[str, Any] = dict(device=device, dtype=case.offset_dtype or case.dtype)
    mask = torch.rand(case.batch, case.offset_groups * taps, *size, **places) if case.mask else None
    return Inputs(
        torch.randn(case.batch, case.channels, *(case.stride * n for n in size), **options),
        torch.randn(case.batch, case.offset_groups * 2 * taps, *size, **places),
        torch.randn(case.channels, case.channels // case.groups, case.kernel, case.kernel, **options) * 0.02,
        mask,
        case.stride,
        case.kernel // 2,
        case.groups,
        case.offset_groups,
    )


def conv2d(x: Inputs) -> Tensor:
    return F.conv2d(x.input, x.weight, None, x.stride, x.padding, 1, x.groups)


def mmdcn_deform_conv2d(x: Inputs) -> Tensor:
    return mmdcn.ops.deform_conv2d(x.input, x.offset, x.weight, None, x.stride, x.padding, 1, x.mask)


def prepacked_call(x: Inputs) -> Call:
    """Pack the weight beforehand, as `mmdcn.prepack` does, and as ONNX Runtime and OpenVINO do with a constant."""
    packed_weight = mmdcn.ops.pack_weight(x.weight, x.groups)
    return lambda: mmdcn.ops.deform_conv2d(
        x.input, x.offset, x.weight, None, x.stride, x.padding, 1, x.mask, packed_weight=packed_weight
    )


def mmdcn_operator(x: Inputs) -> Tensor:
    geometry = (x.stride, x.stride), (x.padding, x.padding), (1, 1)
    operator = torch.ops.mmdcn.deform_conv2d.default
    return operator(x.input, x.offset, x.mask, x.weight, None, *geometry, x.groups, x.offset_groups)


def mmcv_deform_conv2d(x: Inputs) -> Tensor:
    ops = compiled_mmcv_ops()
    geometry = (x.stride, x.padding, 1, x.groups, x.offset_groups)
    if x.mask is None:
        return ops.deform_conv2d(x.input, x.offset, x.weight, *geometry)
    return ops.modulated_deform_conv2d(x.input, x.offset, x.mask, x.weight, None, *geometry)


def torchvision_deform_conv2d(x: Inputs) -> Tensor:
    from torchvision.ops import deform_conv2d

    return deform_conv2d(x.input, x.offset, x.weight, None, x.stride, x.padding, 1, x.mask)


def deformops_deform_conv2d(x: Inputs) -> Tensor:
    """Run the Triton kernels of deformops; the inputs come from `Inputs.channels_inside`."""
    from deformops.registry import conv

    geometry = dict(stride=x.stride, padding=x.padding, groups=x.groups, offset_groups=x.offset_groups)
    return conv(x.input, x.offset, x.weight, mask=x.mask, **geometry)


def reference_deform_conv2d(x: Inputs) -> Tensor:
    return mmdcn.reference.deform_conv2d(x.input, x.offset, x.weight, None, x.stride, x.padding, 1, x.mask)


def onnxruntime_session(x: Inputs) -> Call:
    """Build a call of ONNX Runtime's DeformConv (opset 22), with a constant weight as in exported models."""
    import onnxruntime
    from onnx import TensorProto, checker, helper, numpy_helper

    feeds = {'x': x.input.numpy(), 'offset': x.offset.numpy()}
    if x.mask is not None:
        feeds['mask'] = x.mask.numpy()
    names = ['x', 'w', 'offset', *(['', 'mask'] if x.mask is not None else [])]
    node = helper.make_node(
        'DeformConv',
        names,
        ['y'],
        group=x.groups,
        offset_group=x.offset_groups,
        kernel_shape=list(x.weight.shape[2:]),
        pads=[x.padding] * 4,
        strides=[x.stride] * 2,
    )
    infos = [helper.make_tensor_value_info(k, TensorProto.FLOAT, v.shape) for k, v in feeds.items()]
    output = helper.make_tensor_value_info('y', TensorProto.FLOAT, [len(x.input), len(x.weight), *x.offset.shape[2:]])
    graph = helper.make_graph([node], 'g', infos, [output], [numpy_helper.from_array(x.weight.numpy(), 'w')])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 22)], ir_version=10)
    checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=['CPUExecutionProvider'])
    return lambda: session.run(None, feeds)[0]


def openvino_request(x: Inputs) -> Call:
    """Build a call of OpenVINO's DeformableConvolution (opset 8) in float32, with a constant weight."""
    import openvino
    from openvino import opset8

    feeds = [x.input.numpy(), x.offset.numpy(), *([x.mask.numpy()] if x.mask is not None else [])]
    parameters = [opset8.parameter(feed.shape, np.float32) for feed in feeds]
    weight = x.weight.numpy()
    if x.groups > 1:
        raise NotImplementedError('its fast kernel supports only one group')
    node = opset8.deformable_convolution(
        parameters[0],
        parameters[1],
        opset8.constant(weight),
        [x.stride] * 2,
        [x.padding] * 2,
        [x.padding] * 2,
        [1, 1],
        parameters[2] if x.mask is not None else None,
        'EXPLICIT',
        x.groups,
        x.offset_groups,
        True,  # samples outside the image are zero
    )
    hints = {'INFERENCE_NUM_THREADS': torch.get_num_threads(), 'INFERENCE_PRECISION_HINT': 'f32'}
    compiled = openvino.Core().compile_model(openvino.Model([node], parameters), 'CPU', hints)
    request = compiled.create_infer_request()
    return lambda: request.infer(feeds, share_inputs=True)


Candidate = tuple[Callable[[Inputs], Tensor], Inputs]


def common_candidates(case: Case, device: str) -> dict[str, Candidate]:
    """Return the implementations with forward and backward, each with its inputs."""
    x = make_inputs(case, device)
    y = x.channels_last()
    candidates = {
        'conv2d': (conv2d, x),
        'conv2d channels_last': (conv2d, y),
        'mmdcn': (mmdcn_deform_conv2d, x),
        'mmdcn channels_last': (mmdcn_deform_conv2d, y),
        'mmcv': (mmcv_deform_conv2d, x.one_type()),
        'torchvision': (torchvision_deform_conv2d, x.one_type()),
    }
    if device == 'cpu':
        candidates['reference'] = (reference_deform_conv2d, x)
    if case.operator:
        candidates['mmdcn operator'] = (mmdcn_operator, x)
    if case.deformops:
        candidates['deformops'] = (deformops_deform_conv2d, x.channels_inside())
    return candidates


def forward_candidates(case: Case, device: str) -> dict[str, Build]:
    """Return, for each candidate, the function that builds its forward call."""
    candidates = common_candidates(case, device)
    builds: dict[str, Build] = {name: partial(partial, *candidate) for name, candidate in candidates.items()}
    _, x = candidates['conv2d']
    _, y = candidates['mmdcn channels_last']
    if case.new_kernels:
        builds['mmdcn channels_last, new kernels'] = lambda: with_new_kernels(partial(mmdcn_deform_conv2d, y))
    if device == 'cpu' and case.dtype == torch.float32:
        builds['mmdcn prepacked'] = partial(prepacked_call, x)
        builds['mmdcn prepacked channels_last'] = partial(prepacked_call, y)
        builds['onnxruntime'] = partial(onnxruntime_session, x)
        builds['openvino'] = partial(openvino_request, x)
    return builds


def training_candidates(case: Case, device: str) -> dict[str, Build]:
    """Return the same for forward and backward, with the gradients of all tensors."""
    candidates = common_candidates(case, device)
    builds: dict[str, Build] = {name: partial(training_call, *candidate) for name, candidate in candidates.items()}
    candidate = candidates['mmdcn channels_last']
    if case.new_kernels:
        builds['mmdcn channels_last, new kernels'] = lambda: with_new_kernels(training_call(*candidate))
    if device == 'cuda':
        builds['mmdcn channels_last, deterministic'] = lambda: deterministic(training_call(*candidate))
    return builds


def with_new_kernels(call: Call) -> Call:
    """Run the kernels that have not passed their tests on a GPU; if there are none, the others."""

    def run() -> object:
        os.environ['MMDCN_CUDA_KERNELS'] = 'new'
        try:
            return call()
        finally:
            del os.environ['MMDCN_CUDA_KERNELS']

    return run


def deterministic(call: Call) -> Call:
    def run() -> object:
        torch.use_deterministic_algorithms(True)
        try:
            return call()
        finally:
            torch.use_deterministic_algorithms(False)

    return run


def training_call(function: Callable[[Inputs], Tensor], x: Inputs) -> Call:
    x = x.leaves()
    grad_output = torch.ones_like(function(x))
    tensors = [tensor for tensor in (x.input, x.offset, x.weight, x.mask) if tensor is not None]

    def call() -> list[Tensor | None]:
        output = function(x)
        return [output.detach(), *torch.autograd.grad(output, tensors, grad_output, allow_unused=True)]

    return call
