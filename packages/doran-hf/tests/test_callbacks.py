"""The layer metrics: against numbers computed apart, in the file, and in what the Trainer reports to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import disturb, make_inputs, make_llama
from peft import get_peft_model
from test_training import Sentences, adapted, arguments
from transformers import Trainer, TrainerCallback

from doran_core.diagnostics import GradientProbe
from doran_core.errors import CheckpointError, ConfigError
from doran_hf import DoranConfig, LayerMetricsCallback, factor_penalty, layer_states, restore_start, tau_by_layer
from doran_hf.diagnostics import LayerState, probed_layers
from doran_hf.layer import doran_layers
from doran_hf.layer_table import read_states, write_states
from doran_hf.plot import plot_states


def test_layer_states_are_those_of_the_formulas() -> None:
    model = get_peft_model(make_llama(), DoranConfig(rank=4, target_modules="all-linear", tau_granularity="row"))
    disturb(model)
    states = {state.layer: state for state in layer_states(model, step=3)}
    for layer in doran_layers(model):
        adapter, state = layer.adapter("default"), states[layer.name]
        with torch.no_grad():
            A, B = (factor.double() for factor in adapter.factors())
            tau = torch.nn.functional.softplus(adapter.tau.raw.double())
            update = adapter.scaling * B @ A
            norm = (layer.get_base_layer().weight.double() + update).norm(dim=1)
            shares = torch.linalg.svdvals(update)[:4]
            shares = shares / shares.sum()
        assert state.step == 3
        assert state.tau == pytest.approx(tau.mean().item(), rel=1e-5)
        assert state.norm == pytest.approx(norm.mean().item(), rel=1e-5)
        assert state.scale == pytest.approx((adapter.magnitude.double() / (norm + tau)).mean().item(), rel=1e-5)
        assert state.effective_rank == pytest.approx((-(shares * shares.log()).sum()).exp().item(), rel=1e-4)
        assert state.gradient_parallel is None


def test_the_gradient_is_that_of_the_weight() -> None:
    model = get_peft_model(make_llama(), DoranConfig(rank=4, target_modules="all-linear"))
    disturb(model)
    ids = make_inputs("llama")["input_ids"]
    with GradientProbe(probed_layers(model), first_pass_only=True) as probe:
        model.train()(input_ids=ids, labels=ids).loss.backward()
    merged = model.merge_and_unload()
    for parameter in merged.parameters():
        parameter.requires_grad_(True)
    merged(input_ids=ids, labels=ids).loss.backward()
    assert len(probe.splits()) == 21
    for name, split in probe.splits().items():
        gradient = merged.get_submodule(name).weight.grad.double()
        total = (split.orthogonal**2 + split.parallel**2) ** 0.5
        assert total == pytest.approx(gradient.norm().item(), rel=1e-3), name
        along = (gradient * torch.nn.functional.normalize(merged.get_submodule(name).weight.double())).sum(1)
        assert split.parallel == pytest.approx(along.norm().item(), rel=1e-3), name


def train(folder: Path, callback: LayerMetricsCallback, attach: bool, **options: Any) -> Trainer:
    trainer = Trainer(
        model=adapted(target_modules="all-linear"),
        args=arguments(folder, **options),
        train_dataset=Sentences(),
        callbacks=None if attach else [callback],
    )
    if attach:
        callback.attach(trainer)
    trainer.train()
    return trainer


def test_history_and_file(tmp_path: Path) -> None:
    callback = LayerMetricsCallback(tmp_path / "layers.parquet")
    trainer = train(tmp_path, callback, attach=False, logging_steps=2, max_steps=5)
    assert sorted({state.step for state in callback.states}) == [0, 2, 4, 5]
    assert read_states(tmp_path / "layers.parquet") == callback.states
    last = {state.layer: state for state in callback.states if state.step == 5}
    assert {name: state.tau for name, state in last.items()} == pytest.approx(
        {name: float(tau.mean()) for name, tau in tau_by_layer(trainer.model).items()}
    )
    logged = [state for state in callback.states if state.step in (2, 4)]
    assert all(state.gradient_orthogonal > 0 and state.gradient_parallel > 0 for state in logged)  # type: ignore[operator]
    assert all(0 < state.gradient_parallel_kept < state.gradient_parallel for state in logged)  # type: ignore[operator]
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(entry["tau_min"] <= entry["tau_mean"] <= entry["tau_max"] for entry in history)


@pytest.mark.parametrize("checkpointing", [{}, {"use_reentrant": True}, {"use_reentrant": False}], ids=str)
def test_gradients_are_seen_with_checkpointing_and_accumulation(checkpointing: dict[str, bool], tmp_path: Path) -> None:
    options: dict[str, Any] = {"gradient_accumulation_steps": 2, "max_steps": 1}
    if checkpointing:
        options |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": checkpointing}
    callback = LayerMetricsCallback()
    train(tmp_path, callback, attach=False, **options)
    found = [state for state in callback.states if state.step == 1]
    assert len(found) == 21
    assert all(state.gradient_orthogonal for state in found)


def test_those_that_report_see_every_layer_and_those_that_print_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    printed: list[str] = []

    class Listens(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            printed.extend(logs)

    trainer = Trainer(
        model=adapted(),
        args=arguments(tmp_path, max_steps=3, report_to=["tensorboard"]),
        train_dataset=Sentences(),
    )
    LayerMetricsCallback().attach(trainer)
    trainer.add_callback(Listens())
    trainer.train()
    (events,) = {file.parent for file in tmp_path.rglob("events.out.*")}
    scalars = EventAccumulator(str(events)).Reload().Tags()["scalars"]
    for measure in ("tau", "norm", "scale", "effective_rank", "gradient_orthogonal", "gradient_parallel_kept"):
        found = [name for name in scalars if f"doran/{measure}/" in name]
        assert len(found) == 6, measure
    assert not any(name.startswith("doran/") for name in printed)
    assert "loss" in printed


def test_a_resumed_training_goes_on_with_the_file(tmp_path: Path) -> None:
    def run(checkpoint: str | None) -> list[LayerState]:
        callback = LayerMetricsCallback(tmp_path / "layers.parquet")
        trainer = Trainer(
            model=adapted(),
            args=arguments(tmp_path, max_steps=8, save_strategy="steps", save_steps=4),
            train_dataset=Sentences(),
            callbacks=[callback],
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        return read_states(tmp_path / "layers.parquet")

    whole = run(None)
    assert run(str(tmp_path / "checkpoint-4")) == whole


def test_a_second_training_replaces_the_rows_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "layers.parquet"
    callback = LayerMetricsCallback(file)
    long = train(tmp_path, callback, True, max_steps=8, logging_steps=1)
    assert {row.step for row in read_states(file)} == set(range(9))
    long.args.max_steps = 3
    long.train()
    assert read_states(file) == callback.states
    assert {row.step for row in callback.states} == set(range(4))


@pytest.mark.parametrize(
    "look", [tau_by_layer, factor_penalty, restore_start, lambda *a: layer_states(a[0], 0, None, *a[1:])]
)
def test_adapters_that_are_not_there_are_named(look: Any) -> None:
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no DoRAN adapter"):
        look(make_llama())
    model = get_peft_model(make_llama(), DoranConfig(rank=4, target_modules="all-linear"))
    with pytest.raises(ConfigError, match=r"no DoRAN adapter 'other'; there are \['default'\]"):
        look(model, "other")
    look(model)


def test_a_trained_adapter_is_not_restored_and_not_cast() -> None:
    model = get_peft_model(make_llama(), DoranConfig(rank=4, target_modules="all-linear"))
    disturb(model)
    model.to(torch.float64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match=r"'default' has been trained \(B of model.layers.0.* is not 0\)"):
        restore_start(model)
    after = model.state_dict()
    assert all(after[name].dtype == value.dtype and torch.equal(after[name], value) for name, value in before.items())


def test_plot(tmp_path: Path) -> None:
    callback = LayerMetricsCallback(tmp_path / "layers.parquet")
    train(tmp_path, callback, attach=True, max_steps=2)
    assert plot_states(callback.states, tmp_path / "a.png").stat().st_size > 10_000
    with pytest.raises(CheckpointError, match="nothing to draw"):
        plot_states([], tmp_path / "b.png")
    with pytest.raises(CheckpointError, match="cannot write"):
        plot_states(callback.states, tmp_path / "missing" / "b.png")
    with pytest.raises(CheckpointError, match="cannot write"):
        write_states(tmp_path / "a.png" / "c.parquet", callback.states)
