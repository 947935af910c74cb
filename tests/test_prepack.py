# SPDX-License-Identifier: Apache-2.0
"""Weights that are packed beforehand: the same bits, and never those of an earlier weight."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.parametrizations import spectral_norm

import mmdcn
from mmdcn.ops import deform_conv2d, pack_weight

# groups, C_in and C_out: products of 4, 8 and 16 lanes, with whole, partial and several vectors; depthwise.
SHAPES = [(1, 5, 3), (1, 6, 8), (1, 7, 37), (2, 6, 134), (4, 32, 16), (20, 20, 20)]


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


def draw_call(
    groups: int, in_channels: int, out_channels: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the input, offset and weight of a convolution with 3x2 taps and padding 1."""
    x = draw(2, in_channels, 5, 7, dtype=dtype)
    return x, draw(2, 12, 5, 8, dtype=dtype), draw(out_channels, in_channels // groups, 3, 2, dtype=dtype)


@pytest.fixture
def layer() -> mmdcn.nn.DCNv2:
    """A layer in eval mode whose offsets are not zero."""
    made = mmdcn.nn.DCNv2(6, 20, 3, padding=1)
    nn.init.normal_(made.conv_offset.weight, std=0.1)
    return made.eval()


@pytest.fixture
def x() -> Tensor:
    return draw(2, 6, 9, 5)


def is_packed(layer: nn.Module) -> bool:
    return layer._packed_weight is not None and layer._packed_weight.values_of(layer.weight) is not None


def unpacked(layer: nn.Module, x: Tensor) -> Tensor:
    """Compute the layer's output as a layer with the same parameters that was never packed."""
    plain = mmdcn.nn.DCNv2(6, 20, 3, padding=1).to(layer.weight.dtype).eval()
    plain.load_state_dict(layer.state_dict())
    return plain(x)


@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_a_packed_weight_gives_the_same_bits(
    shape: tuple[int, int, int], dtype: torch.dtype, channels_last: bool
) -> None:
    x, offset, weight = draw_call(*shape, dtype=dtype)
    if channels_last:
        x, weight = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, weight))
    packed = pack_weight(weight, groups=shape[0])
    expected = deform_conv2d(x, offset, weight, padding=1)
    assert torch.equal(deform_conv2d(x, offset, weight, padding=1, packed_weight=packed), expected)


@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_a_packed_weight_is_not_packed_again(shape: tuple[int, int, int]) -> None:
    x, offset, weight = draw_call(*shape)
    packed = pack_weight(weight, groups=shape[0])
    got = deform_conv2d(x, offset, torch.zeros_like(weight), padding=1, packed_weight=packed)
    assert torch.equal(got, deform_conv2d(x, offset, weight, padding=1))


