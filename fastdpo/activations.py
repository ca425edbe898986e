"""What the forward and backward of a micro-batch keep in memory: found by running the model on tensors without data.

The model is copied with as few blocks as show what each kind of block adds, its tensors replaced by fakes that have
shapes and no storage. The copy runs forward and backward in the code of a real run, with the attention kernels of the
card that is asked about, while every storage that the model's operations make is followed from its birth to its death.
Two batches of different size give a line: fixed bytes, and bytes a token. It takes one or two seconds for 8B
parameters, and neither a GPU nor weights.

What cannot be seen this way is what kernels allocate inside of themselves; `_INSIDE` has it for attention.

Legend: T tokens of a micro-batch, N of them scored, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
import logging
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fastdpo.attention import CannotPack, packed_calls
from fastdpo.attention_backends import Facts, pretend
from fastdpo.batch import Pair, PreferenceBatch, pack, pad
from fastdpo.model import Policy, backbone, base_model, checkpointing, input_embedding, output_head, without_dropout

ALIGNMENT = 512  # bytes: torch's CUDA allocator rounds every block up to it
TOKENS, PAIRS = 2048, 8  # of the smaller micro-batch: enough for its slope, and no more pairs than it takes


@dataclass(frozen=True)
class Line:
    """Bytes that grow with the tokens of a micro-batch."""

    fixed: float
    per_token: float

    def __call__(self, tokens: float) -> float:
        return self.fixed + self.per_token * tokens


@dataclass(frozen=True)
class Activations:
    """Bytes beside parameters and gradients, without those of the head's own kernels."""

    forward: Line  # at the most while the backbone runs forward
    at_head: Line  # alive while the head runs forward: autocast still has its copies of weights
    kept: Line  # alive between forward and backward
    attention: Line  # of those, what attention kernels gave: outputs and log-sum-exps
    backward: Line  # at the most while the blocks run backward
    last: Line  # at the most below the first block: the embedding's gradient
    packed: bool  # the model takes packed pairs; padded ones were run otherwise
    hidden_dtype: torch.dtype  # of what the head is given


def measure_activations(
    policy: Policy, pair: Pair, card: Facts, checkpoint: bool, packed: bool | None = None
) -> Activations:
    """What `policy`, on any device or none, keeps for micro-batches of pairs like this one on that card.

    packed: whether pairs are packed; None finds out. Raises ValueError for a model that does not run on fake tensors.
    """
    kinds = block_kinds(base_model(policy.model))
    firsts = [indices[0] for indices in kinds if indices]
    run = partial(_run, policy, pair, card, checkpoint)
    layers = len(firsts) or _text_config(base_model(policy.model)).num_hidden_layers
    packed, base = _first_run(run, firsts, layers, packed)
    few, many = (size.bytes.copy() for size in base)
    for indices in kinds:
        if len(indices) > 1:
            more = run(sorted([*firsts, indices[1]]), packed)
            few += (len(indices) - 1) * (more[0].bytes - base[0].bytes)
            many += (len(indices) - 1) * (more[1].bytes - base[1].bytes)
    slopes = (many - few) / (base[1].tokens - base[0].tokens)
    lines = [Line(float(b - s * base[0].tokens), float(s)) for b, s in zip(few, slopes, strict=True)]
    return Activations(*lines, packed=packed, hidden_dtype=base[0].hidden_dtype)


@dataclass(frozen=True)
class Measured:
    """One micro-batch."""

    bytes: np.ndarray  # in the order of Activations' lines
    tokens: int  # padding included
    hidden_dtype: torch.dtype
    attention_calls: int


def block_kinds(model: nn.Module) -> list[list[int]]:
    """Indices of the blocks, those together that have the same parameters and type; none where they are not found."""
    blocks, config = _blocks(model), _text_config(model)
    if blocks is None:
        return []
    types = getattr(config, "layer_types", None) or [""] * len(blocks)
    kinds: dict[Any, list[int]] = {}
    for index, block in enumerate(blocks):
        shapes = tuple((n, tuple(p.shape), p.dtype, p.requires_grad) for n, p in block.named_parameters())
        kinds.setdefault((type(block), types[index], shapes), []).append(index)
    return list(kinds.values())


def _first_run(
    run: Callable[[Sequence[int], bool], list[Measured]], blocks: Sequence[int], layers: int, packed: bool | None
) -> tuple[bool, list[Measured]]:
    """-> whether pairs are packed, and two sizes of micro-batch run so. Where it is not said, they are packed if every
    block hands its segments to attention; `find_layout`, which has weights, compares numbers, too.
    """
    if packed is not False:
        try:
            measured = run(blocks, True)
            if packed or measured[0].attention_calls == layers:
                return True, measured
        except CannotPack:
            pass
        except ValueError:
            if packed:
                raise
    return False, run(blocks, False)


