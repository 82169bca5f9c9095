from doran_hf.callbacks import LayerMetricsCallback as LayerMetricsCallback
from doran_hf.config import DoranConfig as DoranConfig
from doran_hf.diagnostics import LayerState as LayerState
from doran_hf.diagnostics import factor_penalty as factor_penalty
from doran_hf.diagnostics import layer_states as layer_states
from doran_hf.diagnostics import tau_by_layer as tau_by_layer
from doran_hf.folding import save_folded as save_folded
from doran_hf.hotswap import hotswap_adapter as hotswap_adapter
from doran_hf.layer import DoranLayer as DoranLayer
from doran_hf.model import DoranModel as DoranModel
from doran_hf.peft_internals import DoranPeftType as DoranPeftType
from doran_hf.peft_internals import register as register
from doran_hf.precision import refresh as refresh
from doran_hf.precision import restore_start as restore_start
from doran_hf.weight_decay import exempt_from_decay as exempt_from_decay

__version__: str
