"""Small checkpoints and adapters made on the spot: Llama's names, a few shards, every kind of layer when asked."""

import json

import torch
from safetensors.torch import save_file

from doran_core import DoranConfig
from doran_core.adapter import TrainableAdapter, write_trainable
from doran_core.checkpoint.fingerprint import fingerprint_weights
from doran_core.checkpoint.weight_layout import to_matrix
from doran_core.layers.adapter import DoranAdapter
from doran_core.layers.modules import make_factor_builder
from doran_core.method.factors import LayerSpec
from doran_core.method.shared_network import tensors_by_layer
from doran_core.method.sharing import block_of

HIDDEN, INNER, VOCABULARY = 24, 40, 50
TARGETS = [f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "v_proj")]


def base_weights(dtype=torch.float32, tied=False):
    """Tensors of a two-layer Llama by name."""
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for i in range(2):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"{layer}.self_attn.v_proj.weight": (HIDDEN // 2, HIDDEN),
            f"{layer}.self_attn.q_proj.bias": (HIDDEN,),
            f"{layer}.mlp.down_proj.weight": (HIDDEN, INNER),
            f"{layer}.input_layernorm.weight": (HIDDEN,),
        }
    if not tied:
        shapes["lm_head.weight"] = (VOCABULARY, HIDDEN)
    generator = torch.Generator().manual_seed(11)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def write_base(directory, weights=None, *, shards=2, config=None):
    """A checkpoint directory of these weights."""
    weights = base_weights() if weights is None else weights
    directory.mkdir(parents=True, exist_ok=True)
    config = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": "lm_head.weight" not in weights} | (
        config or {}
    )
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text('{"model": "made"}')
    (directory / "generation_config.json").write_text("{}")
    names = sorted(weights)
    if shards == 1:
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    places = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        save_file({name: weights[name] for name in part}, directory / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in weights.values())}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def doran_adapters(weights, targets=None, kinds=None, seed=5, **options):
    """Adapters of these weights that are away from their start, with the config."""
    kinds = kinds or {}
    config = DoranConfig(**{"rank": 4, "target_modules": list(targets or TARGETS), **options})
    builder = make_factor_builder(config)
    adapters = {}
    torch.manual_seed(seed)
    for name in targets or TARGETS:
        d_out, d_in = to_matrix(weights[f"{name}.weight"], kinds.get(name, "linear")).shape
        spec = LayerSpec(
            name, block_of(name, config.block_pattern), d_in, d_out, config.rank_for(name), config.scaling_for(name)
        )
        adapters[name] = DoranAdapter(config, spec, builder(spec)).eval()
    with torch.no_grad():
        for name, adapter in adapters.items():
            matrix = to_matrix(weights[f"{name}.weight"], kinds.get(name, "linear")).float()
            for parameter in adapter.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
            adapter.magnitude.copy_(matrix.norm(dim=1) * (1.1 + 0.3 * torch.rand(matrix.shape[0])))
    return config, adapters


def trainable_record(weights, targets=None, kinds=None, extra=None, fingerprint=True, task_type="CAUSAL_LM", **options):
    """A TrainableAdapter record and the live adapters that it holds."""
    config, adapters = doran_adapters(weights, targets, kinds, **options)
    items = [(name, to_matrix(weights[f"{name}.weight"], (kinds or {}).get(name, "linear"))) for name in adapters]
    record = TrainableAdapter(
        config=config,
        modules=tensors_by_layer(adapters),
        extra=extra or {},
        base_fingerprint=fingerprint_weights(items) if fingerprint else None,
        base_model="made/llama",
        task_type=task_type,
        module_kinds=kinds or {},
    )
    return record, adapters


def write_adapter(directory, weights, **options):
    """A trainable adapter directory; returns the live adapters."""
    record, adapters = trainable_record(weights, **options)
    write_trainable(record, directory)
    return adapters


def write_peft(directory, tensors, **config):
    """A PEFT LoRA directory as PEFT would write it, from tensors without the key prefix."""
    directory.mkdir(parents=True, exist_ok=True)
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_dora": False, "bias": "none"} | config
    (directory / "adapter_config.json").write_text(json.dumps(fields))
    save_file(
        {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()},
        directory / "adapter_model.safetensors",
    )
    return directory


def lora_tensors(name, d_out, d_in, rank=4, seed=7, magnitude=None):
    """lora_A and lora_B (and a magnitude) of one module."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"{name}.lora_A.weight": torch.randn(rank, d_in, generator=generator),
        f"{name}.lora_B.weight": torch.randn(d_out, rank, generator=generator),
    }
    if magnitude is not None:
        tensors[f"{name}.lora_magnitude_vector"] = magnitude
    return tensors


def folder_bytes(directory):
    """Contents of all files below a directory, by relative path."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def hidden(folder):
    """Names in a directory that start with a dot, as those of unfinished writes do."""
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]
