"""Equality parts of `serve.py`, in float32: tokens against Hugging Face's on merged checkpoints.

python serve_equal.py PART
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve_common import CAPTURE, LINEAR, TESTS, report

TOKENS = 32


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


@dataclass
class Mix:
    """An engine and what it is asked: every prompt with the base (None) and with every adapter, shuffled."""

    llm: Any
    reference: Any
    adapters: dict[str, Any]
    requests: dict[str, Any]
    prompts: list[list[int]]
    asked: list[tuple[str | None, int]]

    def answer(self, **sampling: Any) -> list[Any]:
        """The outputs for `asked`, sent as one batch; greedy."""
        from vllm import SamplingParams

        settings = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False, **sampling)
        outputs = self.llm.generate(
            [{"prompt_token_ids": self.prompts[index]} for _, index in self.asked],
            settings,
            lora_request=[name and self.requests[name] for name, _ in self.asked],
            use_tqdm=False,
        )
        return [output.outputs[0] for output in outputs]


def start(part: str, dtype: str, *, merged: bool) -> Mix:
    """A small Llama with LoRA, DoRA and three DoRANs on a running engine, which says how it runs."""
    sys.path.insert(0, str(TESTS))
    import models
    from test_mixed import five_adapters, prompts_of
    from vllm import LLM
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
    prompts = prompts_of([5, 9, 17, 40, 40, 70, 130, 200], 4096, seed=1)
    asked = [(name, index) for index in range(len(prompts)) for name in (None, *adapters)]
    random.Random(2).shuffle(asked)
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
    return Mix(llm, reference, adapters, requests, prompts, asked)


def equal(part: str, *, merged: bool) -> None:
    """Tokens against Hugging Face's on checkpoints merged in float64, twice: the second time prefixes are cached."""
    mix = start(part, "float32", merged=merged)
    begin = time.perf_counter()
    names = [None, *mix.adapters]
    expected = {name: mix.reference.answer(mix.prompts, name and mix.adapters[name], TOKENS) for name in names}
    report(part, reference_s=round(time.perf_counter() - begin, 1))
    for turn in range(2):
        same, parted = dict.fromkeys(map(str, names), 0), []
        for (name, index), output in zip(mix.asked, mix.answer(), strict=True):
            found, wanted = list(output.token_ids), expected[name][index]
            if found == wanted:
                same[str(name)] += 1
            else:
                place = next(i for i, pair in enumerate(zip(found, wanted, strict=True)) if pair[0] != pair[1])
                parted.append((name or "base", index, place))
        report(part, turn=turn, of=len(mix.prompts), equal=same, equal_in_all=sum(same.values()), asked=len(mix.asked))
        for who, index, place in parted:
            report(part, turn=turn, differs=who, prompt=index, at_token=place)
    mix.llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    equal(sys.argv[1], merged=sys.argv[1] == "equal-merged")
