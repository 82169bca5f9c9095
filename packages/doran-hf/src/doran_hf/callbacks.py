"""LayerMetricsCallback: records tau, norms, ranks and gradients of every adapted layer while Trainer trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import IntervalStrategy

from doran_core.diagnostics import GradientProbe, GradientSplit
from doran_hf.diagnostics import LayerState, layer_states, probed_layers
from doran_hf.layer_table import read_states, write_states

__all__ = ["LayerMetricsCallback"]

_PREFIX = "doran/"
_MEASURES = [entry.name for entry in dataclasses.fields(LayerState) if entry.name not in ("step", "layer")]


class LayerMetricsCallback(TrainerCallback):
    """Records tau, norm, scale, effective rank and gradient split of each layer whenever the Trainer logs.

    As ``Trainer(callbacks=[...])``, the callback fills :attr:`states` and the parquet file, and adds the mean, least
    and largest tau to the Trainer's log history. Trainer calls its own callbacks (TensorBoard, W&B, ...) first. Call
    :meth:`attach` instead so that they get the numbers of each layer, too.

    The gradient comes from the first forward and backward pass of a logged step, including a gradient scaler's factor.
    Recording it needs ``logging_strategy="steps"``, no ``torch_compile``, and linear layers whose weight can be read.
    A logged step costs one more product of the size of the weight's gradient per layer.

    Attributes:
        states: all records, from the first step on.

    Args:
        file: a parquet file for the records (needs pyarrow). It is written at the start and end, with every checkpoint,
            and whenever the records have grown by a tenth. A resumed training keeps the file's rows. Only the main
            process writes.
        adapter_name: which adapter; None for the active one.
        gradients: record the gradient split.
    """

    def __init__(
        self, file: str | Path | None = None, adapter_name: str | None = None, *, gradients: bool = True
    ) -> None:
        self.states: list[LayerState] = []
        self._file = None if file is None else Path(file)
        self._adapter_name = adapter_name
        self._gradients = gradients
        self._probe: GradientProbe | None = None
        self._splits: dict[str, GradientSplit] = {}
        self._written = 0

    def attach(self, trainer: Any) -> LayerMetricsCallback:
        """Add this callback to a Trainer, before the reporting callbacks, and return it.

        All reporting callbacks then get each layer's numbers, as ``doran/tau/model.layers.0...``. The progress bar and
        the console do not print them.
        """
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
        callbacks.insert(0, self)
        printers = [i for i, other in enumerate(callbacks) if isinstance(other, PrinterCallback | ProgressCallback)]
        callbacks.insert(min(printers, default=len(callbacks)), _Hide())
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record the start, or load the records of a resumed run."""
        self.states, self._written = [], 0
        if state.global_step and self._file is not None and self._file.is_file():
            self.states = [row for row in read_states(self._file) if row.step <= state.global_step]
        if not self.states:
            self._record(state, kwargs["model"])
        self._write(state)  # a kill right after the first checkpoint comes before on_save

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Watch the gradients of a step that will be logged."""
        if self._gradients and not args.torch_compile and _will_log(args, state):
            layers = probed_layers(kwargs["model"], self._adapter_name)
            if any(layer.can_be_split for layer in layers.values()):
                self._probe = GradientProbe(layers, first_pass_only=True)
                self._probe.__enter__()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compute the gradient split before the optimizer changes the weights."""
        self._end_probe()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Record the layers; add each layer's numbers to the logs, and the range of tau to the history."""
        if logs is None or "loss" not in logs:
            return
        rows = self._record(state, kwargs["model"])
        for row in rows:
            values = {name: getattr(row, name) for name in _MEASURES}
            logs.update({f"{_PREFIX}{name}/{row.layer}": v for name, v in values.items() if v is not None})
        if rows and state.log_history:
            taus = [row.tau for row in rows]
            state.log_history[-1].update(tau_mean=sum(taus) / len(taus), tau_min=min(taus), tau_max=max(taus))
        if control.should_save or len(self.states) > 1.1 * self._written:
            self._write(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the file, so that a run resumed from this checkpoint has all earlier records."""
        self._write(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record the end, if it was not logged, and write the file."""
        self._end_probe()
        if not self.states or self.states[-1].step != state.global_step:
            self._record(state, kwargs["model"])
        self._write(state)

    def _end_probe(self) -> None:
        if self._probe is not None:
            self._probe.__exit__(None, None, None)
            self._splits = self._probe.splits() if self._probe.saw_gradients else {}
            self._probe = None

    def _record(self, state: TrainerState, model: Any) -> Sequence[LayerState]:
        rows = layer_states(model, state.global_step, self._splits, self._adapter_name)
        self.states += rows
        self._splits = {}
        return rows

    def _write(self, state: TrainerState) -> None:
        if self._file is not None and state.is_world_process_zero and len(self.states) > self._written:
            write_states(self._file, self.states)
            self._written = len(self.states)


class _Hide(TrainerCallback):
    """Removes the numbers of single layers from the logs, between the reporting and the printing callbacks."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        for name in [name for name in logs or {} if name.startswith(_PREFIX)]:
            del logs[name]  # type: ignore[union-attr]  # the loop is empty for None


def _will_log(args: TrainingArguments, state: TrainerState) -> bool:
    step = state.global_step + 1
    if step == 1 and args.logging_first_step:
        return True
    return bool(args.logging_strategy == IntervalStrategy.STEPS) and step % max(1, int(state.logging_steps)) == 0
