# SPDX-License-Identifier: Apache-2.0
"""The offset explorer, in a real browser."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import CHROMIUM, Page, browser
from torch import nn

import mmdcn
from mmdcn.visualization import SamplingRecorder
from mmdcn.visualization.drawing import Detection, Picture
from mmdcn.visualization.explorer import explorer_page

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason='no Chromium is installed')
SCALE = (2.0, 1.5)  # the network's input is larger than the image
DETECTIONS = [Detection(10, 5, 30, 25, 'tree', 0.9), Detection(50, 30, 59, 38, '<b>7', 0.4)]
FIRST, LAST = '#layers button:nth-child(1)', '#layers button:nth-child(2)'


@pytest.fixture(scope='module')
def recorder() -> SamplingRecorder:
    """Three layers at strides 2, 4 and 4; the second has two groups, the last no mask."""
    torch.manual_seed(0)
    model = nn.Sequential(
        mmdcn.DCNv2(3, 4, 3, stride=2, padding=1), mmdcn.DCNv2(4, 4, 3, stride=2, padding=1, deform_groups=2),
        mmdcn.DCN(4, 4, 3, padding=1),
    )  # fmt: skip
    for layer in model:
        nn.init.normal_(layer.conv_offset.weight, std=0.6)
    with torch.no_grad(), SamplingRecorder(model) as recorder:
        model(torch.randn(1, 3, 80, 96))
    return recorder


@pytest.fixture(scope='module')
def file(recorder: SamplingRecorder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp('explorer') / 'page.html'
    path.write_text(explorer_page(Picture(pixels, SCALE), recorder, DETECTIONS, 'Trees & </script>', 'DCNv2'))
    return path


@pytest.fixture(scope='module')
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp('profile')) as page:
        yield page


@pytest.fixture
def page(tab: Page, file: Path) -> Iterator[Page]:
    tab.messages.clear()
    tab.theme('light')
    tab.open(file.as_uri())
    yield tab
    assert tab.messages == []  # errors, warnings, requests over the network


def point_at(page: Page, y: float, x: float) -> None:
    """Move the mouse to a place of the image."""
    left, top, width, height = page.evaluate(
        '(r => [r.x, r.y, r.width, r.height])(at("photo").getBoundingClientRect())'
    )
    page.move_mouse(left + (x + 0.5) / 64 * width, top + (y + 0.5) / 40 * height)


def samples(page: Page) -> torch.Tensor:  # [N, 3]: y, x, opacity
    rows = page.evaluate(
        '[...at("samples").children].map(c => ["cy", "cx", "opacity"].map(n => Number(c.getAttribute(n))))'
    )
    return torch.tensor(rows).reshape(-1, 3)


def expected(
    recorder: SamplingRecorder, name: str, y: float, x: float, **how: int
) -> tuple[torch.Tensor, torch.Tensor]:
    picture = Picture(np.zeros((40, 64, 3), dtype=np.uint8), SCALE)
    places, weights = recorder.points(name, *picture.to_input(y, x), **how)
    return picture.from_input(places), weights


def test_it_opens_without_an_error_on_the_best_detection(page: Page) -> None:
    assert page.evaluate('document.title') == 'Offset explorer: Trees & </script>'
    assert page.evaluate('at("detections").children[1].textContent') == '<b>70.40'
    assert page.evaluate('document.querySelectorAll(".box").length') == 2
    assert page.evaluate('[state.y, state.x]') == [15, 20]
    assert len(samples(page)) == 9


def test_what_it_shows_under_the_pointer_is_what_the_layer_samples(page: Page, recorder: SamplingRecorder) -> None:
    page.click(FIRST)
    for y, x in ((7, 11), (33, 60)):
        before = page.screenshot()
        point_at(page, y, x)
        places, weights = expected(recorder, '0', y, x, depth=1)
        shown = samples(page)
        torch.testing.assert_close(shown[:, :2], places, rtol=0, atol=1e-2)
        torch.testing.assert_close(shown[:, 2], (weights / weights.max()).clamp(min=0.12), rtol=0, atol=0.02)
        assert page.screenshot() != before


@pytest.mark.parametrize('depth', [1, 2, 3])
def test_layers_are_followed_back_to_the_image(page: Page, recorder: SamplingRecorder, depth: int) -> None:
    page.click('#layers button:nth-child(3)')
    page.click(f'#depths button:nth-child({depth})')
    point_at(page, 20, 30)
    places, _ = expected(recorder, '2', 20, 30, depth=depth)
    shown = samples(page)[:, :2]
    assert shown.shape == (9**depth, 2)
    # At a tie between two positions, rounded offsets and float32 may choose either.
    close = (shown - places).abs().amax(1) < 0.02
    assert close.float().mean() > 0.98


def test_offset_groups_can_be_chosen(page: Page, recorder: SamplingRecorder) -> None:
    page.click(LAST)
    page.click('#groups button:nth-child(2)')
    point_at(page, 20, 30)
    places, _ = expected(recorder, '1', 20, 30, depth=1, group=1)
    torch.testing.assert_close(samples(page)[:, :2], places, rtol=0, atol=1e-2)
    page.click(FIRST)
    assert page.evaluate('at("groupbox").hidden')


def test_the_plain_grid_can_be_compared_and_hidden(page: Page) -> None:
    page.click(FIRST)
    point_at(page, 12, 16)
    corners = page.evaluate(
        '[...at("grid").children].map(r => Number(r.getAttribute("x")) + r.getAttribute("width") / 2)'
    )
    # The nearest position is on pixel 24 of the network's input; its taps step over single pixels there.
    x = [(pixel + 0.5) / 1.5 - 0.5 for pixel in (23, 24, 25)]
    assert corners == pytest.approx(x * 3, abs=1e-2)
    assert page.evaluate('at("moves").children.length') == 9
    page.click('#plain')
    assert page.evaluate('at("grid").children.length + at("moves").children.length') == 0


def test_the_keyboard_moves_the_place_and_chooses_layers_and_detections(page: Page) -> None:
    page.evaluate('at("stage").focus()')
    page.press('l')
    layer = page.evaluate('state.layer')
    y, x = page.evaluate('[state.y, state.x]')
    page.press('ArrowDown')
    page.press('ArrowLeft', modifiers=8)  # Shift
    stride = page.evaluate('data.layers[state.layer].stride')
    assert page.evaluate('[state.y, state.x]') == pytest.approx([y + stride[0], x - 1])
    page.press('2')
    assert len(samples(page)) == (81 if layer else 9)
    page.press('d')
    assert page.evaluate('[state.y, state.x]') == [34, 54.5]
    page.press('g')
    assert page.evaluate('at("grid").children.length') == 0


def test_a_finger_that_is_dragged_moves_the_place(page: Page, recorder: SamplingRecorder) -> None:
    page.click(FIRST)
    left, top, width, height = page.evaluate(
        '(r => [r.x, r.y, r.width, r.height])(at("photo").getBoundingClientRect())'
    )
    page.drag_finger((left + 0.2 * width, top + 0.2 * height), (left + 0.5 * width, top + 0.25 * height))
    y, x = page.evaluate('[state.y, state.x]')
    assert (y, x) == pytest.approx((9.5, 31.5), abs=0.1)
    places, _ = expected(recorder, '0', y, x, depth=1)
    torch.testing.assert_close(samples(page)[:, :2], places, rtol=0, atol=1e-2)


def test_text_is_readable_in_both_themes(page: Page) -> None:
    """The contrast of text and ground is at least 4.5, as WCAG 2.2 asks."""

    def luminance(colour: str) -> float:
        channels = [int(value) / 255 for value in colour[4:-1].split(',')]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    grounds = {}
    for theme in ('light', 'dark'):
        page.theme(theme)
        for text, ground in (('h1', 'body'), ('#subtitle', 'body'), ('dt', 'section'), ('[aria-pressed=true]',) * 2):
            colours = page.evaluate(
                f'[getComputedStyle(document.querySelector({text!r})).color, '
                f'getComputedStyle(document.querySelector({ground!r})).backgroundColor]'
            )
            dark, light = sorted(map(luminance, colours))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (theme, text)
        grounds[theme] = page.evaluate('getComputedStyle(document.body).backgroundColor')
    assert luminance(grounds['light']) > 0.8 > 0.05 > luminance(grounds['dark'])


def test_on_a_phone_nothing_is_wider_than_the_screen(page: Page) -> None:
    page.resize(390, 844, mobile=True)
    assert page.evaluate('document.documentElement.scrollWidth') == 390


def test_offsets_that_are_not_finite_are_left_out(recorder: SamplingRecorder, tab: Page, tmp_path: Path) -> None:
    model = nn.Sequential(mmdcn.DCN(3, 4, 3, padding=1))
    with torch.no_grad():
        model[0].conv_offset.bias[7] = float('nan')
        model[0].conv_offset.bias[0] = float('inf')
    with torch.no_grad(), SamplingRecorder(model) as broken:
        model(torch.zeros(1, 3, 12, 16))
    page = explorer_page(Picture(np.zeros((12, 16, 3), dtype=np.uint8)), broken, [], 'broken')
    (tmp_path / 'page.html').write_text(page)
    tab.messages.clear()
    tab.open((tmp_path / 'page.html').as_uri())
    assert len(samples(tab)) == 7
    assert tab.messages == []


def test_the_page_needs_no_other_file(file: Path) -> None:
    page = file.read_text()
    assert 'http' not in page.replace('http://www.w3.org/2000/svg', '')
    start = page.index('id="data">') + len('id="data">')
    assert json.loads(page[start : page.index('</script>', start)])['image'].startswith('data:image/jpeg;base64,')
