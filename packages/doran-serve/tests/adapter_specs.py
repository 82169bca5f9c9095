"""Adapters made by hand for the tests: the numbers, the files of each form, and the merged weight in float64.

Written from the formulas and the file format, apart from the code under test:
LoRA `W0 + g B A`; DoRA `m / n * (W0 + g B A)`; DoRAN `m / (n + tau) * (W0 + g B A)`, n the row norms of the sum.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from doran_core import DoranConfig

FORMS = ("lora", "dora", "folded", "trainable")


@dataclass
class LayerSpec:
    """A `[r, d_in]`, B `[d_out, r]`, the scaling g, m `[d_out]`, and tau (softplus of `raw_tau`)."""

    A: Tensor
    B: Tensor
    scaling: float
    magnitude: Tensor
    raw_tau: Tensor


@dataclass
class AdapterSpec:
    """One adapter: its form and its layers by module name."""

    form: str
    rank: int
    alpha: float
    layers: dict[str, LayerSpec]
    base: dict[str, Tensor] = field(repr=False)

    def scale(self, name: str) -> Tensor:
        """c `[d_out]` in float64."""
        layer = self.layers[name]
        if self.form == "lora":
            return torch.ones(layer.B.shape[0], dtype=torch.float64)
        norm = torch.linalg.vector_norm(self._sum(name), dim=1)
        tau = torch.log1p(torch.exp(layer.raw_tau.double())) if self.form in ("folded", "trainable") else 0.0
        return layer.magnitude.double() / (norm + tau)

    def merged(self, name: str) -> Tensor:
        """The adapted weight `[d_out, d_in]` in float64."""
        return self.scale(name)[:, None] * self._sum(name)

    def _sum(self, name: str) -> Tensor:
        layer = self.layers[name]
        return self.base[name].double() + layer.scaling * layer.B.double() @ layer.A.double()

    def write(self, folder: Path) -> Path:
        """Write the adapter directory of this form."""
        folder.mkdir(parents=True, exist_ok=True)
        config, tensors = getattr(self, f"_{self.form}")()
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        if self.form == "folded":
            self.write_scales(folder)
        return folder

    def write_scales(self, folder: Path, fingerprint: str | None = None, **metadata: str) -> None:
        """Write the folded form's sidecar beside the tensors that lie there."""
        scales = {name: self.scale(name).float() for name in self.layers}
        digest = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
        header = {"format_version": "1", "form": "folded", "adapter_model_sha256": digest, "created_by": "a test"}
        if fingerprint:
            header["base_fingerprint"] = fingerprint
        save_file(scales, folder / "doran_scale.safetensors", metadata=header | metadata)

    def _lora(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        tensors = {}
        for name, layer in self.layers.items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = layer.A.contiguous()
            tensors[f"base_model.model.{name}.lora_B.weight"] = layer.B.contiguous()
        config = {
            "peft_type": "LORA",
            "r": self.rank,
            "lora_alpha": self.alpha,
            "target_modules": sorted(self.layers),
            "bias": "none",
            "task_type": "CAUSAL_LM",
        }
        return config, tensors

    def _dora(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        config, tensors = self._lora()
        for name, layer in self.layers.items():
            tensors[f"base_model.model.{name}.lora_magnitude_vector"] = layer.magnitude
        return config | {"use_dora": True}, tensors

    def _folded(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        config, tensors = self._lora()
        for name, layer in self.layers.items():
            prefix = f"base_model.model.{name}"
            tensors[f"{prefix}.lora_B.weight"] = (layer.scaling * layer.B).contiguous()
            norm = torch.linalg.vector_norm(self._sum(name), dim=1)
            tensors[f"{prefix}.lora_magnitude_vector"] = (self.scale(name) * norm).float()
        return config | {"use_dora": True, "lora_alpha": self.rank}, tensors

    def _trainable(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        tensors = {}
        for name, layer in self.layers.items():
            prefix = f"base_model.model.{name}.doran_adapter"
            tensors[f"{prefix}.factors.A"] = layer.A.contiguous()
            tensors[f"{prefix}.factors.B"] = layer.B.contiguous()
            tensors[f"{prefix}.magnitude"] = layer.magnitude
            tensors[f"{prefix}.tau.raw"] = layer.raw_tau
        options = DoranConfig(
            rank=self.rank,
            alpha=self.alpha,
            factors="static",
            target_modules=sorted({name.rpartition(".")[2] for name in self.layers}),
        )
        config = {
            "peft_type": "DORAN",
            "format_version": 1,
            "base_fingerprint": None,
            "created_by": "a test",
            "task_type": "CAUSAL_LM",
            **options.to_dict(),
        }
        return config, tensors


def make_adapter(
    form: str,
    base: dict[str, Tensor],
    targets: tuple[str, ...],
    *,
    rank: int,
    seed: int,
    size: float,
    skip: str | None = None,
) -> AdapterSpec:
    """Draw an adapter.

    Args:
        form: one of `FORMS`.
        base: weights `[d_out, d_in]` by module name.
        targets: ends of module names.
        rank: r.
        seed: of the numbers.
        size: how far B A moves a weight, relative to the weight's row norms; magnitudes move by half of it.
        skip: leave out modules whose name this pattern finds.
    """
    draw = torch.Generator().manual_seed(seed)
    alpha = 2.0 * rank if form != "folded" else float(rank)
    layers = {}
    for name, weight in base.items():
        if not name.endswith(targets) or (skip and re.search(skip, name)):
            continue
        d_out, d_in = weight.shape
        A = torch.randn(rank, d_in, generator=draw) / d_in**0.5
        B = torch.randn(d_out, rank, generator=draw)
        scaling = alpha / rank
        norm = torch.linalg.vector_norm(weight.float(), dim=1)
        B *= size * norm[:, None] / torch.linalg.vector_norm(scaling * B @ A, dim=1)[:, None]
        total = torch.linalg.vector_norm(weight.float() + scaling * B @ A, dim=1)
        magnitude = total * (1 + 0.5 * size * torch.randn(d_out, generator=draw))
        raw_tau = torch.log(torch.expm1(0.05 * norm.mean())).reshape(1)
        layers[name] = LayerSpec(A, B, scaling, magnitude, raw_tau)
    assert layers, f"no module ends with {targets}"
    return AdapterSpec(form, rank, alpha, layers, base)
