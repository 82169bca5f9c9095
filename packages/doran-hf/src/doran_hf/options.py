"""The options that users set in a DoranConfig, with their help texts. Imports neither PEFT nor torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from doran_core.method.config import Activation

__all__ = ["AdapterOptions"]


@dataclass
class AdapterOptions:
    """The fields that :class:`doran_hf.DoranConfig` adds to PEFT's; its docstring describes them."""

    rank: int = field(default=8, metadata={"help": "Rank of the update: rows of A."})
    alpha: float = field(default=16.0, metadata={"help": "The update is scaled by alpha / rank."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by alpha / sqrt(rank) instead."})
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Other ranks, by module name or regex."}
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Other alphas, by module name or regex."}
    )
    target_modules: str | list[str] | set[str] | None = field(
        default=None,
        metadata={"help": "Names or endings of modules to adapt, a regex, or 'all-linear'; default: query and value."},
    )
    exclude_modules: str | list[str] | set[str] | None = field(
        default=None, metadata={"help": "Names or endings of modules, or a regex, to leave out."}
    )
    target_parameters: list[str] | set[str] | None = field(
        default=None, metadata={"help": "Names or endings of stacked expert weights [experts, rows, columns] to adapt."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Other modules to train in full and save with the adapter."}
    )
    dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of the low-rank branch."})
    norm_grad: Literal["full", "detached"] = field(
        default="full", metadata={"help": "Gradient through the norm, or not, as in DoRA."}
    )
    norm_method: Literal["auto", "factored", "direct"] = field(
        default="auto", metadata={"help": "How the norm is computed."}
    )
    tau_kind: Literal["learned", "fixed", "zero", "gaussian"] = field(
        default="learned", metadata={"help": "Kind of tau; 'zero' is DoRA."}
    )
    tau_granularity: Literal["layer", "head", "expert", "row"] = field(
        default="layer", metadata={"help": "One tau per layer, head, expert or output row."}
    )
    tau_init: float = field(default=0.1, metadata={"help": "First value of tau, or of sigma."})
    tau_init_relative: bool = field(
        default=True, metadata={"help": "tau_init is in units of the mean row norm of the weight."}
    )
    tau_learn_sigma: bool = field(default=False, metadata={"help": "For tau_kind='gaussian': learn sigma."})
    head_dim: int | None = field(
        default=None, metadata={"help": "Output rows per head; default: from the model's configuration."}
    )
    factors: Literal["generated", "static"] = field(
        default="generated", metadata={"help": "A and B from small networks, or as parameters."}
    )
    sharing: Literal["block", "model", "none"] = field(
        default="block", metadata={"help": "Which layers share a network's first layers."}
    )
    share_output: bool = field(
        default=False, metadata={"help": "Share the networks' last layers between layers of equal size."}
    )
    embedding_dim: int | None = field(
        default=None, metadata={"help": "Width of the networks' embeddings; default: the largest rank, at least 16."}
    )
    hidden_dim: int | None = field(
        default=None, metadata={"help": "Width of the networks' hidden layers; default: the rank."}
    )
    depth: int = field(default=2, metadata={"help": "Linear layers of a network."})
    activation: Activation = field(default="leaky_relu", metadata={"help": "Between the networks' layers."})
    generator_init: Literal["identity", "normal"] = field(
        default="identity",
        metadata={"help": "How the networks start: with A and B as LoRA's, or ('normal') from N(0, 1)."},
    )
    block_pattern: str | None = field(default=None, metadata={"help": "Regex that finds the block in a module's name."})
    factor_penalty: float = field(
        default=0.0, metadata={"help": "Weight of the generated factors' mean square in the loss."}
    )
    experts: bool = field(
        default=False, metadata={"help": "Read B A as rank-one experts with learned coefficients (MLAE)."}
    )
    expert_mask: Literal["none", "element", "expert"] = field(
        default="none", metadata={"help": "What the mask drops in training."}
    )
    expert_dropout: float = field(default=0.0, metadata={"help": "Probability of the mask."})
    bias: Literal["none", "all", "doran_only"] = field(default="none", metadata={"help": "Which biases train."})
    layers_to_transform: int | list[int] | None = field(
        default=None, metadata={"help": "Indices of the blocks to adapt, with a list of target_modules."}
    )
    layers_pattern: str | list[str] | None = field(
        default=None, metadata={"help": "Name of the list of blocks, for layers_to_transform."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None,
        metadata={"help": "Tokens whose embeddings train, too: indices, or by name of the embedding module."},
    )
    layer_replication: list[list[int]] | None = field(
        default=None, metadata={"help": "Pairs [start, end] of layers from which to build the model first."}
    )
    ensure_weight_tying: bool = field(
        default=False, metadata={"help": "Keep embeddings in modules_to_save tied to the output layer."}
    )
