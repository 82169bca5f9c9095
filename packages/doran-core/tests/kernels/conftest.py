"""Which implementations can be tried here: torch anywhere, triton on a GPU or in Triton's interpreter."""

import cases
import models
import pytest


@pytest.fixture(
    params=[pytest.param("torch", marks=pytest.mark.no_triton), pytest.param("triton", marks=cases.needs_triton)]
)
def implementation(request):
    return request.param


@pytest.fixture
def device():
    return cases.DEVICE


@pytest.fixture
def used_implementation(implementation, monkeypatch):
    """The implementation that models.gradients and models.outputs use."""
    monkeypatch.setattr(models, "BACKEND", implementation)
    monkeypatch.setattr(models.gradients, "__defaults__", (implementation, None))
    monkeypatch.setattr(models.outputs, "__defaults__", (implementation,))


@pytest.fixture
def alone(monkeypatch):
    """The calls in which a layer computed its weight side by itself."""
    calls = []
    compute = models.prepare_module.compute_alone
    monkeypatch.setattr(models.prepare_module, "compute_alone", lambda *args: calls.append(args) or compute(*args))
    return calls
