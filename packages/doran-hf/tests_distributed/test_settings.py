"""Settings of real users, one row each: right as one process is, or refused by a named error."""

from __future__ import annotations

import pytest
import torch
from devices import here
from models import Adaptation, adapted, probe, train
from processes import Pair, RemoteError
from strategies import Options, Spread
from test_matrix import EXACT, distances, relative_distances
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from doran_core.layers import DoranAdapter
from doran_core.method.shared_network import shared_networks

PENALTY = {"factor_penalty": 1.0}
MODEL_WIDE = {"sharing": "model"}

RIGHT: dict[str, tuple[Adaptation, Options]] = {
    "fsdp2, each Linear a unit": (Adaptation(), Options("fsdp2", units="linear")),
    "fsdp2, one unit": (Adaptation(), Options("fsdp2", units="root")),
    "fsdp2, kept after the forward": (Adaptation(), Options("fsdp2", reshard=False)),
    "fsdp2, accumulation": (Adaptation(), Options("fsdp2", accumulate=2)),
    "fsdp2, checkpointing": (Adaptation(checkpointing="plain"), Options("fsdp2")),
    "fsdp2, reentrant checkpointing": (Adaptation(checkpointing="reentrant"), Options("fsdp2")),
    "fsdp2, model-wide": (Adaptation(options=MODEL_WIDE), Options("fsdp2")),
    "fsdp2, model-wide, kept after the forward": (Adaptation(options=MODEL_WIDE), Options("fsdp2", reshard=False)),
    "fsdp2, model-wide, accumulation, checkpointing": (
        Adaptation(checkpointing="plain", options=MODEL_WIDE), Options("fsdp2", accumulate=2)
    ),
    "fsdp2, model-wide, each Linear a unit": (Adaptation(options=MODEL_WIDE), Options("fsdp2", units="linear")),
    "fsdp2, model-wide, shared output layers": (
        Adaptation(options={**MODEL_WIDE, "share_output": True}), Options("fsdp2")
    ),
    "fsdp2, penalty": (Adaptation(options=PENALTY), Options("fsdp2", penalty=True)),
    "fsdp1, one unit": (Adaptation(), Options("fsdp1", units="root")),
    "fsdp1, PEFT's wrapping policy": (Adaptation(), Options("fsdp1", units="peft")),
    "fsdp1, checkpointing": (Adaptation(checkpointing="plain"), Options("fsdp1")),
    "fsdp1, reentrant checkpointing": (Adaptation(checkpointing="reentrant"), Options("fsdp1")),
    "fsdp1, accumulation": (Adaptation(), Options("fsdp1", accumulate=2)),
    "fsdp1, kept after the forward": (Adaptation(), Options("fsdp1", reshard=False)),
    "ddp, penalty": (Adaptation(options=PENALTY), Options("ddp", penalty=True)),
    "ddp, checkpointing, model-wide": (Adaptation(checkpointing="plain", options=MODEL_WIDE), Options("ddp")),
    "ddp, reentrant checkpointing": (Adaptation(checkpointing="reentrant"), Options("ddp")),
    "ddp, reentrant checkpointing, static graph, model-wide": (
        Adaptation(checkpointing="reentrant", options=MODEL_WIDE), Options("ddp", static_graph=True)
    ),
    "ddp, checkpointing, penalty": (
        Adaptation(checkpointing="plain", options=PENALTY), Options("ddp", penalty=True)
    ),
    "zero2, accumulation": (Adaptation(), Options("zero2", accumulate=2)),
    "zero2, penalty": (Adaptation(options=PENALTY), Options("zero2", penalty=True)),
    "zero3, model-wide": (Adaptation(options=MODEL_WIDE), Options("zero3")),
    "zero3, penalty": (Adaptation(options=PENALTY), Options("zero3", penalty=True)),
    "zero3, checkpointing": (Adaptation(checkpointing="plain"), Options("zero3")),
    "zero3, accumulation": (Adaptation(), Options("zero3", accumulate=2)),
}  # fmt: skip


