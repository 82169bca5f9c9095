"""A base in 4 bits in a real vLLM: folded adapters bring their scale along, so its weights need not be known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from adapter_specs import make_adapter
from test_mixed import ALL, prompts_of, requests_for

from doran_core.errors import CheckpointError, DoranError

ENOUGH = 0.25
"""Of a log-probability: vLLM computes in bfloat16 here, which keeps three digits, over two layers and 512 tokens; how
near it comes depends on the processor's instructions."""


def test_mixed_on_four_bits(engine: Callable[..., Any], reference: Callable[[str], Any], tmp_path: Path) -> None:
    """Each step's choice, and its probability, are those of float32 on the merged dequantized weights."""
    from vllm import SamplingParams

    base = reference("dequantized")
    adapters = {
        "lora": make_adapter("lora", base.weights, ("q_proj", "v_proj"), rank=4, seed=1, size=0.5),
        "attention": make_adapter("folded", base.weights, ALL[:4], rank=5, seed=3, size=0.5),
        "mlp": make_adapter("folded", base.weights, ("gate_proj", "down_proj"), rank=16, seed=4, size=0.5),
    }
    requests = requests_for(adapters, tmp_path)
    prompts, tokens = prompts_of([5, 9, 17], 512, seed=11), 8
    asked = [(name, prompt) for prompt in prompts for name in (None, *adapters)]
    running = engine("quantized")
    outputs = running.llm.generate(
        [{"prompt_token_ids": prompt} for _, prompt in asked],
        SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=1),
        lora_request=[name and requests[name] for name, _ in asked],
        use_tqdm=False,
    )
    trainable = make_adapter("trainable", base.weights, ("q_proj",), rank=4, seed=5, size=0.5)
    request = requests_for({"trainable": trainable}, tmp_path, first=9)["trainable"]
    with pytest.raises(DoranError, match=r"packed is quantized; fold it against the original checkpoint"):
        running.answer(prompts[:1], [request], 2)

    errors: dict[str | None, list[float]] = {}
    unadapted = []
    for (name, prompt), output in zip(asked, outputs, strict=True):
        answer = list(output.outputs[0].token_ids)
        found = torch.tensor(
            [step[token].logprob for step, token in zip(output.outputs[0].logprobs, answer, strict=True)]
        )
        exact = base.logits(prompt, answer, name and adapters[name]).log_softmax(-1)
        wanted = exact[torch.arange(tokens), torch.tensor(answer)]
        errors.setdefault(name, []).append(float((found - wanted).abs().max()))
        errors[name].append(float((exact.amax(-1) - wanted).max()))
        if name:
            without = base.logits(prompt, answer, None).log_softmax(-1)[torch.arange(tokens), torch.tensor(answer)]
            unadapted.append(float((found - without).abs().max()))
    stock = max(errors.pop(None))
    assert stock < ENOUGH, "the engine's own error, without an adapter"
    for name, found_errors in errors.items():
        assert max(found_errors) < 2 * max(stock, 0.05), name
    assert min(unadapted) > 4 * stock, "what is shown is small beside what an adapter does"


def test_a_form_that_needs_the_weights_is_refused(
    checkpoint: Callable[[str], Path], reference: Callable[[str], Any], tmp_path: Path
) -> None:
    from doran_serve.store import AdapterStore

    spec = make_adapter("dora", reference("dequantized").weights, ("q_proj",), rank=4, seed=6, size=0.5)
    with pytest.raises(CheckpointError, match="a dora adapter needs plain base weights"):
        AdapterStore(checkpoint("quantized")).check(spec.write(tmp_path / "dora"))
