"""The one error that a user of the runner meets."""

from __future__ import annotations

from doran_core.errors import DoranError

__all__ = ["ExperimentError"]


class ExperimentError(DoranError, ValueError):
    """A study, a results folder or a data source is not what it should be; the message names file, key and value."""
