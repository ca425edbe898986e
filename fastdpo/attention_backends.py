"""How a layer's packed attention is computed: five backends, and which of them a call goes to.

Every backend takes the queries of all segments end to end, (1, Hq, T, d), and the keys and values gathered for them,
(1, Hkv, K, d) and (1, Hkv, K, dv), gives (1, Hq, T, dv), and lets a segment's last query see its last key and those
before it. They differ in what they can do and where:

    flash-attn  the flash-attn package (2.1 and newer; 2.6 for softcaps), one call a layer. Only where the user asks for
                attn_implementation="flash_attention_2". Untested: written after its documentation, not run yet.
    flash       FlashAttention-2 as torch ships it, one call a layer: bf16 and fp16 on NVIDIA's 8.0 and newer.
    efficient   torch's memory-efficient attention, one call a layer: fp32, and fp16 on cards as old as 5.0. No sliding
                windows: the derivative that torch registers for it leaves them out.
    sdpa        scaled_dot_product_attention segment by segment, under a mask where there is a window or a prompt of
                its own: CPUs and every other device.
    products    plain matrix products segment by segment: logit softcaps, attention sinks, and where "eager" is asked.

`choose` is a pure function of facts. What it chooses for a batch's length is what it chooses for the same batch in the
second forward of a checkpointed block, and for the reference: their rounding is the same.

Legend: T tokens, K gathered keys, Hq and Hkv heads, d head size of queries and keys, dv of values, S segments.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

import torch
from packaging.version import Version
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastdpo.batch import Segments

HALF = (torch.bfloat16, torch.float16)
PACKABLE = (None, "eager", "flash_attention_2")  # what a user may ask for and still get packed batches
BOTTOM_RIGHT = 2  # torch's number for a causal mask with the last query on the last key


class Refused(ValueError):
    """What the user asked for cannot compute this attention."""


@dataclass(frozen=True)
class Facts:
    """What the choice of a backend depends on."""

    device: str = "cpu"  # torch's name of it; "hip" for AMD's cards
    capability: tuple[int, int] = (0, 0)  # of an NVIDIA card
    dtype: torch.dtype = torch.float32
    head_size: int = 64  # of queries and keys
    value_size: int = 64
    window: int | None = None  # how many keys a query sees, itself included; None for all
    softcap: bool = False
    sinks: bool = False
    dropout: bool = False
    asked: str | None = None  # attn_implementation, None for torch's own choice
    flash_built: bool = False  # torch was built with its flash attention
    flash_attn: tuple[int, ...] = ()  # version of the flash-attn package, () where it is not installed


@dataclass(frozen=True)
class Scores:
    """What becomes of a query's products with its keys before they weigh the values."""

    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None  # (Hq,), the logit of one more key without a value
    dropout: float = 0.0


def facts_of(query: Tensor, value: Tensor, scores: Scores, asked: str | None) -> Facts:
    """The facts of one call."""
    dtype = compute_dtype(query)
    return replace(
        device_facts(query.device, dtype) if _pretended is None else replace(_pretended, dtype=dtype),
        head_size=query.shape[-1],
        value_size=value.shape[-1],
        window=scores.window,
        softcap=bool(scores.softcap),
        sinks=scores.sinks is not None,
        dropout=scores.dropout > 0,
        asked=asked,
    )


_pretended: Facts | None = None


@contextmanager
def pretend(card: Facts) -> Iterator[None]:
    """Within it, calls go to the backend that they would have on `card`, whatever device their tensors are on."""
    global _pretended
    before, _pretended = _pretended, card
    try:
        yield
    finally:
        _pretended = before


@cache
def device_facts(device: torch.device, dtype: torch.dtype) -> Facts:
    """A plain call's on a device, in a dtype."""
    hip = device.type == "cuda" and torch.version.hip is not None
    try:
        flash_attn = Version(importlib.metadata.version("flash-attn")).release[:2]
    except importlib.metadata.PackageNotFoundError:
        flash_attn = ()
    return Facts(
        device="hip" if hip else device.type,
        capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0),
        dtype=dtype,
        flash_built=torch.backends.cuda.is_flash_attention_available(),
        flash_attn=flash_attn,
    )


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """What a matrix product of it would be in: ops called by their aten names do not follow autocast by themselves."""
    kind = tensor.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on and tensor.dtype != torch.float64 else tensor.dtype


