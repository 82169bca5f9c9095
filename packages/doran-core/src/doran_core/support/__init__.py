"""What has nothing to do with the method: lazy imports, progress."""
