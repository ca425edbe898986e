"""What the compile report compiles: the public functions, what their kernels depend on, and which combinations of that.

Everything is launched on meta tensors: shapes and dtypes without memory.

Legend: N rows, V vocabulary, D hidden size.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdpo_kernels import launch
from fastdpo_kernels.glu import ACTIVATIONS, glu_backward, glu_forward
from fastdpo_kernels.head import STATS, HeadOptions, Wants
from fastdpo_kernels.nf4 import Packed, dequantize
from fastdpo_kernels.pair_loss import LossTerm, PairwiseLoss, pair_loss, sequence_sums
from fastdpo_kernels.rms_norm import rms_norm
from fastdpo_kernels.rope import rope

Values = Mapping[str, str]  # factor -> its value, of one combination

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True)
class Case:
    """One combination of one operation."""

    op: str
    device: str
    values: tuple[tuple[str, str], ...]

    def launches(self) -> Callable[[Values], object]:
        return OPS[self.op].launches

    def __str__(self) -> str:
        return f"{self.op} " + " ".join(f"{factor}={value}" for factor, value in self.values)


@dataclass(frozen=True)
class Op:
    """A public function, what its compiled kernels depend on, and how to launch them."""

    factors: Mapping[str, tuple[str, ...]]
    launches: Callable[[Values], object]
    allowed: Callable[[launch.Device, Values], bool] = lambda device, values: True
    beyond_pairs: Callable[[Values], set[Any]] = lambda values: set()  # what else of it a cover must hold


# What is launched

# (N, V, D) of the benchmarks, then what is launched otherwise: rows that nothing aligns, few rows, any strides.
SHAPES = {
    "8192x128256x4096": (8192, 128256, 4096),
    "8192x151936x3584": (8192, 151936, 3584),
    "2048x128256x4096": (2048, 128256, 4096),
    "4096x32000x4096": (4096, 32000, 4096),
    "odd": (4097, 50257, 1001),
    "small and odd": (13, 1003, 67),
    "few rows": (24, 50257, 768),
    "one row": (1, 128256, 4096),
    "strided": (2048, 32000, 4096),
}
HEAD_FACTORS = {  # method and dtype are one factor, so that a pairwise cover has both on every device
    "path": tuple(f"{method} {dtype}" for method in ("streamed", "fused") for dtype in ("bf16", "fp16", "fp32")),
    "wants": tuple(want.name for want in Wants),
    "stats": ("none", "log_sum_sq_probs", "all"),
    "bias": ("no", "yes"),
    "softcap": ("no", "yes"),
    "shape": tuple(SHAPES),
}


def head_allowed(device: launch.Device, values: Values) -> bool:
    method, _ = values["path"].split()
    return method != "fused" or device.has_matrix_products


def head_beyond_pairs(values: Values) -> set[Any]:
    """A head that trains and has a bias launches every kernel of its method: each device has that in each dtype."""
    trains = values["wants"] == Wants.ALL_GRADIENTS.name and values["bias"] == "yes"
    return {(values["device"], values["path"])} if trains else set()


def launch_head(values: Values) -> None:
    """A method's forward and backward, called as `linear_logps` calls them: torch.autocast has no meta device."""
    rows, vocabulary, hidden_size = SHAPES[values["shape"]]
    method_name, dtype_name = values["path"].split()
    dtype, strided = DTYPES[dtype_name], values["shape"] == "strided"
    hidden = _meta(rows, hidden_size * (1 + strided), dtype=dtype)[:, :: 1 + strided]
    weight = _meta(vocabulary, hidden_size, dtype=dtype)
    if strided and method_name == "streamed":
        weight = _meta(hidden_size, vocabulary, dtype=dtype).T
    bias = _meta(vocabulary, dtype=dtype) if values["bias"] == "yes" else None
    targets, wants = _meta(rows, dtype=torch.int64), Wants[values["wants"]]
    options = HeadOptions(
        softcap=30.0 if values["softcap"] == "yes" else None,
        stats={"none": (), "all": STATS}.get(values["stats"], (values["stats"],)),
        workspace_bytes=launch.default_workspace_bytes(launch.device_of(hidden.device)),
    )
    method = importlib.import_module(f"fastdpo_kernels.head_{method_name}")
    result = method.forward(hidden, weight, bias, targets, options, wants)
    if wants is Wants.VALUES or result.hidden_jacobian is not None:
        return
    trains = wants is Wants.ALL_GRADIENTS
    needs = (True, trains, trains and bias is not None)
    gradient = torch.empty_like(result.logps)
    for kept in {id(kept): kept for kept in (result.kept, None)}.values():  # a second backward has none
        method.backward(hidden, weight, bias, targets, result.saved, kept, gradient, options, needs)


