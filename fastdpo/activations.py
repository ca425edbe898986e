"""What the forward and backward of a micro-batch keep in memory: found by running the model on tensors without data.

The model is copied with as few blocks as show what each kind of block adds, its tensors replaced by fakes that have
shapes and no storage. The copy runs forward and backward in the code of a real run, with the attention kernels of the
card that is asked about, while every storage that the model's operations make is followed from its birth to its death:
its bytes are those of a real run, to the byte. Batches of several sizes give a curve. It takes some seconds for 8B
parameters, and neither a GPU nor weights.

Between the sizes the curve is a little high. A peak is the largest of many moments, each a line in the tokens: those
with large temporary gradients of weights lead in small batches, those with long activations in large ones. A chord of
such a curve lies above it.

What cannot be seen this way is what kernels allocate inside of themselves: `_INSIDE` has it for attention, and
`_FourBit` and `_EightBit` stand for the layers of bitsandbytes. A copy whose blocks run on our kernels runs their torch
methods, of which results count and what they take inside does not: on a GPU our kernels take nothing there.
Token-by-token recurrences are slow to run so: beyond SLOW operations a micro-batch there are two sizes only, and after
PATIENCE seconds there is no plan.

Legend: T tokens of a micro-batch, N of them scored, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
import logging
import math
import time
import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers.modeling_layers import GradientCheckpointingLayer

from fastdpo.attention import CannotPack, packed_calls
from fastdpo.attention_backends import Facts, pretend
from fastdpo.batch import PreferenceBatch
from fastdpo.data import TokenPair
from fastdpo.head import output_head
from fastdpo.layout import Layout, declared_windows
from fastdpo.model import Policy, base_model, block_lists, checkpointing, input_embedding, without_dropout
from fastdpo.offload import HostCopies
from fastdpo.patching import patched
from fastdpo.projections import refusal, wider
from fastdpo.quantized import is_quantized
from fastdpo_kernels import glu, launch, lora, rms_norm, rope

ALIGNMENT = 512  # bytes: torch's CUDA allocator rounds every block up to it
# Micro-batches of UNIT, STEP * UNIT, STEP^2 * UNIT and so on tokens are run, whatever the length of the run's pairs: so
# what is said to fit does not depend on it. In 8B parameters that train in full, the last moment to take the lead does
# so at some 20,000 tokens: sizes go on to FAR. Attention segment by segment takes too long for that: FEW pairs.
UNIT, STEP, FAR, FEW = 128, 4, 32768, 16
SLOW = 20_000  # operations of one micro-batch, beyond which a line through two sizes has to do
PATIENCE = 60  # seconds for all of them

PROBE = TokenPair([1] * 8, [1] * 8, [1] * 8)


class TooSlow(Exception):
    """Planning has taken PATIENCE seconds."""


@dataclass(frozen=True)
class Curve:
    """Bytes by the tokens of a micro-batch: straight between what was measured, and beyond it as at its ends."""

    tokens: tuple[int, ...]
    bytes: tuple[float, ...]

    def __call__(self, tokens: float) -> float:
        last = min(max(bisect_left(self.tokens, tokens), 1), len(self.tokens) - 1)
        return self.bytes[last] + self._slope(last) * (tokens - self.tokens[last])

    @property
    def per_token(self) -> float:
        """In the largest micro-batches."""
        return self._slope(len(self.tokens) - 1)

    def _slope(self, last: int) -> float:
        return (self.bytes[last] - self.bytes[last - 1]) / (self.tokens[last] - self.tokens[last - 1])


@dataclass(frozen=True)
class Activations:
    """Bytes beside parameters and gradients, without those of the head's own kernels."""

    forward: Curve  # at the most while the backbone runs forward
    at_head: Curve  # alive while the head runs forward: autocast still has its copies of weights
    kept: Curve  # alive between forward and backward
    attention: Curve  # of those, what attention kernels gave: outputs and log-sum-exps
    backward: Curve  # at the most while the blocks run backward
    last: Curve  # at the most below the first block: the embedding's gradient
    packed: bool  # the model takes packed pairs; padded ones were run otherwise
    hidden_dtype: torch.dtype  # of what the head is given


