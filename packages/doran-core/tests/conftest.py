"""Shared by the tests: one seed each, and one thread, so that sums do not depend on the machine."""

import subprocess

import pytest
import torch


def pytest_configure(config):
    config.addinivalue_line("markers", "no_triton: tries the implementation in PyTorch; Triton has no part in it")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def small_disk(tmp_path, request):
    """A file system of its own: 64 kB, or the kB of an indirect parameter."""
    place = tmp_path / "disk"
    place.mkdir()
    size = f"size={getattr(request, 'param', 64)}k"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "doran-test", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)
