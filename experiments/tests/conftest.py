"""What several tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.digits import pretrained_vit


@pytest.fixture(scope="session")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models with a ViT that has seen letters, not for as long as the studies' has."""
    folder = tmp_path_factory.mktemp("models")
    pretrained_vit(folder, steps=300)
    return folder
