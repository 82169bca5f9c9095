"""Classes: their names, and the number of each label in the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from doran_core.errors import ConfigError
from doran_hf.train.config import DataConfig

__all__ = ["Labels"]


@dataclass(frozen=True)
class Labels:
    """Names of the classes, in the order of their numbers; ``numbers`` maps the data's labels to them.

    ``unseen`` are the names of classes without a training example.
    """

    names: list[str]
    numbers: dict[Any, int]
    unseen: list[str]

    @classmethod
    def of(cls, config: DataConfig, rows: Any) -> Labels:
        """The classes of a dataset, from the configuration, the dataset's features or its labels.

        Raises:
            ConfigError: no column of labels, labels that are neither numbers nor names, too few names, or the same
                label everywhere.
        """
        if config.label not in rows.column_names:
            raise ConfigError(f"data.label: no column {config.label!r}; the columns are {sorted(rows.column_names)}")
        declared = config.label_names or getattr(rows.features[config.label], "names", None)
        values = sorted(set(rows.with_format(None)[config.label]), key=lambda value: (str(type(value)), value))
        if all(isinstance(value, str) for value in values):
            names = list(declared or values)
            unknown = sorted(set(values) - set(names))
            if unknown:
                raise ConfigError(f"data.label_names: the label {unknown[0]!r} of the data is not among {names}")
            _check_several(config, values)
            return cls(names, {name: index for index, name in enumerate(names)}, sorted(set(names) - set(values)))
        if not all(isinstance(value, int) and not isinstance(value, bool) for value in values):
            odd = next(value for value in values if not isinstance(value, int) or isinstance(value, bool))
            raise ConfigError(f"data.label: expected whole numbers or names, got {odd!r} in column {config.label!r}")
        names = list(declared or map(str, range(max(values) + 1)))
        if values[0] < 0 or values[-1] >= len(names):
            raise ConfigError(f"data.label: labels from {values[0]} to {values[-1]}, but there are {len(names)} names")
        _check_several(config, values)
        unseen = [name for index, name in enumerate(names) if index not in set(values)]
        return cls(names, {index: index for index in range(len(names))}, unseen)

    def check_same(self, config: DataConfig, rows: Any) -> None:
        """Refuse evaluation examples whose label numbers stand for other classes.

        Raises:
            ConfigError: other classes, or no column of labels.
        """
        if config.label not in rows.column_names:
            raise ConfigError(f"data.label: no column {config.label!r} in data.eval, but {sorted(rows.column_names)}")
        declared = getattr(rows.features[config.label], "names", None)
        if declared is not None and list(declared) != self.names:
            raise ConfigError(f"data.eval: its classes are {declared}, those of data.train {self.names}")

    def described(self) -> str:
        """The number of classes, and the names of those without an example to train on."""
        if not self.unseen:
            return str(len(self.names))
        shown = ", ".join(map(repr, self.unseen[:10])) + (", ..." if len(self.unseen) > 10 else "")
        return f"{len(self.names)}, {len(self.unseen)} of them without an example to train on: {shown}"

    def index(self, value: Any) -> int:
        """The number of a label of the data.

        Raises:
            ConfigError: a label that the training data do not have.
        """
        if value not in self.numbers:
            raise ConfigError(f"data: the label {value!r} is none of the classes {self.names}")
        return self.numbers[value]

    def name(self, value: Any) -> str:
        """The name of a label of the data."""
        return self.names[self.index(value)]


def _check_several(config: DataConfig, values: list[Any]) -> None:
    if len(values) < 2:
        raise ConfigError(f"data.label: every example has the label {values[0]!r} in column {config.label!r}")