def _text_config(model: Any) -> Any:
    return model.config.get_text_config()


def _blocks(model: Any) -> nn.ModuleList | None:
    layers = _text_config(model).num_hidden_layers
    lists = [m for m in backbone(model).modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
    return lists[0] if lists else None


def _run(
    policy: Policy, pair: Pair, card: Facts, checkpoint: bool, blocks: Sequence[int], packed: bool
) -> list[Measured]:
    """These blocks of the policy on fake tensors, with a few pairs and with twice as many."""
    pairs = [pair] * min(PAIRS, math.ceil(TOKENS / (len(pair.prompt) + len(pair.chosen) + len(pair.rejected))))
    with _quiet(), FakeTensorMode(allow_non_fake_inputs=True), ExitStack() as stack:
        try:
            copied = Policy(fake_copy(base_model(policy.model), blocks), policy.autocast, policy.noisy).train()
            if copied.asked_attention == "flash_attention_2":
                copied.asked_attention = None  # torch's own keeps the same, and takes tensors without data
            if not policy.noisy:
                stack.enter_context(without_dropout(copied))
            if checkpoint:
                stack.enter_context(checkpointing(copied, None))
            batches = [pack(every) if packed else pad(every) for every in (pairs, 2 * pairs)]
            return [measure_step(copied, batch, card) for batch in batches]
        except (CannotPack, torch.OutOfMemoryError):
            raise
        except Exception as failure:  # any model's code may stumble over tensors without data
            raise ValueError(
                f"the memory of {type(base_model(policy.model)).__name__} cannot be planned, as it does not run on "
                f"tensors without data ({type(failure).__name__}: {failure}): set max_tokens_per_microbatch"
            ) from failure


def fake_copy(model: Any, blocks: Sequence[int]) -> Any:
    """The model with these of its blocks and with fake tensors, each with a gradient already where it trains.

    Has to be called, and its result used, inside of a FakeTensorMode. The model itself is not changed.
    """
    every = _blocks(model) if blocks else None
    left_out = {id(m) for i, block in enumerate(every or ()) if i not in blocks for m in block.modules()}
    memo: dict[int, Any] = {}
    for module in model.modules():
        if id(module) not in left_out:
            held = chain(module.parameters(recurse=False), module.buffers(recurse=False), vars(module).values())
            memo |= {id(t): _fake(t) for t in held if isinstance(t, Tensor) and id(t) not in memo}
    if every is not None:
        memo[id(every)] = nn.ModuleList([copy.deepcopy(every[index], memo) for index in blocks])
    copied = copy.deepcopy(model, memo)
    config = _text_config(copied)
    if every is not None:
        for name, value in vars(config).items():  # what a config has for each block, such as layer_types
            if isinstance(value, list) and len(value) == len(every):
                config.__dict__[name] = [value[index] for index in blocks]
    for parameter in copied.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
    return copied


def _fake(tensor: Tensor) -> Tensor:
    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


def measure_step(policy: Policy, batch: PreferenceBatch, card: Facts) -> Measured:
    """Runs the policy's backbone forward and backward, the head's kernels left out; its tensors may be fake or real."""
    marks: list[float] = []
    gradients = (p.grad for p in policy.parameters() if p.grad is not None)
    outside = chain(policy.parameters(), policy.buffers(), gradients)
    with pretend(card), packed_calls() as calls, _as_cuda_casts(policy.checkpointed), Alive(outside) as alive:
        with torch.autocast("cpu", policy.autocast) if policy.autocast else nullcontext():
            head = output_head(base_model(policy.model))
            with _at_embedding(policy, lambda: marks.append(alive.start_peak())):
                hidden = policy.hidden_rows(batch)
            dtype, forward, at_head, count = hidden.dtype, alive.start_peak(), alive.now, calls.count
            result = _Head.apply(hidden, head.weight)
        del hidden, head
        kept, attention = alive.now, alive.attention
        alive.start_peak()
        result.backward()
        last = alive.start_peak()
    backward = marks[-1] if marks else last
    return Measured(
        np.array([forward, at_head, kept, attention, backward, last]), batch.input_ids.numel(), dtype, count
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Within it, torch does not log the operations that fakes cannot do: what is raised says it."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


@contextmanager
def _at_embedding(policy: Policy, mark: Callable[[], None]) -> Iterator[None]:
    """Calls `mark` when the gradient of the embedding's output is there: the blocks have run backward."""

    def watch(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: mark())

    handle = input_embedding(policy.model).register_forward_hook(watch)
    try:
        yield
    finally:
        handle.remove()


class _Head(torch.autograd.Function):
    """Keeps of its input what the head keeps: the hidden rows where its weight trains, else nothing."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = hidden.shape, hidden.dtype
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(hidden, weight)
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return torch.zeros(ctx.shape, dtype=ctx.dtype), None


class Alive(TorchDispatchMode):
    """Within it, follows the storages that operations make: how many bytes are alive, and the most since a mark."""

    def __init__(self, outside: Iterator[Tensor]) -> None:
        """`outside`: tensors that are not counted, nor views of them."""
        super().__init__()
        self.now = self.peak = self.attention = 0
        self._keys = {tensor.untyped_storage()._cdata for tensor in outside}

    def start_peak(self) -> int:
        """-> the most bytes so far; counts anew from here."""
        peak, self.peak = self.peak, self.now
        return peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "_efficient_attention_backward":  # torch's own for tensors without data stumbles over its `scale`
            gradient, *operands = args[:4]
            result = (*(torch.empty_like(operand) for operand in operands), gradient.new_empty(0))
        else:
            result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage(), name in _ATTENTION)
        if name in _INSIDE:
            self.peak = max(self.peak, self.now + _INSIDE[name](*args))
        return result

    def _note(self, storage: Any, attention: bool) -> None:
        key, size = storage._cdata, -(-storage.nbytes() // ALIGNMENT) * ALIGNMENT
        if key in self._keys:
            return
        self._keys.add(key)
        self.now += size
        self.attention += size * attention
        self.peak = max(self.peak, self.now)

        def gone() -> None:
            self._keys.discard(key)
            self.now -= size
            self.attention -= size * attention

        weakref.finalize(storage, gone).atexit = False


_ATTENTION = ("_flash_attention_forward", "_efficient_attention_forward")


def _inside_flash(gradient: Tensor, query: Tensor, key: Tensor, *rest: Any) -> int:
    """FlashAttention-2's backward: the queries' gradient in fp32, a number a query, and with grouped heads the keys'
    and values' gradients of every query head.
    """
    tokens, heads, size = query.shape
    grouped = 2 * key.shape[0] * heads * size * key.element_size() if key.shape[1] != heads else 0
    return 4 * tokens * heads * (size + 1) + grouped


def _inside_efficient(gradient: Tensor, query: Tensor, *rest: Any) -> int:
    """The queries' gradient in fp32 where it is not so anyway, and a number a query."""
    heads = query.numel() // query.shape[-1]
    return 4 * (heads + (query.numel() if query.element_size() < 4 else 0))


# Workspaces that kernels take and give back within one call
_INSIDE = {"_flash_attention_backward": _inside_flash, "_efficient_attention_backward": _inside_efficient}


class _CudaAutocast(TorchFunctionMode):
    """Within it, autocast on the CPU computes in fp32 what autocast on CUDA does, as far as models use it: layer norms,
    powers, sums.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _IN_FP32 and torch.is_autocast_enabled("cpu"):
            half = torch.get_autocast_dtype("cpu")
            args, kwargs = tree_map_only(Tensor, lambda t: t.float() if t.dtype == half else t, (args, kwargs))
        return func(*args, **kwargs)


@contextmanager
def _as_cuda_casts(checkpointed: Sequence[Any]) -> Iterator[None]:
    """`_CudaAutocast`, which has to be entered again for the second forward of checkpointed blocks: the backward leaves
    function modes.
    """
    before = [block._gradient_checkpointing_func for block in checkpointed]
    for block, checkpoint in zip(checkpointed, before, strict=True):
        block._gradient_checkpointing_func = partial(_casting_checkpoint, checkpoint)
    try:
        with _CudaAutocast():
            yield
    finally:
        for block, checkpoint in zip(checkpointed, before, strict=True):
            block._gradient_checkpointing_func = checkpoint


def _casting_checkpoint(checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any) -> Any:
    def casting(*args: Any, **kwargs: Any) -> Any:
        with _CudaAutocast():
            return function(*args, **kwargs)

    return checkpoint(casting, *args)


_NAMES = "layer_norm group_norm softmax log_softmax softplus pow __pow__ rsqrt reciprocal exp log sum prod cumsum norm"
_IN_FP32 = {
    getattr(place, name) for name in _NAMES.split() for place in (torch, Tensor, nn.functional) if hasattr(place, name)
}
