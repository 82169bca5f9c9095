"""The options of the method: one frozen, self-validating record with the same fields in memory and on disk."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeGuard, get_args, get_origin, get_type_hints

from doran_core.errors import ConfigError
from doran_core.support.patterns import check_ending, name_pattern, pattern_matches_ending

__all__ = ["ALL_LINEAR", "NOT_SAVED", "Activation", "DoranConfig", "is_number", "is_positive_int", "pattern_value"]

ALL_LINEAR = "all-linear"
"""Value of ``target_modules`` for every linear layer."""

Activation = Literal["leaky_relu", "relu", "gelu", "silu", "tanh", "identity"]

NOT_SAVED = frozenset({"generator_init"})
"""Options that only decide first values. An adapter's file has the trained values, and not these options."""

_LEAST_EMBEDDING = 16


@dataclass(frozen=True, kw_only=True)
class DoranConfig:
    """Every option of DoRAN. The paper (arXiv 2510.04331) gives no initial values or widths: the defaults are ours.

    Attributes:
        rank: r, rows of A.
        alpha: the low-rank update is scaled by ``g = alpha / rank``.
        use_rslora: ``g = alpha / sqrt(rank)`` instead (arXiv 2312.03732).
        rank_pattern: ranks of modules by regex; a regex matches the full name, or the part after a dot.
        alpha_pattern: alphas of modules, likewise.
        target_modules: names or name endings, one regex for the whole name, or "all-linear".
        exclude_modules: names or name endings, or one regex, of modules to leave out.
        modules_to_save: other modules trained in full and saved with the adapter, such as a classifier.
        dropout: dropout on the low-rank branch's input.
        norm_grad: "full" differentiates through the norm; "detached" does not, as DoRA.
        norm_method: "factored" never forms B A; "direct" does; "auto" is factored, and direct for the rows
            in which W0 + g B A nearly cancels (outside of torch.compile).
        tau_kind: "learned", "fixed", "zero" (DoRA's denominator) or "gaussian" (``|N(0, sigma^2)|`` in training,
            its mean at inference).
        tau_granularity: one tau per layer (paper), per head (needs ``head_dim``), per expert of stacked expert weights
            (elsewhere per layer), or per output row.
        tau_init: first value of tau, or of sigma for "gaussian".
        tau_init_relative: ``tau_init`` is in units of the mean row norm of W0.
        tau_learn_sigma: for "gaussian", learn sigma too.
        head_dim: output rows per head, for ``tau_granularity="head"``.
        factors: A and B "generated" by small networks (paper) or "static" parameters (LoRA's).
        sharing: embeddings and first layers shared by the adapted layers of a "block" (paper), by the whole
            "model" (then a learned embedding tells the blocks apart), or by none.
        share_output: share the last layer, W2, too, between layers of equal size.
        embedding_dim: e, width of the embeddings; None means the largest rank, and at least 16. The constructor
            replaces None by the number.
        hidden_dim: h, width of the hidden layers; None means the rank, the least that can express any A and B.
        depth: linear layers in a generator, the last included (paper: 2).
        activation: between the generator's layers (paper: leaky_relu).
        generator_init: first values of embeddings and hidden layers. With "identity" the features start close to the
            identity, so A and B start as in LoRA. "normal" draws from N(0, 1), the "old start" of the studies. Not
            saved with an adapter.
        block_pattern: a regex that finds the block in a module's name (its group 1, or the whole match); by default
            the name up to its last number, "model.layers.3" of "model.layers.3.self_attn.q_proj".
        factor_penalty: weight of the mean square of the generated factors, for the loss.
        experts: read B A as r rank-one experts with learned coefficients (MLAE, arXiv 2405.18897).
        expert_mask: in training, drop whole experts, or single elements of them, or nothing.
        expert_dropout: probability of the mask.
    """

    rank: int = 8
    alpha: float = 16.0
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    dropout: float = 0.0
    norm_grad: Literal["full", "detached"] = "full"
    norm_method: Literal["auto", "factored", "direct"] = "auto"
    tau_kind: Literal["learned", "fixed", "zero", "gaussian"] = "learned"
    tau_granularity: Literal["layer", "head", "expert", "row"] = "layer"
    tau_init: float = 0.1
    tau_init_relative: bool = True
    tau_learn_sigma: bool = False
    head_dim: int | None = None
    factors: Literal["generated", "static"] = "generated"
    sharing: Literal["block", "model", "none"] = "block"
    share_output: bool = False
    embedding_dim: int | None = None
    hidden_dim: int | None = None
    depth: int = 2
    activation: Activation = "leaky_relu"
    generator_init: Literal["identity", "normal"] = "identity"
    block_pattern: str | None = None
    factor_penalty: float = 0.0
    experts: bool = False
    expert_mask: Literal["none", "element", "expert"] = "none"
    expert_dropout: float = 0.0

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for entry in dataclasses.fields(self):
            if get_origin(hints[entry.name]) is Literal:
                self._require_choice(entry.name, get_args(hints[entry.name]))
            elif hints[entry.name] is bool and not isinstance(getattr(self, entry.name), bool):
                raise ConfigError(
                    f"DoranConfig.{entry.name}: expected true or false, got {getattr(self, entry.name)!r}"
                )
        for name in ("rank", "depth"):
            value = getattr(self, name)
            if not is_positive_int(value):
                raise ConfigError(f"DoranConfig.{name}: expected a positive integer, got {value!r}")
        for name in ("embedding_dim", "hidden_dim", "head_dim"):
            value = getattr(self, name)
            if value is not None and not is_positive_int(value):
                raise ConfigError(f"DoranConfig.{name}: expected a positive integer or None, got {value!r}")
        for name in ("dropout", "expert_dropout"):
            value = getattr(self, name)
            if not is_number(value) or not 0.0 <= value < 1.0:
                raise ConfigError(f"DoranConfig.{name}: expected a probability in [0, 1), got {value!r}")
        for name in ("tau_init", "factor_penalty"):
            value = getattr(self, name)
            if not is_number(value) or value < 0.0:
                raise ConfigError(f"DoranConfig.{name}: expected a number not below 0, got {value!r}")
        if not is_number(self.alpha):
            raise ConfigError(f"DoranConfig.alpha: expected a finite number, got {self.alpha!r}")
        for name, check in (("rank_pattern", is_positive_int), ("alpha_pattern", is_number)):
            self._require_pattern(name, check)
        if self.embedding_dim is None:
            widest = max([self.rank, *self.rank_pattern.values(), _LEAST_EMBEDDING])
            object.__setattr__(self, "embedding_dim", widest)
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            self._normalise_names(name, regex=name != "modules_to_save")
        if self.block_pattern is not None:
            _require_regex(self.block_pattern, "block_pattern")
        if self.expert_mask != "none" and not self.experts:
            raise ConfigError(f"DoranConfig.expert_mask={self.expert_mask!r} needs experts=True")
        if self.share_output and (self.factors == "static" or self.sharing == "none"):
            raise ConfigError(
                "DoranConfig.share_output=True needs generated factors and sharing 'block' or 'model', "
                f"got factors={self.factors!r}, sharing={self.sharing!r}"
            )

    def _require_choice(self, name: str, choices: tuple[object, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise ConfigError(f"DoranConfig.{name}: expected one of {list(choices)}, got {value!r}")

    def _normalise_names(self, name: str, *, regex: bool) -> None:
        """Copy any collection of names into a list. A string is a regex, where one is allowed."""
        value = getattr(self, name)
        if value is None or (isinstance(value, str) and regex):
            if isinstance(value, str) and value != ALL_LINEAR:
                _require_regex(value, name)
            return
        if not isinstance(value, list | tuple | set | frozenset) or not all(isinstance(n, str) and n for n in value):
            expected = "a regex or a list of names" if regex else "a list of names"
            raise ConfigError(f"DoranConfig.{name}: expected {expected}, got {value!r}")
        object.__setattr__(self, name, sorted(value) if isinstance(value, set | frozenset) else list(value))

    def _require_pattern(self, name: str, check: Any) -> None:
        value = getattr(self, name)
        if not isinstance(value, Mapping):
            raise ConfigError(f"DoranConfig.{name}: expected a mapping of name pattern to number, got {value!r}")
        for pattern, number in value.items():
            _require_regex(pattern, name, check_ending)
            if not check(number):
                expected = "a positive integer" if check is is_positive_int else "a finite number"
                raise ConfigError(f"DoranConfig.{name}[{pattern!r}]: expected {expected}, got {number!r}")
        object.__setattr__(self, name, dict(value))

    @property
    def embedding_width(self) -> int:
        """``embedding_dim`` as a number: the constructor has replaced None."""
        assert self.embedding_dim is not None
        return self.embedding_dim

    def rank_for(self, module: str) -> int:
        """The rank of the module of this name."""
        return int(pattern_value(self.rank_pattern, module, self.rank))

    def scaling_for(self, module: str) -> float:
        """g of the module of this name."""
        rank = self.rank_for(module)
        alpha = pattern_value(self.alpha_pattern, module, self.alpha)
        return float(alpha) / (math.sqrt(rank) if self.use_rslora else rank)

    def to_dict(self) -> dict[str, Any]:
        """The fields for a file, JSON-ready: all except those in :data:`NOT_SAVED`."""
        return {
            entry.name: dict(value) if isinstance(value := getattr(self, entry.name), Mapping) else value
            for entry in dataclasses.fields(self)
            if entry.name not in NOT_SAVED
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DoranConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            ConfigError: on an unknown field, naming it, or a bad value, naming field and value.
        """
        known = {entry.name for entry in dataclasses.fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise ConfigError(f"DoranConfig: unknown field(s) {unknown}; known fields are {sorted(known)}")
        return cls(**data)


_LARGEST = 2**31
"""Bound of sizes and depths: more than any model has, and less than overflows in torch."""


def is_positive_int(value: object) -> TypeGuard[int]:
    """Whether a value is a positive integer that can be a size."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < _LARGEST


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number that float64 can represent."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max if isinstance(value, int) else math.isfinite(value)


def _require_regex(pattern: object, name: str, check: Callable[[str], object] = name_pattern) -> None:
    if not isinstance(pattern, str):
        raise ConfigError(f"DoranConfig.{name}: expected a regular expression, got {pattern!r}")
    try:
        check(pattern)
    except ValueError as error:
        raise ConfigError(f"DoranConfig.{name}: {error}") from error


def pattern_value(patterns: Mapping[str, float], module: str, default: float) -> float:
    """The value of the first pattern that matches the name in full or after a dot, as in PEFT."""
    for pattern, value in patterns.items():
        if pattern_matches_ending(pattern, module):
            return value
    return default
