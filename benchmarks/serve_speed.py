"""Speed parts of `serve.py`: throughput, latency and swaps at Llama-7B's shape. `python serve_speed.py PART`."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from serve_common import CAPTURE, LINEAR, llama_7b, random_adapters, report


def speed() -> None:
    """Llama-7B's shape with 16 layers: base, stock LoRA, DoRAN mixed and merged, in one run."""
    from doran_serve.bench.cases import Case, Workload, standard_cases
    from doran_serve.bench.run import measure, summary, table

    folder = Path(tempfile.mkdtemp())
    layers = int(os.environ.get("DORAN_BENCH_LAYERS", "16"))
    model = llama_7b(folder / "model", layers)
    begin = time.perf_counter()
    doran = random_adapters(folder, 8, layers, LINEAR, 32)
    report("speed", adapters_made_s=round(time.perf_counter() - begin, 1), layers=layers)
    engine = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": 512,
        "max_num_seqs": 128,
        "gpu_memory_utilization": 0.85,
        "compilation_config": CAPTURE,
    }
    cases = standard_cases(model, engine, [f"{path}-lora" for path in doran], doran, 32)
    mixed = cases[2]
    narrow = {**mixed.engine, "lora_target_modules": [*LINEAR]}
    cases.append(Case("doran mixed without embeddings", True, model, narrow, mixed.adapters))
    wanted = os.environ.get("DORAN_BENCH_CASES", "")
    rounds = int(os.environ.get("DORAN_BENCH_ROUNDS", "4"))
    results = earlier(Path(os.environ["DORAN_BENCH_RESULTS"])) if "DORAN_BENCH_RESULTS" in os.environ else []
    for case in cases:
        done = sum(1 for result in results if result["case"] == case.name)
        if done >= rounds or (wanted and case.name not in wanted.split(",")):
            continue
        try:
            for result in measure(
                case, Workload(rounds=rounds), limit=float(os.environ.get("DORAN_BENCH_LIMIT", "200"))
            ):
                results.append(result)
                report("speed", **result)
        except Exception as error:  # the other cases are still worth their time
            report("speed", case=case.name, failed=str(error)[-2500:])
        report("speed", so_far=summary(results))
    print(table(summary(results)), flush=True)


def earlier(path: Path) -> list[Any]:
    """Rounds of an interrupted run: ratios across machines say less than those of one run."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [entry for entry in map(json.loads, lines) if "tokens_per_s" in entry]


def swap() -> None:
    """In-place swap of q and v in 32 layers of Llama-7B's shape."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import torch
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from doran_serve.merged.mode import merged_options
    from doran_serve.merged.weights import swap_weights

    folder = Path(tempfile.mkdtemp())
    model = llama_7b(folder / "model", 32)
    paths = random_adapters(folder, 3, 32, ("q_proj", "v_proj"), 32)
    llm = LLM(
        model,
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=512,
        enforce_eager=True,
        gpu_memory_utilization=0.85,
        additional_config=merged_options(),
    )

    def rows(worker: Any) -> Any:
        weight = worker.get_model().model.layers[3].self_attn.qkv_proj.weight
        return weight.detach().cpu().clone()

    before = llm.collective_rpc(rows)[0]
    for turn in range(4):
        for index, path in enumerate(paths):
            seconds = llm.collective_rpc(swap_weights, args=(path,))[0]
            report("swap", turn=turn, adapter=index, ms=round(1e3 * seconds, 2), cold=turn == 0)
    adapted = llm.collective_rpc(rows)[0]
    report("swap", back_to_base_ms=round(1e3 * llm.collective_rpc(swap_weights, args=(None,))[0], 2))
    report("swap", base_is_back_to_the_bit=bool(torch.equal(before, llm.collective_rpc(rows)[0])))

    from doran_serve.store import AdapterStore

    adapter = AdapterStore(None).load(paths[-1])
    assert adapter is not None
    q = adapter.modules["model.layers.3.self_attn.q_proj"]
    assert q.scale is not None
    expected = q.scale.double()[:, None] * (before[:4096].double() + q.B.double() @ q.A.double())
    report("swap", equal_to_float64_rounded_once=float((expected.to(before.dtype) == adapted[:4096]).float().mean()))
    report("swap", k_untouched=bool(torch.equal(before[4096:8192], adapted[4096:8192])))

    request = LoRARequest("a", 1, paths[0])
    sampling = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
    for name, chosen in (("base", None), ("swap", request), ("no swap", request), ("swap", None)):
        begin = time.perf_counter()
        llm.generate([{"prompt_token_ids": [5, 6, 7]}], sampling, lora_request=chosen, use_tqdm=False)
        report("swap", one_token=name, ms=round(1e3 * (time.perf_counter() - begin), 1))


if __name__ == "__main__":
    {"speed": speed, "swap": swap}[sys.argv[1]]()
