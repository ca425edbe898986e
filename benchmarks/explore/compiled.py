"""torch.compile of the blocks (`torch_compile=True`) beside the blocks as they are, and beside the fused kernels.

A step of the benchmarks' model is timed with blocks compiled and not (on a GPU: fused), in turn; then the bytes are
counted that a block of Llama-3.1-8B under LoRA moves, weights and attention left out: operation by operation, with the
fused kernels (what goes in and out of each, as on an H200), and as inductor fuses, by its own count.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._inductor import config as inductor
from torch._inductor.graph import GraphLowering
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from benchmarks.device import CPU, CUDA, DEVICES, Device
from benchmarks.explore.host import Asked, asking
from benchmarks.explore.stepping import Stepping
from benchmarks.models import MODELS
from benchmarks.workload import PROFILES, build_model, pair_lengths, room_for
from fastdpo.compiled import compiled_blocks
from fastdpo.data import TokenPair
from fastdpo.model import base_model
from fastdpo.patching import patched

ROUNDS = 7
TOKENS = 64, 128  # what does not grow with them falls out of the difference


def kept_bytes(run: Stepping, batch: Any) -> int:
    """What autograd keeps of a forward, weights left out."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in run.policy.state_dict().values()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run.policy(batch.microbatches[0])
    total = sum(kept.values())
    del result
    return total


def stepped(device: Device) -> list[dict[str, Any]]:
    """Medians of a step in turn, seconds to compile, and what a forward keeps."""
    model, lengths = MODELS[device.model], pair_lengths(PROFILES["hh-rlhf"], 8)
    pairs = [TokenPair([5] * one.prompt, [6] * one.chosen, [7] * one.rejected) for one in lengths]
    built = [Stepping(build_model(model, room_for(lengths), device.dtype, device.place)) for _ in range(2)]
    plain, compiled = built
    fused = nullcontext() if device is CPU else patched([plain.policy.model])
    laps: dict[str, list[float]] = {"as they are" if device is CPU else "fused": [], "compiled": []}
    with fused, compiled_blocks([compiled.policy], None, None):
        for _ in range(ROUNDS + 1):
            for name, run in zip(laps, built, strict=True):
                device.wait()
                start = time.perf_counter()
                run.backward(run.batch(pairs))
                device.wait()
                laps[name].append(time.perf_counter() - start)
        kept = [kept_bytes(run, run.batch(pairs)) for run in built]
    return [
        {"blocks": name, "first step, s": seconds[0], "step, s": median(seconds[1:]), "kept, MiB": size / 2**20}
        for (name, seconds), size in zip(laps.items(), kept, strict=True)
    ]


class Traffic(TorchDispatchMode):
    """Bytes in and out of operations that are neither attention nor views."""

    moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name()
        apart = ("attention", "empty", "detach", "_unsafe_view", "alias")
        if not func.is_view and not any(word in name for word in apart):
            self.moved += _bytes((args, kwargs, result))
        return result


def _bytes(values: Any) -> int:
    return sum(one.numel() * one.element_size() for one in tree_leaves(values) if isinstance(one, Tensor))


@contextmanager
def counting() -> Iterator[list[int]]:
    """-> bytes of each Triton kernel's arguments, and of each graph that inductor compiles."""
    found: list[int] = []
    launch, generate = JITFunction.run, GraphLowering.codegen

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(_bytes(args))
        return launch(self, *args, **kwargs)

    def codegen(self: Any) -> Any:
        code = generate(self)
        names = [(str(getattr(node.node, "python_kernel_name", "")), node) for node in self.scheduler.nodes]
        found.append(sum(node.get_read_write_buffers_sizes() for name, node in names if "attention" not in name))
        return code

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", run))
        stack.enter_context(mock.patch.object(GraphLowering, "codegen", codegen))
        stack.enter_context(inductor.patch(force_disable_caches=True))
        yield found


def of_block(run: Stepping, tokens: int, compiled: bool) -> int:
    """Bytes of one block forward and backward under autocast, after a first in which fused kernels check themselves."""
    model: Any = base_model(run.policy.model).model
    layer = model.layers[0]
    hidden = torch.randn(1, tokens, model.config.hidden_size, device=run.place).bfloat16().requires_grad_()
    table = model.rotary_emb(hidden, torch.arange(tokens, device=run.place)[None])
    call = torch.compile(layer, dynamic=False) if compiled else layer

    def both_ways() -> None:
        with torch.autocast(run.place.split(":")[0], torch.bfloat16):
            result = call(hidden, position_embeddings=table, attention_mask=None)
        result.backward(torch.ones_like(result))

    if not compiled:  # inductor's count is of what it compiles, which is the first call
        both_ways()
        hidden.grad = None
        layer.zero_grad()
    with counting() as found, nullcontext() if compiled else Traffic() as operations:
        both_ways()
    return sum(found) + (operations.moved if operations else 0)


def moved(device: Device) -> list[dict[str, Any]]:
    shape = replace(MODELS["llama-3.1-8b"], num_hidden_layers=1, vocab_size=512)
    run = Stepping(build_model(shape, max(TOKENS), "bfloat16", device.place))

    def a_token(compiled: bool = False) -> float:
        few, many = (of_block(run, tokens, compiled) for tokens in TOKENS)
        return (many - few) / (TOKENS[1] - TOKENS[0])

    least = 4.0 * sum(i + o for i, o in shape.linears.values())  # in and out of the frozen products, both ways
    found = {"its products alone": least, "operation by operation": a_token(), "inductor": a_token(compiled=True)}
    with asking(Asked(run.policy, {}), device):
        found["fused kernels"] = a_token()
    assert CUDA.kernels.expected is not None
    gpu, flops, rate = CUDA.kernels.expected
    products = 4.0 * sum(i * o for i, o in shape.linears.values()) / flops  # forward, and dX
    return [
        {"block": name, "bytes a token": size, f"of its products on an {gpu}": size / rate / products}
        for name, size in found.items()
    ]


def measure(options: Namespace) -> dict[str, list[dict[str, Any]]]:
    device = DEVICES[options.device]
    return {"a step": stepped(device), "an 8B block beside its products": moved(device)}
