# SPDX-License-Identifier: Apache-2.0
"""Mixed precision on a CPU."""

from collections.abc import Callable

import mmcv.ops
import pytest
import small_detectors
import torch
from mmengine.optim import OptimWrapper, build_optim_wrapper
from torch import Tensor, nn

import mmdcn

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU, which mmengine itself trains on')


LEARNING_RATE = 0.01


def wrapper_of(model: nn.Module, **settings: object) -> OptimWrapper:
    optimizer = dict(type='SGD', lr=LEARNING_RATE, momentum=0.9)
    return build_optim_wrapper(model, dict(type='mmdcn.AmpOptimWrapper', optimizer=optimizer, **settings))


def dtypes(model: nn.Module, *names: str) -> dict[str, list[torch.dtype]]:
    """Note the types of the tensors that modules are given and give, as they are called."""
    seen: dict[str, list[torch.dtype]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple, output: Tensor) -> None:
            tensors = (*args[0], args[1]) if isinstance(args[0], tuple | list) else args
            seen[name] = [tensor.dtype for tensor in (*tensors, output)]

        return hook

    for name in names:
        model.get_submodule(name).register_forward_hook(note(name))
    return seen


def test_a_detector_trains_in_bfloat16_and_its_regions_stay_float32() -> None:
    model = small_detectors.build(small_detectors.faster_rcnn_config()).train()
    before = {name: value.clone() for name, value in model.named_parameters()}
    seen = dtypes(model, 'backbone.layer2.0.conv2', 'roi_head.bbox_roi_extractor', 'roi_head.bbox_head.fc_cls')
    logs = model.train_step(small_detectors.batch(), wrapper_of(model, loss_scale='dynamic', dtype='float16'))
    assert all(value.isfinite() for value in logs.values())
    assert seen['backbone.layer2.0.conv2'][-1] == torch.bfloat16
    assert set(seen['roi_head.bbox_roi_extractor']) == {torch.float32}
    assert seen['roi_head.bbox_head.fc_cls'][-1] == torch.bfloat16
    for name, value in model.named_parameters():
        assert value.dtype == torch.float32
        assert value.grad is None or not torch.equal(value, before[name]) or not value.grad.any(), name


def test_gradients_are_clipped_to_the_norm_of_the_config() -> None:
    model = nn.Linear(3, 2)
    before = [value.clone() for value in model.parameters()]
    wrapper = wrapper_of(model, clip_grad=dict(max_norm=0.5))
    with wrapper.optim_context(model):
        loss = model(torch.full((4, 3), 100.0)).sum()
    wrapper.update_params(loss)
    step = torch.cat([(old - new).flatten() for old, new in zip(before, model.parameters(), strict=True)])
    torch.testing.assert_close(step.norm().item(), 0.5 * LEARNING_RATE, rtol=1e-3, atol=0)


def test_a_state_has_no_scale_of_the_loss_and_that_of_a_gpu_loads() -> None:
    model = nn.Linear(3, 2)
    wrapper = wrapper_of(model)
    wrapper.update_params(model(torch.ones(1, 3)).sum())
    state = wrapper.state_dict()
    assert 'loss_scaler' not in state
    resumed = wrapper_of(model)
    resumed.load_state_dict(dict(state, loss_scaler=dict(scale=65536.0, growth_factor=2.0, _growth_tracker=3)))
    torch.testing.assert_close(resumed.optimizer.state_dict()['state'], wrapper.optimizer.state_dict()['state'])


def test_the_operators_of_mmcv_take_bfloat16_and_compute_in_float32() -> None:
    wrapper_of(nn.Linear(1, 1))
    torch.manual_seed(0)
    image = torch.randn(1, 2, 8, 9).bfloat16().requires_grad_()
    single = image.detach().float().requires_grad_()
    rois = torch.tensor([[0, 0.5, 1.25, 6.75, 7.5]])
    boxes, scores = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 5], [5, 5, 7, 7]]), torch.tensor([0.5, 0.75, 0.25])
    with torch.autocast('cpu', torch.bfloat16):
        pooled = mmcv.ops.roi_align(image, rois.bfloat16(), (3, 2))
        kept = mmcv.ops.nms(boxes.bfloat16(), scores.bfloat16(), 0.5)[1]
    expected = mmcv.ops.roi_align(single, rois, (3, 2))
    assert torch.equal(pooled, expected)
    assert kept.tolist() == [1, 2]
    pooled.sum().backward()
    expected.sum().backward()
    assert torch.equal(image.grad, single.grad.bfloat16())


def test_without_autocast_the_operators_of_mmcv_are_as_they_were() -> None:
    wrapper_of(nn.Linear(1, 1))
    image, rois = torch.randn(1, 2, 8, 9, dtype=torch.float64), torch.tensor([[0, 0.5, 1.25, 6.75, 7.5]]).double()
    assert mmcv.ops.roi_align(image, rois, (3, 2)).dtype == torch.float64


def test_it_is_a_name_of_mmdcn() -> None:
    assert isinstance(wrapper_of(nn.Linear(1, 1)), mmdcn.AmpOptimWrapper)
