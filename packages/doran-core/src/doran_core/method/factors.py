"""Sources of A and B: static parameters, or the paper's small networks with shared trunks.

A custom generator is any ``nn.Module`` whose call without arguments returns ``(A, B)``, see :class:`FactorGenerator`.
Pass a function that builds it to ``adapt(..., factor_builder=...)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from doran_core.errors import ConfigError
from doran_core.method.config import DoranConfig
from doran_core.method.factor_start import first_output_weight, first_values
from doran_core.method.shared_network import NetworkHolder, SharedNetwork
from doran_core.support.sharding import carried, read

__all__ = [
    "FactorBuilder",
    "FactorGenerator",
    "FactorTrunk",
    "GeneratedFactors",
    "LayerSpec",
    "StaticFactors",
    "factor_penalty",
]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "leaky_relu": F.leaky_relu,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}


@dataclass(frozen=True)
class LayerSpec:
    """The facts about a layer that its generator gets.

    Attributes:
        name: the module's name in the model.
        block: the block that it belongs to, "" if its name has no number.
        d_in: columns of the weight seen as ``[d_out, d_in]``.
        d_out: rows of the weight.
        rank: r.
        scaling: g.
        experts: number of matrices ``[d_out, d_in]`` in a stack, each with its own factors; None for an ordinary
            layer.
    """

    name: str
    block: str
    d_in: int
    d_out: int
    rank: int
    scaling: float
    experts: int | None = None

    @property
    def stacked(self) -> tuple[int, ...]:
        """The extra first dimension of a stack's tensors, if any."""
        return () if self.experts is None else (self.experts,)


@runtime_checkable
class FactorGenerator(Protocol):
    """The interface of a source of factors: an ``nn.Module`` that can be called without arguments."""

    def __call__(self) -> tuple[Tensor, Tensor]:
        """``(A [r, d_in], B [d_out, r])``; B must be 0 at the start, so that training starts at the base model."""
        ...


FactorBuilder = Callable[[LayerSpec], nn.Module]
"""Makes the factor generator of one layer."""


def factor_penalty(A: Tensor, B: Tensor) -> Tensor:
    """Mean square of A ``[r, d_in]`` plus that of B ``[d_out, r]``, a scalar."""
    return A.square().mean() + B.square().mean()


class StaticFactors(nn.Module):
    """A and B as parameters, with LoRA's start: A uniform in ``+-1/sqrt(d_in)``, B zero."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        bound = 1.0 / math.sqrt(spec.d_in)
        A = torch.empty(*spec.stacked, spec.rank, spec.d_in, dtype=torch.float32)
        self.A = nn.Parameter(A.uniform_(-bound, bound))
        self.B = nn.Parameter(torch.zeros(*spec.stacked, spec.d_out, spec.rank, dtype=torch.float32))

    def forward(self) -> tuple[Tensor, Tensor]:
        return carried(self.A), carried(self.B)


# FSDP, ZeRO and accelerate gather parameters around the forward of the module that owns them. So each parameter is used
# in that forward only.


class _Weights(nn.ParameterList):
    """The weights of a network's hidden layers."""

    __call__ = nn.Module.__call__  # nn.ParameterList's own raises

    def forward(self, embedding: Tensor, features: Callable[[Tensor, Sequence[Tensor]], Tensor]) -> Tensor:
        return features(embedding, [read(weight) for weight in self])


class _SharedOutputs(nn.ParameterDict):
    """Shared last layers of a group, by size."""

    __call__ = nn.Module.__call__  # nn.ParameterDict's own raises

    def forward(self, size: int, hidden: Tensor) -> Tensor:
        weight = read(self[str(size)])
        return F.linear(hidden.to(weight), weight)