def test_an_image_that_is_copied_in_parts_ignores_the_packed_weight() -> None:
    size = 400  # with 64 channels, 41 MB
    x, offset, weight = draw(1, 64, size, size), torch.zeros(1, 2, size // 4, size // 4), draw(3, 64, 1, 1)
    expected = deform_conv2d(x, offset, weight, stride=4)
    assert torch.equal(deform_conv2d(x, offset, weight, stride=4, packed_weight=pack_weight(weight)), expected)


def test_bfloat16_products_of_the_processor_ignore_the_packed_weight() -> None:
    x, offset, weight = draw_call(1, 7, 37, dtype=torch.bfloat16)
    expected = deform_conv2d(x, offset, weight, padding=1)
    assert torch.equal(deform_conv2d(x, offset, weight, padding=1, packed_weight=pack_weight(weight)), expected)


def test_under_autocast_the_weight_itself_is_used() -> None:
    x, offset, weight = draw_call(1, 7, 37)
    packed = torch.full_like(pack_weight(weight), torch.nan)
    with torch.autocast('cpu', torch.bfloat16):
        expected = deform_conv2d(x, offset, weight, padding=1)
        assert torch.equal(deform_conv2d(x, offset, weight, padding=1, packed_weight=packed), expected)


def test_gradients_of_a_call_with_a_packed_weight_are_those_without() -> None:
    def gradients(packed: Tensor | None) -> tuple[Tensor, ...]:
        tensors = [tensor.requires_grad_() for tensor in draw_call(2, 6, 134, dtype=torch.float64)]
        return torch.autograd.grad(deform_conv2d(*tensors, padding=1, packed_weight=packed).square().sum(), tensors)

    packed = pack_weight(draw_call(2, 6, 134, dtype=torch.float64)[2], groups=2)
    assert all(torch.equal(*pair) for pair in zip(gradients(packed), gradients(None), strict=True))


@pytest.mark.parametrize('mapped', ['offset', 'weight', 'bias'])
def test_vmap_of_a_call_with_a_packed_weight_is_that_without(mapped: str) -> None:
    x, offset, weight = draw_call(1, 7, 37)
    packed = pack_weight(weight)
    given = {'offset': offset, 'weight': weight, 'bias': draw(37)}
    stacked = {**given, mapped: torch.stack([given[mapped], given[mapped] + 1])}
    in_dims = {name: 0 if name == mapped else None for name in given}
    # A mapped weight has one packed weight for each, which a call cannot take.
    packed_weight = None if mapped == 'weight' else packed

    def call(tensors: dict[str, Tensor]) -> Tensor:
        return deform_conv2d(x, **tensors, padding=1, packed_weight=packed_weight)

    got = torch.vmap(call, in_dims=(in_dims,))(stacked)
    expected = [call({**given, mapped: each}) for each in stacked[mapped]]
    torch.testing.assert_close(got, torch.stack(expected))


@pytest.mark.parametrize(
    ('packed', 'message'),
    [
        (torch.zeros(5), r'packed_weight must have shape \[\d+\], got \[5\]'),
        (pack_weight(draw(20, 6, 3, 3)).double(), 'packed_weight must be Float, got Double'),
        (pack_weight(draw(20, 6, 3, 3)).repeat(2)[::2], 'packed_weight must be contiguous'),
    ],
    ids=['size', 'type', 'strides'],
)
def test_a_tensor_that_is_no_packed_weight_is_refused(packed: Tensor, message: str) -> None:
    x, offset, weight = draw(1, 6, 4, 4), torch.zeros(1, 18, 4, 4), draw(20, 6, 3, 3)
    with pytest.raises(RuntimeError, match=message):
        deform_conv2d(x, offset, weight, padding=1, packed_weight=packed)


@pytest.mark.parametrize(
    ('weight', 'groups', 'message'),
    [
        (draw(4, 3, 3), 1, 'weight must have 4 dimensions'),
        (torch.zeros(4, 3, 1, 1, dtype=torch.int64), 1, 'weight must be of type float64'),
        (draw(4, 3, 1, 1), 3, r'weight must have a C_out that its 3 groups divide, got C_out = 4'),
        (draw(4, 3, 1, 1), 0, 'groups must be an integer, 1 or more, got 0'),
        (draw(4, 0, 1, 1), 1, r'weight must have no empty dimension, got shape \[4, 0, 1, 1\]'),
        (torch.empty(4, 3, 1, 1, device='meta'), 1, 'weight must be on a CPU, got meta'),
    ],
    ids=['rank', 'type', 'groups', 'no group', 'empty', 'device'],
)
def test_a_weight_that_cannot_be_packed_is_refused(weight: Tensor, groups: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_weight(weight, groups)


def test_prepack_packs_every_deformable_convolution_of_a_model(x: Tensor) -> None:
    layers = [mmdcn.nn.DCN(6, 8, 3, padding=1), mmdcn.nn.DCNv2(8, 6, 3, padding=1, groups=2)]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.Conv2d(6, 2, 1)).eval()
    expected = model(x)
    assert mmdcn.prepack(model) is model
    assert all(map(is_packed, layers))
    assert torch.equal(model(x), expected)


def test_prepack_packs_the_layers_of_configs_and_those_that_take_offsets() -> None:
    layer = mmdcn.DeformConv2d(6, 20, 3, padding=1).eval()
    x, offset = draw(1, 6, 4, 4), draw(1, 18, 4, 4)
    expected = layer(x, offset)
    mmdcn.prepack(layer)
    assert is_packed(layer)
    assert torch.equal(layer(x, offset), expected)


def test_prepack_refuses_a_model_in_training_mode(layer: nn.Module) -> None:
    with pytest.raises(ValueError, match=r'model must be in eval mode .* call model.eval\(\)'):
        mmdcn.prepack(layer.train())


def test_prepack_leaves_layers_alone_that_it_cannot_help() -> None:
    computed = spectral_norm(mmdcn.nn.DCNv2(6, 20, 3)).eval()
    for layer in (computed, mmdcn.nn.DCNv2(6, 20, 3).bfloat16().eval(), mmdcn.nn.DCNv2(6, 20, 3).to('meta').eval()):
        assert mmdcn.prepack(layer)._packed_weight is None


def pickled(layer: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    'discard',
    [
        lambda layer: layer.train().eval(),
        lambda layer: nn.Sequential(layer).train()[0].eval(),
        lambda layer: layer.load_state_dict(layer.state_dict()) and layer,
        lambda layer: layer.double(),
        copy.deepcopy,
        pickled,
    ],
    ids=['train', 'train the model', 'load_state_dict', 'double', 'deepcopy', 'pickle'],
)
def test_a_layer_discards_its_packed_weight(
    layer: nn.Module, x: Tensor, discard: Callable[[nn.Module], nn.Module]
) -> None:
    changed = discard(mmdcn.prepack(layer))
    assert changed._packed_weight is None
    x = x.to(changed.weight.dtype)
    assert torch.equal(changed(x), unpacked(changed, x))


def in_place(layer: nn.Module) -> None:
    with torch.no_grad():
        layer.weight.mul_(2)


def new_storage(layer: nn.Module) -> None:
    layer.weight.data = layer.weight.data * 2


def new_parameter(layer: nn.Module) -> None:
    layer.weight = nn.Parameter(layer.weight.detach() * 2)


def optimizer_step(layer: nn.Module) -> None:
    layer.weight.grad = torch.ones_like(layer.weight)
    torch.optim.SGD([layer.weight], lr=0.1).step()


@pytest.mark.parametrize('change', [in_place, new_storage, new_parameter, optimizer_step])
def test_a_changed_weight_is_not_replaced_by_its_packed_predecessor(
    layer: nn.Module, x: Tensor, change: Callable[[nn.Module], None]
) -> None:
    before = mmdcn.prepack(layer)(x)
    change(layer)
    assert not is_packed(layer)
    got = layer(x)
    assert not torch.equal(got, before)
    assert torch.equal(got, unpacked(layer, x))


def test_functional_call_uses_the_weight_that_it_is_given(layer: nn.Module, x: Tensor) -> None:
    mmdcn.prepack(layer)
    parameters = {name: parameter * 2 for name, parameter in layer.named_parameters()}
    got = torch.func.functional_call(layer, parameters, (x,))
    layer.load_state_dict(parameters)
    assert torch.equal(got, layer(x))


def test_a_model_made_in_inference_mode_can_be_prepacked(x: Tensor) -> None:
    with torch.inference_mode():
        layer = mmdcn.nn.DCNv2(6, 20, 3, padding=1).eval()
        expected = layer(x)
        assert is_packed(mmdcn.prepack(layer))
        assert torch.equal(layer(x), expected)


def test_exported_and_compiled_programs_do_not_contain_the_packed_weight(layer: nn.Module, x: Tensor) -> None:
    expected = layer(x)
    mmdcn.prepack(layer)
    program = torch.export.export(layer, (x,))
    assert set(program.state_dict) == set(layer.state_dict())
    assert not program.constants
    torch.testing.assert_close(program.module()(x), expected)
    torch.testing.assert_close(torch.compile(layer, backend='aot_eager', fullgraph=True)(x), expected)
    torch.testing.assert_close(torch.jit.trace(layer, x)(x), expected)


def test_replaced_weight_data_is_not_taken_for_the_packed_weight(layer: mmdcn.nn.DCNv2, x: Tensor) -> None:
    mmdcn.prepack(layer)
    with torch.no_grad():
        for _ in range(4):  # the second would have the address of the first, if that were freed
            layer.weight.data = 2 * layer.weight.data
            assert torch.equal(layer(x), unpacked(layer, x))


def test_training_with_a_fused_optimizer_discards_the_packed_weight(layer: mmdcn.nn.DCNv2, x: Tensor) -> None:
    """It changes the weight without counting a version."""
    mmdcn.prepack(layer)(x).square().sum().backward()
    torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True).step()
    with torch.no_grad():
        assert torch.equal(layer(x), unpacked(layer, x))


def test_a_weight_that_is_no_plain_parameter_is_not_packed() -> None:
    with FakeTensorMode():
        layer = mmdcn.prepack(mmdcn.nn.DCNv2(4, 6, 3).eval())
    assert not is_packed(layer)


def test_a_packed_weight_on_another_device_is_refused() -> None:
    x, offset, weight = draw_call(1, 5, 3)
    packed = pack_weight(weight).to('meta')
    with pytest.raises(ValueError, match='packed_weight must be on the device of input, cpu, got meta'):
        deform_conv2d(x, offset, weight, padding=1, packed_weight=packed)
