"""Every public name of doran-hf 0.1 is still there, as it was or as an alias."""

import importlib
import warnings

import pytest

NAMES = {
    "doran_hf": """
        DoranConfig DoranLayer DoranModel DoranPeftType LayerMetricsCallback LayerState factor_penalty
        hotswap_adapter layer_states register restore_start tau_by_layer
    """,
    "doran_hf.train": "DataConfig TrainConfig load_config train",
}
"""What the reference of 0.1 documented, by module. Add nothing; a name may go with a major version."""


@pytest.mark.parametrize("module", NAMES)
def test_every_name_of_0_1_is_still_there(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        missing = [name for name in NAMES[module].split() if not hasattr(importlib.import_module(module), name)]
    assert not missing
