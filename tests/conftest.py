"""The repository's tools are scripts, not a package: their tests find them here."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