class _HiddenLayers(nn.Module):
    """Embedding and all layers but the last of one factor's network: ``H [r, h] = act(E @ W1.T / sqrt(e)) / h``.

    The paper gives neither scales nor first values; both are our choice, and :mod:`doran_core.method.factor_start` has
    the values. A hidden layer divides by the square root of the number of its inputs, and the last layer's inputs are
    divided by their number. With these scales, a step of Adam moves H about as far for all widths.
    """

    def __init__(self, rank: int, config: DoranConfig) -> None:
        super().__init__()
        self.activation = _ACTIVATIONS[config.activation]
        widths = [config.embedding_width] + [config.hidden_dim or rank] * (config.depth - 1)
        embedding, *weights = first_values(config.generator_init, rank, widths, self.activation)
        self.embedding = nn.Parameter(embedding)
        self.weights = _Weights(map(nn.Parameter, weights))

    def forward(self, offset: Tensor | None) -> Tensor:
        embedding = read(self.embedding, 2)
        embedding = embedding if offset is None else embedding + offset.to(embedding)
        hidden: Tensor = self.weights(embedding, self.features)
        return hidden

    @torch.no_grad()
    def start(self, offset: Tensor | None) -> Tensor:
        """H in float64 on the CPU, with the same bits for every device of the network; meta on the meta device."""
        if self.embedding.is_meta:
            return self.forward(offset)
        embedding = self.embedding.double().cpu()
        embedding = embedding if offset is None else embedding + offset.double().cpu()
        return self.features(embedding, [weight.double().cpu() for weight in self.weights])

    def features(self, embedding: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """H ``[..., r, h]`` from embeddings ``[..., r, e]`` and weights ``[..., h, e]``, of one network or of many."""
        hidden = embedding
        for weight in weights:
            hidden = self.activation(hidden @ weight.mT / math.sqrt(weight.shape[-1]))
        return hidden / hidden.shape[-1]


class FactorTrunk(SharedNetwork):
    """The shared parts of a sharing group: embeddings, first layers and, with ``share_output``, last layers.

    Args:
        rank: r of the group; layers of another rank belong to another group.
        config: the method's options.
    """

    def __init__(self, rank: int, config: DoranConfig) -> None:
        super().__init__()
        self.rank = rank
        self.A = _HiddenLayers(rank, config)
        self.B = _HiddenLayers(rank, config)
        self.output_A = _SharedOutputs()
        self.output_B = _SharedOutputs()

    def forward(self, offset: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Hidden features of A and of B, ``[r, h]`` each; ``offset`` ``[e]`` is added to the embeddings."""
        return self.A(offset), self.B(offset)

    def add_shared_outputs(self, d_in: int, d_out: int) -> None:
        """Create the shared W2 for layers of this size, unless the group has them."""
        w2_A, w2_B = self.first_outputs(d_in, d_out, None)
        if str(d_in) not in self.output_A:
            self.output_A[str(d_in)] = w2_A
        if str(d_out) not in self.output_B:
            self.output_B[str(d_out)] = w2_B

    def first_outputs(
        self, d_in: int, d_out: int, offset: Tensor | None, experts: int | None = None
    ) -> tuple[nn.Parameter, nn.Parameter]:
        """W2 of A ``[d_in, h]`` and of B ``[d_out, h]`` at the start, on the trunk's device; or of each expert."""
        hidden, device = self.A.start(offset), self.A.embedding.device
        if experts is None:
            w2_A = first_output_weight(hidden, d_in).to(device)
        else:
            w2_A = torch.stack([first_output_weight(hidden, d_in).to(device) for _ in range(experts)])
        w2_B = torch.zeros(*w2_A.shape[:-2], d_out, hidden.shape[1], dtype=w2_A.dtype, device=device)
        return nn.Parameter(w2_A), nn.Parameter(w2_B)


class GeneratedFactors(NetworkHolder):
    """``A = H_A @ W2_A.T`` and ``B = (H_B @ W2_B.T).T`` with H from a trunk that other layers may share.

    Each expert of a stack has a W2 of its own, ``[experts, d_in, h]`` and ``[experts, d_out, h]``; all experts share
    the trunk. With the default width ``h = r`` an expert has as many parameters of its own as with static factors.

    Every layer of a sharing group registers the trunk, see :class:`~doran_core.method.shared_network.SharedNetwork`.

    Args:
        spec: the layer.
        config: the method's options.
        trunk: the group's trunk.
        block_embedding: holder of the block's embedding ``[e]``, for ``sharing="model"``, or None.
    """

    def __init__(
        self,
        spec: LayerSpec,
        config: DoranConfig,
        trunk: FactorTrunk,
        *,
        block_embedding: BlockEmbedding | None = None,
    ) -> None:
        super().__init__()
        if trunk.rank != spec.rank:
            raise ConfigError(f"{spec.name}: rank {spec.rank} cannot use a trunk of rank {trunk.rank}")
        self.trunk = trunk
        self.block_embedding = block_embedding
        self.d_in, self.d_out = spec.d_in, spec.d_out
        self.share_output = config.share_output
        if self.share_output and spec.experts is not None:
            raise ConfigError(
                f"{spec.name}: share_output=True would give all experts the same factors; set share_output=False"
            )
        if self.share_output:
            trunk.add_shared_outputs(spec.d_in, spec.d_out)
            return
        offset = None if block_embedding is None else block_embedding.vector
        self.w2_A, self.w2_B = trunk.first_outputs(spec.d_in, spec.d_out, offset, spec.experts)

    def _hidden(self) -> tuple[Tensor, Tensor]:
        block = self.block_embedding
        hidden: tuple[Tensor, Tensor] = self.trunk(None if block is None else block())
        return hidden

    def forward(self) -> tuple[Tensor, Tensor]:
        hidden_A, hidden_B = self._hidden()
        if self.share_output:
            trunk = self.trunk
            return trunk.output_A(self.d_in, hidden_A), trunk.output_B(self.d_out, hidden_B).T
        w2_A, w2_B = read(self.w2_A), read(self.w2_B)
        # A trunk may have another device or precision than this layer.
        if w2_A.dim() == 3:
            return hidden_A.to(w2_A) @ w2_A.mT, w2_B @ hidden_B.to(w2_B).mT
        return F.linear(hidden_A.to(w2_A), w2_A), F.linear(w2_B, hidden_B.to(w2_B))

    @staticmethod
    def joined(layers: Sequence[GeneratedFactors]) -> tuple[Tensor, Tensor]:
        """``A^T [d_in, r]`` of all layers, concatenated, and their B ``[d_out, r]``; for layers with their own W2.

        Consecutive layers with the same features share one product.
        """
        groups: list[list[GeneratedFactors]] = []
        for layer in layers:
            first = groups[-1][0] if groups else None
            if first is None or first.trunk is not layer.trunk or first.block_embedding is not layer.block_embedding:
                groups.append([])
            groups[-1].append(layer)
        parts = []
        for group in groups:
            hidden_A, hidden_B = group[0]._hidden()
            w2_A = torch.cat([read(layer.w2_A) for layer in group])
            w2_B = torch.cat([read(layer.w2_B) for layer in group])
            parts.append((F.linear(w2_A, hidden_A.to(w2_A)), F.linear(w2_B, hidden_B.to(w2_B))))
        return torch.cat([A for A, _ in parts]), torch.cat([B for _, B in parts])


class BlockEmbedding(SharedNetwork):
    """The vector ``[e]`` that identifies a block in a model-wide trunk.

    The vector starts at 0, so every block's features start close to the identity; the blocks' gradients then make them
    differ.
    """

    def __init__(self, config: DoranConfig) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(config.embedding_width, dtype=torch.float32))
        if config.generator_init == "normal":
            nn.init.normal_(self.vector)

    def forward(self) -> Tensor:
        return carried(self.vector)
