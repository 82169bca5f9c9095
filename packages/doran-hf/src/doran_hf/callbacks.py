"""Trainer callbacks that watch the adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from doran_hf.diagnostics import tau_by_layer

__all__ = ["TauCallback"]


class TauCallback(TrainerCallback):
    """Records tau of each layer at the start, whenever the Trainer logs, and at the end.

    Attributes:
        history: one entry per record: ``{"step": int, "tau": {module name: [float, ...]}}``.

    Args:
        file: also write the records there, one JSON object a line; None for no file. Only the main process writes.
        adapter_name: which adapter; None for the active one.
    """

    def __init__(self, file: str | Path | None = None, adapter_name: str | None = None) -> None:
        self.history: list[dict[str, Any]] = []
        self._file = None if file is None else Path(file)
        self._adapter_name = adapter_name

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record the start, or where a resumed run goes on."""
        self._record(state, kwargs.get("model"))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Record, and put the mean into the Trainer's log history."""
        taus = self._record(state, kwargs.get("model"))
        if taus and state.log_history:
            values = [value for layer in taus.values() for value in layer]
            state.log_history[-1].update(tau_mean=sum(values) / len(values), tau_min=min(values), tau_max=max(values))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record the end."""
        self._record(state, kwargs.get("model"))

    def _record(self, state: TrainerState, model: nn.Module | None) -> dict[str, list[float]]:
        if model is None:
            return {}
        taus = {name: tau.tolist() for name, tau in tau_by_layer(model, self._adapter_name).items()}
        if self.history and self.history[-1]["step"] == state.global_step:
            return taus  # the end of training logs, too
        entry = {"step": state.global_step, "tau": taus}
        self.history.append(entry)
        if self._file is not None and state.is_world_process_zero:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(entry) + "\n")
        return taus
