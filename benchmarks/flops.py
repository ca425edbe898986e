"""Floating-point operations of a step: counted, by formula, and what is needed at least.

Two independent answers that must agree: `counter()` watches every operation torch runs, `packed_flops` and
`padded_flops` multiply out what fastdpo's and TRL's step should cost. Both count a multiply-add as two and attention as
full rectangles of queries x keys, its backward as five products for two, as torch's counter does, whether or not a
kernel skips the causal half. A bias is no product and counts nothing.

`needed_flops` is what MFU goes by, for every contender alike: the prompt once, nothing computed twice, the causal half
of attention only.

D hidden, V vocabulary, r LoRA rank (None: all weights train), T tokens a pair (prompt once), N response tokens a pair.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from typing import TYPE_CHECKING, Any

from benchmarks.models import Model
from benchmarks.workload import PairLengths

if TYPE_CHECKING:
    import torch
    from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Passes:
    """One pass of each kind over the same rows, of a model with LoRA adapters and a frozen head, or all of it trained.

    A frozen linear of W weights costs 2 W T forward and 2 W T backward (dX only: no dW). LoRA's factors train: forward
    2 r (in + out) T, backward twice that. A linear that trains costs another 2 W T backward, a head that trains another
    product. Head: 2 V D N a product.
    """

    policy_forward: float
    backward: float
    reference_forward: float
    head: float  # one product
    first_inputs: float  # gradients by the first layer's inputs, part of `backward`; 0 where embeddings want them
    head_weight: float  # the head's product for its own gradient

    @classmethod
    def of(
        cls,
        model: Model,
        lora_rank: int | None,
        tokens: int,
        scored: int,
        keys: float,
        attention: float,
        unread: int = 0,
    ) -> Passes:
        """`keys`: products of queries with keys; `attention`: the backward's attention over the forward's; `unread`:
        rows that the last block's MLP leaves out.
        """
        layers, linears = model.num_hidden_layers, model.linears
        mlp = [linears[name] for name in ("gate_proj", "up_proj", "down_proj")]
        base = 2.0 * tokens * layers * sum(i * o for i, o in linears.values()) - 2.0 * unread * sum(
            i * o for i, o in mlp
        )
        full, rank = lora_rank is None, lora_rank or 0
        factors = 2.0 * rank * (tokens * layers * sum(map(sum, linears.values())) - unread * sum(map(sum, mlp)))
        scores = 4.0 * model.hidden_size * layers * keys  # and their product with the values
        inputs = [linears[name] for name in ("q_proj", "k_proj", "v_proj")]
        first = 0.0 if full else 2.0 * tokens * sum(i * o + rank * i for i, o in inputs)
        head = 2.0 * model.vocab_size * model.hidden_size * scored
        backward = (2 if full else 1) * base + 2 * factors + attention * scores
        return cls(base + factors + scores, backward, base + scores, head, first, head if full else 0.0)


def packed_flops(
    pairs: list[PairLengths], model: Model, lora_rank: int | None, reference: bool, checkpointing: bool = False
) -> float:
    """One epoch of fastdpo over packed pairs; `reference` says whether the reference runs too.

    Head: logits and dH, and dW where it trains. Under LoRA nothing below the first layer trains, so its inputs need no
    gradient.
    """
    passes = _packed(pairs, model, lora_rank, sum(map(_rectangles, pairs)), 2.5)
    total = passes.policy_forward + passes.backward + 2 * passes.head + passes.head_weight - passes.first_inputs
    total += passes.reference_forward + passes.head if reference else 0
    return total + (passes.policy_forward if checkpointing else 0)


def needed_flops(pairs: list[PairLengths], model: Model, lora_rank: int | None, reference: bool) -> float:
    """The least of one epoch: `packed_flops` with half of the attention, its backward four products for two."""
    passes = _packed(pairs, model, lora_rank, sum(map(_triangles, pairs)), 2.0)
    total = passes.policy_forward + passes.backward + 2 * passes.head + passes.head_weight - passes.first_inputs
    return total + (passes.reference_forward + passes.head if reference else 0)


def _packed(pairs: list[PairLengths], model: Model, lora_rank: int | None, keys: float, attention: float) -> Passes:
    """The head reads a pair's last prompt token for both responses, and of each response all tokens but the last."""
    scored = sum(pair.chosen + pair.rejected for pair in pairs)
    unread = sum(pair.prompt + 1 for pair in pairs)
    return Passes.of(model, lora_rank, sum(pair.prompt for pair in pairs) + scored, scored, keys, attention, unread)


