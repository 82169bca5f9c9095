"""The proof that an exported directory computes what PyTorch computes."""
