"""CUDA graphs of a micro-batch padded to a bucket: what padding costs, and what hiding the host's time is worth.

A graph has fixed shapes, and a packed micro-batch four that vary: its tokens, gathered keys, scored rows and segments.
Each is padded up to a geometric series; a graph serves what has the same four. Padding costs FLOPs of the blocks by
tokens and of the head by rows. Without graphs a micro-batch takes as long as the host or the GPU does, whichever is
longer, the GPU at an MFU of 0.5; with them as long as the padded one takes the GPU. What does not fit a graph (another
reading of the data, a first compilation) is left out, in favour of graphs.

Legend: T tokens, K gathered keys, N scored rows, S segments.
"""

from __future__ import annotations

from argparse import Namespace
from math import ceil, log
from random import Random
from typing import Any

from benchmarks.estimate import PEAK
from benchmarks.explore import host
from benchmarks.flops import Passes
from benchmarks.models import Model
from benchmarks.run import LORA_RANK
from benchmarks.workload import PROFILES, PairLengths, pair_lengths
from fastdpo.batch import microbatches

RATIOS = (1.1, 1.25, 1.5, 2.0)
CASES = ((8, 8192), (64, 16_384))  # pairs an optimizer step, tokens a micro-batch at most
ROWS, SMALLEST = 4096, 8

Sizes = tuple[int, int, int, int]  # T, K, N, S


def sizes(pairs: list[PairLengths]) -> Sizes:
    tokens, scored = sum(pair.tokens for pair in pairs), sum(pair.chosen + pair.rejected for pair in pairs)
    return tokens, tokens + sum(pair.prompt for pair in pairs), scored, 2 * len(pairs)


def bucket(size: int, ratio: float) -> int:
    """The first of SMALLEST times a power of the ratio that has room."""
    steps = max(0, ceil(log(size / SMALLEST) / log(ratio) - 1e-9))
    return max(size, int(SMALLEST * ratio**steps))


def packed(profile: str, batch: int, budget: int) -> list[Sizes]:
    """The micro-batches of an epoch in random order."""
    pairs, found = pair_lengths(PROFILES[profile], ROWS), []
    Random(0).shuffle(pairs)
    for start in range(0, ROWS, batch):
        step = pairs[start : start + batch]
        groups = microbatches([pair.tokens for pair in step], batch, budget)
        found += [sizes([step[index] for index in group]) for group in groups]
    return found


def seconds(model: Model, size: Sizes) -> float:
    """On the GPU: the reference, forward and backward. Attention is left out, which padding need not lengthen."""
    tokens, _, scored, _ = size
    passes = Passes.of(model, LORA_RANK, tokens, scored, 0, 0.0)
    needed = passes.policy_forward + passes.backward + passes.reference_forward + 3 * passes.head
    return (needed - passes.first_inputs) / (host.MFU * PEAK)


def case(model: Model, asking: float, profile: str, batch: int, budget: int, ratio: float) -> dict[str, Any]:
    """`asking`: seconds of the host a micro-batch."""
    found = packed(profile, batch, budget)
    padded = [tuple(bucket(one, ratio) for one in size) for size in found]
    alone, wider = sum(seconds(model, size) for size in found), sum(seconds(model, size) for size in padded)  # type: ignore[arg-type]
    now = sum(max(asking, seconds(model, size)) for size in found)
    return {
        "model": model.name,
        "profile": profile,
        "pairs a step": batch,
        "ratio": ratio,
        "tokens, median": sorted(tokens for tokens, *_ in found)[len(found) // 2],
        "waiting for the host": sum(asking > seconds(model, size) for size in found) / len(found),
        "FLOPs wasted": wider / alone - 1,
        "graphs by tokens alone": len({size[0] for size in padded}),
        "graphs": len(set(padded)),
        "replays a graph in an epoch": len(padded) / len(set(padded)),
        "speed": now / wider,
        "speed if the host took half": sum(max(asking / 2, seconds(model, size)) for size in found) / wider,
    }


def measure(options: Namespace) -> dict[str, list[dict[str, Any]]]:
    asked = host.measure(options)["one micro-batch"]
    rows = [
        case(model, of_host["micro-batch, ms"] / 1e3, profile, *shape, ratio)
        for model, of_host in zip(host.SHAPES, asked, strict=True)
        for profile in ("hh-rlhf", "ultrafeedback")
        for shape in CASES
        for ratio in RATIOS
    ]
    return {"padded to buckets": rows, "the host": asked}