def _sigmoid(m: Any, chosen: Any, rejected: Any, beta: float) -> Any:
    return -m.log_sigmoid(beta * (chosen - rejected))


def _all_mathematics(m: Any, chosen: Any, rejected: Any, beta: float, mean_reward: Any) -> Any:
    """Every function that a formula can use: no loss, but its derivative holds all that a loss's can."""
    margin, away = beta * (chosen - rejected), m.abs(chosen) + 1.0
    smooth = m.sigmoid(margin) + m.tanh(margin) + m.softplus(margin - mean_reward) + m.expm1(-away) + m.exp(-away)
    pieces = m.relu(margin) + m.minimum(margin, 1.0) + m.maximum(rejected, -1.0) + m.capped_exp(margin)
    return smooth + pieces + m.log(away) + m.log1p(away) + m.sqrt(away) + m.log1mexp(-away)


_SIGMOID = LossTerm(_sigmoid, {"beta": 0.1})
LOSSES = {
    "sigmoid": (_SIGMOID,),
    "mathematics": (LossTerm(_all_mathematics, {"beta": 0.1}),),
    "list": (
        LossTerm(_sigmoid, {"beta": 0.1}, 0.5, score=lambda m, log_ratio: m.capped_exp(log_ratio)),
        LossTerm(_sigmoid, {"beta": 0.1}, 0.3, per="token"),
        LossTerm(_sigmoid, {"beta": 2.0}, 0.2, of="logps", per="token"),
        LossTerm(lambda m, chosen, rejected: -chosen, {}, 1.0, of="logps", per="batch_token"),
    ),
    "matched": (
        LossTerm(_sigmoid, {"beta": 0.1}, 0.5, matched="margins"),
        LossTerm(_sigmoid, {"beta": 0.1}, 0.5, matched="sides"),
    ),
}
PAIR_FACTORS = {
    "losses": tuple(LOSSES),
    "ld_alpha": ("no", "yes"),
    "weighting": ("no", "yes"),
    "dtype": ("fp32", "fp64"),
    "pairs": ("1", "64"),
    "reference": ("given", "free"),
}


def pair_loss_allowed(device: launch.Device, values: Values) -> bool:
    return values["losses"] != "matched" or values["weighting"] == "no"  # refused: a matched loss is of no single pair


def launch_pair_loss(values: Values) -> None:
    pairs, dtype = int(values["pairs"]), DTYPES[values["dtype"]]
    tokens, weighting = 300 * pairs, values["weighting"] == "yes"
    token_logps = _meta(tokens, dtype=dtype).requires_grad_()
    result = pair_loss(
        token_logps,
        _meta(2 * pairs + 1, dtype=torch.int32),
        _meta(pairs, 2, dtype=torch.float64) if values["reference"] == "given" else None,
        PairwiseLoss(LOSSES[values["losses"]], 0.1, 0.5 if values["ld_alpha"] == "yes" else None, weighting),
        log_sum_sq_probs=_meta(tokens, dtype=dtype) if weighting else None,
        mean_reward=_meta(dtype=torch.float64),
        method="triton",
    )
    result.losses.mean().backward()


def launch_sequence_sums(values: Values) -> None:
    ld_alpha = 0.5 if values["ld_alpha"] == "yes" else None
    sequence_sums(_meta(4096, dtype=DTYPES[values["dtype"]]), _meta(65, dtype=torch.int32), ld_alpha)