@cache
def choose(facts: Facts) -> tuple[str, str]:
    """-> the backend, and why: what keeps the ones before it from this call.

    Raises Refused where the user asked for what cannot do it.
    """
    if facts.asked == "eager":
        return "products", "attn_implementation='eager'"
    if facts.asked == "flash_attention_2":
        if obstacle := _not_flash_attn(facts):
            raise Refused(
                f"attn_implementation='flash_attention_2' was asked for, but {obstacle}: leave attn_implementation "
                "out, and torch's own attention is taken"
            )
        return "flash-attn", "attn_implementation='flash_attention_2'"
    obstacles = []
    for backend in ("flash", "efficient", "sdpa"):
        if not (obstacle := OBSTACLES[backend](facts)):
            return backend, "; ".join(dict.fromkeys(obstacles)) or f"{_name(facts.dtype)} on {_card(facts)}"
        obstacles.append(obstacle)
    return "products", "; ".join(dict.fromkeys(obstacles))


def _not_flash_attn(facts: Facts) -> str:
    if not facts.flash_attn:
        return "the package is not installed (pip install flash-attn)"
    if facts.flash_attn < ((2, 6) if facts.softcap else (2, 1)):
        return f"flash-attn {'.'.join(map(str, facts.flash_attn))} is too old (2.1, and 2.6 for softcaps)"
    return _not_on_flash_kernels(facts)


def _not_flash(facts: Facts) -> str:
    if not (obstacle := _not_cuda(facts)) and not facts.flash_built:
        obstacle = "this torch was built without flash attention"
    return obstacle or _not_on_flash_kernels(facts) or _not_sdpa(facts)


def _not_on_flash_kernels(facts: Facts) -> str:
    """What keeps a call from FlashAttention-2's kernels, whoever ships them."""
    width = flash_width(facts.head_size, facts.value_size)
    if obstacle := _not_cuda(facts):
        return obstacle
    if facts.capability < (8, 0):
        return f"flash attention needs compute capability 8.0, not {_card(facts)}"
    if facts.dtype not in HALF:
        return f"flash attention takes bfloat16 and float16, not {_name(facts.dtype)}"
    if facts.sinks:
        return "fused attention has no sinks"
    if width > 256:
        return f"flash attention takes heads of up to 256, not {width}"
    if facts.dropout and width > 192 and facts.capability not in ((8, 0), (9, 0)):
        return f"flash attention has no gradient for heads of {width} with dropout on {_card(facts)}"
    return ""


def _not_efficient(facts: Facts) -> str:
    if obstacle := _not_cuda(facts):
        return obstacle
    if facts.dtype not in (*HALF, torch.float32) or facts.dtype == torch.bfloat16 and facts.capability < (8, 0):
        return f"efficient attention does not take {_name(facts.dtype)} on {_card(facts)}"
    if facts.window is not None:
        return "efficient attention has no gradient for sliding windows"
    return _not_sdpa(facts)


def _not_sdpa(facts: Facts) -> str:
    if facts.softcap or facts.sinks:
        return f"fused attention has no {'softcap' if facts.softcap else 'sinks'}"
    return ""


def _not_cuda(facts: Facts) -> str:
    return "" if facts.device == "cuda" else f"one call for all segments needs an NVIDIA GPU, not {facts.device!r}"


OBSTACLES: dict[str, Callable[[Facts], str]] = {  # backend -> what keeps a call from it, "" where nothing does
    "flash-attn": _not_flash_attn,
    "flash": _not_flash,
    "efficient": _not_efficient,
    "sdpa": _not_sdpa,
    "products": lambda facts: "",
}


def _card(facts: Facts) -> str:
    return "compute capability {}.{}".format(*facts.capability) if facts.device == "cuda" else facts.device


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_asked(asked: str | None, device: torch.device, dtype: torch.dtype) -> None:
    """Raises Refused where what was asked for cannot run here, whatever the model, and where nobody knows it."""
    known = ["eager", *(name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if "fastdpo" not in name)]
    elsewhere = asked is None or asked.startswith("flash_") or "/" in asked  # a newer one, a kernel of the Hub
    if not elsewhere and asked not in known:
        usual = ", ".join(sorted(name for name in known if "|" not in name))
        raise Refused(
            f"attn_implementation={asked!r} is none that transformers knows: take one of {usual}, or leave it out"
        )
    if asked == "flash_attention_2":
        choose(replace(device_facts(device, dtype), asked=asked))
    if asked == "flex_attention" and device.type == "cpu":
        raise Refused("attn_implementation='flex_attention' has no gradient on a CPU: leave it out")


