"""What tokens are learned: completions, the assistant's turns, or all; and choosing among completions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import make_llama
from tiny_bases import CHAT, make_tokenizer

from doran_core.errors import ConfigError
from doran_hf.train.choice_accuracy import choice_accuracy
from doran_hf.train.config import DataConfig
from doran_hf.train.text import IGNORED, TextEncoder


def encoder(columns: list[str], tokenizer: Any = None, **options: Any) -> TextEncoder:
    return TextEncoder(DataConfig(train="-", **options), tokenizer or make_tokenizer(), columns)


def learned(encode: TextEncoder, row: dict[str, Any]) -> tuple[str, str]:
    """The whole text and the part that is learned, as words."""
    encoded = encode(row)
    assert len(encoded["input_ids"]) == len(encoded["labels"])
    for token, label in zip(encoded["input_ids"], encoded["labels"], strict=True):
        assert label in (IGNORED, token)
    kept = [label for label in encoded["labels"] if label != IGNORED]
    return encode.tokenizer.decode(encoded["input_ids"]), encode.tokenizer.decode(kept)


def test_prompt_and_completion_by_templates() -> None:
    encode = encoder(["x", "y"], prompt="Review: {x} Sentiment:", completion=" {y}")
    row = {"x": "a b", "y": "positive"}
    assert learned(encode, row) == ("Review: a b Sentiment: positive <eos>", "positive <eos>")
    encode = encoder(["x", "y"], prompt="Review: {x} Sentiment:", completion=" {y}", append_eos=False)
    assert learned(encode, row) == ("Review: a b Sentiment: positive", "positive")
    encode = encoder(["x", "y"], prompt="{x}", completion=" {y}", completion_only=False)
    assert learned(encode, row) == ("a b positive <eos>", "a b positive <eos>")


def test_usual_column_names_need_no_settings() -> None:
    assert learned(encoder(["prompt", "completion"]), {"prompt": "a b", "completion": " c"})[1] == "c <eos>"
    assert learned(encoder(["text", "id"]), {"text": "a b", "id": 3})[1] == "a b <eos>"


def test_every_turn_of_the_assistant_is_learned_with_its_ending() -> None:
    turns = [
        {"role": "user", "content": "a b"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
        {"role": "assistant", "content": "e f"},
    ]
    whole, part = learned(encoder(["messages"], system="g"), {"messages": turns})
    assert whole == "<system> g <end> <user> a b <end> <assistant> c <end> <user> d <end> <assistant> e f <end>"
    assert part == "c <end> e f <end>"


def test_prompt_and_completion_in_the_chat_template() -> None:
    encode = encoder(["prompt", "completion"], chat=True)
    assert learned(encode, {"prompt": "a", "completion": "b"}) == ("<user> a <end> <assistant> b <end>", "b <end>")


def test_a_token_over_the_border_is_learned() -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import PreTrainedTokenizerFast

    symbols = [*ByteLevel.alphabet(), "Ġy"]
    bytes_ = Tokenizer(BPE({symbol: i for i, symbol in enumerate(symbols)}, [("Ġ", "y")]))
    bytes_.pre_tokenizer = ByteLevel(add_prefix_space=False)
    encode = encoder(["prompt", "completion"], PreTrainedTokenizerFast(tokenizer_object=bytes_))
    encoded = encode({"prompt": "q ", "completion": "y"})  # " y" is one token
    assert [label != IGNORED for label in encoded["labels"]] == [False, True]


def test_long_examples_are_cut() -> None:
    encoded = encoder(["text"], max_length=3)({"text": "a b c d e"})
    assert len(encoded["input_ids"]) == len(encoded["labels"]) == 3


@pytest.mark.parametrize(
    ("columns", "options", "row", "message"),
    [
        (["a"], {}, {}, r"data: set data.text.*\['a'\]"),
        (["text"], {"text": "{title}"}, {"text": "x"}, r"data.text.*'title'.*\['text'\]"),
        (["text"], {"text": "txt"}, {"text": "x"}, r"data.text: 'txt' is no column.*\['text'\]"),
        (["p"], {"prompt": "{p}", "completion": "answer"}, {"p": "x"}, r"data.completion: 'answer' is no column"),
        (["text"], {"messages": "chat"}, {}, r"data.messages: no column 'chat'.*\['text'\]"),
        (["m"], {"messages": "m"}, {"m": "hello"}, r"data.messages: expected a list.*'hello'"),
        (["m"], {"messages": "m"}, {"m": [{"role": "user", "content": "a"}]}, r"no turn of the assistant"),
        (["text"], {"text": "text", "messages": "text"}, {}, r"messages and text are both set"),
        (["text"], {"choices": ["a", "b"]}, {}, r"data.choices: needs data.prompt"),
    ],
)
def test_bad_examples_are_named(columns: list[str], options: Any, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        encoder(columns, **options)(row)


def test_templates_that_cannot_be_followed_are_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        encoder(["messages"], tokenizer)
    tokenizer.chat_template = "{{ messages | length }} " + CHAT
    with pytest.raises(ConfigError, match="renders the beginning of a chat differently"):
        encoder(["messages"], tokenizer)(
            {"messages": [{"role": role, "content": "a"} for role in ("user", "assistant")]}
        )


@pytest.mark.parametrize("choices", [[" a", " b"], [" a", " b c d", " c"]])
def test_choice_accuracy_is_that_of_one_forward_pass_per_pair(choices: list[str]) -> None:
    model = make_llama()
    encode = encoder(["x", "y"], prompt="{x}", completion="{y}", choices=choices)
    rows = [{"x": " ".join(str((3 * i + j) % 40) for j in range(i % 5 + 1)), "y": choices[i % 2]} for i in range(70)]
    hits = 0
    for row in rows:
        losses = []
        for choice in choices:
            encoded = encode.encode_pair(row["x"], choice)
            ids, labels = torch.tensor([encoded["input_ids"]]), torch.tensor([encoded["labels"]])
            with torch.no_grad():
                loss = model(input_ids=ids, labels=labels).loss
            losses.append(float(loss) * sum(label != IGNORED for label in encoded["labels"]))
        hits += losses.index(min(losses)) == choices.index(row["y"])
    assert 0 < hits < len(rows)
    assert choice_accuracy(model, encode, rows, "choosing") == pytest.approx(hits / len(rows))
    with pytest.raises(ConfigError, match=r"' z' of an example is not among"):
        choice_accuracy(model, encode, [{"x": "a", "y": " z"}], "choosing")


def test_choices_that_are_cut_are_not_compared() -> None:
    choices = [" a", " b c d"]
    encode = encoder(["x", "y"], prompt="{x}", completion="{y}", choices=choices, max_length=4, append_eos=False)
    model = make_llama()
    assert choice_accuracy(model, encode, [{"x": "e", "y": " a"}], "choosing") in (0.0, 1.0)
    with pytest.raises(ConfigError, match=r"data.max_length: an example has 5 tokens .*' b c d', and only 4 are"):
        choice_accuracy(model, encode, [{"x": "e f", "y": " a"}], "choosing")
