"""Every public name of doran-core 0.1 is still there, as it was or as an alias (adapter/test_former_names.py)."""

import importlib
import warnings

import pytest

NAMES = {
    "doran_core": """
        DoranAdapter DoranConfig DoranConv2d DoranEmbedding DoranError DoranHandle DoranLinear FactorGenerator
        LayerSpec Tau adapt functional load read_adapter read_compiled write_compiled write_trainable
    """,
    "doran_core.functional": """
        CANCELLATION_THRESHOLD accumulation_dtype adapted_linear adapted_output aligned_product
        aligned_row_norm base_product base_squared_norm cancelled_rows direction factored_row_norm
        merged_weight output_scale per_row row_norm scaled_factor wide_product wide_transposed_product
    """,
    "doran_core.layers": """
        BaseView DoranAdapter DoranConv DoranConv2d DoranEmbedding DoranLayer DoranLinear WeightSwap base_view
        build_adapters is_adaptable is_linear wrap
    """,
    "doran_core.adapter": """
        AnyAdapter CompiledAdapter CompiledModule PeftAdapter PeftModule TrainableAdapter read_adapter
        read_compiled write_compiled write_peft_dora write_trainable
    """,
    "doran_core.convert": "compile_adapter from_peft to_peft_dora",
    "doran_core.merge": "merge_checkpoint",
    "doran_core.diagnostics": """
        AdapterReport GradientProbe GradientSplit LayerReport LayerSimilarity ProbedLayer delta_similarity
        effective_rank factor_similarity gradient_split inspect_adapter singular_values
    """,
    "doran_core.kernels": "Backend get_backend set_backend use_backend",
    "doran_core.errors": """
        AdapterFormatError BackendError BaseMismatchError CheckFailedError CheckpointError ConfigError
        CorruptFileError DoranError FormatVersionError MissingDependencyError MissingKeyError NonFiniteError
        RankError TargetError TensorDtypeError TensorShapeError UnexpectedKeyError require
    """,
    "doran_core.config": "ALL_LINEAR Activation DoranConfig",
    "doran_core.factors": """
        FactorBuilder FactorGenerator FactorTrunk GeneratedFactors LayerSpec StaticFactors factor_penalty
    """,
    "doran_core.tau": "Tau tau_size",
}
"""What the reference of 0.1 documented, by module. Add nothing; a name may go with a major version."""


@pytest.mark.parametrize("module", NAMES)
def test_every_name_of_0_1_is_still_there(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        missing = [name for name in NAMES[module].split() if not hasattr(importlib.import_module(module), name)]
    assert not missing
