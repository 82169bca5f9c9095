"""The fingerprint of base weights: a short hash, by which an adapter made for other weights is refused.

The fingerprint is the same for a float32 checkpoint and its bf16 copy, because values are rounded to bf16 first. A
float16 or quantized copy has other values: an adapter made on such a copy records no fingerprint (None).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from doran_core.files.tensors import bytes_view

__all__ = ["combine_digests", "exact_digest", "fingerprint_weights", "sample_stride", "samples_digest", "weight_digest"]

SAMPLES_PER_WEIGHT = 65536
_VERSION = "doran-fingerprint-2"


def sample_stride(rows: int, columns: int) -> int:
    """The distance of the sampled elements in a flattened ``[rows, columns]``: at most 65536, from the first on.

    The stride shares no divisor with the number of columns, so the samples reach every column, if there are enough of
    them. A stride of 256 in 4096 columns would meet the same 16 columns in every row.
    """
    stride = max(1, -(-rows * columns // SAMPLES_PER_WEIGHT))
    while math.gcd(stride, columns) != 1:
        stride += 1
    return stride


def weight_digest(module: str, weight: Tensor) -> bytes:
    """Digest of one adapted weight.

    Args:
        module: its module's name as the adapter spells it.
        weight: ``[d_out, d_in]``; a transposed view is as good as a copy. A stack ``[experts, d_out, d_in]`` counts as
            its matrices one below the other.
    """
    rows, columns = math.prod(weight.shape[:-1]), weight.shape[-1]
    stride = sample_stride(rows, columns)
    if weight.is_contiguous():
        samples = weight.detach().view(-1)[::stride]
    else:  # a flattened copy would take the weight's memory once more
        indices = torch.arange(0, weight.numel(), stride, device=weight.device)
        samples = weight.detach()[torch.unravel_index(indices, weight.shape)]
    return samples_digest(module, (rows, columns), samples)


def exact_digest(module: str, weight: Tensor) -> bytes | None:
    """As :func:`weight_digest`; None for float16 and float64, which do not round to bf16 as the checkpoint does."""
    return weight_digest(module, weight) if weight.dtype in (torch.float32, torch.bfloat16, torch.float64) else None


def samples_digest(module: str, shape: tuple[int, int], samples: Tensor) -> bytes:
    """As :func:`weight_digest`, from the sampled values only."""
    digest = hashlib.sha256(f"{module}\0{shape[0]}\0{shape[1]}\0".encode())
    digest.update(bytes_view(samples.to(torch.bfloat16).cpu().contiguous()))
    return digest.digest()


def combine_digests(digests: Iterable[tuple[str, bytes]]) -> str:
    """The fingerprint from ``(module name, digest)`` pairs in any order."""
    total = hashlib.sha256(_VERSION.encode())
    for _, digest in sorted(digests):
        total.update(digest)
    return f"sha256:{total.hexdigest()}"


def fingerprint_weights(items: Iterable[tuple[str, Tensor]]) -> str:
    """Fingerprint of the adapted base weights.

    Args:
        items: module name and weight ``[d_out, d_in]`` of each adapted module, in any order.

    Returns:
        ``"sha256:"`` and 64 hexadecimal digits. Do not record one for float16 or quantized weights.
    """
    return combine_digests((module, weight_digest(module, weight)) for module, weight in items)
