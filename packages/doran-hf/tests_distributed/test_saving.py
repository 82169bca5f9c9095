"""Saving, fingerprint and merge of sharded models: the bytes of one process; FSDP2 merges in place and back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Adaptation, Block, adapted, batches, handle_of, loss_of, probe, train
from processes import Pair, RemoteError
from strategies import Options, Spread, spread

from doran_core.adapter import read_folded
from doran_core.layers import DoranAdapter
from doran_hf import save_folded


def save(spreading: Spread, folder: str) -> tuple[str | None, dict[str, str]]:
    """The fingerprint, and digests of the files of both forms."""
    handle = handle_of(spreading.inner)
    with spreading.whole() if spreading.options.strategy == "fsdp1" else nullcontext():
        for form in ("trainable", "folded"):
            handle.save(f"{folder}/{form}", form=form)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return handle.base_fingerprint(), {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
        }


def train_and_save(options: Options, folder: str) -> Any:
    return train(Adaptation(), options, lambda spreading: save(spreading, folder))


@pytest.mark.parametrize(
    "options",
    [
        Options("fsdp2", steps=0),
        Options("fsdp2", units="linear", steps=0),
        Options("fsdp1", steps=0),
        Options("zero3", steps=0),
    ],
    ids=["fsdp2", "fsdp2-linear", "fsdp1", "zero3"],
)
def test_the_files_are_those_of_one_process(pair: Pair, tmp_path: Path, options: Options) -> None:
    fingerprint, files = train_and_save(Options(steps=0), str(tmp_path / "one"))
    assert fingerprint is not None
    assert len(files) == 5
    found = pair.run(train_and_save, options, str(tmp_path / "two"))
    assert [part[0] for part in found] == [fingerprint, fingerprint]
    assert found[0][1] == files


def fold(options: Options, folder: str) -> Any:
    """The tensors that each process has for its own engine."""

    def run(spreading: Spread) -> dict[str, torch.Tensor]:
        place = f"{folder}/{torch.distributed.get_rank() if torch.distributed.is_initialized() else 'one'}"
        modules = read_folded(save_folded(spreading.inner, place)).modules
        return {f"{name}.{part}": getattr(m, part) for name, m in modules.items() for part in ("A", "B", "scale")}

    return train(Adaptation("hf"), options, run)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2", "zero3"])
def test_every_process_folds_the_policy_of_one_process(pair: Pair, tmp_path: Path, strategy: str) -> None:
    one = fold(Options(steps=3), str(tmp_path))
    assert any(float(tensor.abs().max()) > 0 for key, tensor in one.items() if key.endswith(".B"))
    for found in pair.run(fold, Options(strategy, steps=3), str(tmp_path)):
        torch.testing.assert_close(found, one, atol=1e-5, rtol=0)


def merge(options: Options, method: str = "core") -> Any:
    """Logits before, while merged, and after; and whether the sharded weights were others while merged, and after."""

    def run(spreading: Spread) -> tuple[list[torch.Tensor], list[bool]]:
        model = spreading.inner if method == "hf" else handle_of(spreading.inner)
        steps = [model.merge_adapter, model.unmerge_adapter] if method == "hf" else [model.merge, model.unmerge]
        logits, base = [probe(spreading)], base_weights(spreading)
        changed = []
        for step in steps:
            probe(spreading)  # leaves weights gathered where FSDP2 does not shard them again
            step()
            logits.append(probe(spreading))
            changed.append(any(not torch.equal(w, base[name]) for name, w in base_weights(spreading).items()))
        return logits, changed

    return train(Adaptation(method), options, run)


def only_merge(options: Options) -> Any:
    return train(Adaptation(), options, lambda spreading: handle_of(spreading.inner).merge())


def base_weights(spreading: Spread) -> dict[str, torch.Tensor]:
    state = spreading.model.state_dict().items()
    return {n: t.full_tensor() if hasattr(t, "full_tensor") else t.clone() for n, t in state if "base_layer" in n}


@pytest.mark.parametrize("method", ["core", "hf"])
@pytest.mark.parametrize(
    "options",
    [
        Options("fsdp2"),
        Options("fsdp2", units="linear"),
        Options("fsdp2", units="root"),
        Options("fsdp2", reshard=False),
    ],
    ids=["block", "linear", "root", "not resharded"],
)
def test_fsdp2_merges_in_place_and_back_to_the_bit(pair: Pair, options: Options, method: str) -> None:
    for (before, merged, after), changed in pair.run(merge, options, method):
        torch.testing.assert_close(merged, before, atol=1e-5, rtol=1e-5)
        assert not torch.equal(merged, before)  # another order of sums: W' was in use
        assert torch.equal(after, before)
        assert changed == [True, False]


@pytest.mark.parametrize(
    ("options", "remedy"), [(Options("fsdp1"), "summon_full_params"), (Options("zero3"), "GatheredParameters")],
    ids=["fsdp1", "zero3"],
)  # fmt: skip
def test_elsewhere_the_remedy_is_named(pair: Pair, options: Options, remedy: str) -> None:
    with pytest.raises(RemoteError, match=remedy) as caught:
        pair.run(only_merge, options)
    assert caught.value.kind == "TargetError"


def resume(how: Adaptation, options: Options) -> Any:
    """The trained parameters of four steps at once, and of two and two with a checkpoint between them."""
    from torch.distributed.checkpoint import state_dict as checkpoint

    rank = torch.distributed.get_rank()
    steps = batches(4, rank)

    def made(steps: list[Any], load: Callable[[Spread], None] | None = None) -> Spread:
        spreading = spread(adapted(how), options, Block)
        if load is not None:
            load(spreading)
        for step in steps:
            spreading.step(step, loss_of)
        return spreading

    half = made(steps[:2])
    whole = checkpoint.StateDictOptions(full_state_dict=True, cpu_offload=True)
    states = checkpoint.get_state_dict(half.model, half.optimizer, options=whole)
    model_state, optimizer_state = states if rank == 0 else ({}, {})

    def load(spreading: Spread) -> None:
        sent = checkpoint.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        checkpoint.set_model_state_dict(spreading.model, model_state, options=sent)
        checkpoint.set_optimizer_state_dict(spreading.model, spreading.optimizer, optimizer_state, options=sent)

    return made(steps).tensors(), made(steps[2:], load).tensors()


@pytest.mark.parametrize("sharing", ["block", "model"])
@pytest.mark.parametrize("method", ["core", "hf"])
def test_fsdp2_resumes_from_torchs_checkpoint(pair: Pair, method: str, sharing: str) -> None:
    """As Trainer resumes, loads its best model, and accelerate loads a state, from what rank 0 has read."""
    for at_once, resumed in pair.run(resume, Adaptation(method, {"sharing": sharing}), Options("fsdp2")):
        assert at_once.keys() == resumed.keys()
        assert all(torch.equal(at_once[name], resumed[name]) for name in at_once)


def load_another_base(how: Adaptation, options: Options) -> Any:
    """Logits before and after loading a base of 1.3 times the weights; norms taken by each pass; digests before it."""

    def run(spreading: Spread) -> tuple[list[torch.Tensor], list[int], list[list[bytes | None]]]:
        taken, reset_base = [], DoranAdapter.reset_base

        def counted(adapter: DoranAdapter, view: Any) -> None:
            taken.append(adapter)
            reset_base(adapter, view)

        logits, counts, digests = [], [], []
        layers = [layer for layer in spreading.inner.modules() if hasattr(layer, "whole_weight")]
        name = ["default"] if how.method == "hf" else []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DoranAdapter, "reset_base", counted)
            for is_loaded in (False, True, False):
                if is_loaded:
                    state = spreading.model.state_dict().items()
                    other = {name: t * 1.3 if name.endswith("base_layer.weight") else t for name, t in state}
                    spreading.model.load_state_dict(other)
                digests.append([layer.base_digest(*name) for layer in layers])
                logits.append(probe(spreading))
                counts.append(len(taken))
        return logits, counts, digests

    return train(how, options, run)


@pytest.mark.parametrize("units", ["block", "linear"])
@pytest.mark.parametrize("method", ["core", "hf"])
def test_fsdp2_takes_the_norms_of_a_loaded_base_once(pair: Pair, method: str, units: str) -> None:
    """Its parameters count no writes, and lie elsewhere in each pass."""
    logits, _, digests = load_another_base(Adaptation(method), Options(steps=3))
    assert (logits[0] - logits[1]).abs().max() > 1e-2
    assert digests[0] != digests[1]
    for found in pair.run(load_another_base, Adaptation(method), Options("fsdp2", steps=3, units=units)):
        torch.testing.assert_close(found[0], logits, atol=1e-5, rtol=0)
        assert found[1] == [0, 8, 8]
        assert found[2] == digests


def train_a_base_weight(options: Options) -> Any:
    """The trained parameters and the logits after five steps in which a base weight trains, too."""

    def make(how: Adaptation, options: Options) -> Any:
        model: Any = adapted(how)
        model.blocks[0].up.base_layer.weight.requires_grad_(True)
        return model

    return train(Adaptation(), options, None, make)


def test_fsdp2_sees_what_the_optimizer_writes_to_a_base_weight(pair: Pair) -> None:
    one = train_a_base_weight(Options(steps=5))
    for found in pair.run(train_a_base_weight, Options("fsdp2", steps=5)):
        torch.testing.assert_close(found.logits, one.logits, atol=1e-5, rtol=0)
