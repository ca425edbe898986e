"""torch.compile of a model's blocks, where `torch_compile=True` asks for it.

Blocks are compiled one by one and not the model as a whole: they are alike, so one compilation serves them all, and
what differs between batches stays outside. Lengths are dynamic, so a batch of another size compiles nothing again.
Packed attention, whose segments are Python numbers, is called as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from fastdpo.attention import NAME, prefix_attention
from fastdpo.model import Policy, base_model


@contextmanager
def compiled_blocks(policies: Sequence[Policy], backend: str | None, mode: str | None) -> Iterator[None]:
    """Within it, the blocks of these policies' models run compiled, by `backend` (None: inductor) in its `mode`.

    Raises ValueError for a model without blocks that transformers could checkpoint, which is how they are found.
    """
    models = [base_model(policy.model) for policy in policies]
    blocks: list[Any] = [b for model in models for b in model.modules() if isinstance(b, GradientCheckpointingLayer)]
    if not blocks:
        raise ValueError(f"torch_compile=True finds no blocks to compile in {type(models[0]).__name__}: leave it off")
    AttentionInterface.register(NAME, torch.compiler.disable(prefix_attention))
    for block in blocks:
        block.compile(backend=backend or "inductor", mode=mode, dynamic=True)
    try:
        yield
    finally:
        AttentionInterface.register(NAME, prefix_attention)
        for block in blocks:
            block._compiled_call_impl = None  # what torch.nn.Module.compile sets
