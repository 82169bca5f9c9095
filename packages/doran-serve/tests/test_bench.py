"""`doran bench-serve`: real engines on a small workload, and the comparison by hand."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_specs import make_adapter
from safetensors.torch import save_file

from doran_core.adapter import PeftAdapter, read_adapter
from doran_core.cli.main import main
from doran_core.errors import DoranError
from doran_serve.bench.cases import Case, Workload, standard_cases
from doran_serve.bench.run import measure, reason, summary, table
from doran_serve.bench.strip import write_lora
from doran_serve.launch import CACHE_VARIABLE
from doran_serve.memory import Memory
from doran_serve.store import AdapterStore


def test_ratios_are_of_medians() -> None:
    rounds = [("base", 100.0, 2.0), ("base", 300.0, 4.0), ("base", 200.0, 3.0), ("lora", 150.0, 6.0)]
    results: list[dict[str, Any]] = [
        {"case": name, "tokens_per_s": speed, "alone_ms_per_token": alone} for name, speed, alone in rounds
    ]
    medians = summary([{"case": "base", "start_s": 9.0}, *results])
    assert medians == {
        "base": {"tokens_per_s": 200.0, "alone_ms_per_token": 3.0},
        "lora": {"tokens_per_s": 150.0, "alone_ms_per_token": 6.0},
    }
    assert table(medians).rows[-1] == ["lora", "150", "0.750", "1.000", "6.00", "2.000", "1.000"]


def test_the_lora_of_an_adapter_has_its_factors(tmp_path: Path) -> None:
    base = {"model.layers.0.mlp.up_proj": torch.randn(24, 16)}
    spec = make_adapter("folded", base, ("up_proj",), rank=3, seed=1, size=0.4)
    adapter = AdapterStore(None).load(spec.write(tmp_path / "doran"))
    assert adapter is not None
    lora = read_adapter(write_lora(adapter, tmp_path / "lora"))
    assert isinstance(lora, PeftAdapter)
    part, layer = lora.modules["model.layers.0.mlp.up_proj"], spec.layers["model.layers.0.mlp.up_proj"]
    torch.testing.assert_close(part.scaling * part.B @ part.A, layer.scaling * layer.B @ layer.A)
    assert part.magnitude is None


def test_stock_and_plugin_are_measured_and_compared(
    checkpoint: Callable[[str], Path],
    reference: Callable[[str], Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("vllm")
    # Each case starts an engine: stock LoRA and mixed serving stand for all four.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process for each engine, not two: it starts sooner
    monkeypatch.setattr("doran_serve.bench.cases.standard_cases", lambda *given: standard_cases(*given)[1:3])
    for index in range(2):
        spec = make_adapter("folded", reference("llama").weights, ("q_proj",), rank=4, seed=index, size=0.4)
        spec.write(tmp_path / "adapters" / f"{index}")
    engine = {"dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True, "max_model_len": 64}
    sizes = ["--requests", "4", "--prompt-tokens", "8", "--output-tokens", "4", "--rounds", "1"]
    where = [str(checkpoint("llama")), "--adapters", str(tmp_path / "adapters"), "--log", str(tmp_path / "rounds")]
    assert main(["bench-serve", *where, *sizes, "--engine", json.dumps(engine), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    lines = [json.loads(line) for line in (tmp_path / "rounds").read_text().splitlines()]
    measured = {line["case"]: line["tokens_per_s"] for line in lines if "tokens_per_s" in line}
    assert list(measured) == ["lora", "doran mixed"]
    assert all(speed > 0 for speed in measured.values())
    assert printed["rounds"] == lines
    assert printed["medians"]["doran mixed"]["tokens_per_s"] == measured["doran mixed"]


def test_an_engine_that_fails_is_said_with_its_reason(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    case = Case("base", False, str(tmp_path / "nowhere"), {})
    with pytest.raises(DoranError, match=r"base: ended with 1: [\s\S]*nowhere"):
        list(measure(case, Workload()))


def test_the_reason_is_the_first_error_and_not_what_follows_from_it() -> None:
    first = "(Worker pid=7) ERROR 11-29 01:20:19 [multiproc_executor.py:933] "
    log = "\n".join(
        (
            "dispatcher.py:138: FutureWarning: `torch.distributed.reduce_op` is deprecated",
            f"{first}Traceback (most recent call last):",
            f'{first}    raise ValueError(f"Available memory on node {{node}} ...")',
            f"{first}ValueError: Available memory on node 0 (18.0/23.4 GiB) is less than desired",
            "Exception: WorkerProc initialization failed due to an exception in a background process.",
            "RuntimeError: Engine core initialization failed. See root cause above.",
        )
    )
    assert reason(log) == "ValueError: Available memory on node 0 (18.0/23.4 GiB) is less than desired"
    pydantic = "ValidationError: 1 validation error for ModelConfig\n  Value error, no such model"
    assert reason(f"pydantic_core._pydantic_core.{pydantic}\nINFO done") == f"pydantic_core._pydantic_core.{pydantic}"
    assert reason("ended by a signal") == "ended by a signal"


@pytest.mark.parametrize(("engine", "size"), [({}, "3"), ({"gpu_memory_utilization": 0.5}, None)])
def test_the_engines_get_a_cache_that_a_cpu_has(
    engine: dict[str, float], size: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = {"model.layers.0.mlp.up_proj": torch.randn(24, 16)}
    (tmp_path / "base").mkdir()
    save_file({f"{key}.weight": value for key, value in base.items()}, tmp_path / "base" / "model.safetensors")
    make_adapter("folded", base, ("up_proj",), rank=3, seed=1, size=0.4).write(tmp_path / "adapters" / "one")
    monkeypatch.setenv(CACHE_VARIABLE, "")  # so that it is put back
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setattr("doran_serve.memory.device_memory", lambda: Memory(24 * 2**30, "this machine"))
    seen = []

    def measured(case: Case, workload: Workload) -> list[dict[str, Any]]:
        seen.append(os.environ.get(CACHE_VARIABLE))
        return [{"case": case.name, "tokens_per_s": 1.0, "alone_ms_per_token": 1.0}]

    monkeypatch.setattr("doran_serve.bench.run.measure", measured)
    where = [str(tmp_path / "base"), "--adapters", str(tmp_path / "adapters")]
    assert main(["bench-serve", *where, "--engine", json.dumps(engine), "--debug"]) == 0
    assert seen == [size] * 4
