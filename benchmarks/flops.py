"""Floating-point operations of a step, counted and by arithmetic.

Two independent answers that must agree: `counter()` watches every operation torch runs, `formula_flops` multiplies out
what the packed, prefix-shared step should cost. Both count a multiply-add as two and attention as full rectangles of
queries x keys, as torch's counter does, whether or not a kernel skips the causal half.

D hidden, V vocabulary, r LoRA rank, T tokens a pair (prompt once), N response tokens a pair.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.workload import PairLengths, layer_linears

if TYPE_CHECKING:
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig


def formula_flops(pairs: list[PairLengths], config: LlamaConfig, lora_rank: int, reference: bool) -> int:
    """One epoch of LoRA DPO over packed pairs with a frozen head; `reference` says whether the reference runs too.

    A frozen linear of W weights costs 2 W T forward and 2 W T backward (dX only: no dW). LoRA's factors train: forward
    2 r (in + out) T, backward twice that. Head: logits and dH, 2 V D N each; no third product. Reference: forward only.
    """
    linears = layer_linears(config)
    weights = config.num_hidden_layers * sum(i * o for i, o in linears.values())
    factors = config.num_hidden_layers * lora_rank * sum(i + o for i, o in linears.values())
    tokens = sum(pair.prompt + pair.chosen + pair.rejected for pair in pairs)
    responses = sum(pair.chosen + pair.rejected for pair in pairs)
    rectangles = sum(_attention_rectangles(pair) for pair in pairs)
    queries = linears["q_proj"][1]
    attention = 4 * queries * config.num_hidden_layers * rectangles  # scores and their product with the values
    head = 2 * config.vocab_size * config.hidden_size * responses

    # Nothing below the first layer trains, so its three input projections need no dX, from base or factors.
    first = [linears[name] for name in ("q_proj", "k_proj", "v_proj")]
    unneeded = 2 * tokens * sum(i * o + lora_rank * i for i, o in first)
    forward = 2 * weights * tokens + 2 * factors * tokens + attention + head
    backward = 2 * weights * tokens + 4 * factors * tokens + 5 * attention // 2 + head - unneeded
    reference_forward = 2 * weights * tokens + attention + head
    return forward + backward + (reference_forward if reference else 0)


def _attention_rectangles(pair: PairLengths) -> int:
    """Queries x keys: prompt and chosen over themselves, then rejected over prompt and rejected."""
    first = pair.prompt + pair.chosen
    return first * first + pair.rejected * (pair.prompt + pair.rejected)


def counter() -> FlopCounterMode:
    """torch's counter, taught what it does not know: the CPU's attention kernel, and how TRL's LM head accumulates.

    On a CPU the head's backward ends in addmm_, which torch 2.13 does not count: a third of the head's policy work. On
    a GPU it ends in addmm with an out_dtype, on which torch's own formula raises a TypeError. A GPU's attention kernels
    are counted by the same rule as the CPU's, whatever this version of torch makes of grouped queries.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    aten: Any = torch.ops.aten
    mapping: dict[Any, Any] = {aten.addmm: _addmm, aten.addmm_: _addmm}
    for kernel in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention"):
        mapping[getattr(aten, f"_scaled_dot_product_{kernel}")] = _attention_forward
        mapping[getattr(aten, f"_scaled_dot_product_{kernel}_backward")] = _attention_backward
    return FlopCounterMode(display=False, custom_mapping=mapping)


def _addmm(_sum: torch.Size, left: torch.Size, right: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def _attention_forward(query: torch.Size, key: torch.Size, *_: Any, **__: Any) -> int:
    batch, heads, queries, width = query
    return 4 * batch * heads * queries * key[2] * width


def _attention_backward(_grad: torch.Size, query: torch.Size, key: torch.Size, *_: Any, **__: Any) -> int:
    """Five products: the scores again, then dV, dP, dQ and dK."""
    return 5 * _attention_forward(query, key) // 2


def padded_positions(pairs: list[PairLengths], micro_batch: int) -> int:
    """Positions TRL scores in one pass: both sides of every pair, padded to their micro-batch's longest."""
    batches = [pairs[i : i + micro_batch] for i in range(0, len(pairs), micro_batch)]
    return sum(2 * len(batch) * (max(b.prompt + max(b.chosen, b.rejected) for b in batch) - 1) for batch in batches)


def head_flops(config: LlamaConfig, rows: int, passes: int) -> int:
    """`passes` products of `rows` hidden states with the LM head."""
    return passes * 2 * config.vocab_size * config.hidden_size * rows
