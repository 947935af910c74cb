# SPDX-License-Identifier: Apache-2.0
"""mmdcn.ops.deform_conv2d on calls that nobody thought of; tests/fuzz_deform_conv2d.py draws as many as one likes."""

import pytest

pytest.importorskip('hypothesis')

from fuzz_deform_conv2d import fuzz


@pytest.mark.usefixtures('one_thread')
def test_drawn_calls_agree_with_the_reference_and_every_peer() -> None:
    """A peer skips what it cannot run."""
    tally = fuzz(count=300, number=0)
    print(tally)
    assert tally.cases >= 300


@pytest.mark.mmcv_ops
@pytest.mark.usefixtures('one_thread')
def test_drawn_calls_agree_with_mmcv() -> None:
    assert fuzz(count=100, number=1).answered['mmcv, float64'] > 10
