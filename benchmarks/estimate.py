"""What a 70B model takes under FSDP2, by arithmetic alone: bytes a process, traffic and time. Nothing here is measured.

docs/several_gpus.md says where each number comes from and holds the tables, which `python -m benchmarks estimate`
prints.

A pass gathers what is around the blocks (embedding, last norm, head) once, and each block once; the policy's backward
gathers each block again. Gradients of what trains are reduced once a micro-batch, in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

from benchmarks.markdown import table
from benchmarks.models import Model

LLAMA = Model("llama-3-70b", "Llama-3-70B's shape", "llama", 128_256, 8192, 28_672, 80, 64, 8, False, False, 0.0)
RANK = 16
GIB, GB = 2**30, 1e9
ADAM = 8  # bytes of a trained number: two moments in fp32
FP32 = 4
UNITS = 3  # blocks: the one that computes, the one that is fetched, the buffer that it comes in
RESERVE, CONTEXT = 0.05, 0.6 * GIB  # as the memory plan has them
LINE_RATE, MFU, PEAK = 0.8, 0.4, 989e12  # shares of what links and chips give at most; dense bf16 of an H100 or H200
MICRO_BATCH = 8192  # tokens, at most
STEP = 128 * 3 * 512  # tokens: 128 pairs of a prompt and two answers of 512 tokens


@dataclass(frozen=True)
class Cluster:
    title: str
    ranks: int
    card: float  # bytes
    link: float  # bytes a second at which a gather comes in at most


@dataclass(frozen=True)
class Training:
    """`weight`: bytes of one between passes; `flops`: of the backward, a token and weight, with the forward again."""

    title: str
    weight: int
    trained: float  # numbers in a block
    around: float  # trained numbers around the blocks
    flops: int
    copy: int  # bytes of a weight of a reference model of its own


BLOCK = sum(inputs * outputs for inputs, outputs in LLAMA.linears.values()) + 2 * LLAMA.hidden_size
AROUND = LLAMA.parameters["total"] - LLAMA.num_hidden_layers * BLOCK
FACTORS = RANK * sum(map(sum, LLAMA.linears.values()))
EIGHT = Cluster("8 x H200", 8, 140 * GIB, 450 * GB)  # NVLink 4, one direction
MANY = Cluster("64 x H100", 64, 79 * GIB, 8 * 50 * GB)  # a ring enters each machine once, over its 8 links
LORA = Training("LoRA", 2, FACTORS, 0, 4, 0)
FULL = Training("full", 4, BLOCK, AROUND, 6, 4)
CASES = [(training, cluster) for training in (LORA, FULL) for cluster in (EIGHT, MANY)]


def held(training: Training, cluster: Cluster) -> dict[str, float]:
    """Bytes of a process, but for what tokens take."""
    layers, share = LLAMA.num_hidden_layers, cluster.ranks
    trained = layers * training.trained + training.around
    adapters = FP32 * trained if training is LORA else 0
    return {
        "weights": (training.weight * LLAMA.parameters["total"] + adapters) / share,
        "gradients": FP32 * trained / share,
        "optimizer states": ADAM * trained / share,
        "reference model": training.copy * LLAMA.parameters["total"] / share,
        "gathered: blocks": UNITS * (gathered_block(training) + FP32 * training.trained),
        "gathered: around them": training.weight * AROUND + FP32 * training.around,
        "allocator, CUDA": RESERVE * cluster.card + CONTEXT,
    }


def gathered_block(training: Training) -> float:
    """Bytes of one in bf16, with its adapters."""
    return 2 * (BLOCK + (training.trained if training is LORA else 0))


def of_a_token(training: Training) -> float:
    """Bytes that checkpointing keeps, the input of each block in the dtype of the residual stream, and of a block's
    backward what `fastdpo plan` finds: as much as five rows of the MLP.
    """
    return LLAMA.num_hidden_layers * LLAMA.hidden_size * training.weight + 5 * 2 * LLAMA.intermediate_size


def traffic(training: Training) -> dict[str, float]:
    """Bytes of what a micro-batch gathers and reduces."""
    blocks = LLAMA.num_hidden_layers * gathered_block(training)
    around = training.weight * AROUND
    reduced = FP32 * (LLAMA.num_hidden_layers * training.trained + training.around)
    return {"forward": blocks + around, "backward": blocks + reduced, "reference": blocks + around}


def seconds(moved: float, cluster: Cluster) -> float:
    """Of a gather of so many bytes, of which each process has a share."""
    return moved * (1 - 1 / cluster.ranks) / (LINE_RATE * cluster.link)


def computed(training: Training, tokens: float) -> dict[str, float]:
    """Seconds of a pass over the blocks, without attention, adapters and the head."""
    product = tokens * LLAMA.num_hidden_layers * BLOCK / (MFU * PEAK)
    return {"forward": 2 * product, "backward": training.flops * product, "reference": 2 * product}


def memory_table() -> str:
    columns = [held(*case) for case in CASES]
    free = [cluster.card - sum(column.values()) for (_, cluster), column in zip(CASES, columns, strict=True)]
    sizes = [of_a_token(training) for training, _ in CASES]
    rows = [[name, *(f"{column[name] / GIB:.1f}" for column in columns)] for name in columns[0]]
    rows.append(["left of the card", *(f"{left / GIB:.1f}" for left in free)])
    rows.append(["MiB a token", *(f"{size / 2**20:.2f}" for size in sizes)])
    fitting = [left / size for left, size in zip(free, sizes, strict=True)]
    rows.append(["tokens that fit", *(f"{tokens:,.0f}" if tokens > 0 else "does not fit" for tokens in fitting)])
    return _table("GiB a process", rows)


def traffic_table() -> str:
    rows = [[f"{name}, GB a micro-batch", *_row(lambda t, c, of=name: traffic(t)[of] / GB)] for name in traffic(LORA)]
    rows.append(["micro-batches a step", *_row(micro_batches)])
    rows.append(["GB a step", *_row(lambda t, c: micro_batches(t, c) * sum(traffic(t).values()) / GB)])
    rows.append(["s a step of traffic", *_row(seconds_of_traffic, digits=1)])
    rows.append(["s a step of products", *_row(lambda t, c: sum(computed(t, STEP / c.ranks).values()), digits=1)])
    rows += [
        [f"tokens that cover the {name}", *_row(lambda t, c, of=name: covering(t, c, of))] for name in traffic(LORA)
    ]
    return _table("", rows)


def micro_batches(training: Training, cluster: Cluster) -> float:
    return ceil(STEP / cluster.ranks / MICRO_BATCH)


def seconds_of_traffic(training: Training, cluster: Cluster) -> float:
    return micro_batches(training, cluster) * seconds(sum(traffic(training).values()), cluster)


def covering(training: Training, cluster: Cluster, name: str) -> float:
    """Tokens of a micro-batch whose products in a pass take as long as its traffic."""
    return seconds(traffic(training)[name], cluster) / computed(training, 1)[name]


def _row(quantity: Callable[[Training, Cluster], float], digits: int = 0) -> list[str]:
    return [f"{quantity(*case):,.{digits}f}" for case in CASES]


def _table(corner: str, rows: list[list[str]]) -> str:
    return table([corner, *(f"{training.title}, {cluster.title}" for training, cluster in CASES)], rows)


def tables() -> str:
    return f"{memory_table()}\n\n{traffic_table()}\n"
