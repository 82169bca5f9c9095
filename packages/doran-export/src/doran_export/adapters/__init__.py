"""Adapters that stay apart from the base in one graph, and their files."""