GLU_FACTORS = {
    "dtypes": ("bf16", "fp16", "fp32", "bf16, up fp32"),
    "activation": ACTIVATIONS,
    "h": ("no", "yes"),
    "shape": ("8192x14336", "halves", "odd"),
}


def launch_glu(values: Values) -> None:
    rows, width = {"8192x14336": (8192, 14336), "halves": (8192, 8192), "odd": (13, 1001)}[values["shape"]]
    dtype, up_dtype = _two_dtypes(values["dtypes"])
    gate, up = _meta(rows, width, dtype=dtype), _meta(rows, width, dtype=up_dtype)
    if values["shape"] == "halves":
        gate, up = _meta(rows, 2 * width, dtype=dtype)[:, :width], _meta(rows, 2 * width, dtype=up_dtype)[:, width:]
    h = glu_forward(gate, up, values["activation"], "triton")
    glu_backward(torch.empty_like(h), gate, up, values["activation"], "triton", with_h=values["h"] == "yes")


NORM_VARIANTS = {  # dtypes of x and weight, offset, round_first
    "Llama bf16": ("bf16", 0.0, True),
    "Llama fp16": ("fp16", 0.0, True),
    "Llama fp32": ("fp32", 0.0, True),
    "Llama bf16, fp32": ("bf16, fp32", 0.0, True),
    "Gemma bf16": ("bf16", 1.0, False),
    "Gemma fp32": ("fp32", 1.0, False),
    "OLMo-2 bf16": ("bf16", 0.0, False),
    "no weight bf16": ("bf16", 0.0, True),
}
NORM_SHAPES = {"8192x4096": (8192, 4096), "262144x128": (2**18, 128), "2048x16384": (2048, 16384), "odd": (13, 1001)}
NORM_FACTORS = {"variant": tuple(NORM_VARIANTS), "weight": ("frozen", "trained"), "shape": tuple(NORM_SHAPES)}


def norm_allowed(device: launch.Device, values: Values) -> bool:
    return not (values["variant"].startswith("no weight") and values["weight"] == "trained")


def launch_norm(values: Values) -> None:
    dtypes, offset, round_first = NORM_VARIANTS[values["variant"]]
    dtype, weight_dtype = _two_dtypes(dtypes)
    x = _meta(*NORM_SHAPES[values["shape"]], dtype=dtype).requires_grad_()
    weight = None
    if not values["variant"].startswith("no weight"):
        weight = _meta(x.shape[1], dtype=weight_dtype).requires_grad_(values["weight"] == "trained")
    y = rms_norm(x, weight, 1e-6, offset=offset, round_first=round_first, method="triton")
    y.backward(torch.empty_like(y))


ROPE_SHAPES = {  # B, T, heads of q and of k, E, R
    "Llama-3 8B": (2, 4096, 32, 8, 128, 128),
    "half of 128": (2, 4096, 32, 2, 128, 64),
    "Phi-3": (2, 4096, 32, 32, 96, 96),
    "odd": (3, 13, 7, 1, 20, 10),
}
ROPE_FACTORS = {
    "dtypes": ("bf16", "fp16", "fp32", "bf16, fp32"),  # of q and k, and of cos and sin
    "pairs": ("half", "interleaved", "half by_pair", "interleaved by_pair"),
    "upcast": ("no", "yes"),
    "gradient": ("both", "of q"),
    "shape": tuple(ROPE_SHAPES),
}


