"""The accelerate configurations of examples/, launched with two processes: the adapter is that of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

REPOSITORY = Path(__file__).parents[3]
EXAMPLES = REPOSITORY / "examples" / "accelerate"
ON_CPU = REPOSITORY / "tests" / "distributed" / "on_cpu.py"
STEPS, BATCH = 3, 4
CLOSE = 1e-5

SPREAD = {
    "ddp": "spread by MULTI_CPU",
    "fsdp1": "spread by FSDP 1",
    "fsdp2": "spread by FSDP 2",
    "zero2": "spread by DEEPSPEED 2",
    "zero3": "spread by DEEPSPEED 3",
}
"""By configuration, what accelerate is to say of it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, its tokenizer, texts, and what one process makes of them."""
    made = tmp_path_factory.mktemp("launching")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(
        LlamaConfig(vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, **shape)
    ).save_pretrained(made / "base")
    words = Tokenizer(WordLevel({f"t{number}": number for number in range(64)}, unk_token="t0"))
    words.pre_tokenizer = WhitespaceSplit()
    names = {"pad_token": "t0", "bos_token": "t1", "eos_token": "t2"}
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(made / "base")
    texts = [" ".join(f"t{3 + (7 * row + 5 * place) % 61}" for place in range(8)) for row in range(STEPS * BATCH)]
    (made / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    run(made, "one", [sys.executable, str(EXAMPLES / "train.py")], BATCH)
    return made


def run(folder: Path, name: str, command: list[str], batch: int) -> str:
    """Train to `folder/name`; what was printed."""
    arguments = [folder / "base", folder / "texts.jsonl", folder / name, "--steps", STEPS, "--batch", batch]
    variables = {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu", "HF_DATASETS_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [*command, *map(str, arguments)],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


@pytest.mark.parametrize("name", SPREAD)
def test_the_adapter_is_that_of_one_process(name: str, folder: Path) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(EXAMPLES / f"{name}.yaml")]
    launch += ["--mixed_precision", "no", "--main_process_port", "0"]
    script = [str(ON_CPU), *(["--ddp"] if name == "ddp" else []), str(EXAMPLES / "train.py")]
    assert f"{SPREAD[name]} over 2" in run(folder, name, launch + script, BATCH // 2)
    one, two = (load_file(folder / path / "adapter_model.safetensors") for path in ("one", name))
    assert one.keys() == two.keys()
    assert max(float((one[key] - two[key]).abs().max()) for key in one) < CLOSE
    assert any(float(tensor.abs().max()) > 0 for key, tensor in two.items() if "w2_B" in key)
    configs = [json.loads((folder / path / "adapter_config.json").read_text()) for path in ("one", name)]
    assert configs[0]["base_fingerprint"] == configs[1]["base_fingerprint"] is not None
