"""`doran serve --check` and the flags that it derives; the server itself is in test_http."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_specs import make_adapter
from safetensors.torch import save_file

from doran_core.cli.group import doran
from doran_core.cli.main import main
from doran_core.errors import CheckpointError, DoranError
from doran_serve import flags, memory
from doran_serve.launch import CACHE_VARIABLE


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory with `base` and three adapters of ranks 3, 9 and 4 in `adapters`."""
    base = {"model.layers.0.mlp.up_proj": torch.randn(24, 16)}
    (tmp_path / "base").mkdir()
    save_file(
        {"model.layers.0.mlp.up_proj.weight": base["model.layers.0.mlp.up_proj"]}, tmp_path / "base/model.safetensors"
    )
    for name, form, rank in (("b", "lora", 3), ("a", "folded", 9), ("c", "trainable", 4)):
        make_adapter(form, base, ("up_proj",), rank=rank, seed=1, size=0.4).write(tmp_path / "adapters" / name)
    return tmp_path


def run(*arguments: str) -> int:
    """The command, with its errors as they are raised."""
    with doran.make_context("doran", ["serve", *arguments]) as context:
        doran.invoke(context)
    return 0


def test_check_lists_every_adapter(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(folder / "base"), "--adapters", str(folder / "adapters"), "--check") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:4] for line in lines[:3]] == [
        ["a", "folded", "rank", "9"],
        ["b", "lora", "rank", "3"],
        ["c", "trainable", "rank", "4"],
    ]
    # 16 (24 + 16) numbers of 4 bytes, and 24 scales: 2,656 bytes.
    assert lines[3] == "3 slots of 0.0 MiB for 3 adapters"
    assert lines[4] == f"adapters that are put into {folder / 'adapters'} from now on are found by name"


def test_check_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = [str(folder / "base"), "--adapters", str(folder / "adapters"), "--json"]
    assert run(*where, "--check", "--port", "8123") == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: (info["form"], info["rank"], info["layers"]) for name, info in found["adapters"].items()} == {
        "a": ("folded", 9, 1),
        "b": ("lora", 3, 1),
        "c": ("trainable", 4, 1),
    }
    assert found["vllm_arguments"][-2:] == ["--port", "8123"]
    with pytest.raises(DoranError, match="--json goes with --check"):
        run(*where)


def test_help_imports_neither_torch_nor_vllm() -> None:
    for command in ("serve", "bench-serve"):
        code = f"import sys; from doran_core.cli.main import main; main([{command!r}, '--help'])"
        heavy = 'print({"torch", "vllm", "transformers"} & set(sys.modules))'
        done = subprocess.run([sys.executable, "-c", f"{code}; {heavy}"], check=True, capture_output=True, text=True)
        assert done.stdout.endswith("\nset()\n")


def test_a_bad_adapter_is_named_with_its_reason(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "adapters" / "b" / "adapter_model.safetensors").unlink()
    assert main(["serve", str(folder / "base"), "--adapters", str(folder / "adapters"), "--check"]) == 1
    assert "doran: error: 1 of 3 adapters cannot be served" in capsys.readouterr().err
    with pytest.raises(
        DoranError, match=r"1 of 3 adapters cannot be served: b: .*adapter_model\.safetensors is missing"
    ):
        run(str(folder / "base"), "--adapters", str(folder / "adapters"), "--check")


