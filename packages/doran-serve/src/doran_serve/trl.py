"""TRL's rollouts with an adapter: each update sends vLLM the adapter's files, never the base weights.

TRL's own way merges the adapter, copies every weight to the engine, and unmerges. Here the engine keeps its base, also
a quantized one, and gets the adapter under a new version. Only this file uses names outside TRL's public interface. It
imports transformers, which vLLM brings, and neither TRL nor vLLM.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from transformers import TrainerCallback

from doran_core.errors import ConfigError, DoranError
from doran_serve.flags import served_rank
from doran_serve.live import reload_adapter
from doran_serve.publish import publish_adapter

if TYPE_CHECKING:

    class StockGeneration:
        """The part of TRL's `VLLMGeneration` that `_AdapterGeneration` relies on."""

        _llm_weights_sleeping: bool
        accelerator: Any
        enable_sleep_mode: bool
        llm: Any
        mode: str
        model: Any
        vllm_client: Any

        def _init_vllm(self) -> None: ...

    class StockEngine:
        """The part of `vllm.LLM` that `_PolicyEngine` relies on."""

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...
        def generate(self, *args: Any, **kwargs: Any) -> Any: ...
        def sleep(self, level: int = 1, **kwargs: Any) -> Any: ...
        def wake_up(self, tags: list[str] | None = None) -> Any: ...

    class StockTrainer:
        """The part of TRL's trainers that `_AdapterTrainer` relies on."""

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

else:
    StockGeneration = StockEngine = StockTrainer = object

__all__ = ["AdapterSync", "with_adapter_sync"]

Write = Callable[[Any, Path], object]


class AdapterSync(TrainerCallback):
    """Loads a policy's adapter into an engine: as a callback, at the start and after each optimizer step.

    For rollouts by an engine of your own (TRL's ``rollout_func``, another loop): pass :attr:`request` to its
    ``generate``. With TRL's own rollouts use :func:`with_adapter_sync`, which syncs when TRL would.

    Attributes:
        request: vLLM's LoRARequest for the present version; None before the first one, and for a server.

    Args:
        engine: ``vllm.LLM`` or its ``LLMEngine`` with ``enable_lora=True``; or the directory whose adapters a server
            serves (``doran serve BASE --adapters DIRECTORY``).
        write: writes a model's adapter to a directory: ``doran_hf.save_folded``; for a LoRA
            ``lambda model, directory: model.save_pretrained(directory)``. All processes call it.
        name: the policy's name, in the engine and in requests to the server.
    """

    def __init__(self, engine: Any, write: Write, name: str = "policy") -> None:
        self.request: Any = None
        self._engine, self._write, self._name = engine, write, name

    def load(self, model: Any) -> None:
        """Load the present adapter of a PeftModel. Requests in flight keep the version that they were sent with.

        Raises:
            DoranError: the adapter cannot be written or served, with the reason; the last version stays.
        """
        with tempfile.TemporaryDirectory(prefix="doran-policy-") as folder:
            adapter = Path(folder) / self._name
            self._write(model, adapter)
            if not isinstance(self._engine, str | Path):
                self.request = reload_adapter(self._engine, self._name, adapter)
            elif _is_first_process():
                publish_adapter(adapter, Path(self._engine) / self._name)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Load the policy for the first rollout."""
        self.load(kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Load the updated policy."""
        self.load(kwargs["model"])


def with_adapter_sync(
    trainer: type,
    write: Write,
    *,
    name: str = "policy",
    served: str | Path | None = None,
    engine_options: Mapping[str, Any] | None = None,
) -> type:
    """TRL's GRPOTrainer, or another trainer that rolls out with its VLLMGeneration, with rollouts by adapter.

    With ``vllm_mode="colocate"`` TRL's engine starts with ``enable_lora``, and sleeps at level 1: level 2 drops the
    base, and no later step here sends it again. With ``vllm_mode="server"`` the server is ``doran serve``. It needs no
    weight transfer: each version is published to the directory that it serves.

    Args:
        trainer: the trainer's class; it is not changed.
        write: see :class:`AdapterSync`.
        name: see :class:`AdapterSync`.
        served: with a server: the directory whose adapters it serves, as this machine sees it.
        engine_options: for the colocated ``vllm.LLM``, over TRL's own. ``max_lora_rank`` is the adapter's unless given.

    Returns:
        A subclass. It takes the same arguments, and raises ConfigError unless ``use_vllm`` is set, the model has an
        adapter, and, with a server, `served` is given.

    Raises:
        DoranError: `trainer` does not roll out with TRL's VLLMGeneration.
    """
    modules = [sys.modules[cls.__module__] for cls in trainer.__mro__]
    holders = [module for module in modules if hasattr(module, "VLLMGeneration")]
    if not holders:
        raise DoranError(f"{trainer.__qualname__}: does not roll out with TRL's VLLMGeneration (TRL 1.16 has it)")
    stock: type = holders[0].VLLMGeneration
    home = sys.modules[stock.__module__]
    sync = _Sync(write, name, None if served is None else Path(served), dict(engine_options or {}), home)
    generation = type("AdapterGeneration", (_AdapterGeneration, stock), {"doran": sync})
    namespace = {"doran_holders": holders, "doran_generation": generation, "__module__": trainer.__module__}
    return type(trainer.__name__, (_AdapterTrainer, trainer), namespace)


