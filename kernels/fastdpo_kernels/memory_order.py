"""Tensors that lie in memory as others do, so that the transposes around a kernel stay views."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def memory_order(x: Tensor) -> list[int]:
    """The dimensions but the last by their strides, largest first."""
    return sorted(range(x.ndim - 1), key=lambda dim: -x.stride(dim))


def empty_in_order(shape: Sequence[int], order: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised and dense, the dimensions in that order and the last side by side; no view of another tensor."""
    strides, stride = [1] * len(shape), max(1, shape[-1])
    for dim in reversed(order):
        strides[dim] = stride
        stride *= max(1, shape[dim])
    return torch.empty_strided(shape, strides, dtype=dtype, device=device)
