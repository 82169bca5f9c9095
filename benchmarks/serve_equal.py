"""Equality parts of `serve.py`: tokens against Hugging Face's on merged checkpoints. `python serve_equal.py PART`."""

from __future__ import annotations

import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from serve_common import CAPTURE, LINEAR, TESTS, report


def small_llama(folder: Path, dtype: str) -> Path:
    """A random Llama of 4 layers as a checkpoint of `dtype`."""
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name), std=0.05)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def equal(part: str, dtype: str, merged: bool) -> None:
    """A batch of base, LoRA, DoRA and three DoRANs: tokens against Hugging Face's on float64-merged checkpoints."""
    sys.path.insert(0, str(TESTS))
    import models
    from test_mixed import five_adapters, prompts_of
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.platforms import current_platform

    from doran_serve.merged.mode import merged_options

    folder = Path(tempfile.mkdtemp())
    base = small_llama(folder / "base", dtype)
    reference = models.Reference(base)
    adapters = five_adapters(reference.weights, 0.3)
    requests = {
        name: LoRARequest(name, i, str(spec.write(folder / name))) for i, (name, spec) in enumerate(adapters.items(), 1)
    }
    tokens, names = 32, [None, *adapters]
    prompts = prompts_of([5, 9, 17, 40, 40, 70, 130, 200], 4096, seed=1)
    begin = time.perf_counter()
    expected = {name: reference.answer(prompts, name and adapters[name], tokens) for name in names}
    report(part, reference_s=round(time.perf_counter() - begin, 1))
    mode: dict[str, Any] = {"enable_lora": True, "max_loras": 5, "max_lora_rank": 16, "lora_target_modules": [*LINEAR]}
    llm = LLM(
        str(base),
        dtype=dtype,
        skip_tokenizer_init=True,
        max_model_len=512,
        gpu_memory_utilization=0.5,
        compilation_config=CAPTURE,
        **({"additional_config": merged_options()} if merged else mode),
    )
    config = llm.llm_engine.vllm_config
    report(
        part,
        graphs=str(config.compilation_config.cudagraph_mode),
        compiled=str(config.compilation_config.mode),
        eager=config.model_config.enforce_eager,
        device=current_platform.get_device_name(),
    )
    asked = [(name, index) for index in range(len(prompts)) for name in names]
    random.Random(2).shuffle(asked)
    for turn in range(2):
        outputs = llm.generate(
            [{"prompt_token_ids": prompts[index]} for _, index in asked],
            SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False),
            lora_request=[name and requests[name] for name, _ in asked],
            use_tqdm=False,
        )
        same, gaps = dict.fromkeys(map(str, names), 0), []
        for (name, index), output in zip(asked, outputs, strict=True):
            found, wanted = list(output.outputs[0].token_ids), expected[name][index]
            if found == wanted:
                same[str(name)] += 1
            else:
                gaps.append((name, index, *first_difference(reference, adapters, name, prompts[index], found, wanted)))
        report(part, turn=turn, of=len(prompts), equal=same, equal_in_all=sum(same.values()), asked=len(asked))
        for name, index, place, gap in gaps:
            report(part, turn=turn, differs=name or "base", prompt=index, at_token=place, reference_gap=gap)
    llm.llm_engine.engine_core.shutdown()


def first_difference(
    reference: Any, adapters: Any, name: str | None, prompt: list[int], found: list[int], wanted: list[int]
) -> tuple[int, float]:
    """Where two answers part, and by how much the reference preferred its token there (logits)."""
    import torch

    place = next(i for i, pair in enumerate(zip(found, wanted, strict=True)) if pair[0] != pair[1])
    reference.answer([prompt], name and adapters[name], 1)  # puts the weights in place
    with torch.inference_mode():
        logits = reference.model(torch.tensor([prompt + wanted[:place]])).logits[0, -1]
    return place, round(float(logits[wanted[place]] - logits[found[place]]), 5)


if __name__ == "__main__":
    name = sys.argv[1]
    equal(name, "bfloat16" if name == "equal-bf16" else "float32", merged=name == "equal-merged")
