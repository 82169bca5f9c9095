"""The rule for vLLM releases, and what is said when there is no vLLM."""

from __future__ import annotations

import logging
from importlib import metadata

import pytest

from doran_core.errors import MissingDependencyError
from doran_serve import versions


@pytest.mark.parametrize("version", ["0.25.0", "0.25.1+cu130", "0.32.0"])
def test_checked_releases_are_used_silently(version: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        versions.check(version)
    assert not caplog.records


@pytest.mark.parametrize("version", ["0.28.1", "0.33.0", "1.0.0", "dev"])
def test_other_releases_warn_once(
    version: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "_warned", set())
    with caplog.at_level(logging.WARNING):
        versions.check(version)
        versions.check(version)
    assert [version in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize("version", ["0.24.9", "0.9.2"])
def test_older_releases_are_refused(version: str) -> None:
    with pytest.raises(versions.UnsupportedVllmError, match=rf"from 0.25 on .* but {version} is installed"):
        versions.check(version)


def test_without_vllm_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    with pytest.raises(MissingDependencyError, match=r"doran-serve\[cuda\].*doran-serve\[cpu\]"):
        versions.installed()


@pytest.mark.parametrize(
    ("torch", "torchvision", "refused"),
    [
        ("2.13.0+cpu", "0.28.0", True),
        ("2.13.0+cpu", "0.28.0+cpu", False),
        ("2.13.0+cpu", None, False),
        ("2.13.0", "0.28.0", False),
    ],
)
def test_companions_built_for_cuda_beside_a_cpu_torch(
    torch: str, torchvision: str | None, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = {"torch": torch} | ({} if torchvision is None else {"torchvision": torchvision})
    monkeypatch.setattr(metadata, "version", installed.__getitem__)
    monkeypatch.setattr(metadata, "distributions", lambda *, name: [name] if name in installed else [])
    if refused:
        with pytest.raises(versions.UnsupportedVllmError, match=r"pip uninstall -y torchvision$"):
            versions.check_companions()
    else:
        versions.check_companions()