def test_wrong_paths_are_named(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such checkpoint directory"):
        run(str(folder / "nowhere"), "--check")
    with pytest.raises(DoranError, match="nowhere: no such directory of adapters"):
        run(str(folder / "base"), "--adapters", str(folder / "nowhere"), "--check")
    with pytest.raises(DoranError, match="no adapter in it"):
        run(str(folder / "base"), "--adapters", str(folder), "--check")


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """A start sets variables of this process; they are put back."""
    before = dict(os.environ)
    for name in ("DORAN_ADAPTERS_DIR", "DORAN_CLOSED_ENDPOINTS", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        os.environ.pop(name, None)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What vLLM would be run with."""
    calls: list[Any] = []
    monkeypatch.setattr("doran_serve.compat.run_vllm", calls.append)
    monkeypatch.setattr("doran_serve.versions.installed", lambda: "0.32.0")
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    return calls


def test_flags_follow_the_adapters_and_the_user_wins(folder: Path, called: list[Any]) -> None:
    base, adapters = str(folder / "base"), str(folder / "adapters")
    run(base, "--adapters", adapters, "--port", "8123", "--max-loras=2")
    assert called == [
        [
            *("serve", base, "--enable-lora", "--max-lora-rank", "16", "--max-cpu-loras", "3"),
            *("--lora-target-modules", "up_proj", "--lora-modules"),
            *(json.dumps({"name": name, "path": str(folder / "adapters" / name)}) for name in "abc"),
            *("--port", "8123", "--max-loras=2"),
        ]
    ]


def test_merged_mode(folder: Path, called: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    base, adapters = str(folder / "base"), str(folder / "adapters")
    run(base, "--adapters", adapters, "--mode", "merged", "--additional-config", '{"other": 1}')
    (arguments,) = called
    assert arguments[:3] == ["serve", base, "--lora-modules"]
    assert arguments[-2:] == ["--additional-config", '{"other": 1, "doran_mode": "merged"}']
    assert "--enable-lora" not in arguments
    assert "merged mode keeps 0.00 GiB" in capsys.readouterr().out
    with pytest.raises(DoranError, match="--enable-lora does not go with --mode merged"):
        run(base, "--adapters", adapters, "--mode", "merged", "--enable-lora")
    with pytest.raises(DoranError, match="is no JSON object"):
        run(base, "--adapters", adapters, "--mode", "merged", "--additional-config", "nonsense")
    with pytest.raises(DoranError, match="needs --adapters"):
        run(base, "--mode", "merged")


def test_many_adapters_are_found_by_name(folder: Path, called: list[Any]) -> None:
    for index in range(flags.LISTED + 1):
        shutil.copytree(folder / "adapters" / "a", folder / "adapters" / f"tenant-{index}")
    run(str(folder / "base"), "--adapters", str(folder / "adapters"))
    assert "--lora-modules" not in called[0]
    assert called[0][called[0].index("--max-loras") + 1] == "8"
    assert os.environ["DORAN_ADAPTERS_DIR"] == str(folder / "adapters")
    with pytest.raises(DoranError, match="add --api-server-count 1"):
        run(str(folder / "base"), "--adapters", str(folder / "adapters"), "--data-parallel-size", "2")


def test_later_adapters_are_found_and_clients_load_none_by_path(
    folder: Path,
    called: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    where = [str(folder / "base"), "--adapters", str(folder / "adapters")]
    run(*where)
    assert os.environ["DORAN_ADAPTERS_DIR"] == str(folder / "adapters")
    assert os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert os.environ.pop("DORAN_CLOSED_ENDPOINTS") == "1"
    run(*where)  # now the variable is the user's own wish
    assert "DORAN_CLOSED_ENDPOINTS" not in os.environ
    monkeypatch.setenv("DORAN_ADAPTERS_DIR", "mine")
    run(*where)
    assert os.environ["DORAN_ADAPTERS_DIR"] == "mine"
    monkeypatch.delenv("DORAN_ADAPTERS_DIR")
    run(*where, "--api-server-count", "2")
    assert "DORAN_ADAPTERS_DIR" not in os.environ
    assert "are served after a restart" in capsys.readouterr().out


def test_the_good_adapters_are_served_and_the_bad_ones_named(
    folder: Path, called: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "adapters" / "b" / "adapter_model.safetensors").write_bytes(b"cut off")
    run(str(folder / "base"), "--adapters", str(folder / "adapters"))
    modules = called[0][called[0].index("--lora-modules") + 1 :]
    assert [json.loads(module)["name"] for module in modules] == ["a", "c"]
    assert "not served: b: " in capsys.readouterr().err
    for name in "ac":
        (folder / "adapters" / name / "adapter_model.safetensors").unlink()
    run(str(folder / "base"), "--adapters", str(folder / "adapters"))
    assert "--lora-modules" not in called[1]
    assert called[1][called[1].index("--max-lora-rank") + 1] == "16"


def test_check_knows_the_limits_that_are_given(folder: Path) -> None:
    where = [str(folder / "base"), "--adapters", str(folder / "adapters"), "--check"]
    with pytest.raises(DoranError, match=r"1 of 3 .*: a: .*rank 9, but .* max_lora_rank=8"):
        run(*where, "--max-lora-rank", "8")
    with pytest.raises(DoranError, match=r"3 of 3 .*lora_target_modules=q_proj"):
        run(*where, "--lora-target-modules", "q_proj", "--port", "1")
    with pytest.raises(DoranError, match=r"1 of 3 .*: a: .*'a' is the base model's own name"):
        run(*where, "--served-model-name", "x", "a")


def test_names_of_any_kind(folder: Path, called: list[Any]) -> None:
    for name in ("a=b", "c,d", ".a.1234.tmp"):
        shutil.copytree(folder / "adapters" / "a", folder / "adapters" / name)
    run(str(folder / "base"), "--adapters", str(folder / "adapters"))
    modules = [json.loads(module) for module in called[0][called[0].index("--lora-modules") + 1 :]]
    assert {module["name"]: Path(module["path"]).name for module in modules} == {
        n: n for n in ("a", "a=b", "b", "c", "c,d")
    }


def test_a_layer_that_is_not_linear_is_refused(folder: Path) -> None:
    base = {"lm_head": torch.randn(24, 16)}
    save_file({"lm_head.weight": base["lm_head"]}, folder / "base/model.safetensors")
    where = [str(folder / "base"), "--adapters", str(folder / "adapters"), "--check"]
    shutil.rmtree(folder / "adapters")
    make_adapter("lora", base, ("lm_head",), rank=3, seed=1, size=0.4).write(folder / "adapters" / "lora")
    assert run(*where) == 0
    with pytest.raises(DoranError, match=r"1 of 1 .*lm_head; merged mode cannot swap"):
        run(*where, "--mode", "merged")
    for form in ("folded", "dora", "trainable"):
        make_adapter(form, base, ("lm_head",), rank=3, seed=1, size=0.4).write(folder / "adapters" / form)
    with pytest.raises(DoranError, match=r"3 of 4 .*lm_head: vLLM serves this layer as output head"):
        run(*where)


@pytest.mark.parametrize(("gib", "size"), [(7, "1"), (24, "3"), (512, "4")])
def test_a_cpu_gets_a_cache_of_a_size_that_it_has(
    gib: int, size: str, called: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    monkeypatch.setattr("doran_serve.memory.device_memory", lambda: memory.Memory(gib * 2**30, "this machine"))
    run("org/model")
    assert os.environ.pop(CACHE_VARIABLE) == size
    assert f"{size} GiB for the cache of keys and values" in capsys.readouterr().out
    run("org/model", "--gpu-memory-utilization=0.5")
    run("org/model", "--kv-cache-memory-bytes", "1000")
    monkeypatch.setattr("doran_serve.memory.device_memory", lambda: memory.Memory(gib * 2**30, "NVIDIA H100"))
    run("org/model")
    assert CACHE_VARIABLE not in os.environ


def test_an_engine_that_does_not_start_is_no_bug_of_ours(monkeypatch: pytest.MonkeyPatch, called: list[Any]) -> None:
    def fail(message: str) -> None:
        def run_vllm(arguments: list[str]) -> None:
            raise RuntimeError(message)

        monkeypatch.setattr("doran_serve.compat.run_vllm", run_vllm)

    fail("Engine core initialization failed. See root cause above.")
    with pytest.raises(DoranError, match="did not start; its first line with ERROR says why"):
        run("org/model")
    fail("something else")
    with pytest.raises(RuntimeError, match="something else"):
        run("org/model")


def test_memory_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "nvidia-smi"
    script.write_text('#!/bin/sh\n[ "$2" = 3 ] && echo "81559, NVIDIA H100"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    assert memory.device_memory() == memory.Memory(81559 * 2**20, "NVIDIA H100")
    assert memory.device_memory(2) == memory.Memory(2 * 81559 * 2**20, "2 x NVIDIA H100")
    script.write_text("#!/bin/sh\nexit 9\n")
    assert memory.device_memory().name == "this machine"


def test_slots_that_fit() -> None:
    shapes = [(24, 16), (8, 16)]
    each = memory.slot_bytes(shapes, rank=4, width=2)
    assert each == 4 * (40 + 24) * 2 + 4 * 32
    device = memory.Memory(total=10_000, name="a device")
    assert memory.fitting_slots(8, 500, base=5000, memory=device) == 4  # 7,200 - 5,000 holds 4.4
    assert memory.fitting_slots(3, 500, base=5000, memory=device) == 3
    with pytest.raises(DoranError, match=r"no adapter slot fits: the base takes .* of a device"):
        memory.fitting_slots(8, 500, base=7000, memory=device)


def test_an_allowlist_without_the_plugin_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("doran_serve.versions.installed", lambda: "0.32.0")
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(DoranError, match="VLLM_PLUGINS='other'"):
        run(str(folder / "base"))


@pytest.mark.parametrize(("rank", "served"), [(1, 8), (8, 8), (9, 16), (257, 320), (512, 512)])
def test_served_rank(rank: int, served: int) -> None:
    assert flags.served_rank(rank) == served


def test_no_rank_above_what_vllm_serves() -> None:
    with pytest.raises(DoranError, match="above 512"):
        flags.served_rank(513)
