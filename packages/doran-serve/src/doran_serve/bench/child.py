"""Measures one case in this process: `python -m doran_serve.bench.child SPEC.json`. One JSON line for each number."""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

__all__ = ["main"]


def report(**fields: Any) -> None:
    """Print one line of results immediately, so that a killed run keeps its measurements."""
    print("RESULT " + json.dumps(fields), flush=True)


def main(path: str) -> None:
    """Measure the case of a specification (`case`, `workload`)."""
    spec = json.loads(Path(path).read_text(encoding="utf-8"))
    case, workload = spec["case"], spec["workload"]
    start = time.perf_counter()
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(case["model"], **case["engine"])
    vocabulary = llm.llm_engine.model_config.get_vocab_size()

    def reached(stage: str) -> None:
        report(case=case["name"], reached=stage, after_s=round(time.perf_counter() - start, 2))

    reached("engine up")
    adapters: list[Any] = [LoRARequest(Path(a).name, i, a) for i, a in enumerate(case["adapters"], 1)] or [None]
    draw = random.Random(0)

    def timed(requests: int, tokens: int, adapters: list[Any] = adapters) -> float:
        """Seconds for `requests` new prompts, `tokens` of output each."""
        prompts = [
            {"prompt_token_ids": [draw.randrange(10, vocabulary) for _ in range(workload["prompt_tokens"])]}
            for _ in range(requests)
        ]
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        chosen = [adapters[i % len(adapters)] for i in range(requests)]
        begin = time.perf_counter()
        llm.generate(prompts, sampling, lora_request=chosen, use_tqdm=False)
        return time.perf_counter() - begin

    for index, adapter in enumerate(adapters):
        timed(1, 1, [adapter])
        reached(f"adapter {index} answers")
    timed(workload["requests"], 8)
    reached("warm")
    for _ in range(workload["rounds"]):
        many = timed(workload["requests"], workload["output_tokens"])
        alone = timed(1, workload["output_tokens"])
        report(
            case=case["name"],
            tokens_per_s=round(workload["requests"] * workload["output_tokens"] / many, 1),
            alone_ms_per_token=round(1e3 * alone / workload["output_tokens"], 4),
        )
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
