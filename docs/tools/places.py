"""Where the repository is, and which packages it has. Imports nothing."""

from pathlib import Path

__all__ = ["PACKAGES", "REPOSITORY"]

REPOSITORY = Path(__file__).parents[2]
PACKAGES = ("core", "hf", "export", "serve")
