"""In a clone, doran-core is the folder beside this one. The same file in each package that needs doran-core.

pip finds doran-core on an index only once it is released there, so a wheel built in a clone asks for that folder
instead. A wheel for an index is built with DORAN_RELEASE=1, or from a source distribution, which has no such folder
beside it. An editable install keeps the plain requirement too, so that doran-core can be installed editable as well.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CoreBesideHook(BuildHookInterface[Any]):
    """Replaces the requirement on doran-core's version by ``doran-core @ file:...``."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before a wheel is built; `version` is "standard" or "editable"."""
        core = Path(self.root).parent / "doran-core"
        released = os.environ.get("DORAN_RELEASE") == "1"
        if version == "editable" or released or not (core / "pyproject.toml").is_file():
            return
        # In place: hatchling lets a hook add requirements, but beside the plain one pip would still ask an index.
        requirements = self.metadata.core.dependencies
        requirements[:] = [
            f"doran-core[cli] @ {core.as_uri()}" if requirement.startswith("doran-core[cli]") else requirement
            for requirement in requirements
        ]