@dataclass(frozen=True)
class _Sync:
    """The arguments of `with_adapter_sync`; `home` is the module from which TRL takes its engine and its client."""

    write: Write
    name: str
    served: Path | None
    engine_options: dict[str, Any]
    home: Any


class _AdapterTrainer(StockTrainer):
    """Mixin over a trainer of TRL's: uses `doran_generation` instead of TRL's VLLMGeneration."""

    doran_holders: list[Any]
    doran_generation: type

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with contextlib.ExitStack() as stack:
            for holder in self.doran_holders:
                stack.enter_context(mock.patch.object(holder, "VLLMGeneration", self.doran_generation))
            super().__init__(*args, **kwargs)
        if not isinstance(getattr(self, "vllm_generation", None), self.doran_generation):
            raise ConfigError("with_adapter_sync: the trainer makes no rollouts with vLLM; set use_vllm=True")


class _AdapterGeneration(StockGeneration):
    """Mixin over TRL's `VLLMGeneration`."""

    doran: _Sync

    def _init_vllm(self) -> None:
        """Start TRL's engine with adapters enabled, or its client without a channel for weights."""
        if not hasattr(self.model, "peft_config"):
            raise ConfigError(f"with_adapter_sync: {type(self.model).__name__} has no adapter; give a peft_config")
        home = self.doran.home
        if self.mode == "server":
            if self.doran.served is None:
                raise ConfigError("with_adapter_sync: served: expected the directory whose adapters the server serves")
            client = type("AdapterClient", (_AdapterClient, home.VLLMClient), {})
            with mock.patch.object(home, "VLLMClient", client):
                super()._init_vllm()
            engine: Any = self.doran.served
        else:
            options = {"enable_lora": True, "max_lora_rank": served_rank(_rank(self.model))} | self.doran.engine_options
            policy_engine = type("PolicyEngine", (_PolicyEngine, home.LLM), {"doran_options": options})
            with mock.patch.object(home, "LLM", policy_engine):
                super()._init_vllm()
            engine = self.llm
        self._sync = AdapterSync(engine, self.doran.write, self.doran.name)

    def sync_weights(self) -> None:
        """Load the policy into the engine. TRL calls this before a rollout if the policy has changed."""
        if self.mode == "colocate" and self.enable_sleep_mode:
            self.llm.wake_up(tags=["weights"])
            self._llm_weights_sleeping = False
        self._sync.load(self.model)
        if self.mode == "colocate":
            self.llm.doran_request = self._sync.request
        elif self.accelerator.is_main_process:
            self.vllm_client.model = self.doran.name


class _PolicyEngine(StockEngine):
    """Mixin over `vllm.LLM`: every request is answered with the policy's adapter."""

    doran_options: dict[str, Any]
    doran_request: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **(kwargs | self.doran_options))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's method, with the policy's adapter by default."""
        return super().generate(*args, **{"lora_request": self.doran_request, **kwargs})

    def sleep(self, level: int = 1, **kwargs: Any) -> Any:
        """vLLM's method, at level 1 at most: the base moves to host memory and is not dropped."""
        return super().sleep(level=min(level, 1), **kwargs)


class _AdapterClient:
    """Mixin over TRL's `VLLMClient`."""

    def init_communicator(self, *args: Any, **kwargs: Any) -> None:
        """No channel for weights: the server reads the adapter's files."""


def _rank(model: Any) -> int:
    """The largest rank among a PeftModel's adapters."""
    ranks: list[int] = []
    for config in model.peft_config.values():
        ranks += [getattr(config, "rank", None) or config.r, *(getattr(config, "rank_pattern", None) or {}).values()]
    return max(ranks)


def _is_first_process() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
