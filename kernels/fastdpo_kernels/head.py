"""What the methods of `linear_logps` share: a head's options, and what a forward leaves behind.

A method is a module with two functions:

    forward(hidden, weight, bias, targets, options, wants) -> HeadForward
    backward(hidden, weight, bias, targets, saved, kept, grad_logps, options, needs) -> three gradients, in the dtypes
        that they were summed in: autograd makes them those of the leaves

Legend: N rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from torch import Tensor

STATS = ("entropy", "mean_logit", "is_top1", "log_sum_sq_probs")


class Wants(Enum):
    """What a forward prepares for: nothing, the gradient of a frozen head's input, or that of a head that trains."""

    VALUES = "values"
    HIDDEN_GRADIENT = "hidden gradient"
    ALL_GRADIENTS = "all gradients"


@dataclass(frozen=True)
class HeadOptions:
    """How logits become log-probs: everything of the head that is not a tensor."""

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    stats: tuple[str, ...] = ()
    workspace_bytes: int = 64 * 2**20

    @property
    def slope_factor(self) -> float:
        """dz/d(W h + b) without the softcap's part."""
        return self.logit_scale / self.temperature

    @property
    def of_kernels(self) -> dict[str, float | bool]:
        """As arguments of the Triton kernels."""
        return {
            "logit_scale": self.logit_scale,
            "softcap": 1.0 if self.softcap is None else self.softcap,
            "inverse_temperature": 1.0 / self.temperature,
            "HAS_SOFTCAP": self.softcap is not None,
        }


@dataclass
class HeadForward:
    """What a forward leaves behind."""

    logps: Tensor  # (N,)
    stats: dict[str, Tensor]  # each (N,)
    hidden_jacobian: Tensor | None = None  # (N, D) d logp_n / d h_n, where the method has it already
    saved: tuple[Tensor, ...] = field(default=())  # (N,) each, for the backward to recompute from
    kept: Tensor | None = None  # the logits or their gradient, where they fit; the backward may overwrite them
