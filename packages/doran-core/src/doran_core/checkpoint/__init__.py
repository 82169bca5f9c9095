"""Base checkpoints on disk: reading them, finding an adapter's layers in them, their fingerprint, layouts and ties."""

from __future__ import annotations

from doran_core.checkpoint.checkpoint import Checkpoint

__all__ = ["Checkpoint"]
