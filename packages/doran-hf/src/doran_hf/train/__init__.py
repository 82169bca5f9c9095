"""`doran train` as a library: a configuration in, an adapter with metrics and a model card out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from doran_core.support.lazy import lazy_names

if TYPE_CHECKING:
    from doran_hf.train.config import DataConfig, TrainConfig, load_config
    from doran_hf.train.run import train

__all__ = ["DataConfig", "TrainConfig", "load_config", "train"]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(
        __name__, {"DataConfig": "config", "TrainConfig": "config", "load_config": "config", "train": "run"}
    )
