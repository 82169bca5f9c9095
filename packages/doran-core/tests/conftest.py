"""Shared by the tests: one seed each, and one thread, so that sums do not depend on the machine."""

import pytest
import torch


def pytest_configure(config):
    config.addinivalue_line("markers", "no_triton: tries the implementation in PyTorch; Triton has no part in it")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
