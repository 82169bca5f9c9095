"""What has nothing to do with the method: lazy imports, sharded tensors, name patterns, wide sums, progress."""
