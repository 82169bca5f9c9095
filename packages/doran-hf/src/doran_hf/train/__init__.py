"""`doran train` as a library: a configuration in, an adapter with metrics and a model card out."""

from doran_hf.train.config import DataConfig, TrainConfig, load_config
from doran_hf.train.run import train

__all__ = ["DataConfig", "TrainConfig", "load_config", "train"]
