"""Merge adapters into a checkpoint on disk, shard by shard: streamed, atomic, resumable."""

from doran_core.merge.run import merge_checkpoint

__all__ = ["merge_checkpoint"]
