# SPDX-License-Identifier: Apache-2.0
import pytest
import torch


@pytest.fixture(params=['cpu', 'cuda'])
def device(request: pytest.FixtureRequest) -> str:
    """Each device that the operators run on."""
    if request.param == 'cuda' and not torch.cuda.is_available():
        pytest.skip('torch finds no CUDA device')
    return request.param
