"""Shared by the tests: one seed each, and one thread, so that sums do not depend on the machine."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
