"""Tiny base models saved with a tokenizer or an image processor, as `doran train` and the auto classes want them."""

from __future__ import annotations

from pathlib import Path

from conftest import make_bert, make_llama, make_vit
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, ViTImageProcessor

SPECIAL = ["<pad>", "<unk>", "<eos>", "<user>", "<assistant>", "<system>", "<end>"]
WORDS = ["Review:", "Sentiment:", "positive", "negative", *"abcdefghijklmnop", *map(str, range(40))]
CHAT = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, known words only, with a chat template."""
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>", model_max_length=64
    )
    made.chat_template = CHAT
    return made


def save_text_base(folder: Path, family: str = "llama") -> Path:
    model = make_llama() if family == "llama" else make_bert()
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def save_image_base(folder: Path) -> Path:
    make_vit().save_pretrained(folder)
    processor = ViTImageProcessor(
        size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5], do_resize=True, do_normalize=True
    )
    processor.save_pretrained(folder)
    return folder