@dataclass(frozen=True)
class Measured:
    """One micro-batch."""

    bytes: np.ndarray  # in the order of Activations' curves
    tokens: int  # padding included
    hidden_dtype: torch.dtype
    attention_calls: int
    windows_known: bool  # attention was given the windows that the config declares
    operations: int


def measure_activations(
    policy: Policy,
    pair: TokenPair,
    card: Facts,
    packed: bool,
    checkpoint: Mapping[str, Any] | None = None,
    fused: bool = False,
    known: dict[Any, Measured] | None = None,
) -> Activations:
    """What `policy`, on any device or none, keeps for micro-batches of pairs shaped like this one, the longest, on that
    card.

    checkpoint: the options of `checkpointing`, None without; fused: blocks run on our kernels; known: micro-batches run
    before, with the same arguments but for `checkpoint`. Raises ValueError for a model that does not run on fake
    tensors, or not within PATIENCE seconds.
    """
    options = checkpoint or {}
    every = options.get("every_n_layers", 1)
    kinds = _kinds(base_model(policy.model), every)
    kind_of = {index: kind for kind, members in kinds.items() for index in members}
    shown = _shown(list(kinds.values()), every, options.get("offload", False))
    unseen = [more for kind in kinds.values() if (more := [index for index in kind if index not in shown])]
    known, deadline = {} if known is None else known, time.monotonic() + PATIENCE
    how = repr(checkpoint and {**options, "every_n_layers": 1 if kinds else every})

    def run(blocks: Sequence[int], pairs: Sequence[TokenPair]) -> Measured:
        """Blocks of the same kinds, checkpointed alike, keep the same wherever they are in the model."""
        key = how, *(kind_of[index] for index in blocks), *map(_lengths, pairs)
        if key not in known:
            known[key] = _run(policy, card, checkpoint, deadline, fused, blocks, packed, pairs)
        return known[key]

    sizes = _sizes(partial(run, shown), pair, packed, fused)
    whole = np.array([size.bytes for _, size in sizes])
    for left_out in unseen:  # each adds what one more of its kind does
        more = [run(sorted([*shown, left_out[0]]), pairs).bytes for pairs, _ in sizes]
        whole += len(left_out) * (np.array(more) - [size.bytes for _, size in sizes])
    tokens = tuple(size.tokens for _, size in sizes)
    curves = [Curve(tokens, tuple(every)) for every in whole.T.tolist()]
    return Activations(*curves, packed=packed, hidden_dtype=sizes[0][1].hidden_dtype)


def takes_packed(policy: Policy, card: Facts) -> bool:
    """Whether every block hands its segments and its window to attention. `find_layout`, which has weights, compares
    numbers, too.
    """
    model = base_model(policy.model)
    shown = _shown(block_kinds(model))
    try:
        seen = _run(policy, card, None, time.monotonic() + PATIENCE, False, shown, True, [PROBE])
    except (CannotPack, ValueError):
        return False
    return seen.attention_calls == (len(shown) or _text_config(model).num_hidden_layers) and seen.windows_known


def _shown(kinds: list[list[int]], every: int = 1, offload: bool = False) -> list[int]:
    """The blocks that are run: the first of each kind, and the second of all, as under adapters the first has an input
    without gradient and its peak elsewhere. With inputs on the host the third, too: two are on the device at a time.
    Where some blocks checkpoint, the last two of both sorts besides: the peak is in one of them, and all that is
    between only adds what it keeps.
    """
    shown = {index for kind in kinds for index in kind if index == kind[0] or index == 1 or (offload and index == 2)}
    last = max((kind[-1] for kind in kinds), default=0)
    return sorted(shown | ({last, last - last % every} if every > 1 and kinds else set()))


