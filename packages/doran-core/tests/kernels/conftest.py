"""Which implementations can be tried here: torch anywhere, triton on a GPU or in Triton's interpreter."""

import cases
import pytest


@pytest.fixture(
    params=[pytest.param("torch", marks=pytest.mark.no_triton), pytest.param("triton", marks=cases.needs_triton)]
)
def implementation(request):
    return request.param


@pytest.fixture
def device():
    return cases.DEVICE
