"""The directory of a run: its files, all written atomically, and whether a rerun may continue it.

RUN/config.yaml      the configuration, all defaults filled in
RUN/base.json        metrics of the untouched base model
RUN/checkpoints/     the Trainer's, until the run is done
RUN/layers.parquet   tau, norm, rank and gradients of each layer
RUN/adapter/         the adapter, its tokenizer or image processor, names of classes, and a model card
RUN/metrics.json     written last: a run that has it is done
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from doran_core.errors import CheckpointError, ConfigError, CorruptFileError
from doran_core.files.atomic import write_file
from doran_core.files.jsonfile import json_text, read_json
from doran_core.files.opening import named_errors, read_file
from doran_core.files.temporary import is_temporary
from doran_hf.layer_table import FILE_NAME
from doran_hf.train.config import CONFIG_LIMIT, TrainConfig
from doran_hf.train.fields import parse_yaml

__all__ = ["RunDirectory"]


class RunDirectory:
    """One run's directory. Making this object changes nothing on disk; :meth:`begin` does.

    Args:
        config: the configuration.
        overwrite: remove an earlier run, done or not, when this one begins. Files that are not a run's stay.

    Raises:
        ConfigError: the directory holds a run with another configuration, naming the fields.
        CheckpointError: the directory holds something else, or cannot be written.
    """

    def __init__(self, config: TrainConfig, *, overwrite: bool = False) -> None:
        self.path = Path(config.output)
        self.config_file = self.path / "config.yaml"
        self.adapter = self.path / "adapter"
        self.checkpoints = self.path / "checkpoints"
        self.layers = self.path / FILE_NAME
        self._files = (
            self.config_file,
            self.path / "base.json",
            self.path / "metrics.json",
            self.layers,
            self.path / "layers.png",
        )
        self._config, self._overwrite = config, overwrite
        try:
            self._check()
        except OSError as error:
            raise CheckpointError(f"output: cannot read {self.path}: {error.strerror or error}") from error

    def _check(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise CheckpointError(f"output: {self.path} exists and is not a directory")
        if self.config_file.is_file():
            if self._overwrite:
                return
            with named_errors(self.config_file, ConfigError):
                text = read_file(self.config_file, CONFIG_LIMIT).decode("utf-8")
            changed = _differences(parse_yaml(text, str(self.config_file)), self._config.to_dict())
            if changed:
                raise ConfigError(
                    f"output: {self.path} holds a run with other settings: {'; '.join(changed)}. "
                    "Choose another output, or remove that run with --overwrite"
                )
            return
        # A run may have been killed while it wrote its first file.
        if self.path.is_dir() and not all(is_temporary(entry.name) for entry in self.path.iterdir()):
            raise CheckpointError(f"output: {self.path} is not empty and holds no run of doran train")

    def begin(self) -> None:
        """Make the directory, or remove the run that is to be overwritten, and write the configuration.

        Raises:
            CheckpointError: the directory cannot be written.
        """
        try:
            if self._overwrite and self.config_file.is_file():
                self._remove_run()
            self.path.mkdir(parents=True, exist_ok=True)
            self.write("config.yaml", self._config.to_yaml())
        except OSError as error:
            raise CheckpointError(f"output: cannot write {self.path}: {error.strerror or error}") from error

    def withdraw(self) -> None:
        """Remove the empty directories that a Trainer created before it refused."""
        for folder in (self.checkpoints, self.path):
            with contextlib.suppress(OSError):  # not there, or not empty
                folder.rmdir()

    def _remove_run(self) -> None:
        for folder in (self.adapter, self.checkpoints):
            shutil.rmtree(folder, ignore_errors=True)
        for file in self._files:
            file.unlink(missing_ok=True)

    @property
    def done(self) -> bool:
        """Whether the run is finished."""
        return (self.path / "metrics.json").is_file()

    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint. Partial checkpoints of a killed run are removed."""
        found = sorted(self.checkpoints.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=_step_of, reverse=True)
        for folder in found:
            if _is_whole(folder):
                return folder
            shutil.rmtree(folder)
        return None

    def read(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the run, or None.

        Raises:
            CorruptFileError: it is there and not JSON.
        """
        with named_errors(self.path / name):
            try:
                return read_json(self.path / name)
            except FileNotFoundError:
                return None

    def write(self, name: str, content: str | Mapping[str, Any]) -> None:
        """Write a text, or data as JSON, atomically.

        Raises:
            CheckpointError: it cannot be written.
        """
        write_file(self.path / name, content if isinstance(content, str) else json_text(content))

    def remove_checkpoints(self) -> None:
        """Remove the checkpoints of a finished run."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)


def _step_of(folder: Path) -> int:
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _is_whole(folder: Path) -> bool:
    """The Trainer writes its state last."""
    try:
        return "global_step" in read_json(folder / "trainer_state.json")
    except (OSError, CorruptFileError):
        return False


def _differences(old: Any, new: dict[str, Any]) -> list[str]:
    before, after = _flat(old if isinstance(old, dict) else {}), _flat(new)
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return [f"{name} was {before.get(name)!r}, now {after.get(name)!r}" for name in names if name != "output"]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and not prefix:
            flat |= _flat(value, f"{name}.")
        else:
            flat[prefix + str(name)] = value
    return flat
