from doran_core import functional as functional
from doran_core.adaptation import adapt as adapt
from doran_core.adaptation import load as load
from doran_core.adapter import read_adapter as read_adapter
from doran_core.adapter import read_folded as read_folded
from doran_core.adapter import write_folded as write_folded
from doran_core.adapter import write_trainable as write_trainable
from doran_core.errors import DoranError as DoranError
from doran_core.handle import DoranHandle as DoranHandle
from doran_core.layers import DoranAdapter as DoranAdapter
from doran_core.layers import DoranConv2d as DoranConv2d
from doran_core.layers import DoranEmbedding as DoranEmbedding
from doran_core.layers import DoranLinear as DoranLinear
from doran_core.method.config import DoranConfig as DoranConfig
from doran_core.method.factors import FactorGenerator as FactorGenerator
from doran_core.method.factors import LayerSpec as LayerSpec
from doran_core.method.tau import Tau as Tau

__version__: str
