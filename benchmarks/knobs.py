"""The launch numbers that `python -m benchmarks tune` tries: what each is timed on, and which others are tried.

A knob is a name of `launch.py`, a function or a number; a candidate takes its place for a call. `fused_config:few` is
what fused_config has for few rows (`few_logits` and `few_gradients`), which are timed apart. Candidates are few and
near: half and twice as much, within what is a power of two and what a program may have. Whether they fit every
architecture the compiler says before anyone times them.

Not here: what decides between methods (MIN_STREAMED_ROWS), what is under a tenth of anything timed (target_block,
fused_join), and what has one value that compiles.

Legend: N rows, V vocabulary, D hidden size, I intermediate size, P pairs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.observe import replaced
from benchmarks.pairs import WEIGHTED, pairwise
from benchmarks.roofline import Work
from fastdpo_kernels import launch
from fastdpo_kernels.compile_cases import Case, Values
from fastdpo_kernels.glu import glu
from fastdpo_kernels.head import STATS, HeadOptions, Wants
from fastdpo_kernels.lora import Adapter, Projection, lora_mlp
from fastdpo_kernels.nf4 import Packed, dequantize
from fastdpo_kernels.pair_loss import pair_loss
from fastdpo_kernels.rms_norm import rms_norm
from fastdpo_kernels.rope import rope

Results = tuple[Tensor, ...]
Call = Callable[[], Results]
Shape = tuple[int, ...]


class Draw:
    """Random tensors of a place: bf16 on a GPU, without memory on "meta", fp32 where kernels are interpreted."""

    def __init__(self, place: str) -> None:
        self.place = place
        self.dtype = torch.float32 if place == "cpu" else torch.bfloat16
        self.generator = None if place == "meta" else torch.Generator(place).manual_seed(0)

    def __call__(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(shape, generator=self.generator, device=self.place, dtype=torch.float32)
        return (values * scale).to(dtype or self.dtype)

    def integers(self, below: int, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randint(below, shape, generator=self.generator, device=self.place, dtype=dtype)


# ---- what is timed


@dataclass(frozen=True)
class Task:
    """A call of kernels, forward and backward, and what of it must be computed and moved (2 bytes a number)."""

    make: Callable[[Draw, Shape], Call]
    shape: Shape  # of real models
    small: Shape  # for Triton's interpreter, and for sanitizers
    work: Callable[..., Work]
    allowed: float = 2.0**-7  # |difference| / |default's|: bf16 that is summed in another order, once or twice
    in_graph: bool = False  # launching takes longer than running: timed in a CUDA graph

    def on(self, place: str, small: bool = False) -> Call:
        return self.make(Draw(place), self.small if small else self.shape)


def _head(method: str, wants: Wants, stats: tuple[str, ...] = ()) -> Callable[[Draw, Shape], Call]:
    """As linear_logps calls a method, whose torch.autocast there is not for meta tensors."""

    def make(draw: Draw, shape: Shape) -> Call:
        rows, vocabulary, width = shape
        hidden, weight = draw(rows, width), draw(vocabulary, width, scale=3 / width**0.5)
        targets, upstream = draw.integers(vocabulary, rows, dtype=torch.int64), draw(rows, dtype=torch.float32)
        trains = wants is Wants.ALL_GRADIENTS
        bias = draw(vocabulary) if trains else None

        def call() -> Results:
            size = launch.default_workspace_bytes(launch.device_of(hidden.device))
            options = HeadOptions(stats=stats, workspace_bytes=size)
            module = importlib.import_module(f"fastdpo_kernels.head_{method}")
            found = module.forward(hidden, weight, bias, targets, options, wants)
            results = found.logps, *found.stats.values()
            if found.hidden_jacobian is not None:
                return *results, found.hidden_jacobian
            given = hidden, weight, bias, targets, found.saved, found.kept, upstream, options, (True, trains, trains)
            return *results, *(gradient for gradient in module.backward(*given) if gradient is not None)

        return call

    return make


def _pair_loss(draw: Draw, shape: Shape) -> Call:
    pairs, length = shape
    token_logps = -draw(2 * pairs * length, dtype=torch.float32).abs()
    ends = torch.arange(0, 2 * pairs * length + 1, length, device=draw.place, dtype=torch.int32)
    reference, loss = -draw(pairs, 2, dtype=torch.float64).abs() * length, pairwise(WEIGHTED["sigmoid"])

    def call() -> Results:
        leaf = token_logps.detach().requires_grad_()
        found = pair_loss(leaf, ends, reference, loss, tokens_per_pair=2.0 * length, method="triton")
        return found.losses.detach(), found.rewards, *torch.autograd.grad(found.losses.mean(), leaf)

    return call


def _sequence_sums(draw: Draw, shape: Shape) -> Call:
    sequences, length = shape
    token_logps = -draw(sequences * length, dtype=torch.float32).abs()
    ends = torch.arange(0, sequences * length + 1, length, device=draw.place, dtype=torch.int32)
    module = importlib.import_module("fastdpo_kernels.pair_loss_triton")
    return lambda: (module.sequence_sums(token_logps, ends, 0.5),)


def _packed(draw: Draw, rows: int, columns: int) -> Packed:
    """A random NF4 weight with double quantisation."""
    numel, blocksize = rows * columns, 64
    blocks = -(-numel // blocksize)
    bytes_of = partial(draw.integers, 256, dtype=torch.uint8)
    code, nested = draw(16, dtype=torch.float32), draw(256, scale=1e-3, dtype=torch.float32)
    groups = draw(-(-blocks // 256), dtype=torch.float32)
    offset = draw(1, scale=0.02, dtype=torch.float32)[0]
    return Packed(
        bytes_of(-(-numel // 2)), (rows, columns), bytes_of(blocks), blocksize, code, groups, nested, 256, offset
    )


def _nf4(draw: Draw, shape: Shape) -> Call:
    packed = _packed(draw, *shape)
    out = torch.empty(shape, dtype=draw.dtype, device=draw.place)
    return lambda: (dequantize(packed, draw.dtype, out=out, method="triton"),)


def _norm(trained: bool) -> Callable[[Draw, Shape], Call]:
    def make(draw: Draw, shape: Shape) -> Call:
        x, upstream = draw(*shape).requires_grad_(), draw(*shape)
        weight = draw(shape[1]).requires_grad_(trained)
        leaves = [x, weight] if trained else [x]
        return _both(lambda: (rms_norm(x, weight, 1e-5, method="triton"),), leaves, [upstream])

    return make


def _rope(draw: Draw, shape: Shape) -> Call:
    tokens, heads, kv_heads, size = shape
    q, k, dq, dk = (draw(1, tokens, n, size).transpose(1, 2) for n in (heads, kv_heads) * 2)
    cos, sin = draw(1, tokens, size), draw(1, tokens, size)
    leaves = [q.requires_grad_(), k.requires_grad_()]
    return _both(lambda: rope(q, k, cos, sin, method="triton"), leaves, [dq, dk])


def _glu(draw: Draw, shape: Shape) -> Call:
    gate, up, upstream = draw(*shape).requires_grad_(), draw(*shape).requires_grad_(), draw(*shape)
    return _both(lambda: (glu(gate, up, "silu", method="triton"),), [gate, up], [upstream])


def _mlp(draw: Draw, shape: Shape) -> Call:
    rows, width, inner = shape
    x, upstream = draw(rows, width).requires_grad_(), draw(rows, width)

    def projection(out: int, into: int) -> Projection:
        factors = draw(16, into, scale=into**-0.5), draw(out, 16, scale=0.01)
        return Projection(_packed(draw, out, into), None, Adapter(*(f.requires_grad_() for f in factors), 2.0))

    layers = projection(inner, width), projection(inner, width), projection(width, inner)
    return _both(lambda: (lora_mlp(x, *layers, "silu"),), [x], [upstream])


def _both(forward: Callable[[], Results], leaves: list[Tensor], upstream: list[Tensor]) -> Call:
    def call() -> Results:
        results = forward()
        gradients = torch.autograd.grad(results, leaves, upstream)
        return *(result.detach() for result in results), *gradients

    return call


def _logits(times: int) -> Callable[..., Work]:
    """Bytes of logits written and read so many times, for heads so narrow that their products are these bytes, too."""
    return lambda rows, vocabulary, width: Work(0.0, 2.0 * times * rows * vocabulary)


def _products(count: int) -> Callable[..., Work]:
    return lambda rows, vocabulary, width: Work(2.0 * count * rows * vocabulary * width, 0.0)


def _tensors(count: float) -> Callable[..., Work]:
    return lambda rows, width: Work(0.0, 2.0 * count * rows * width)


EXACT = 0.0
_STREAMED, _FUSED = partial(_head, "streamed"), partial(_head, "fused")
_FROZEN, _TRAINED = Wants.HIDDEN_GRADIENT, Wants.ALL_GRADIENTS
_NARROW, _SMALL = (8192, 128_256, 64), (6, 300, 32)
TASKS = {
    "streamed head, narrow": Task(_STREAMED(_FROZEN), _NARROW, _SMALL, _logits(4)),
    "streamed head, narrow, statistics": Task(_STREAMED(_FROZEN, STATS), _NARROW, _SMALL, _logits(4)),
    "streamed head, narrow, trained": Task(_STREAMED(_TRAINED), _NARROW, _SMALL, _logits(8)),
    "streamed head": Task(_STREAMED(_FROZEN), (8192, 128_256, 4096), _SMALL, _products(2)),
    "fused head, trained": Task(_FUSED(_TRAINED), (4096, 32_000, 4096), (18, 300, 32), _products(4)),
    "fused head, few rows": Task(_FUSED(_FROZEN), (64, 128_256, 4096), (16, 300, 32), _products(3)),
    "pair_loss": Task(
        _pair_loss,
        (64, 250),
        (3, 70),
        lambda pairs, length: Work(0.0, 24.0 * pairs * length),
        allowed=1e-6,
        in_graph=True,
    ),
    "sequence_sums": Task(
        _sequence_sums, (128, 250), (6, 70), lambda n, length: Work(0.0, 4.0 * n * length), 1e-6, in_graph=True
    ),
    "nf4": Task(_nf4, (14_336, 4096), (48, 64), lambda rows, width: Work(0.0, 2.52 * rows * width), EXACT),
    "rms_norm": Task(_norm(False), (8192, 4096), (13, 128), _tensors(5)),
    "rms_norm of heads": Task(_norm(False), (2**18, 128), (37, 16), _tensors(5)),
    "rms_norm, trained": Task(_norm(True), (8192, 4096), (13, 128), _tensors(5)),
    "rope": Task(_rope, (8192, 32, 8, 128), (9, 4, 2, 16), lambda n, h, g, e: Work(0.0, 8.0 * n * (h + g) * e), EXACT),
    "glu": Task(_glu, (8192, 14_336), (13, 96), _tensors(8), EXACT),
    "lora_mlp": Task(_mlp, (32_768, 4096, 14_336), (24, 64, 128), lambda rows, d, i: Work(12.0 * rows * d * i, 0.0)),
}


# ---- what is tried

Change = Callable[[Any], Any]  # what launch.py has -> what takes its place


@dataclass(frozen=True)
class Knob:
    name: str  # in launch.py
    tasks: tuple[str, ...]
    candidates: Mapping[str, Change]
    own_architecture: bool = False  # numbers are of one architecture; others need not take them
    compiles: bool = True  # a kernel of its own for each candidate

    @contextmanager
    def turned(self, candidate: str, given: dict[str, str] | None = None) -> Iterator[None]:
        """`given` gets what launch.py then gives, by call, which takes the host longer: for no call that is timed."""

        def change(real: Any) -> Any:
            new = self.candidates[candidate](real)
            return new if given is None else _noted(self.name, real, new, given)

        with replaced(launch, self.name, change):
            launch.fused_ranges.cache_clear()  # it remembers what follows from the other numbers
            try:
                yield
            finally:
                launch.fused_ranges.cache_clear()


def _noted(name: str, real: Any, new: Any, given: dict[str, str]) -> Any:
    if not callable(real):
        given[name] = str(new)
        return new

    def called(*arguments: Any, **named: Any) -> Any:
        words = [str(one) for one in arguments if not isinstance(one, launch.Device)]
        words += [f"{key}={one}" for key, one in named.items() if not isinstance(one, launch.Device)]
        config = new(*arguments, **named)
        given[f"{name}({', '.join(words)})"] = _changed(real(*arguments, **named), config)
        return config

    return called


def _changed(real: Any, config: Any) -> str:
    """As launch.py has it: of a FusedConfig the products that are others, anything else whole."""
    if not isinstance(config, launch.FusedConfig):
        return str(config)
    both = [(one.name, getattr(real, one.name), getattr(config, one.name)) for one in fields(config)]
    return ", ".join(f"{name}={new}" for name, old, new in both if new != old) or "the same"


def _set(**changes: Any) -> Change:
    return lambda real: lambda *given, **named: replace(real(*given, **named), **changes)


def _times(**factors: float) -> Change:
    def of(config: Any) -> Any:
        return replace(config, **{name: max(1, int(getattr(config, name) * by)) for name, by in factors.items()})

    return lambda real: lambda *given, **named: of(real(*given, **named))


def _result_times(factor: float) -> Change:
    return lambda real: lambda *given, **named: max(1, int(real(*given, **named) * factor))


def _number(value: int) -> Change:
    return lambda real: value


def _always(value: int) -> Change:
    return lambda real: lambda *given: value


def _row(kib: int, warps: int, registers: int) -> Change:
    def change(real: Callable[..., launch.RowConfig]) -> Callable[..., launch.RowConfig]:
        def config(vocabulary: int, itemsize: int = 2, crowded: bool = False) -> launch.RowConfig:
            usual = real(vocabulary, itemsize, crowded)
            if usual.block * itemsize < 16384:  # a small vocabulary fits a block of its own
                return usual
            return launch.RowConfig(kib * 1024 // itemsize, warps, registers=registers)

        return config

    return change


def _product(which: str, **changes: Any) -> Change:
    def of(config: launch.FusedConfig) -> launch.FusedConfig:
        return replace(config, **{which: replace(getattr(config, which), **changes)})

    return lambda real: lambda *given, **named: of(real(*given, **named))


def _tiles(which: str, few: bool) -> dict[str, Change]:
    tried = (128, 128, 8, 4, 1), (128, 256, 8, 3, 1), (256, 128, 8, 3, 1), (64, 256, 8, 4, 1)
    if few:
        tried = (64, 64, 4, 4, 2), (64, 128, 4, 3, 2), (64, 256, 8, 3, 1), (128, 128, 8, 4, 1)
    names = "block_m", "block_n", "num_warps", "num_stages", "resident"
    settings = [dict(zip(names, one, strict=True)) for one in tried]
    return {f"{which}: {_words(setting)}": _product(which, **setting) for setting in settings}


def _words(changes: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in changes.items())


def _each(change: Callable[..., Change], *settings: dict[str, Any]) -> dict[str, Change]:
    between = " times " if change is _times else "="
    return {_words(setting).replace("=", between): change(**setting) for setting in settings}


_BLOCK_AND_WARPS = (
    *({"block": 0.5}, {"block": 2}, {"num_warps": 0.5}, {"num_warps": 2}),
    *({"block": 0.5, "num_warps": 0.5}, {"block": 2, "num_warps": 2}),
)
_ROWS_AND_WARPS = ({"num_warps": 0.5}, {"num_warps": 2}, {"rows": 2}, {"rows": 2, "num_warps": 2})
KNOBS = {
    "row_config": Knob(
        "row_config",
        ("streamed head, narrow", "streamed head, narrow, statistics"),
        {
            f"{kib} KiB, {warps} warps, {registers} registers": _row(kib, warps, registers)
            for kib, warps, registers in ((8, 8, 128), (8, 16, 64), (16, 8, 128), (16, 32, 64), (32, 32, 64))
        },
    ),
    "column_config": Knob(
        "column_config",
        ("streamed head, narrow, trained",),
        _each(
            _set,
            *({"block_rows": 16}, {"block_rows": 64}, {"block_vocabulary": 256, "num_warps": 8}),
            {"block_rows": 64, "num_warps": 8},
        ),
    ),
    "default_workspace_bytes": Knob(
        "default_workspace_bytes",
        ("streamed head",),
        {f"{size} MiB": _always(size * 2**20) for size in (128, 256, 512, 768)},
        compiles=False,
    ),
    "fused_config": Knob(
        "fused_config",
        ("fused head, trained",),
        {**_tiles("logits", few=False), **_tiles("gradient", few=False)},
        own_architecture=True,
    ),
    "fused_config:few": Knob(
        "fused_config",
        ("fused head, few rows",),
        {**_tiles("few_logits", few=True), **_tiles("few_gradients", few=True)},
        own_architecture=True,
    ),
    "ROW_TILES_SIDE_BY_SIDE": Knob(
        "ROW_TILES_SIDE_BY_SIDE",
        ("fused head, trained",),
        {str(count): _number(count) for count in (4, 16)},
        own_architecture=True,
    ),
    "pair_loss_config": Knob("pair_loss_config", ("pair_loss",), _each(_times, *_BLOCK_AND_WARPS)),
    "nf4_config": Knob("nf4_config", ("nf4",), _each(_times, *_BLOCK_AND_WARPS)),
    "norm_config": Knob(
        "norm_config", ("rms_norm", "rms_norm of heads", "rms_norm, trained"), _each(_times, *_ROWS_AND_WARPS)
    ),
    "norm_programs": Knob(
        "norm_programs",
        ("rms_norm, trained",),
        {f"times {by:g}": _result_times(by) for by in (0.5, 2, 4)},
        compiles=False,
    ),
    "rope_config": Knob(
        "rope_config", ("rope",), _each(_times, *_ROWS_AND_WARPS, {"rows": 0.5}, {"rows": 0.5, "num_warps": 0.5})
    ),
    "glu_config": Knob("glu_config", ("glu",), _each(_times, *_BLOCK_AND_WARPS)),
    "MLP_ROWS": Knob(
        "MLP_ROWS", ("lora_mlp",), {str(rows): _number(rows) for rows in (4096, 16_384, 32_768)}, compiles=False
    ),
}


@dataclass(frozen=True)
class Tried(Case):
    """A candidate's launches of one task, for the compile report: `values` are the task and the candidate."""

    def launches(self) -> Callable[[Values], object]:
        def with_candidate(values: Values) -> None:
            with KNOBS[self.op].turned(values["candidate"]):
                TASKS[values["task"]].on("meta")()

        return with_candidate


def to_try(names: Iterable[str]) -> list[tuple[str, str, str]]:
    """(knob, task, candidate) of these knobs."""
    return [(name, task, one) for name in names for one in KNOBS[name].candidates for task in KNOBS[name].tasks]


def cases(names: Iterable[str], devices: Sequence[str], own: str) -> list[Tried]:
    """All of it that has kernels of its own, on every device of launch.EXAMPLES that it must compile for."""
    return [
        Tried(name, device, (("task", task), ("candidate", candidate)))
        for name, task, candidate in to_try(names)
        if KNOBS[name].compiles
        for device in ([own] if KNOBS[name].own_architecture else devices)
    ]