def launch_rope(values: Values) -> None:
    batch, tokens, heads, kv_heads, size, rotated = ROPE_SHAPES[values["shape"]]
    dtype, factor_dtype = _two_dtypes(values["dtypes"])
    layout, *by_pair = values["pairs"].split()
    q, k = (_meta(batch, tokens, n, size, dtype=dtype).transpose(1, 2).requires_grad_() for n in (heads, kv_heads))
    cos, sin = (_meta(1, tokens, rotated // 2 if by_pair else rotated, dtype=factor_dtype) for _ in range(2))
    flags = {"interleaved": layout == "interleaved", "by_pair": bool(by_pair), "upcast": values["upcast"] == "yes"}
    results = rope(q, k, cos, sin, **flags, method="triton")
    wanted = results if values["gradient"] == "both" else results[:1]
    torch.autograd.backward(wanted, [torch.empty_like(result) for result in wanted])


def _two_dtypes(words: str) -> tuple[torch.dtype, torch.dtype]:
    """`bf16` is that twice, `bf16, up fp32` first the one, then the other."""
    names = words.split()
    return DTYPES[names[0].strip(",")], DTYPES[names[-1]]


NF4_FACTORS = {
    "dtype": ("bf16", "fp16", "fp32"),
    "scales": ("fp32", "nested"),
    "blocksize": ("64", "4096"),
    "shape": ("4096x14336", "odd", "beyond int32"),
}


def launch_nf4(values: Values) -> None:
    shape = {"4096x14336": (4096, 14336), "odd": (67, 1003), "beyond int32": (2**16, 2**16)}[values["shape"]]
    blocksize, numel, nested = int(values["blocksize"]), shape[0] * shape[1], values["scales"] == "nested"
    blocks = -(-numel // blocksize)
    absmax = _meta(blocks, dtype=torch.uint8 if nested else torch.float32)
    plain = _meta(-(-numel // 2), dtype=torch.uint8), shape, absmax, blocksize, _meta(16, dtype=torch.float32)
    packed = Packed(*plain)
    if nested:
        groups, code = _meta(-(-blocks // 256), dtype=torch.float32), _meta(256, dtype=torch.float32)
        packed = Packed(*plain, groups, code, 256, _meta(dtype=torch.float32))
    dequantize(packed, DTYPES[values["dtype"]], method="triton")


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


OPS = {
    "linear_logps": Op(HEAD_FACTORS, launch_head, head_allowed, head_beyond_pairs),
    "pair_loss": Op(PAIR_FACTORS, launch_pair_loss, pair_loss_allowed),
    "sequence_sums": Op({"dtype": ("fp32", "fp64"), "ld_alpha": ("no", "yes")}, launch_sequence_sums),
    "glu": Op(GLU_FACTORS, launch_glu),
    "nf4": Op(NF4_FACTORS, launch_nf4),
    "rms_norm": Op(NORM_FACTORS, launch_norm, norm_allowed),
    "rope": Op(ROPE_FACTORS, launch_rope),
}


# Which combinations


def combinations(op: Op, devices: Sequence[str]) -> list[dict[str, str]]:
    """Every allowed combination of the factors, the device first among them."""
    factors = {"device": tuple(devices), **op.factors}
    every = (dict(zip(factors, values, strict=True)) for values in itertools.product(*factors.values()))
    return [values for values in every if op.allowed(launch.EXAMPLES[values["device"]], values)]


def pairs_of(values: Values) -> set[Any]:
    return set(itertools.combinations(values.items(), 2))


def pairwise(every: Sequence[dict[str, str]], also: Callable[[Values], set[Any]] = lambda _: set()) -> list[Values]:
    """Few of the combinations that hold every pair of values, and all of what is `also` to be held, that any holds.

    Greedy: always the combination with most that is still missing, the first of equals, so it repeats. What one adds
    only falls as others are taken, so an old count is a bound, and most combinations need not be counted again.
    """
    held = [pairs_of(values) | also(values) for values in every]
    bounds = [len(own) for own in held]
    missing: set[Any] = set().union(*held)
    taken = []
    while missing:
        best, most = 0, 0
        for place, bound in enumerate(bounds):
            if bound > most:
                bounds[place] = len(held[place] & missing)
                best, most = (place, bounds[place]) if bounds[place] > most else (best, most)
        taken.append(every[best])
        missing -= held[best]
    return taken


def cases(cover: str, devices: Sequence[str], ops: Sequence[str]) -> list[Case]:
    found = []
    for name in ops:
        every = combinations(OPS[name], devices)
        for values in pairwise(every, OPS[name].beyond_pairs) if cover == "pairwise" else every:
            rest = {factor: value for factor, value in values.items() if factor != "device"}
            found.append(Case(name, values["device"], tuple(rest.items())))
    return found
