"""Asks an engine in this process and its children, and prints the answers: `python ask.py SPEC`, see test_mixed."""

from __future__ import annotations

import json
import sys
from typing import Any


def main(spec: dict[str, Any]) -> None:
    """Print `{adapter: [tokens of each prompt]}` after `ANSWERS`."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from doran_serve.merged.mode import merged_options

    mixed = {"enable_lora": True, "max_loras": 5, "max_lora_rank": 16}
    llm = LLM(
        spec["base"],
        dtype="float32",
        max_model_len=128,
        skip_tokenizer_init=True,
        enforce_eager=True,
        tensor_parallel_size=spec.get("ranks", 1),
        **(mixed if spec["mode"] == "mixed" else {"additional_config": merged_options()}),
        **spec.get("engine", {}),
    )
    requests: dict[str, Any] = {"None": None}
    for number, (name, path) in enumerate(spec["adapters"].items(), 1):
        requests[name] = LoRARequest(name, number, path)
    asked = [(name, prompt) for prompt in spec["prompts"] for name in requests]
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for _, prompt in asked],
        SamplingParams(temperature=0, max_tokens=spec["tokens"], ignore_eos=True, detokenize=False),
        lora_request=[requests[name] for name, _ in asked],
        use_tqdm=False,
    )
    answers: dict[str, list[list[int]]] = {name: [] for name in requests}
    for (name, _), output in zip(asked, outputs, strict=True):
        answers[name].append(list(output.outputs[0].token_ids))
    print("\nANSWERS " + json.dumps(answers), flush=True)
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