def _sizes(
    run: Callable[[Sequence[TokenPair]], Measured], longest: TokenPair, packed: bool, fused: bool
) -> list[tuple[Sequence[TokenPair], Measured]]:
    """Pairs and what they keep, fewest tokens first: as many micro-batches as the curves through them need.

    Where attention is one call a layer, bytes go by tokens, and pairs of UNIT tokens stand for any. Elsewhere masks and
    scores go by the square of a pair's length: pairs are as long as the run's, and its longest is one of the sizes.
    """
    unit = _resized(longest, UNIT, packed)
    alike = packed and run([unit]).operations == run([unit] * STEP).operations
    whole = unit if alike else longest
    length = Layout(packed, "").tokens(whole)
    slow = run([whole]).operations > SLOW
    most = FAR if alike else min(FAR, length * (STEP if slow else FEW))
    batches = [_pairs_of(whole, tokens, packed) for tokens in sorted({*_token_numbers(most, fused), length})]
    first, second, last = (run(batches[place]) for place in (0, 1, -1))
    chord = first.bytes + (last.bytes - first.bytes) * (second.tokens - first.tokens) / (last.tokens - first.tokens)
    # but for rounding; what bends upwards and touches its chord is straight
    if slow or np.allclose(chord, second.bytes, rtol=1e-4):
        batches = [batches[0], batches[-1]]
    return [(pairs, run(pairs)) for pairs in batches]


