from doran_hf.train.config import DataConfig as DataConfig
from doran_hf.train.config import TrainConfig as TrainConfig
from doran_hf.train.config import load_config as load_config
from doran_hf.train.run import train as train
