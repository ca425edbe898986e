"""Policy and reference through a layer together, so that 4-bit weights are dequantised once for both: what it can save.

By roofline: on a GPU at the rates that it shows first, without one at those expected of an H200. A step runs three
passes over the frozen layers (reference, policy, backward), four with checkpointing, and dequantises each weight in
each: half a byte read and two written. Going through a layer together saves one of them while the reference is online,
that is in the first epoch.

Two ways: rows of both in one product, twice as many; or block by block in turn, the block's dequantised weights kept in
between, products as they are. The second keeps the bits of both, and takes room for a block in place of one matrix.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from benchmarks.device import CUDA
from benchmarks.explore.float8 import base_share
from benchmarks.measure import METERS, ceilings
from benchmarks.models import MODELS, NF4_BYTES, Model, quantised
from benchmarks.roofline import Ceilings, Work

TOKENS = tuple(2**power for power in range(9, 16))
EPOCHS = 3
PROFILE = "ultrafeedback"


def dequantising(model: Model) -> Work:
    """All layers' weights once: codes and scales read, 2 bytes written for each."""
    return Work(0.0, _weights(model) * (NF4_BYTES + 2))


def products(model: Model, tokens: int) -> Work:
    """One pass over the frozen layers: each weight read again, inputs read and outputs written."""
    rows = model.num_hidden_layers * sum(i + o for i, o in model.linears.values())
    return Work(2.0 * tokens * _weights(model), 2.0 * (_weights(model) + tokens * rows))


def _weights(model: Model) -> int:
    return model.num_hidden_layers * sum(i * o for i, o in model.linears.values())


def saving(model: Model, tokens: int, checkpointing: bool, rates: Ceilings) -> dict[str, Any]:
    """Of a micro-batch. What is no product with a frozen layer takes its FLOPs' time."""
    passes = 4 if checkpointing else 3
    share, needed = base_share(model, PROFILE)
    once, product = dequantising(model).seconds(rates), products(model, tokens).seconds(rates)
    step = passes * (once + product) + (1 - share) * needed * tokens / rates.flops
    layer = max(i * o for i, o in model.linears.values())
    return {
        "model": model.name,
        "tokens": tokens,
        "checkpointing": checkpointing,
        "dequantising once, ms": 1e3 * once,
        "of its products": once / product,
        "step, ms": 1e3 * step,
        "dequantising, of the step": passes * once / step,
        "saved in the first epoch": once / step,
        f"saved over {EPOCHS} epochs": once / (EPOCHS * step - (EPOCHS - 1) * (once + product)),
        "a block kept, MiB more": 2 * (_weights(model) / model.num_hidden_layers - layer) / 2**20,
    }


def measure(options: Namespace) -> dict[str, list[dict[str, Any]]]:
    assert CUDA.kernels.expected is not None
    _, flops, moved = CUDA.kernels.expected
    measured = options.device == CUDA.name
    rates = ceilings(METERS[CUDA.place](), CUDA.kernels) if measured else Ceilings(flops, moved)
    models = [MODELS[quantised(name)] for name in ("mistral-7b", "llama-3.1-8b")]
    rows = [saving(*case, rates) for case in ((m, t, c) for m in models for c in (False, True) for t in TOKENS)]
    return {"by roofline": rows}
