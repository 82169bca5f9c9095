"""The demo's two tasks: training examples, and a score on unseen texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo.data import ANSWERS, sentiment_prompt


@dataclass
class Sizes:
    """How much of everything: the full demo, and the short form for CI."""

    sentiment_steps: int = 100
    critic_steps: int = 60
    critic_tokens: int = 96
    sentiment_test: int = 500
    critic_test: int = 64

    @classmethod
    def short(cls) -> Sizes:
        return cls(sentiment_steps=12, critic_steps=6, critic_tokens=64, sentiment_test=64, critic_test=16)


@dataclass
class Task:
    """What one adapter learns.

    Attributes:
        name: of the adapter.
        examples: token ids and labels to train on.
        steps: of training.
        batch: examples in a step.
        metric: what `score` measures.
        score: the metric of a model on unseen texts; also takes a label for its progress bar.
        test_size: how many unseen texts there are.
    """

    name: str
    examples: list[dict[str, list[int]]]
    steps: int
    batch: int
    metric: str
    score: Callable[[Any, str], float]
    test_size: int


def sentiment_task(tokenizer: Any, sentences: Any, sizes: Sizes) -> Task:
    """Answer positive or negative to a sentence of a review."""
    answers = [tokenizer(answer, add_special_tokens=False).input_ids[0] for answer in ANSWERS]
    tokens = [tokenizer(sentiment_prompt(text)).input_ids for text in sentences.text]
    labels = [int(label) for label in sentences.label]
    held_out, train = slice(0, sizes.sentiment_test), slice(sizes.sentiment_test, None)
    examples = [
        {"input_ids": [*ids, answers[label]], "labels": [-100] * len(ids) + [answers[label]]}
        for ids, label in zip(tokens[train], labels[train], strict=True)
    ]

    def accuracy(model: Any, what: str) -> float:
        predicted = answer_scores(model, tokens[held_out], answers, what).argmax(1).tolist()
        return sum(p == label for p, label in zip(predicted, labels[held_out], strict=True)) / len(predicted)

    return Task("sentiment", examples, sizes.sentiment_steps, 16, "accuracy", accuracy, sizes.sentiment_test)


def critic_task(tokenizer: Any, reviews: Any, sizes: Sizes) -> Task:
    """Go on with a review."""
    import torch
    from tqdm import tqdm

    texts = [text.replace("<br />", "\n") for text in reviews.text[: sizes.critic_test + 8 * sizes.critic_steps]]
    tokens = [tokenizer(f"Review: {text}", truncation=True, max_length=sizes.critic_tokens).input_ids for text in texts]
    examples = [{"input_ids": ids, "labels": ids} for ids in tokens[sizes.critic_test :]]

    @torch.no_grad()
    def loss(model: Any, what: str) -> float:
        total = count = 0.0
        for ids in tqdm(tokens[: sizes.critic_test], desc=what):
            batch = torch.tensor([ids], device=model.device)
            total += model(input_ids=batch, labels=batch).loss.item() * (len(ids) - 1)
            count += len(ids) - 1
        return total / count

    return Task("critic", examples, sizes.critic_steps, 8, "held-out loss", loss, sizes.critic_test)


def answer_scores(model: Any, prompts: list[list[int]], answers: list[int], what: str) -> Any:
    """Logits of the answers after each prompt, ``[prompts, answers]``; prompts of one length go together, unpadded."""
    import torch
    from tqdm import tqdm

    scores = torch.empty(len(prompts), len(answers))
    by_length: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(index)
    with torch.no_grad(), tqdm(total=len(prompts), desc=what) as bar:
        for indices in by_length.values():
            for start in range(0, len(indices), 32):
                chosen = indices[start : start + 32]
                batch = torch.tensor([prompts[i] for i in chosen], device=model.device)
                logits = model(input_ids=batch, logits_to_keep=1).logits[:, -1]
                scores[chosen] = logits[:, answers].float().cpu()
                bar.update(len(chosen))
    return scores


def generate(
    base: Path, work: Path, tokenizer: Any, prompts: dict[str, list[str]], device: str
) -> dict[str, list[list[int]]]:
    """Greedy tokens by transformers' generate: what vLLM has to equal."""
    import torch
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM

    tokens: dict[str, list[list[int]]] = {}
    for name, texts in prompts.items():
        directory = base if name == "base" else work / f"merged-{name}"
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).to(device).eval()
        tokens[name] = []
        for text in tqdm(texts, desc=name):
            ids = tokenizer(text, return_tensors="pt").to(device)
            output = model.generate(
                **ids, do_sample=False, max_new_tokens=new_tokens(name), pad_token_id=tokenizer.eos_token_id
            )
            tokens[name].append(output[0, ids.input_ids.shape[1] :].tolist())
    return tokens


def new_tokens(name: str) -> int:
    return 1 if name == "sentiment" else 24
