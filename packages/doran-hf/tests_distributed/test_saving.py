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


def merge(options: Options) -> Any:
    def run(spreading: Spread) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        handle, before = handle_of(spreading.inner), probe(spreading)
        handle.merge()
        merged = probe(spreading)
        handle.unmerge()
        return before, merged, probe(spreading)

    return train(Adaptation(), options, run)


@pytest.mark.parametrize("units", ["block", "linear"])
def test_fsdp2_merges_in_place_and_back_to_the_bit(pair: Pair, units: str) -> None:
    for before, merged, after in pair.run(merge, Options("fsdp2", units=units)):
        torch.testing.assert_close(merged, before, atol=1e-5, rtol=1e-5)
        assert not torch.equal(merged, before)  # another order of sums: W' was in use
        assert torch.equal(after, before)


@pytest.mark.parametrize(
    ("options", "remedy"), [(Options("fsdp1"), "summon_full_params"), (Options("zero3"), "GatheredParameters")],
    ids=["fsdp1", "zero3"],
)  # fmt: skip
def test_elsewhere_the_remedy_is_named(pair: Pair, options: Options, remedy: str) -> None:
    with pytest.raises(RemoteError, match=remedy) as caught:
        pair.run(merge, options)
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
    """Logits before and after loading a base of 1.3 times the weights, and how many norms each of the passes took."""

    def run(spreading: Spread) -> tuple[list[torch.Tensor], list[int]]:
        taken, reset_base = [], DoranAdapter.reset_base

        def counted(adapter: DoranAdapter, view: Any) -> None:
            taken.append(adapter)
            reset_base(adapter, view)

        logits, counts = [], []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DoranAdapter, "reset_base", counted)
            for is_loaded in (False, True, False):
                if is_loaded:
                    state = spreading.model.state_dict().items()
                    other = {name: t * 1.3 if name.endswith("base_layer.weight") else t for name, t in state}
                    spreading.model.load_state_dict(other)
                logits.append(probe(spreading))
                counts.append(len(taken))
        return logits, counts

    return train(how, options, run)


@pytest.mark.parametrize("method", ["core", "hf"])
def test_fsdp2_takes_the_norms_of_a_loaded_base_once(pair: Pair, method: str) -> None:
    """Its parameters count no writes, and lie elsewhere in each pass."""
    logits, _ = load_another_base(Adaptation(method), Options(steps=3))
    assert (logits[0] - logits[1]).abs().max() > 1e-2
    for found, counts in pair.run(load_another_base, Adaptation(method), Options("fsdp2", steps=3)):
        torch.testing.assert_close(found, logits, atol=1e-5, rtol=0)
        assert counts == [0, 8, 8]
