"""The README's examples run as they stand."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
ADAPTERS = [["my-adapter"], ["cosines", "folded"], []]


@pytest.mark.parametrize(("code", "adapters"), list(zip(EXAMPLES, ADAPTERS, strict=True)))
def test_readme_example(tmp_path, code, adapters):
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert sorted(path.parent.name for path in tmp_path.rglob("adapter_model.safetensors")) == adapters
