"""One training loop over every way of spreading a model over processes, with nothing of doran in it."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from devices import here
from torch import Tensor, nn

__all__ = ["STRATEGIES", "Options", "Spread", "spread"]

STRATEGIES = ("ddp", "fsdp1", "fsdp2", "zero2", "zero3")


@dataclass(frozen=True)
class Options:
    """How a model is spread.

    Attributes:
        strategy: one of STRATEGIES, or "single".
        bf16: the strategy's own mixed precision; for DDP and one process autocast.
        units: FSDP: "block", "linear" (every base Linear, too), "root" alone, or for FSDP1 "peft" (PEFT's policy).
        reshard: FSDP: free what was gathered after the forward pass.
        accumulate: micro-batches per step.
        steps: optimizer steps.
        penalty: add the factors' penalty to the loss.
        static_graph: DDP's.
    """

    strategy: str = "single"
    bf16: bool = False
    units: str = "block"
    reshard: bool = True
    no_shard: bool = False
    accumulate: int = 1
    steps: int = 10
    learning_rate: float = 1e-2
    penalty: bool = False
    static_graph: bool = False


class Spread:
    """A model that is spread: its steps and its whole tensors.

    Args:
        model: what is called.
        inner: the model as it was given.
        options: how.
        engine: DeepSpeed's, or None.
    """

    def __init__(self, model: Any, inner: nn.Module, options: Options, engine: Any = None) -> None:
        self.model, self.inner, self.options, self.engine = model, inner, options, engine
        self.optimizer = (
            None if engine is not None else torch.optim.AdamW(trained(inner), lr=options.learning_rate, eps=1e-3)
        )

    def step(self, batches: list[Any], loss_of: Callable[[Any, Any], Tensor]) -> float:
        """One optimizer step over its micro-batches; the mean loss."""
        total = 0.0
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            with self._micro_step(last):
                loss = loss_of(self.model, batch)
                total += float(loss.detach())
                if self.engine is not None:
                    self.engine.backward(loss)
                    self.engine.step()
                else:
                    (loss / len(batches)).backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return total / len(batches)

    @contextmanager
    def _micro_step(self, last: bool) -> Iterator[None]:
        kind, model = self.options.strategy, self.model
        if kind == "fsdp2":
            model.set_requires_gradient_sync(last)
        waiting = model.no_sync() if kind in ("ddp", "fsdp1") and not last else nullcontext()
        cast = self.options.bf16 and kind in ("single", "ddp")
        with waiting, torch.autocast(here().type, torch.bfloat16) if cast else nullcontext():
            yield

    @contextmanager
    def whole(self) -> Iterator[None]:
        """A context in which FSDP1's and ZeRO's parameters are whole."""
        if self.options.strategy == "fsdp1":
            from torch.distributed.fsdp import FullyShardedDataParallel

            with FullyShardedDataParallel.summon_full_params(self.model, writeback=False):
                yield
        elif self.options.strategy == "zero3":
            import deepspeed

            with deepspeed.zero.GatheredParameters(list(self.inner.parameters())):
                yield
        else:
            yield

    def tensors(self) -> dict[str, Tensor]:
        """The trained parameters by name, whole, float32, as this process sees them."""
        with self.whole(), torch.no_grad():
            found = {}
            for name, parameter in self.inner.named_parameters():
                if parameter.requires_grad:
                    value = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
                    found[plain_name(name)] = value.detach().float().cpu().clone()
            return found

    def close(self) -> None:
        """Give DeepSpeed's hooks back."""
        if self.engine is not None:
            self.engine.destroy()


def plain_name(name: str) -> str:
    """A parameter's name without what the wrappers put into it."""
    for mark in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
        name = name.replace(mark, "")
    return name


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def spread(model: nn.Module, options: Options, block: type[nn.Module]) -> Spread:
    """Spread a model over the process group.

    Args:
        model: whole, the same in each process.
        options: how.
        block: class of the blocks that are FSDP units.
    """
    return _SPREADERS[options.strategy](model, options, block)


def _single(model: nn.Module, options: Options, block: type[nn.Module]) -> Spread:
    return Spread(model, model, options)


def _ddp(model: nn.Module, options: Options, block: type[nn.Module]) -> Spread:
    return Spread(nn.parallel.DistributedDataParallel(model, static_graph=options.static_graph), model, options)


def _fsdp1(model: nn.Module, options: Options, block: type[nn.Module]) -> Spread:
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    policies: dict[str, Any] = {"block": ModuleWrapPolicy({block})}
    if options.units == "peft":
        from peft.utils.other import fsdp_auto_wrap_policy

        os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = block.__name__
        policies["peft"] = fsdp_auto_wrap_policy(model)
    sharding = ShardingStrategy.FULL_SHARD if options.reshard else ShardingStrategy.SHARD_GRAD_OP
    half = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if options.bf16 else None
    wrapped = FullyShardedDataParallel(
        model,
        sharding_strategy=ShardingStrategy.NO_SHARD if options.no_shard else sharding,
        auto_wrap_policy=policies.get(options.units),
        mixed_precision=half,
        use_orig_params=True,
        device_id=here(),
    )
    return Spread(wrapped, model, options)


def _fsdp2(model: nn.Module, options: Options, block: type[nn.Module]) -> Spread:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if options.bf16 else None
    shard = functools.partial(
        fully_shard,
        mesh=init_device_mesh(here().type, (2,)),
        reshard_after_forward=options.reshard,
        **({"mp_policy": half} if half else {}),
    )
    for module in list(model.modules()):
        if options.units == "linear" and type(module) is nn.Linear:
            shard(module)
    if options.units != "root":
        for module in list(model.modules()):
            if isinstance(module, block):
                shard(module)
    return Spread(shard(model), model, options)


def _zero(model: nn.Module, options: Options, block: type[nn.Module]) -> Spread:
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=trained(model),
        optimizer=torch.optim.AdamW(trained(model), lr=options.learning_rate, eps=1e-3),
        config=deepspeed_config(options),
    )
    return Spread(engine, model, options, engine)


def deepspeed_config(options: Options) -> dict[str, Any]:
    """ZeRO's configuration; every parameter is sharded, however small."""
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": options.accumulate,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": options.bf16},
        "zero_optimization": {"stage": int(options.strategy[-1]), "stage3_param_persistence_threshold": 0},
        "wall_clock_breakdown": False,
        "steps_per_print": 10**9,
    }


_SPREADERS = {"single": _single, "ddp": _ddp, "fsdp1": _fsdp1, "fsdp2": _fsdp2, "zero2": _zero, "zero3": _zero}