@pytest.mark.parametrize("method", ["core", "hf"])
@pytest.mark.parametrize("setting", RIGHT)
def test_it_is_one_process(pair: Pair, setting: str, method: str) -> None:
    how, options = RIGHT[setting]
    how = Adaptation(method, how.options, how.checkpointing)
    one = train(how, Options(accumulate=options.accumulate, penalty=options.penalty))
    found = distances(pair.run(train, how, options), one)
    assert max(found) < EXACT, found


def networks_first(how: Adaptation, options: Options) -> nn.Module:
    """The shared networks are units of their own, as docs/howto/scaling.md has it."""
    model = adapted(how)
    mesh = init_device_mesh(here().type, (2,))
    for network in shared_networks(model):
        fully_shard(network, mesh=mesh, reshard_after_forward=False)
    return model


@pytest.mark.parametrize("method", ["core", "hf"])
def test_fsdp2_with_networks_as_units_of_their_own(pair: Pair, method: str) -> None:
    how = Adaptation(method, MODEL_WIDE)
    found = distances(pair.run(train, how, Options("fsdp2"), None, networks_first), train(how, Options()))
    assert max(found) < EXACT, found


def adapters_in_float32(how: Adaptation, options: Options) -> nn.Module:
    """The adapters are units of their own without a policy, as docs/howto/scaling.md has it."""
    model = adapted(how)
    mesh = init_device_mesh(here().type, (2,))
    for module in model.modules():
        if isinstance(module, DoranAdapter):
            fully_shard(module, mesh=mesh)
    return model


def precisions(spreading: Spread) -> set[torch.dtype]:
    """Of the magnitudes during a pass."""
    seen: set[torch.dtype] = set()
    for module in spreading.inner.modules():
        if isinstance(module, DoranAdapter):
            module.register_forward_pre_hook(lambda adapter, args: seen.add(adapter.magnitude.dtype))
    probe(spreading)
    return seen


@pytest.mark.parametrize("method", ["core", "hf"])
def test_fsdp2_in_bf16_with_adapters_in_float32(pair: Pair, method: str) -> None:
    """What docs/howto/scaling.md says of it. Seen, of what training changes in the logits: 1.1% and 0.9%."""
    how, options = Adaptation(method), Options("fsdp2", bf16=True)
    assert pair.run(train, how, options, precisions) == [{torch.bfloat16}] * 2
    assert pair.run(train, how, options, precisions, adapters_in_float32) == [{torch.float32}] * 2
    one = train(how, Options())
    rounded = relative_distances(pair.run(train, how, options), one)
    whole = relative_distances(pair.run(train, how, options, None, adapters_in_float32), one)
    assert whole[1] < rounded[1], (whole, rounded)


REFUSED: dict[str, tuple[Adaptation, Options, str]] = {
    "fsdp1, penalty": (Adaptation(options=PENALTY), Options("fsdp1", penalty=True), "use FSDP2"),
    "fsdp1 NO_SHARD, model-wide": (Adaptation(options=MODEL_WIDE), Options("fsdp1", no_shard=True), "use FSDP2"),
    "fsdp1, model-wide": (Adaptation(options=MODEL_WIDE), Options("fsdp1"), "use FSDP2"),
    "ddp, reentrant checkpointing, model-wide": (
        Adaptation(checkpointing="reentrant", options=MODEL_WIDE), Options("ddp"), "use_reentrant=False"
    ),
    "ddp, reentrant checkpointing, penalty": (
        Adaptation(checkpointing="reentrant", options=PENALTY), Options("ddp", penalty=True), "static_graph=True"
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", ["core", "hf"])
@pytest.mark.parametrize("setting", REFUSED)
def test_it_is_refused_with_the_remedy(pair: Pair, setting: str, method: str) -> None:
    how, options, remedy = REFUSED[setting]
    with pytest.raises(RemoteError, match=remedy) as caught:
        pair.run(train, Adaptation(method, how.options, how.checkpointing), options)
    assert caught.value.kind == "TargetError"
