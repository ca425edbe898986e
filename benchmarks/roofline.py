"""What token log-probs of an LM head cost at least: matrix products and bytes, and the time that a device needs for
them.

Legend: N scored rows, V vocabulary, D hidden size. One product of the hidden rows with the head is 2 N V D FLOP.
"""

from __future__ import annotations

from dataclasses import dataclass

FORWARD, FROZEN_HEAD, TRAINED_HEAD = "forward", "frozen head", "trained head"
# Logits; then the hidden rows' gradient from them; then the head's. Three is what keeping the N x V logits allows:
# whoever recomputes them instead does four, and can reach 75% at most.
PRODUCTS = {FORWARD: 1, FROZEN_HEAD: 2, TRAINED_HEAD: 3}


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches at best."""

    flops: float  # a second, in a large matrix product
    bytes: float  # a second, read and written, in a large copy


@dataclass(frozen=True)
class Work:
    """The least that must be computed and moved."""

    flops: float
    bytes: float

    def seconds(self, ceilings: Ceilings) -> float:
        """The larger of both times: no implementation runs much faster."""
        return max(self.flops / ceilings.flops, self.bytes / ceilings.bytes)


def head_work(shape: tuple[int, int, int], wants: str, itemsize: int) -> Work:
    """Every input read once, every result written once: fp32 log-probs, gradients in the dtype of their inputs."""
    rows, vocabulary, hidden = shape
    inputs = (rows + vocabulary) * hidden * itemsize + 8 * rows
    gradients = {FORWARD: 0, FROZEN_HEAD: rows, TRAINED_HEAD: rows + vocabulary}[wants] * hidden * itemsize
    return Work(PRODUCTS[wants] * 2.0 * rows * vocabulary * hidden, float(inputs + 4 * rows + gradients))
