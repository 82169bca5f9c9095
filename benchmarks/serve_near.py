"""The part `near-bf16` of `serve.py`: how far mixed serving in bfloat16 is from the exact function.

    python serve_near.py near-bf16

In bfloat16 no two engines answer alike: a rounding that differs makes another token the best where two are nearly
tied, and all that follows differs. So whole answers are not counted. The engine answers freely, as it does for users,
and gives the log-probabilities of its five best tokens at every step. On the very prefix that it chose, the same
tokens are asked of two others:

- the exact function: Hugging Face in float32 on the weights merged in float64;
- the peer: Hugging Face in bfloat16 on the merged weights rounded to bfloat16, as a merged checkpoint is served.

Both distances from the exact function are reported, for the base, LoRA, DoRA and DoRAN. Where the best token is not
the exact one, the gap is what the exact logits lose by it, also in units of bfloat16's spacing at that logit (`ulps`):
a gap of a few is a tie.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from serve_common import report
from serve_equal import TOKENS, start
from torch import Tensor

BEST = 5


def logits_after(model: Any, prompt: list[int], answer: list[int]) -> Tensor:
    """The logits `[tokens, vocabulary]` that each token of an answer was chosen by, float32."""
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :]
    return logits.float()


def ulp(values: Tensor) -> Tensor:
    """The spacing of bfloat16's numbers at `values`: it keeps 8 significant bits."""
    return torch.exp2(torch.floor(torch.log2(values.abs())) - 7)


class Distance:
    """Differences from the exact function, over all steps of all answers."""

    def __init__(self) -> None:
        self.errors: list[Tensor] = []
        self.gaps: list[tuple[float, float]] = []
        self.steps = 0

    def add(self, exact: Tensor, tokens: Tensor, log_probs: Tensor, best: Tensor) -> None:
        """The steps of one answer.

        Args:
            exact: logits `[steps, vocabulary]`.
            tokens: the tokens `[steps, BEST]` that are compared.
            log_probs: what is measured: their log-probabilities.
            best: `[steps]` the best token in what is measured.
        """
        self.errors.append((log_probs - exact.log_softmax(-1).gather(1, tokens)).abs().flatten())
        self.steps += len(exact)
        top, chosen = exact.amax(-1), exact.gather(1, best[:, None])[:, 0]
        for gap, unit in zip((top - chosen).tolist(), ulp(top).tolist(), strict=True):
            if gap > 0:
                self.gaps.append((gap, gap / unit))

    @property
    def mean(self) -> float:
        """The mean difference of a log-probability."""
        return float(torch.cat(self.errors).mean())

    def summary(self) -> dict[str, float | int]:
        """For the report."""
        errors = torch.cat(self.errors)
        return {
            "mean": round(self.mean, 5),
            "p99": round(float(errors.quantile(0.99)), 5),
            "max": round(float(errors.max()), 5),
            "steps": self.steps,
            "other_best": len(self.gaps),
            "largest_gap": round(max((gap for gap, _ in self.gaps), default=0.0), 5),
            "largest_gap_ulps": round(max((ulps for _, ulps in self.gaps), default=0.0), 2),
        }


def near(part: str) -> None:
    """Report both distances for the base and every adapter, and their ratios."""
    mix = start(part, "bfloat16", merged=False)
    import models  # of the tests; `start` has put them on the path

    outputs = mix.answer(logprobs=BEST)
    mix.llm.llm_engine.engine_core.shutdown()
    exact = mix.reference.model
    peer = copy.deepcopy(exact).to(torch.bfloat16)
    engine_means, ratios = {}, {}
    for name in (None, *mix.adapters):
        adapter = name and mix.adapters[name]
        for model in (exact, peer):
            models.put_weights(model, mix.reference.weights, adapter)
        engine_distance, peer_distance = Distance(), Distance()
        for (asked, index), output in zip(mix.asked, outputs, strict=True):
            if asked != name:
                continue
            answer = list(output.token_ids)
            assert len(answer) == TOKENS
            ranked = [sorted(step.items(), key=lambda item: -item[1].logprob)[:BEST] for step in output.logprobs]
            tokens = torch.tensor([[token for token, _ in step] for step in ranked])
            found = torch.tensor([[entry.logprob for _, entry in step] for step in ranked])
            wanted = logits_after(exact, mix.prompts[index], answer)
            engine_distance.add(wanted, tokens, found, torch.tensor(answer))
            other = logits_after(peer, mix.prompts[index], answer)
            peer_distance.add(wanted, tokens, other.log_softmax(-1).gather(1, tokens), other.argmax(-1))
        who = name or "base"
        report(part, adapter=who, engine=engine_distance.summary(), merged_checkpoint=peer_distance.summary())
        engine_means[who] = engine_distance.mean
        ratios[who] = round(engine_distance.mean / peer_distance.mean, 3)
    report(part, engine_to_merged_checkpoint=ratios)
    report(part, engine_to_its_base={who: round(mean / engine_means["base"], 3) for who, mean in engine_means.items()})


if __name__ == "__main__":
    near(sys.argv[1])
