"""The example of the README's first user runs with nothing but torch, safetensors and scikit-learn, and learns."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples" / "digits.py"


def test_digits_example_beats_the_frozen_base():
    assert len(EXAMPLE.read_text().splitlines()) < 40
    done = subprocess.run([sys.executable, EXAMPLE], capture_output=True, text=True, check=True)
    frozen, adapted = (float(number) for number in re.findall(r"\d\.\d+", done.stdout))
    assert adapted > frozen + 0.03
    assert adapted > 0.9
