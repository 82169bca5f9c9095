"""Lazy packages: one list of names, in the stub; former names go on working."""

import importlib
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from doran_core.support.lazy import stub_names


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A lazy package `lazily`, and the stub that it is made of."""
    folder = tmp_path / "lazily"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        textwrap.dedent("""
        from doran_core.support.lazy import lazy_names
        __getattr__, __dir__, __all__ = lazy_names(__name__, renamed={"old": "one"}, first="lazily.before")
        """)
    )
    (folder / "__init__.pyi").write_text("from lazily import whole as whole\nfrom lazily.part import one as one\n")
    (folder / "part.py").write_text("import lazily.order\none = 1\nlazily.order.seen.append('part')\n")
    (folder / "whole.py").write_text("value = 2\n")
    (folder / "before.py").write_text("import lazily.order\nlazily.order.seen.append('before')\n")
    (folder / "order.py").write_text("seen = []\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("lazily")
    for name in [name for name in sys.modules if name.partition(".")[0] == "lazily"]:
        del sys.modules[name]


def test_a_name_loads_its_module_when_it_is_used(package):
    assert package.__all__ == ["one", "whole"] == [name for name in dir(package) if not name.startswith("_")][1:]
    assert "lazily.part" not in sys.modules
    assert package.one == 1
    assert package.whole.value == 2
    assert package.order.seen == ["before", "part"]


def test_a_former_name_warns_where_it_is_used(package):
    with pytest.warns(DeprecationWarning, match=r"lazily.old is called one now") as caught:
        assert package.old == 1
    assert caught[0].filename == __file__
    with pytest.raises(AttributeError, match="module 'lazily' has no attribute 'neither'"):
        package.neither  # noqa: B018


@pytest.mark.parametrize("name", ["doran_core", "doran_core.adapter", "doran_core.convert"])
def test_every_listed_name_is_there(name):
    package = importlib.import_module(name)
    assert all(hasattr(package, listed) for listed in package.__all__)


def test_a_star_import_takes_the_names_of_the_stub():
    code = "from doran_core import *; print(sorted(name for name in dir() if not name.startswith('_')))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    stub = Path(importlib.import_module("doran_core").__file__).with_suffix(".pyi")
    assert done.stdout.strip() == str(sorted(stub_names(stub)))
