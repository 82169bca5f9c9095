"""The exporter through onnxruntime-genai: its model builder makes the graph, its generator runs it.

The only file that knows onnxruntime-genai, which is the extra [genai] and imported when it is used.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from doran_core.errors import CheckpointError, require
from doran_export.errors import ExportError, UnsupportedModelError
from doran_export.files import GENAI_CONFIG, read_json
from doran_export.runtime.providers import PROVIDERS

__all__ = ["build_graph", "genai_tokens", "require_genai", "require_plain_head"]


def require_genai() -> Any:
    """The onnxruntime_genai module.

    Raises:
        MissingDependencyError: onnxruntime-genai is not installed.
    """
    return require(
        "onnxruntime_genai",
        package="doran-export",
        extra="genai",
        purpose="exporting a decoder through onnxruntime-genai (the other way is the torch exporter)",
    )


def require_plain_head(model: PreTrainedModel) -> None:
    """Refuse a model in which another linear layer has as many outputs as the vocabulary has tokens.

    The builder (0.18) takes every such layer for the head, and its graph gives wrong logits.

    Raises:
        UnsupportedModelError: naming that layer.
    """
    head, vocabulary = model.get_output_embeddings(), model.config.get_text_config().vocab_size
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head and module.out_features == vocabulary:
            raise UnsupportedModelError(
                f"{name} has {vocabulary} outputs, as many as the vocabulary has tokens, and onnxruntime-genai's "
                "builder takes it for the head: try the torch exporter"
            )


def build_graph(model: Path, out: Path, precision: str, provider: str) -> None:
    """Let the builder write model.onnx, its data and genai_config.json.

    The builder runs in a process of its own, because it is a program with top-level modules named ``builders`` and
    ``quantization``, and because the end of a process frees all memory.

    Args:
        model: Hugging Face model directory.
        out: existing directory to write to.
        precision: fp32, fp16, bf16, int8 or int4.
        provider: onnxruntime's name of the execution provider that the graph is for.

    Raises:
        CheckpointError: the directory has no tokenizer.
        ExportError: the builder failed.
        MissingDependencyError: onnxruntime-genai is not installed.
        UnsupportedModelError: the builder does not know the architecture.
    """
    require_genai()
    if not any(model.glob("tokenizer*.json")):
        raise CheckpointError(f"{model} has no tokenizer, which onnxruntime-genai needs; the torch exporter needs none")
    package = find_spec("onnxruntime_genai")
    assert package is not None
    assert package.origin is not None
    builder = Path(package.origin).parent / "models" / "builder.py"
    target = next(short for short, name in PROVIDERS.items() if name == provider)
    with tempfile.TemporaryDirectory(prefix=".builder-", dir=out) as scratch:
        command = [sys.executable, str(builder), "-i", str(model), "-o", str(out), "-p", precision, "-e", target]
        done = subprocess.run([*command, "-c", scratch], capture_output=True, text=True, errors="replace")
    if done.returncode == 0:
        return
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    reason = lines[-1].strip() if lines else f"exit code {done.returncode}"
    if reason.startswith("NotImplementedError"):
        architecture = read_json(model / "config.json").get("architectures", ["no architecture"])[0]
        raise UnsupportedModelError(
            f"onnxruntime-genai has no builder for {architecture} ({model}): try the torch exporter"
        )
    if "No space left" in done.stderr:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    raise ExportError(f"the model builder of onnxruntime-genai failed on {model}: {reason}")


def genai_tokens(
    directory: Path, prompts: Sequence[Sequence[int]], steps: int
) -> tuple[list[NDArray[np.int64]], frozenset[int]]:
    """Greedy tokens from onnxruntime-genai's own generator.

    Args:
        directory: a directory that the builder wrote.
        prompts: token ids.
        steps: number of tokens at most.

    Returns:
        The tokens of each prompt, up to its first end token, and the end tokens.
    """
    genai = require_genai()
    model = genai.Model(str(directory))
    rows = []
    for prompt in prompts:
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=len(prompt) + steps, do_sample=False)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(np.asarray(prompt, dtype=np.int32))
        tokens: list[int] = []
        while not generator.is_done() and len(tokens) < steps:
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
        rows.append(np.asarray(tokens, dtype=np.int64))
    ends = read_json(directory / GENAI_CONFIG).get("model", {}).get("eos_token_id", [])
    return rows, frozenset(ends if isinstance(ends, list) else [ends])