# ---- one call for all segments


@dataclass(frozen=True)
class Call:
    """Segments of one variable-length call: where their queries and keys lie, offsets (S + 1,) int32, and maxima."""

    queries: slice
    keys: slice
    cu_queries: Tensor
    cu_keys: Tensor
    max_queries: int
    max_keys: int


def flash_width(head_size: int, value_size: int) -> int:
    """The head size that FlashAttention-2 computes with: a multiple of 8; above 192 only 256 trains everywhere."""
    width = -(-max(head_size, value_size) // 8) * 8
    return 256 if 192 < width <= 256 else width


def segment_groups(query_lengths: Sequence[int], heads: int, width: int) -> list[tuple[int, int]]:
    """Segments as runs of [first, last) that one FlashAttention-2 call can take.

    Its backward counts the elements of a buffer of (T + 128 S) * heads * width in int32, the width a multiple of 64 at
    most. A segment that is too long for it alone goes alone.
    """
    rows = (2**31 - 1) // (heads * (-(-width // 64) * 64))
    groups, first, used = [], 0, 0
    for index, length in enumerate(query_lengths):
        if used + length + 128 > rows and index > first:
            groups.append((first, index))
            first, used = index, 0
        used += length + 128
    return [*groups, (first, len(query_lengths))]


def _calls(segments: Segments, groups: Sequence[tuple[int, int]]) -> Iterator[Call]:
    query, key = 0, 0
    for first, last in groups:
        queries, keys = segments.query_lengths[first:last], segments.key_lengths[first:last]
        cu_queries, cu_keys = segments.cu_queries, segments.cu_keys
        if len(groups) > 1:
            cu_queries = cu_queries[first : last + 1] - cu_queries[first]
            cu_keys = cu_keys[first : last + 1] - cu_keys[first]
        here = slice(query, query + sum(queries)), slice(key, key + sum(keys))
        yield Call(*here, cu_queries, cu_keys, max(queries), max(keys))
        query, key = here[0].stop, here[1].stop


def _widened(tensor: Tensor, width: int) -> Tensor:
    """Zeros behind each head: they add nothing to products, and values of zero come out as zero. Heads contiguous."""
    if tensor.shape[-1] == width and tensor.stride(-1) == 1:
        return tensor
    return pad(tensor, (0, width - tensor.shape[-1])).contiguous()


def _a_head_each(query: Tensor, tensor: Tensor) -> Tensor:
    """Keys or values of grouped heads, repeated for each head of the queries."""
    groups = query.shape[1] // tensor.shape[1]
    return tensor if groups == 1 else tensor.repeat_interleave(groups, 1)


def _by_flash_kernels(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, attend: Callable[..., Tensor]
) -> Tensor:
    """`attend` takes and gives (tokens, heads, size)."""
    width = flash_width(query.shape[-1], value.shape[-1])
    q, k, v = (_widened(tensor, width).squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    calls = list(_calls(segments, segment_groups(segments.query_lengths, query.shape[1], width)))
    if len(calls) == 1:  # an index, even of all, fills zeros with its gradient
        result = attend(q, k, v, calls[0])
    else:
        result = torch.cat([attend(q[call.queries], k[call.keys], v[call.keys], call) for call in calls])
    return result[..., : value.shape[-1]].transpose(0, 1)[None]


def flash(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scores: Scores) -> Tensor:
    def attend(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        left = None if scores.window is None else scores.window - 1
        return torch.ops.aten._flash_attention_forward(
            q,
            k,
            v,
            call.cu_queries,
            call.cu_keys,
            call.max_queries,
            call.max_keys,
            scores.dropout,
            True,  # causal
            False,  # return_debug_mask
            scale=scores.scaling,
            window_size_left=left,
            window_size_right=None if left is None else 0,
        )[0]

    return _by_flash_kernels(query, key, value, segments, attend)


def flash_attn(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scores: Scores) -> Tensor:
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    def attend(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        return flash_attn_varlen_func(
            q,
            k,
            v,
            call.cu_queries,
            call.cu_keys,
            call.max_queries,
            call.max_keys,
            dropout_p=scores.dropout,
            softmax_scale=scores.scaling,
            causal=True,
            window_size=(-1, -1) if scores.window is None else (scores.window - 1, 0),
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **({"softcap": scores.softcap} if scores.softcap else {}),
        )

    return _by_flash_kernels(query, key, value, segments, attend)


def efficient(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scores: Scores) -> Tensor:
    """Heads are as many for keys as for queries here, and of a size that its loads are aligned to."""
    size = value.shape[-1]
    key, value = _a_head_each(query, key), _a_head_each(query, value)
    q, k, v = (_widened(tensor, -(-tensor.shape[-1] // 8) * 8).transpose(1, 2) for tensor in (query, key, value))
    result = torch.ops.aten._efficient_attention_forward(
        q,
        k,
        v,
        None,  # bias
        segments.cu_queries,
        segments.cu_keys,
        max(segments.query_lengths),
        max(segments.key_lengths),
        scores.dropout,
        BOTTOM_RIGHT,
        True,  # compute_log_sumexp: for the backward, and without one too, so that both compute alike
        scale=scores.scaling,
    )
    return result[0][..., :size].transpose(1, 2)


# ---- segment by segment


def _by_segment(query: Tensor, key: Tensor, value: Tensor, segments: Segments, attend: Callable[..., Tensor]) -> Tensor:
    """`attend` takes and gives (1, heads, tokens, size)."""
    keys, values = key.split(segments.key_lengths, 2), value.split(segments.key_lengths, 2)
    return torch.cat(list(map(attend, query.split(segments.query_lengths, 2), keys, values)), 2)


def sdpa(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scores: Scores) -> Tensor:
    if query.is_cuda:  # only torch's unfused attention takes grouped heads under a mask there
        key, value = _a_head_each(query, key), _a_head_each(query, value)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        causal = q.shape[2] == k.shape[2] and (scores.window is None or scores.window >= k.shape[2])
        mask = None if causal else _mask(segments, q, k, scores.window)
        return scaled_dot_product_attention(
            q, k, v, mask, scores.dropout, causal, scale=scores.scaling, enable_gqa=q.shape[1] != k.shape[1]
        )

    return _by_segment(query, key, value, segments, attend)


def products(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scores: Scores) -> Tensor:
    key, value = _a_head_each(query, key), _a_head_each(query, value)
    exact = torch.promote_types(query.dtype, torch.float32)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = q @ k.transpose(-1, -2) * scores.scaling
        if scores.softcap:
            logits = scores.softcap * torch.tanh(logits / scores.softcap)
        logits = logits.masked_fill(~_mask(segments, q, k, scores.window), -torch.inf)
        if scores.sinks is not None:  # one more column, which takes its share and gives nothing
            sinks = scores.sinks.to(logits.dtype).view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
            logits = torch.cat([logits, sinks], -1)
        weights = logits.softmax(-1, dtype=exact)[..., : k.shape[2]].to(q.dtype)
        return torch.dropout(weights, scores.dropout, train=True) @ v

    return _by_segment(query, key, value, segments, attend)


def _mask(segments: Segments, q: Tensor, k: Tensor, window: int | None) -> Tensor:
    """(Lq, Lk) bool, True where attended; made once a batch and length, then shared by the layers."""
    what = (q.device, q.shape[2], k.shape[2], window)
    if what not in segments.masks:
        last = k.shape[2] - q.shape[2]  # the key that the first query stands on
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(last)
        segments.masks[what] = mask if window is None else mask.triu(last - window + 1)
    return segments.masks[what]


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Segments, Scores], Tensor]] = {
    "flash-attn": flash_attn,
    "flash": flash,
    "efficient": efficient,
    "sdpa": sdpa,
    "products": products,
}
DESCRIPTIONS = {
    "flash-attn": "the flash-attn package, one call a layer",
    "flash": "torch's flash attention, one call a layer",
    "efficient": "torch's memory-efficient attention, one call a layer",
    "sdpa": "torch's scaled_dot_product_attention, segment by segment",
    "products": "plain matrix products, segment by segment",
}