def _token_numbers(most: int, fused: bool) -> list[int]:
    """The same for every run. Fused MLPs run in parts, where their curve bends the other way: at whole ones."""
    numbers = [UNIT]
    while numbers[-1] * STEP <= most:
        numbers.append(numbers[-1] * STEP)
    part = launch.MLP_ROWS
    if fused and part < numbers[-1]:
        numbers = [number for number in numbers if number < part] + [part, -(-numbers[-1] // part) * part]
    return numbers


def _pairs_of(longest: TokenPair, tokens: int, packed: bool) -> list[TokenPair]:
    """A pair of so many tokens, or as many of the longest as have no less."""
    length = Layout(packed, "").tokens(longest)
    return [_resized(longest, min(tokens, length), packed)] * -(-tokens // length)


def _resized(pair: TokenPair, tokens: int, packed: bool) -> TokenPair:
    """A pair of so many tokens in the layout, of the same shape."""
    prompt, chosen, rejected = _lengths(pair)
    if packed:
        prompt = min(prompt * tokens // pair.length, tokens - 2)
        chosen = min(max(1, chosen * tokens // pair.length), tokens - prompt - 1)
        rejected = tokens - prompt - chosen
    else:
        width, row = prompt + max(chosen, rejected), tokens // 2
        prompt = min(prompt * row // width, row - 1)
        chosen, rejected = (
            row - prompt if side == width - len(pair.prompt) else max(1, side * row // width)
            for side in (chosen, rejected)
        )
    return TokenPair([1] * prompt, [1] * chosen, [1] * rejected)


def _lengths(pair: TokenPair) -> tuple[int, int, int]:
    return len(pair.prompt), len(pair.chosen), len(pair.rejected)


def block_kinds(model: nn.Module, every: int = 1) -> list[list[int]]:
    """Indices of the blocks, those of a kind together; none where they are not found."""
    return list(_kinds(model, every).values())


def _kinds(model: nn.Module, every: int) -> dict[Any, list[int]]:
    """Indices of the blocks by what they keep: those of a kind have the same parameters and type, and checkpoint alike
    where one of `every` does.
    """
    blocks, config = _blocks(model), _text_config(model)
    if blocks is None:
        return {}
    types = getattr(config, "layer_types", None) or [""] * len(blocks)
    kinds: dict[Any, list[int]] = {}
    for index, block in enumerate(blocks):
        shapes = tuple((n, tuple(p.shape), p.dtype, p.requires_grad) for n, p in block.named_parameters())
        kinds.setdefault((type(block), types[index], index % every == 0, shapes), []).append(index)
    return kinds


def _text_config(model: Any) -> Any:
    return model.config.get_text_config()


def _blocks(model: Any) -> nn.ModuleList | None:
    return next(iter(block_lists(model)), None)


def _run(
    policy: Policy,
    card: Facts,
    checkpoint: Mapping[str, Any] | None,
    deadline: float,
    fused: bool,
    blocks: Sequence[int],
    packed: bool,
    pairs: Sequence[TokenPair],
) -> Measured:
    """These blocks of the policy on fake tensors, with these pairs."""
    name = type(base_model(policy.model)).__name__
    with _quiet(), FakeTensorMode(allow_non_fake_inputs=True), ExitStack() as stack:
        try:
            fused_4bit = _fused_4bit(policy) if fused else {}
            model = fake_copy(base_model(policy.model), blocks, fused_4bit)
            copied = Policy(model, policy.autocast, policy.noisy).train()
            if copied.asked_attention == "flash_attention_2":
                copied.asked_attention = None  # torch's own keeps the same, and takes tensors without data
            if not policy.noisy:
                stack.enter_context(without_dropout(copied))
            if checkpoint is not None:
                stack.enter_context(_checkpointing(copied, checkpoint, blocks))
            batch = Layout(packed, "").collate(pairs)
            if fused:
                stack.enter_context(patched([copied.model]))
                stack.enter_context(_torch_methods(batch.input_ids.numel() // len(pairs)))
            measured = measure_step(copied, batch, card, deadline)
            return replace(measured, bytes=measured.bytes + _scratch_bytes(fused_4bit))
        except (CannotPack, torch.OutOfMemoryError):
            raise
        except TooSlow:
            raise ValueError(
                f"the memory of {name} cannot be planned within {PATIENCE} s: set max_tokens_per_microbatch"
            ) from None
        except Exception as failure:  # any model's code may stumble over tensors without data
            raise ValueError(
                f"the memory of {name} cannot be planned, as it does not run on tensors without data "
                f"({type(failure).__name__}: {failure}): set max_tokens_per_microbatch"
            ) from failure


@contextmanager
def _checkpointing(copied: Policy, options: Mapping[str, Any], blocks: Sequence[int]) -> Iterator[None]:
    """`checkpointing` of a copy that has these blocks of the model."""
    every = options.get("every_n_layers", 1)
    with checkpointing(copied, {**options, "every_n_layers": min(every, 2)}):  # raises where blocks are not told apart
        pass
    with checkpointing(copied, {**options, "every_n_layers": 1}):
        own = [module for module in copied.checkpointed if isinstance(module, GradientCheckpointingLayer)]
        left_out = {id(block) for index, block in zip(blocks or range(len(own)), own, strict=False) if index % every}
        copied.checkpointed = [module for module in copied.checkpointed if id(module) not in left_out]
        yield


@contextmanager
def _torch_methods(tokens: int) -> Iterator[None]:
    """Within it, our kernels run their torch methods, and a fused MLP in parts of whole pairs of so many tokens, which
    are no smaller than a run's.
    """
    before = launch.MLP_ROWS, launch.block_method
    launch.MLP_ROWS, launch.block_method = -(-launch.MLP_ROWS // tokens) * tokens, lambda *given: "torch"
    try:
        yield
    finally:
        launch.MLP_ROWS, launch.block_method = before


def _fused_4bit(policy: Policy) -> dict[int, tuple[Any, torch.dtype]]:
    """By identity, the 4-bit layers that run on our kernels, and the dtype of their products."""
    found: dict[int, tuple[Any, torch.dtype]] = {}
    for module in policy.model.modules():
        layers: dict[str, Any] = dict(module.named_children())
        for name, layer in layers.items():
            if not is_quantized(layer) or hasattr(layer, "state") or id(layer) in found:
                continue
            whole, dtype = module if name == "base_layer" else layer, policy.autocast or layer.compute_dtype
            if dtype is not None and not (refusal(whole, policy.noisy) or wider(whole, dtype)):
                found[id(layer)] = layer, dtype
    return found


def _scratch_bytes(layers: Mapping[int, tuple[Any, torch.dtype]]) -> np.ndarray:
    """Of `nf4.scratch`, which is always there, in the order of Activations' curves."""
    most = max((layer.in_features * layer.out_features * dtype.itemsize for layer, dtype in layers.values()), default=0)
    return most * np.array([1, 1, 1, 0, 1, 1])


def _as_dense(layer: Any, dtype: torch.dtype) -> nn.Linear:
    """What keeps as much as this 4-bit layer where it is fused: its weight dequantised, which does not count."""
    dense = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=dtype)
    return dense.requires_grad_(False)


def fake_copy(model: Any, blocks: Sequence[int], fused_4bit: Mapping[int, tuple[Any, torch.dtype]]) -> Any:
    """The model with these of its blocks and with fake tensors, each with a gradient already where it trains; dense
    layers in place of 4-bit ones that are fused.

    Has to be called, and its result used, inside of a FakeTensorMode. The model itself is not changed.
    """
    every = _blocks(model) if blocks else None
    left_out = {id(m) for i, block in enumerate(every or ()) if i not in blocks for m in block.modules()}
    memo: dict[int, Any] = {}
    for module in model.modules():
        if id(module) in fused_4bit and id(module) not in left_out:
            memo[id(module)] = _as_dense(*fused_4bit[id(module)])
        elif id(module) not in left_out:
            if is_quantized(module):  # what has its scales is not copied
                memo |= {id(value): value for value in vars(module).values() if _is_state(value)}
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
    for module in copied.modules():
        if is_quantized(module):
            module.forward = MethodType(_eight_bit if hasattr(module, "state") else _four_bit, module)
    return copied


def _is_state(value: Any) -> bool:
    return type(value).__module__.startswith("bitsandbytes.")


def _fake(tensor: Tensor) -> Tensor:
    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


def measure_step(policy: Policy, batch: PreferenceBatch, card: Facts, deadline: float = math.inf) -> Measured:
    """Runs the policy's backbone forward and backward, the head's kernels left out; its tensors may be fake or real.

    Raises TooSlow at the deadline.
    """
    marks: list[float] = []
    gradients = (p.grad for p in policy.parameters() if p.grad is not None)
    outside = chain(policy.parameters(), policy.buffers(), gradients)
    alive = Alive(outside, deadline)
    _leave_out_host_copies(policy.checkpointed, alive)
    with pretend(card), packed_calls() as calls, _as_cuda_casts(policy.checkpointed), _as_one(alive), alive:
        with torch.autocast("cpu", policy.autocast) if policy.autocast else nullcontext():
            head = output_head(base_model(policy.model))
            with _at_embedding(policy, lambda: marks.append(alive.start_peak())):
                hidden = head.inputs(policy.hidden_rows(batch))
            dtype, forward, at_head, count = hidden.dtype, alive.start_peak(), alive.now, calls.count
            result = _Head.apply(hidden.to(policy.autocast or dtype), head.weight)  # as linear_logps has it
        del hidden, head
        kept, attention = alive.now, alive.attention
        alive.start_peak()
        result.backward()
        last = alive.start_peak()
    backward = marks[-1] if marks else last
    every = np.array([forward, at_head, kept, attention, backward, last])
    text = _text_config(base_model(policy.model))
    declared = declared_windows(text)  # a config without a type a layer has those of all of the model's layers
    known = calls.windows == (declared if getattr(text, "layer_types", None) else declared[:count])
    return Measured(every, batch.input_ids.numel(), dtype, count, known, alive.operations)


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

    def __init__(self, outside: Iterator[Tensor], deadline: float = math.inf) -> None:
        """`outside`: tensors that are not counted, nor views of them; `deadline`: of time.monotonic, to raise at."""
        super().__init__()
        self.deadline, self.on_device = deadline, True  # what is made while on_device is False is not counted
        self.inside = False  # a kernel, of which results count only
        self.now = self.peak = self.attention = self.operations = 0
        self._keys = {tensor.untyped_storage()._cdata for tensor in outside}

    def start_peak(self) -> int:
        """-> the most bytes so far; counts anew from here."""
        peak, self.peak = self.peak, self.now
        return peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.operations += 1
        if name == "_efficient_attention_backward":  # torch's own for tensors without data stumbles over its `scale`
            gradient, *operands = args[:4]
            result = (*(torch.empty_like(operand) for operand in operands), gradient.new_empty(0))
        elif name == "_grouped_mm":  # torch's own for tensors without data takes bf16 only
            result = _grouped_product(*args[:3])
        else:
            result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                if not self.inside:
                    self.note(tensor.untyped_storage(), name in _ATTENTION)
                if time.monotonic() > self.deadline:  # not where a device is asked for: torch aborts the process there
                    raise TooSlow
        if name in _INSIDE:
            self.peak = max(self.peak, self.now + _INSIDE[name](*args))
        return result

    def note(self, storage: Any, attention: bool) -> None:
        key, size = storage._cdata, -(-storage.nbytes() // ALIGNMENT) * ALIGNMENT * self.on_device
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


def _grouped_product(left: Tensor, right: Tensor, offsets: Tensor | None) -> Tensor:
    """Rows of `left` in groups, each with a matrix of its own; where both have two dimensions, a matrix a group."""
    rows, columns = left.shape[-2], right.shape[-1]
    groups = left.shape[:-2] or right.shape[:-2] if left.ndim == right.ndim else ()
    if left.ndim == right.ndim == 2 and offsets is not None:
        groups = offsets.shape
    return left.new_empty(*groups, rows, columns)


def _leave_out_host_copies(checkpointed: Sequence[Any], alive: Alive) -> None:
    """Copies of block inputs on the host are not counted."""
    functions = {id(f): f for block in checkpointed if isinstance(f := block._gradient_checkpointing_func, HostCopies)}
    for copies in functions.values():
        keep = copies._keep

        def keep_beside(tensor: Tensor, copies: Any = copies, keep: Any = keep) -> Any:
            if (before := copies.last()) is not None:
                alive.on_device = False
                before.send()
                alive.on_device = True
            return keep(tensor)

        copies._keep = keep_beside


_KERNELS: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (glu, ("glu_forward", "glu_backward")),
    (lora, ("glu_forward", "glu_backward")),
    (rms_norm._Torch, ("forward", "backward")),
    (rope, ("_rotate",)),
)


@contextmanager
def _as_one(alive: Alive) -> Iterator[None]:
    """Within it, our kernels count as on a GPU: what they give, and nothing that their torch methods take inside."""

    def whole(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            alive.inside = True
            try:
                result = function(*args, **kwargs)
            finally:
                alive.inside = False
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor):
                    alive.note(tensor.untyped_storage(), False)
            return result

        return call

    before = [(place, name, vars(place)[name]) for place, names in _KERNELS for name in names]
    for place, name, _ in before:
        function = whole(getattr(place, name))
        setattr(place, name, staticmethod(function) if isinstance(place, type) else function)
    try:
        yield
    finally:
        for place, name, function in before:
            setattr(place, name, function)


class _FourBit(torch.autograd.Function):
    """x W' of a 4-bit weight (O, I): it is dequantised each way, by way of its scales in fp32, and nothing is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.shape = shape
        return x @ _dequantized(x, shape).T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient @ _dequantized(gradient, ctx.shape), None


def _dequantized(like: Tensor, shape: tuple[int, int]) -> Tensor:
    scales = like.new_empty(math.prod(shape) // 64, dtype=torch.float32)
    weight = like.new_empty(shape)
    del scales
    return weight


def _four_bit(self: Any, x: Tensor) -> Tensor:
    """The forward of bitsandbytes' Linear4bit."""
    dtype = self.compute_dtype or x.dtype
    product = _FourBit.apply(x.to(dtype), (self.out_features, self.in_features))
    return (product if self.bias is None else product + self.bias.to(dtype)).to(x.dtype)


class _EightBit(torch.autograd.Function):
    """x W' of an int8 weight (O, I) as bitsandbytes 0.50 has it: its rows are quantised, products are int32, and x is
    kept: by a way around autograd's saved tensors, so that checkpointing does not free it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.x, ctx.shape = x, shape
        rows = x.to(torch.float16).to(torch.int8)
        sums = rows.new_empty(*rows.shape[:-1], shape[0], dtype=torch.int32)
        return sums.to(torch.float16).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient @ gradient.new_empty(ctx.shape), None


def _eight_bit(self: Any, x: Tensor) -> Tensor:
    """The forward of bitsandbytes' Linear8bitLt, which keeps which columns have outliers: few, here one."""
    self.outliers = x.new_empty(1, dtype=torch.int64)
    product = _EightBit.apply(x, (self.out_features, self.in_features))
    return product if self.bias is None else product + self.bias.to(product.dtype)


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
