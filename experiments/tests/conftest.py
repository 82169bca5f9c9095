"""What several tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from experiments.digits import pretrained_vit


def needs_a_folder(study: Path) -> bool:
    """Whether a study is trained on data that are not part of the repository."""
    return "/" in str(yaml.safe_load(study.read_text(encoding="utf-8")).get("model", ""))


@pytest.fixture(scope="session")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models with a ViT that has seen letters, not for as long as the studies' has."""
    folder = tmp_path_factory.mktemp("models")
    pretrained_vit(folder, steps=300)
    return folder
