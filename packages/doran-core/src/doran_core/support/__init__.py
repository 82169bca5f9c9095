"""Helpers independent of the method: lazy imports, sharded tensors, name patterns, wide sums, progress."""
