"""Legal inputs: adapters of every form, small sharded bases, a training configuration. And what each one means."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "packages/doran-core/tests"))

import made  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

from doran_core import DoranConfig  # noqa: E402
from doran_core.adapter import TrainableAdapter, read_adapter, write_folded, write_trainable  # noqa: E402
from doran_core.convert import fold_adapter, to_peft_dora  # noqa: E402
from doran_core.layers.modules import layer_spec, make_factor_builder  # noqa: E402
from doran_core.layers.stack import StackAdapter, StackView  # noqa: E402
from doran_core.method.shared_network import tensors_by_layer  # noqa: E402

__all__ = ["CONFIG", "SEALED", "adapters", "meaning", "write_all"]

CONFIG = {"model_type": "llama", "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2, "vocab_size": 50}

TRAINABLE: dict[str, dict[str, Any]] = {
    "generated": {},
    "static": {"factors": "static", "tau_kind": "fixed", "tau_granularity": "row"},
    "model": {"sharing": "model", "share_output": True, "experts": True},
    "none": {"sharing": "none", "tau_kind": "zero", "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3.0}},
    "gaussian": {
        "tau_kind": "gaussian",
        "tau_learn_sigma": True,
        "use_rslora": True,
        "block_pattern": r"layers\.(\d+)",
    },
}
SEALED = (*TRAINABLE, "experts", "named", "folded", "folded-static")
"""The forms that doran writes with digests: what is accepted of them means what was saved."""


def write_all(folder: Path) -> None:
    """All legal inputs, in folders of their own."""
    weights = made.base_weights() | {_STACK: torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(3))}
    made.write_base(folder / "base", weights, config=CONFIG)
    made.write_base(folder / "base-single", weights, shards=1, config=CONFIG)
    half = {name: value.bfloat16() for name, value in weights.items()}
    made.write_base(folder / "base-half", half, shards=3, config=CONFIG)
    for name, options in TRAINABLE.items():
        made.write_adapter(folder / name, weights, **options)
    write_trainable(_experts(weights[_STACK]), folder / "experts")
    named, _ = made.trainable_record(weights)
    names = {"model.layers.0.self_attn.q_proj.weight": "model.layers.0.self_attn.q_proj.weight"}
    ties = {"lm_head.weight": "model.embed_tokens.weight"}
    write_trainable(replace(named, ties=ties, stored_names=names), folder / "named")
    extra = {"model.norm.weight": torch.ones(24)}
    made.write_adapter(folder / "extra", weights, extra=extra, modules_to_save=["norm"])
    for name, source in (("folded", "generated"), ("folded-static", "static")):
        write_folded(fold_adapter(folder / source, folder / "base"), folder / name)
    to_peft_dora(folder / "folded", folder / "peft-dora")
    made.write_peft(folder / "peft-lora", made.lora_tensors(made.TARGETS[0], 24, 24))
    embedding = {
        "model.embed_tokens.lora_embedding_A": torch.ones(4, 50),
        "model.embed_tokens.lora_embedding_B": torch.ones(24, 4),
    }
    made.write_peft(folder / "peft-embedding", embedding, rank_pattern={"embed_tokens": 4})
    (folder / "yaml").mkdir()
    text = "base: base\noutput: run\ndata:\n  train: x.jsonl\nadapter:\n  rank: 4\ntrainer:\n  max_steps: 3\n"
    (folder / "yaml" / "doran.yaml").write_text(text)


_STACK = "model.layers.1.mlp.experts.gate_up_proj"


def _experts(weight: torch.Tensor) -> TrainableAdapter:
    """An adapter of two experts in one tensor."""
    owner = nn.Module()
    owner.gate_up_proj = nn.Parameter(weight, requires_grad=False)
    view = StackView(owner, "gate_up_proj", transposed=False, name=_STACK)
    config = DoranConfig(rank=2, target_modules=["gate_up_proj"])
    spec = layer_spec(_STACK, view, config)
    torch.manual_seed(4)
    adapter = StackAdapter(config, spec, make_factor_builder(config)(spec))
    adapter.initialise(view)
    return TrainableAdapter(config, tensors_by_layer({_STACK: adapter}), task_type="CAUSAL_LM")


def adapters(folder: Path) -> list[Path]:
    """The adapter directories among the legal inputs."""
    return sorted(path for path in folder.iterdir() if (path / "adapter_config.json").exists())


def meaning(folder: Path) -> str:
    """What a reader makes of an adapter, as text: equal for adapters of equal meaning."""
    adapter = read_adapter(folder)
    found: dict[str, Any] = {"type": type(adapter).__name__, "base": getattr(adapter, "base_fingerprint", None)}
    config = getattr(adapter, "config", None)
    found["config"] = config.to_dict() if hasattr(config, "to_dict") else None
    for name, module in adapter.modules.items():
        parts = module if isinstance(module, dict) else vars(module)
        found[name] = {key: _plain(value) for key, value in sorted(parts.items())}
    found["extra"] = {key: _plain(value) for key, value in sorted(adapter.extra.items())}
    return json.dumps(found, sort_keys=True, default=str)


def _plain(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return [str(value.dtype), list(value.shape), value.contiguous().view(torch.uint8).flatten().tolist()]
