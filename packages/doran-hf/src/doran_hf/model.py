"""DoranModel: the tuner that puts DoRAN layers into a model, on PEFT's tuner base."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from peft.config import PeftConfig
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, replicate_layers
from torch import Tensor, nn

from doran_core.adapter.schema import FORMAT_VERSION, created_by
from doran_core.adapter.validate import check_tensors
from doran_core.errors import ConfigError, MissingKeyError, TargetError, UnexpectedKeyError
from doran_core.kernels import prepare, unprepare
from doran_core.layers.modules import make_factor_builder
from doran_core.layers.statistics import forget_statistics, keep_statistics
from doran_core.layers.traced import share_blocks
from doran_core.layers.uncalled import pad_encoders, read_not_called, unpad_encoders
from doran_core.method.config import DoranConfig as CoreConfig
from doran_core.method.factors import FactorBuilder
from doran_core.support.names import plain_name
from doran_core.support.sharding import reshard
from doran_core.targets import matches, refuse_read, warn_unused_patterns
from doran_hf.base_check import base_fingerprint, base_ties, check_base, module_kinds, stored_experts, stored_names
from doran_hf.combine import add_weighted_adapter
from doran_hf.config import DoranConfig
from doran_hf.defaults import DEFAULT_TARGETS, fill_head_dim
from doran_hf.expert_layers import DoranExperts, DoranStack
from doran_hf.expert_share import warn_of_experts
from doran_hf.expert_targets import expand_parameters, routers_as_modules
from doran_hf.layer import DoranLayer, doran_layers, layer_class
from doran_hf.mixed_batch import adapter_per_row
from doran_hf.notices import before_merging, before_saving
from doran_hf.peft_internals import PREFIX, is_offloaded_and_unhooked
from doran_hf.penalty import PenaltyHook
from doran_hf.random_start import warn_random_start
from doran_hf.router_layers import RouterDoranLayer, is_router
from doran_hf.targets import check_exclusions, check_targets, expand_all_linear, fill_targets, refuse_saved
from doran_hf.untying import keep_untied

__all__ = ["DoranModel"]

_MARK = ".doran_adapter."
_FSDP1 = "_fsdp_wrapped_module."
"""FSDP1 puts this part into the names of wrapped parameters, and removes it from the names in state dicts."""


class _Plan(NamedTuple):
    """Shared data of the layers of an adapter that is being added; `read` are layers that the model reads without
    calling."""

    core: CoreConfig
    builder: FactorBuilder
    read: Mapping[str, str]


class DoranModel(BaseTuner):
    """Creates and manages DoRAN adapters in a model. ``get_peft_model`` and other PEFT functions create it; users
    rarely do.

    Arguments are those of every PEFT tuner: the model to adapt, a :class:`DoranConfig` or one per adapter name, and
    the adapter's name.

    Raises:
        TargetError: target modules that do not exist, or that DoRAN cannot adapt.
        BaseMismatchError: a loaded adapter was made for other base weights.
    """

    prefix: str = PREFIX
    tuner_layer_cls = DoranLayer
    target_module_mapping = DEFAULT_TARGETS

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Add one adapter to the model; see the base class for the arguments."""
        config = self.peft_config[adapter_name]
        is_new = config.created_by is None
        read = read_not_called(model) if is_new else {}  # a saved adapter is loaded unchanged
        asked = config.target_modules
        fill_targets(config, model)
        if state_dict is None:
            expand_parameters(config, model)
            expand_all_linear(config, model, read)
            routers_as_modules(config, model)
            check_targets(config, model)
            check_exclusions(config, model)
        warn_random_start(model, config.modules_to_save)
        fill_head_dim(config, model)
        core = config.core()
        # One builder for all layers of the adapter, because it keeps the sharing groups.
        self._plan = _Plan(core, make_factor_builder(core), read)
        try:
            with _patterns_hidden(config):
                super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
            warn_of_experts(model, asked)
            warn_unused_patterns(core, [layer.name for layer in doran_layers(model, adapter_name)])
            _check_adapter_name(model, adapter_name)
            check_base(model, adapter_name, config)
            pad_encoders(model, doran_layers(model))
            keep_statistics(model)
        except Exception:
            _withdraw(model, adapter_name)
            raise
        finally:
            del self._plan
        prepare(self)  # the tuner's forward calls the inner model's forward and so skips the inner model's hooks
        share_blocks(model)
        if config.factor_penalty > 0.0:
            PenaltyHook.attach(model)

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> Any:
        # PEFT decides, with the result of our matcher for this name in place of each pattern.
        key = plain_name(key)
        view = copy.copy(peft_config)
        view.target_modules = _resolved(peft_config.target_modules, key)
        view.exclude_modules = _resolved(peft_config.exclude_modules, key)
        view.modules_to_save = [re.escape(name) for name in peft_config.modules_to_save or []]
        return BaseTuner._check_target_module_exists(view, key)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "cat",
    ) -> None:
        """Add the weighted sum of adapters as one adapter; see :func:`doran_hf.combine.add_weighted_adapter`."""
        add_weighted_adapter(self, adapters, weights, adapter_name, combination_type)

    def _prepare_model(self, peft_config: DoranConfig, model: nn.Module) -> None:
        if not peft_config.layer_replication:
            return
        if not any(True for _ in doran_layers(model)):
            replicate_layers(model, peft_config.layer_replication)
            return
        there = [config.layer_replication for config in self.peft_config.values() if config is not peft_config]
        if peft_config.layer_replication not in there:
            raise ConfigError(
                f"DoranConfig.layer_replication={peft_config.layer_replication!r}: the model has adapters with "
                f"{there[0] if there else None!r} already; the first adapter decides which layers there are"
            )

    # Ties and their effect on modules_to_save are the same for every method.
    _add_modules_to_save_to_tie = LoraModel._add_modules_to_save_to_tie

    def _add_targets_to_tie(self, peft_config: DoranConfig, tied_weight_keys: list[str]) -> None:
        raise ConfigError(
            "DoranConfig.ensure_weight_tying: an embedding among target_modules cannot share its adapter with the "
            "output layer, whose norms are over the other axis; adapt one of them, or put it into modules_to_save"
        )

    def _create_and_replace(
        self,
        config: DoranConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        name = plain_name(current_key)
        if is_offloaded_and_unhooked(self.model, target):
            raise TargetError(
                f"{name}: its weight is offloaded, and PEFT has removed the hooks that load it; adapt the base with "
                "get_peft_model, then set_peft_model_state_dict(model, load_peft_weights(path))"
            )
        refuse_read(name, self._plan.read)
        refuse_saved(name, config)
        core, builder = self._plan.core, self._plan.builder
        if parameter_name is not None:
            self._adapt_parameter(config, adapter_name, target, target_name, parent, name)
            return
        layer = target if isinstance(target, DoranLayer) else _new_layer(target, name)
        layer.add(adapter_name, core, builder, inference_mode=config.inference_mode)
        if layer is target:
            return
        layer.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        self._replace_module(parent, target_name, layer, target)

    def _adapt_parameter(
        self,
        config: DoranConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        name: str,
    ) -> None:
        """Adapt one stacked parameter of `target`: an experts module, a DoranExperts, or a module inside one."""
        holder_name, _, parameter = name.rpartition(".")
        experts = next((module for module in (target, parent) if isinstance(module, DoranExperts)), None)
        if experts is None:
            experts = DoranExperts(target, holder_name)
        stack = experts.stack(parameter)
        stack.add(adapter_name, self._plan.core, self._plan.builder, inference_mode=config.inference_mode)
        stack.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        if experts not in (target, parent):
            self._replace_module(parent, target_name, experts, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's base class also copies the attribute `weight`, which fails for heads without one and for embeddings
        # with trained tokens; PEFT's LoRA does not copy it either. DoranLayer.add has moved the adapter to its device.
        setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT calls this around forward and generate, and takes adapter_names out of the arguments itself.
        if kwargs.get("adapter_names") is None:
            yield
            return
        known = {name for layer in doran_layers(self.model) for name in layer.doran_adapter}
        if any(isinstance(layer, DoranStack | RouterDoranLayer) for layer in doran_layers(self.model)):
            raise ConfigError(
                "adapter_names: an adapter of expert weights (target_parameters) or routers cannot be chosen for each "
                "row of a batch; call set_adapter, and pass batches of one adapter"
            )
        beams = kwargs.get("num_beams")
        with adapter_per_row(
            self.model,
            kwargs.get("adapter_names"),
            known,
            beams if isinstance(beams, int) else 1,
            DoranLayer,
        ):
            yield

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the model in place; see the base class for the arguments."""
        before_merging(self.model, adapter_names or self.active_adapters)
        reshard(self.model)
        super().merge_adapter(adapter_names, safe_merge)

    def unmerge_adapter(self) -> None:
        """Put every W0 back, bit for bit."""
        reshard(self.model)
        super().unmerge_adapter()

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            before_merging(self.model, adapter_names or self.active_adapters)
        PenaltyHook.detach(self.model)
        unprepare(self)
        model: nn.Module = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        unpad_encoders(model)
        forget_statistics(model)
        share_blocks(model)
        keep_untied(model)
        return model

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        # PEFT calls this first when it saves, with both model and configuration.
        if isinstance(config, DoranConfig):
            before_saving(model, adapter_name)
            config.record(
                format_version=FORMAT_VERSION,
                base_fingerprint=base_fingerprint(model, adapter_name),
                module_kinds=module_kinds(model, adapter_name),
                ties=base_ties(model),
                stored_names=stored_names(model, adapter_name),
                stored_experts=stored_experts(model, adapter_name),
                created_by=created_by().replace("doran-core", "doran-hf with doran-core"),
            )
        selected: dict[str, Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        # PEFT looks for modules under FSDP1's names. ZeRO-3's state dict has a shared network once for each layer that
        # holds it, but a file has it once.
        seen: set[int] = set()
        for name, tensor in _tensors_by_name(model, adapter_name).items():
            key = name.replace(_FSDP1, "")
            if id(tensor) in seen:
                selected.pop(key, None)
            elif key in state_dict:
                selected[key] = state_dict[key]
            seen.add(id(tensor))
        return selected

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # The name directly follows the container, at any depth of the parameter.
        key = plain_name(key)
        before, mark, after = key.rpartition(f"{_MARK}{adapter_name}.")
        if mark:
            return f"{before}{_MARK}{after}"
        return str(super()._remove_adapter_name_from_key(key, adapter_name))

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        state_dict = {plain_name(key): tensor for key, tensor in state_dict.items()}
        own = {key: tensor for key, tensor in state_dict.items() if _MARK in key}
        check_tensors(f"adapter {adapter_name!r}", own)
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        places = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        there = {plain_name(key): key for key, _ in places}
        remapped = {there.get(key, key): tensor for key, tensor in remapped.items()}
        held = _tensors_by_name(model, adapter_name)
        unknown = sorted(key for key in remapped if _MARK in key and key not in held)
        if unknown:
            raise UnexpectedKeyError(f"adapter {adapter_name!r}: no layer of this model has the tensor {unknown[0]!r}")
        # A shared network's tensors have one name per layer; a file has only one of these names.
        given = {id(held[key]) for key in remapped if key in held}
        missing = sorted(key for key, tensor in held.items() if id(tensor) not in given)
        if missing:
            raise MissingKeyError(
                f"adapter {adapter_name!r}: {len(missing)} tensors are missing, such as {missing[0]!r}"
            )
        # With low_cpu_mem_usage the model's tensors are on the meta device, and these replace them. In a safetensors
        # buffer they are unaligned, and sums would differ in the last bit from those of the saved model.
        replaced = {key for key, tensor in held.items() if tensor.is_meta}
        return {key: tensor.clone() if key in replaced else tensor for key, tensor in remapped.items()}


def _new_layer(target: nn.Module, name: str) -> DoranLayer:
    kind = RouterDoranLayer if is_router(target) else layer_class(target, name)
    return kind(target, name)


def _resolved(patterns: Any, key: str) -> Any:
    """A regex as a list of the names it matches; a list unchanged. PEFT's matcher backtracks, ours does not."""
    if not isinstance(patterns, str):
        return patterns
    return {key} if matches(key, patterns) else set()


@contextmanager
def _patterns_hidden(config: DoranConfig) -> Iterator[None]:
    """Skip a warning of PEFT whose matcher backtracks."""
    before = config.rank_pattern, config.alpha_pattern
    config.rank_pattern, config.alpha_pattern = {}, {}
    try:
        yield
    finally:
        config.rank_pattern, config.alpha_pattern = before


def _tensors_by_name(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """An adapter's tensors under all of their names in the model."""
    return {
        f"{name}{_MARK}{adapter_name}.{key}": tensor
        for name, layer in model.named_modules()
        if isinstance(layer, DoranLayer) and adapter_name in layer.doran_adapter
        for key, tensor in layer.adapter(adapter_name).state_dict(keep_vars=True).items()
    }


def _withdraw(model: nn.Module, adapter_name: str) -> None:
    """Remove a partially injected adapter, and the layers that were wrapped only for it."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, DoranLayer)]
    for name, layer in layers:
        if adapter_name in layer.doran_adapter:
            BaseTunerLayer.delete_adapter(layer, adapter_name)
        if not layer.doran_adapter and not isinstance(layer, DoranStack):
            model.set_submodule(name, layer.view.layer)
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, DoranExperts)]
    for name, experts in modules:
        if experts.drop_empty():
            model.set_submodule(name, experts.base_layer)


def _check_adapter_name(model: nn.Module, adapter_name: str) -> None:
    """Refuse adapter names that PEFT would confuse with parts of another adapter's keys."""
    for layer in doran_layers(model, adapter_name):
        parts = {part for key in layer.adapter(adapter_name).state_dict() for part in key.split(".")}
        if adapter_name in parts:
            raise ConfigError(f"adapter name {adapter_name!r} is the name of a part of every adapter; choose another")