def _rectangles(pair: PairLengths) -> int:
    """Queries x keys: prompt and chosen over themselves, then rejected over prompt and rejected."""
    first = pair.prompt + pair.chosen
    return first * first + pair.rejected * (pair.prompt + pair.rejected)


def _triangles(pair: PairLengths) -> float:
    """The same where a query sees itself and what is before it."""
    first, second = pair.prompt + pair.chosen, pair.rejected
    return first * (first + 1) / 2 + second * pair.prompt + second * (second + 1) / 2


def padded_flops(
    pairs: list[PairLengths],
    model: Model,
    lora_rank: int | None,
    micro_batch: int,
    reference: bool,
    checkpointing: bool,
    all_rows: bool,
) -> float:
    """One epoch of TRL, both sides of every pair padded to the longest of their micro-batch; rows in training order.

    The head computes its logits again in the backward: three products of the policy, one of the reference. Without
    Triton it takes `all_rows`. Checkpointing runs a layer's forward again, and wants gradients by the first one's
    inputs.
    """
    tokens, keys = 0, 0
    for batch, longest in _padded(pairs, micro_batch):
        tokens += 2 * len(batch) * longest
        keys += 2 * len(batch) * longest * longest
    scored = padded_positions(pairs, micro_batch) if all_rows else sum(pair.chosen + pair.rejected for pair in pairs)
    passes = Passes.of(model, lora_rank, tokens, scored, keys, 2.5)
    total = passes.policy_forward + passes.backward + 3 * passes.head + passes.head_weight
    total += passes.policy_forward if checkpointing else -passes.first_inputs
    return total + (passes.reference_forward + passes.head if reference else 0)


def padded_reference_flops(
    pairs: list[PairLengths], model: Model, lora_rank: int | None, micro_batch: int, all_rows: bool
) -> float:
    """The reference of the same epoch alone, as TRL precomputes it."""
    both = (padded_flops(pairs, model, lora_rank, micro_batch, on, False, all_rows) for on in (True, False))
    return next(both) - next(both)


def counter() -> FlopCounterMode:
    """torch's counter, taught what it does not know: the CPU's attention kernel, and how TRL's LM head accumulates.

    On a CPU the head's backward ends in addmm_, which torch 2.13 does not count: a third of the head's policy work. On
    a GPU it ends in addmm with an out_dtype, on which torch's own formula raises a TypeError. A GPU's attention kernels
    are counted by the same rule as the CPU's, whatever this version of torch makes of grouped queries. bitsandbytes has
    an operation of its own for products with 4-bit weights.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    aten: Any = torch.ops.aten
    mapping: dict[Any, Any] = {aten.addmm: _addmm, aten.addmm_: _addmm}
    for kernel in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention"):
        mapping[getattr(aten, f"_scaled_dot_product_{kernel}")] = _attention_forward
        mapping[getattr(aten, f"_scaled_dot_product_{kernel}_backward")] = _attention_backward
    if find_spec("bitsandbytes") is not None:
        import bitsandbytes  # noqa: F401 (registers it)

        mapping[torch.ops.bitsandbytes.gemm_4bit] = _product_in_4_bits
    return FlopCounterMode(display=False, custom_mapping=mapping)


def _addmm(_sum: torch.Size, left: torch.Size, right: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def _product_in_4_bits(left: torch.Size, _packed: torch.Size, shape: Any, *_: Any, **__: Any) -> int:
    return 2 * prod(left) * shape[0]


def _attention_forward(query: torch.Size, key: torch.Size, *_: Any, **__: Any) -> int:
    batch, heads, queries, width = query
    return 4 * batch * heads * queries * key[2] * width


def _attention_backward(_grad: torch.Size, query: torch.Size, key: torch.Size, *_: Any, **__: Any) -> int:
    """Five products: the scores again, then dV, dP, dQ and dK."""
    return 5 * _attention_forward(query, key) // 2


def _padded(pairs: list[PairLengths], micro_batch: int) -> Iterable[tuple[list[PairLengths], int]]:
    for start in range(0, len(pairs), micro_batch):
        batch = pairs[start : start + micro_batch]
        yield batch, max(pair.prompt + max(pair.chosen, pair.rejected) for pair in batch)


def padded_positions(pairs: list[PairLengths], micro_batch: int) -> int:
    """Positions TRL scores in one pass: both sides of every pair, padded to their micro-batch's longest."""
    return sum(2 * len(batch) * (longest - 1) for batch, longest in _padded(pairs, micro_batch))
