"""Run DoRAN in the PEFT project's method comparison: MetaMathQA to GSM8K with Llama-3.2-3B.

    python experiments/method_comparison/run.py PEFT

PEFT is a clone of github.com/huggingface/peft from which PEFT is installed. Its run.py trains and tests, and writes its
record there; it needs the hub and a GPU. docs/howto/peft-comparison.md tells more.
"""

from __future__ import annotations

import argparse
import os
import runpy
import shutil
import sys
from pathlib import Path

OWN = Path(__file__).resolve().parent
EXPERIMENT = "doran/llama-3.2-3B-rank31"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peft", type=Path, metavar="PEFT")
    run_in(parser.parse_args().peft)


def run_in(clone: Path) -> None:
    """Put the configuration among the experiments of a clone of PEFT, and start its run.py on it."""
    folder = (clone / "method_comparison" / "MetaMathQA").resolve()
    if not (folder / "run.py").is_file():
        raise SystemExit(f"{folder}: expected PEFT's method comparison with its run.py; is {clone} a clone of PEFT?")
    shutil.copytree(OWN / EXPERIMENT, folder / "experiments" / EXPERIMENT, dirs_exist_ok=True)
    import doran_hf  # noqa: F401 - makes DoRAN one of PEFT's methods

    os.chdir(folder)
    sys.path.insert(0, str(folder))
    sys.argv = ["run.py", "-v", f"experiments/{EXPERIMENT}"]
    runpy.run_path("run.py", run_name="__main__")


if __name__ == "__main__":
    main()
