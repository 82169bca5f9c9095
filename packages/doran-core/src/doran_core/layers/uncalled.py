"""Layers whose weight a model reads without calling the layer: an adapter around one would have no effect."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from doran_core.layers.adapter import DoranAdapter
from doran_core.support.names import plain_modules

__all__ = ["READ_BY_CLASS", "pad_encoders", "read_not_called", "unpad_encoders", "warn_uncalled"]

_FUSED_SCAN = ("conv1d", "out_proj")

READ_BY_CLASS: dict[str, tuple[str, ...]] = {
    # State-space mixers. Their fused kernels, where installed, read the projections after the convolution, too.
    "BambaMixer": _FUSED_SCAN,
    "FalconH1Mixer": _FUSED_SCAN,
    "FalconMambaMixer": ("conv1d", "dt_proj", "out_proj", "x_proj"),
    "GraniteMoeHybridMambaLayer": _FUSED_SCAN,
    "JambaMambaMixer": ("conv1d", "dt_proj"),
    "Mamba2Mixer": _FUSED_SCAN,
    "MambaMixer": ("conv1d", "dt_proj", "out_proj", "x_proj"),
    "NemotronHMamba2Mixer": _FUSED_SCAN,
    "Zamba2MambaMixer": _FUSED_SCAN,
    "ZambaMambaMixer": ("conv1d",),
    # Linear attention and short convolutions.
    "Glm5NextTextLinearAttention": ("conv1d",),
    "InklingShortConvolution": ("conv1d",),
    "KimiLinearDeltaAttention": ("conv1d",),
    "Lfm2MoeShortConv": ("conv",),
    "Lfm2ShortConv": ("conv",),
    "OlmoHybridGatedDeltaNet": ("conv1d",),
    "Qwen3NextGatedDeltaNet": ("conv1d",),
    "Qwen3_5GatedDeltaNet": ("conv1d",),
    "Qwen3_5MoeGatedDeltaNet": ("conv1d",),
    "Qwen4ExpTextGatedDeltaNet": ("conv1d",),
    "RecurrentGemmaRecurrentBlock": ("conv_1d",),
    # Others.
    "ConditionalDetrMHAttentionMap": ("k_proj",),
    "DabDetrMHAttentionMap": ("k_linear",),
    "DetrMHAttentionMap": ("k_proj",),
    "Gemma3nTextAltUp": ("correction_coefs",),
    "LSHSelfAttention": ("query_key", "value"),
    "LayoutLMv2Encoder": ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"),
    "LayoutLMv3Encoder": ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"),
    "MaskFormerDetrMHAttentionMap": ("k_proj",),
    "MobileBertLMPredictionHead": ("decoder", "dense"),
    "NeoMMEForMaskedLM": ("unembedding_projection",),
    "PPDocLayoutV2ReadingOrderEncoder": ("rel_pos_bias",),
    "TDNNLayer": ("kernel",),
    "WavLMAttention": ("k_proj", "out_proj", "q_proj", "v_proj"),
}
"""By transformers class: linear layers and convolutions whose weight is read on at least one code path. doran-hf's
tests compare this table with transformers' sources."""


def read_not_called(model: nn.Module) -> dict[str, str]:
    """Layers of a model whose weight is read without calling the layer.

    Returns:
        For each name the reason, as the end of a sentence.
    """
    found: dict[str, str] = {}
    for place, parent in plain_modules(model).items():
        names = READ_BY_CLASS.get(type(parent).__name__, ())
        for name, child in parent.named_children():
            full = f"{place}.{name}" if place else name
            if isinstance(child, NonDynamicallyQuantizableLinear):
                found[full] = "nn.MultiheadAttention reads its weight"
            elif name in names:
                found[full] = f"{type(parent).__name__} reads its weight"
    return found | _stand_ins(model)


def _stand_ins(model: nn.Module) -> dict[str, str]:
    """The module "shared" of T5 and BART-like models: other embeddings use its weight and are called in its place."""
    embeddings = {name: module for name, module in plain_modules(model).items() if isinstance(module, nn.Embedding)}
    found = {}
    for name, module in embeddings.items():
        called = [other for other, its in embeddings.items() if its is not module and its.weight is module.weight]
        if name.rpartition(".")[2] == "shared" and called:
            found[name] = f"{' and '.join(called)} are called in its place"
    return found


def pad_encoders(model: nn.Module, adapted: Iterable[nn.Module]) -> None:
    """Make every nn.TransformerEncoder around adapted layers compute on padded tensors.

    At inference with a padding mask, the encoder passes nested tensors to its layers. Only PyTorch's fused layer
    accepts these, and the encoder's check for the fused layer does not notice adapters.
    """
    inside = {id(module) for module in adapted}
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and any(id(module) in inside for module in encoder.modules()):
            vars(encoder).setdefault(_NESTED, encoder.use_nested_tensor)
            encoder.use_nested_tensor = False


def unpad_encoders(model: nn.Module) -> None:
    """Undo :func:`pad_encoders`."""
    for encoder in model.modules():
        if _NESTED in vars(encoder):
            encoder.use_nested_tensor = vars(encoder).pop(_NESTED)


_NESTED = "use_nested_tensor_unadapted"


def warn_uncalled(adapters: Iterable[DoranAdapter], doing: str) -> None:
    """Warn once about adapted layers that no forward pass has called, if there were passes.

    Args:
        adapters: the adapters of a model.
        doing: the coming action, for the message: "merging still changes their weights".
    """
    all_of_them = list(adapters)
    uncalled = [adapter.spec.name for adapter in all_of_them if not adapter.called]
    if uncalled and len(uncalled) < len(all_of_them):
        shown = ", ".join(uncalled[:5]) + (", ..." if len(uncalled) > 5 else "")
        warnings.warn(
            f"{len(uncalled)} of {len(all_of_them)} adapted layers were never called ({shown}): the model does not "
            f"use them, or reads their weights past the adapters; {doing}",
            stacklevel=3,
        )
