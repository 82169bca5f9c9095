"""DoranConfig: the options of doran_core's method together with those that PEFT adds to every tuner."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.config import PeftConfig

from doran_core.adapter.digest import check_directory, seal_directory
from doran_core.adapter.fields import CONFIG_FIELDS, check_fields
from doran_core.adapter.schema import FORMAT_VERSION
from doran_core.errors import AdapterFormatError, ConfigError, FormatVersionError
from doran_core.files.jsonfile import read_json
from doran_core.files.opening import named_errors
from doran_core.method.config import ALL_LINEAR, NOT_SAVED
from doran_core.method.config import DoranConfig as CoreConfig
from doran_hf.options import AdapterOptions
from doran_hf.peft_internals import DoranPeftType
from doran_hf.tensor_file import require_safetensors

__all__ = ["DoranConfig"]

_CORE_FIELDS = {entry.name: entry for entry in dataclasses.fields(CoreConfig)}
_BIASES = ("none", "all", "doran_only")


@dataclass
class DoranConfig(AdapterOptions, PeftConfig):
    """Configuration of a DoRAN adapter for ``get_peft_model`` and everything else that takes a ``PeftConfig``.

    The fields of :class:`doran_core.DoranConfig` mean the same here and are described there; each field's metadata has
    a short help text. The others are PEFT's:

    Attributes:
        target_modules: names or name endings, one regex, "all-linear", or None for the query and value projections of
            the architectures that PEFT knows.
        bias: which biases train: "none", "all", or "doran_only" (those of the adapted layers).
        target_parameters: names or endings of stacked expert weights ``[experts, rows, columns]`` to adapt, such as
            "mlp.experts.gate_up_proj"; with ``target_modules=[]``, these alone.
        layers_to_transform: indices of the blocks to adapt, with a list of target_modules.
        layers_pattern: name of the list of blocks, for layers_to_transform.
        trainable_token_indices: tokens whose embeddings train, too; for the input embedding, or by module name.
        layer_replication: pairs ``[start, end]`` of layers from which to build the model, in order, before it is
            adapted. Copies share base weights and have their own adapters.
        ensure_weight_tying: an embedding in modules_to_save or trainable_token_indices stays tied to the output layer.
        fan_in_fan_out: accepted for compatibility with LoRA, and ignored: Conv1D is recognised.
        format_version: format version of the adapter file.
        created_by: the program that wrote it.
        base_fingerprint: fingerprint of the adapter's base weights. A base with another fingerprint is refused; None
            skips the check.
        module_kinds: kinds of the adapted layers that are not linear, written on saving for readers without the model.
        ties: each tied parameter of the base model and its source, likewise.
        stored_names: checkpoint names of parameters that transformers renames, likewise.
        stored_experts: checkpoint names of the single experts of stacked weights, likewise.
        tensors_digest, digest: digests of the saved files, to detect damage; written on saving and checked on loading.

    Raises:
        ConfigError: an invalid value; names field and value.
        FormatVersionError: an adapter_config.json of a newer format.
    """

    fan_in_fan_out: bool = field(default=False, metadata={"help": "Accepted as in LoRA, but ignored."})
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "Format of the adapter file; do not set."})
    created_by: str | None = field(default=None, metadata={"help": "Program that wrote the adapter; filled on saving."})
    base_fingerprint: str | None = field(
        default=None, metadata={"help": "Fingerprint of the adapter's base weights; filled on saving."}
    )
    module_kinds: dict[str, str] = field(
        default_factory=dict, metadata={"help": "Kinds of the adapted layers that are not linear; filled on saving."}
    )
    ties: dict[str, str] | None = field(
        default=None, metadata={"help": "Tied parameters of the base model with their sources; filled on saving."}
    )
    stored_names: dict[str, str] | None = field(
        default=None, metadata={"help": "Names of renamed parameters in the base's checkpoint; filled on saving."}
    )
    stored_experts: dict[str, list[str]] | None = field(
        default=None, metadata={"help": "Names of single experts' weights in the base's checkpoint; filled on saving."}
    )
    tensors_digest: str | None = field(default=None, metadata={"help": "Digest of the tensors; filled on saving."})
    digest: str | None = field(default=None, metadata={"help": "Digest of this configuration; filled on saving."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = DoranPeftType.DORAN
        _check_version(self.format_version)
        for name in ("target_modules", "exclude_modules", "target_parameters"):
            setattr(self, name, _names(name, getattr(self, name)))
        if isinstance(self.target_parameters, str):
            raise ConfigError(
                f"DoranConfig.target_parameters: expected a list of names, got {self.target_parameters!r}"
            )
        if self.target_modules == set() and not self.target_parameters:
            raise ConfigError("DoranConfig.target_modules: [] means target_parameters alone, and none are given")
        if self.bias not in _BIASES:
            raise ConfigError(f"DoranConfig.bias: expected one of {list(_BIASES)}, got {self.bias!r}")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ConfigError(
                f"DoranConfig.layers_to_transform={self.layers_to_transform!r} needs a list of target_modules, "
                f"got the string {self.target_modules!r}"
            )
        if self.layers_to_transform is not None and self.target_parameters:
            raise ConfigError(
                f"DoranConfig.layers_to_transform={self.layers_to_transform!r} is for target_modules; name the layers "
                "in target_parameters, such as 'layers.3.mlp.experts.down_proj'"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError(f"DoranConfig.layers_pattern={self.layers_pattern!r} needs layers_to_transform")
        _check_replication(self.layer_replication)
        _check_layer_lists(self.layers_pattern)
        for name in ("fan_in_fan_out", "ensure_weight_tying", "inference_mode"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"DoranConfig.{name}: expected true or false, got {getattr(self, name)!r}")
        if not isinstance(self.module_kinds, dict):
            raise ConfigError(f"DoranConfig.module_kinds: expected names and kinds, got {self.module_kinds!r}")
        self._saved_facts: dict[str, Any] = {}
        self.embedding_dim = self.core().embedding_dim

    def core(self) -> CoreConfig:
        """The method's part of this configuration, validated.

        Raises:
            ConfigError: naming field and value.
        """
        values: dict[str, Any] = {name: getattr(self, name) for name in _CORE_FIELDS}
        return CoreConfig(**{name: _listed(value) for name, value in values.items()})

    def record(self, **facts: Any) -> None:
        """Set the facts about the model that :meth:`to_dict`, and so saving, reports.

        Facts are not fields, because this object may configure another adapter for another base later.
        """
        self._saved_facts = facts

    def to_dict(self) -> dict[str, Any]:
        """The fields for a file: JSON-ready, with sorted name lists and the model's facts."""
        values: dict[str, Any] = super().to_dict() | self._saved_facts
        # doran_core refuses the first two; versions before target_parameters refuse the others
        for name in ("trainable_token_indices", "layer_replication", "target_parameters", "stored_experts"):
            if not values.get(name):
                values.pop(name, None)
        return {name: _listed(value) for name, value in values.items() if name not in NOT_SAVED}

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write adapter_config.json, with the digests of the adapter where its tensors are beside it."""
        super().save_pretrained(save_directory, **kwargs)
        seal_directory(Path(save_directory))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> DoranConfig:
        """Read a saved configuration. It must be complete, and the tensors beside it must be safetensors.

        Raises:
            MissingKeyError: the adapter has no safetensors file. PEFT would go on and load a pickle.
            AdapterFormatError: the configuration lacks a field, or has an unknown field or an invalid value.
        """
        name = str(pretrained_model_name_or_path)
        if is_local := Path(name, subfolder or "").is_dir():
            require_safetensors(name, subfolder)
        config: DoranConfig = super().from_pretrained(name, subfolder, **kwargs)
        if not is_local:
            with named_errors(name, AdapterFormatError):
                check_directory(require_safetensors(name, subfolder, **cls._split_kwargs(kwargs)[0]))
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str], **kwargs: Any) -> dict[str, Any]:
        """The fields of a saved configuration, checked as doran_core checks them.

        Raises:
            AdapterFormatError: names file and field. Missing fields get no defaults, which could compute another
                function.
            CorruptFileError: this file or the tensors beside it changed since they were saved.
        """
        path = Path(path_json_file)
        with named_errors(path, AdapterFormatError):
            fields = read_json(path)
            fields.pop("runtime_config", None)  # options of PEFT that mean nothing in a file
            if (method := fields.get("peft_type")) != DoranPeftType.DORAN:
                raise ConfigError(f"{path}: peft_type {method!r}, expected DORAN")
            _check_version(fields.get("format_version", FORMAT_VERSION))  # first: later formats may differ
            beside = {entry.name for entry in dataclasses.fields(cls)} - CONFIG_FIELDS - NOT_SAVED - {"format_version"}
            check_fields(str(path), fields.keys() - beside)
            cls(**fields)
            check_directory(path.parent)
        return fields

    @classmethod
    def from_lora(cls, lora: LoraConfig, **overrides: Any) -> DoranConfig:
        """Convert a LoRA or DoRA configuration: same modules, rank and scaling.

        Args:
            lora: with ``use_dora`` or without.
            overrides: any fields of DoranConfig, e.g. ``tau_kind="fixed"``.

        Raises:
            ConfigError: the LoRA configuration sets an option that DoRAN lacks; names the option.
        """
        values = {ours: getattr(lora, theirs) for theirs, ours in _FROM_LORA.items()}
        values["bias"] = "doran_only" if lora.bias == "lora_only" else lora.bias
        foreign = [
            f"{entry.name}={getattr(lora, entry.name)!r}"
            for entry in dataclasses.fields(lora)
            if entry.name not in _FROM_LORA and entry.name not in _LORA_WITHOUT_EFFECT and not _is_default(lora, entry)
        ]
        if foreign:
            raise ConfigError(f"DoranConfig.from_lora: DoRAN has no counterpart of {', '.join(foreign)}")
        return cls(**(values | overrides))


_FROM_LORA = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "target_modules",
    "target_parameters": "target_parameters",
    "exclude_modules": "exclude_modules",
    "modules_to_save": "modules_to_save",
    "use_rslora": "use_rslora",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "fan_in_fan_out": "fan_in_fan_out",
    "layers_to_transform": "layers_to_transform",
    "layers_pattern": "layers_pattern",
    "trainable_token_indices": "trainable_token_indices",
    "layer_replication": "layer_replication",
    "ensure_weight_tying": "ensure_weight_tying",
    "task_type": "task_type",
    "base_model_name_or_path": "base_model_name_or_path",
    "revision": "revision",
    "inference_mode": "inference_mode",
}
_LORA_WITHOUT_EFFECT = {"use_dora", "bias", "peft_type", "peft_version", "auto_mapping", "runtime_config"}


def _listed(value: Any) -> Any:
    """Sets as sorted lists, everything else as it is."""
    return sorted(value) if isinstance(value, set) else value


def _is_default(config: Any, entry: dataclasses.Field[Any]) -> bool:
    value = getattr(config, entry.name)
    if entry.default_factory is not dataclasses.MISSING:
        return bool(value == entry.default_factory())
    return bool(value == entry.default) or not value


def _check_version(version: object) -> None:
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise FormatVersionError(f"DoranConfig.format_version: {version!r}, expected an integer up to {FORMAT_VERSION}")
    if version > FORMAT_VERSION:
        raise FormatVersionError(
            f"this adapter has format_version {version}, newer than {FORMAT_VERSION}, the last one that the installed "
            "doran-core reads; upgrade doran-core and doran-hf"
        )


def _check_replication(pairs: object) -> None:
    valid = pairs is None or (
        isinstance(pairs, list | tuple)
        and len(pairs) > 0
        and all(isinstance(pair, list | tuple) and len(pair) == 2 and 0 <= pair[0] < pair[1] for pair in pairs)
    )
    if not valid:
        raise ConfigError(
            f"DoranConfig.layer_replication: expected pairs [start, end] of layers with 0 <= start < end, got {pairs!r}"
        )


def _check_layer_lists(names: object) -> None:
    """PEFT inserts these names into a regular expression."""
    given = [names] if isinstance(names, str) else names or []
    if not isinstance(given, list) or not all(isinstance(name, str) and _LIST_NAME.fullmatch(name) for name in given):
        raise ConfigError(f"DoranConfig.layers_pattern: expected names of lists of layers, got {names!r}")


_LIST_NAME = re.compile(r"[\w.]*")


def _names(field_name: str, value: object) -> str | set[str] | None:
    """Module names in PEFT's types: a set, a string, or None."""
    if value is None or isinstance(value, str):
        return ALL_LINEAR if isinstance(value, str) and value.lower() == ALL_LINEAR else value
    if isinstance(value, Mapping) or not isinstance(value, list | tuple | set | frozenset):
        raise ConfigError(f"DoranConfig.{field_name}: expected a list of names, a string or None, got {value!r}")
    if not value and field_name in ("target_modules", "target_parameters"):
        return set()
    if not value or not all(isinstance(name, str) and name for name in value):
        raise ConfigError(f"DoranConfig.{field_name}: expected a list of non-empty names, got {value!r}")
    return set(value)
