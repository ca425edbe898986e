"""The processes of a run, one a device: what they tell each other.

Every rank reads the same optimizer batch and takes its share of the pairs (`loader.py`). Then ranks compute by
themselves, and once a step they sum their gradients. Not by DistributedDataParallel: it reduces in the middle of the
last backward, where a rank that runs out of memory would leave the others waiting for it. Here all ranks first agree
that they are through, so that they can do the step again together. What that gives up is reducing beside the backward:
2 * 4 bytes of traffic for each parameter that trains, once an optimizer step.

Numbers that hosts exchange (counts, whether memory sufficed) go through gloo and wait for no device; each says what it
is for, so that ranks at different points of the run (a callback called `evaluate` on one alone) end with an error that
says so. Within a step, what ranks do together on the device comes after an agreement that all are ready for it, and
allocates nothing: a rank that runs out of memory never leaves the others waiting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastdpo.config import DPOConfig
from fastdpo.quantized import quantized_scales
from fastdpo.sharding import asked_plugin, is_sharded

# What an exchange of numbers is for; all but gradients fill one line of WIDTH numbers.
PURPOSES = ("memory", "batch", "evaluation", "gradients", "sizes", "flags", "plan", "pass", "wait")
WIDTH = 8
BUCKET_BYTES = 2**26  # of gradients that are summed in one call (unmeasured: large enough for a link's full rate)
FITS = 2**62


class RanOutElsewhere(RuntimeError):
    """Another rank ran out of memory: all do the step again within `budget` tokens a micro-batch; 0: nothing helps."""

    def __init__(self, budget: int) -> None:
        super().__init__("another process ran out of memory on a single pair: its own message says what to change")
        self.budget = budget


@dataclass(frozen=True)
class Ranks:
    """This process among `count`; alone, everything here returns what it was given."""

    rank: int = 0
    count: int = 1
    hosts: Any = None  # the group that exchanges numbers on the CPU
    fsdp: Any = None  # accelerate's plugin, where each holds a share of the weights

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def reads_weights(self) -> bool:
        """Under FSDP2 one process may do it for all, as `shard` gives them its values."""
        return self.is_main or self.fsdp is None or not self.fsdp.cpu_ram_efficient_loading

    def exchange(self, purpose: str, numbers: Sequence[int] = ()) -> list[list[int]]:
        """-> the numbers of every rank, which all give equally many: at most 7, but for gradients, before which ranks
        agree. Raises RuntimeError where ranks are at different points of the run.
        """
        if self.count == 1:
            return [list(numbers)]
        line = [PURPOSES.index(purpose), *numbers]
        mine = torch.tensor(line + [0] * (WIDTH - len(line)), dtype=torch.int64)
        everyone = [torch.empty_like(mine) for _ in range(self.count)]
        dist.all_gather(everyone, mine, group=self.hosts)
        lines: list[list[int]] = torch.stack(everyone).tolist()
        if len({theirs[0] for theirs in lines}) > 1:
            at = ", ".join(f"{PURPOSES[theirs[0]]!r} in process {rank}" for rank, theirs in enumerate(lines))
            raise RuntimeError(
                f"the processes are at different points of the run (they exchange {at}): train, evaluate and predict "
                "are called in all of them or in none, also from callbacks"
            )
        return [theirs[1 : len(line)] for theirs in lines]

    def agree(self, budget: int = FITS) -> int:
        """Each rank calls it at the same points, and one that ran out of memory in place of its next: `budget` is then
        the tokens a micro-batch to try next. -> the least of those. Raises RanOutElsewhere where only others did.
        """
        least = min(theirs[0] for theirs in self.exchange("memory", [budget]))
        if least < FITS and budget == FITS:
            raise RanOutElsewhere(least)
        return least

    def makes_pass(self, wanted: bool) -> bool:
        """Whether a pass through the model is made that this rank wants, or not: under FSDP2 all make it as soon as one
        of them does, as it gathers weights from all.
        """
        return wanted if self.fsdp is None else any(theirs[0] for theirs in self.exchange("pass", [int(wanted)]))

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks of a tensor on the run's device, in place."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def gather(self, rows: Tensor, sizes: Sequence[int] | None = None) -> list[Tensor]:
        """-> what every rank gave, in their order: (N, ...) with an N of its own, `sizes` where it is known. Before the
        transfer they agree.
        """
        if self.count == 1:
            return [rows]
        sizes = sizes or [theirs[0] for theirs in self.exchange("sizes", [len(rows)])]
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        everyone = [torch.empty_like(padded) for _ in sizes]
        self.agree()
        dist.all_gather(everyone, padded, group=None if rows.is_cuda else self.hosts)
        return [part[:size] for part, size in zip(everyone, sizes, strict=True)]

    @torch.no_grad()
    def equalise(self, module: nn.Module) -> None:
        """Every parameter and buffer, with the scales of quantised ones, as the first rank has it; shares of sharded
        ones are left as they are.
        """
        if self.count == 1:
            return
        for tensor in (*module.parameters(), *module.buffers(), *quantized_scales(module)):
            if is_sharded(tensor):
                continue
            values = tensor.data.contiguous()
            dist.broadcast(values, src=0)
            tensor.data.copy_(values)

    def wait(self) -> None:
        """Until all ranks are here."""
        self.exchange("wait")


def find_ranks(config: DPOConfig) -> Ranks:
    """The ranks that the launcher started; accelerate, through the config, has connected them."""
    if config.world_size == 1:
        return Ranks()
    assert dist.group.WORLD is not None
    hosts = _host_group(dist.group.WORLD, config.ddp_timeout)
    return Ranks(dist.get_rank(), dist.get_world_size(), hosts, asked_plugin(config.fsdp_plugin_args))


@cache
def _host_group(world: Any, seconds: int) -> Any:
    """One a process, whatever the number of trainers in it."""
    return world if dist.get_backend(world) == "gloo" else dist.new_group(backend="gloo", timeout=timedelta(0, seconds))


class GradientSum:
    """Sums the gradients of all ranks in place, small ones together; what it needs is allocated before the first step.

    A parameter that no rank has a gradient for keeps none, as it would in one process. Under FSDP2 each block's were
    summed in its backward, and ranks agree alone.
    """

    def __init__(self, ranks: Ranks, trained: Sequence[Tensor]) -> None:
        self.ranks, self.trained = ranks, trained
        self.buckets: list[list[int]] = []
        if ranks.count == 1 or ranks.fsdp is not None:
            return
        room, dtype = 0, None
        for index, parameter in enumerate(trained):
            if parameter.nbytes > room or parameter.dtype != dtype:
                self.buckets.append([])
                room, dtype = BUCKET_BYTES, parameter.dtype
            self.buckets[-1].append(index)
            room -= parameter.nbytes
        together = [bucket for bucket in self.buckets if len(bucket) > 1]
        largest = max((sum(trained[index].nbytes for index in bucket) for bucket in together), default=0)
        self.buffer = torch.empty(largest, dtype=torch.uint8, device=trained[0].device)

    @torch.no_grad()
    def __call__(self, *also: Tensor) -> None:
        """`also` are small tensors that are summed beside the gradients."""
        if self.ranks.count == 1:
            return
        self.ranks.agree()
        for tensor in also:
            self.ranks.sum(tensor)
        if self.ranks.fsdp is not None:
            return
        present = self.ranks.exchange("gradients", [parameter.grad is not None for parameter in self.trained])
        there = [any(theirs) for theirs in zip(*present, strict=True)]
        for parameter, somewhere in zip(self.trained, there, strict=True):
            if somewhere and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            elif somewhere and not parameter.grad.is_contiguous():  # type: ignore[union-attr]
                parameter.grad = parameter.grad.contiguous()  # type: ignore[union-attr]
        self.ranks.agree()  # from here on nothing is allocated
        for bucket in self.buckets:
            self._sum([self.trained[index].grad for index in bucket if there[index]])  # type: ignore[misc]

    def _sum(self, gradients: list[Tensor]) -> None:
        if len(gradients) < 2:
            for gradient in gradients:
                self.ranks.sum(gradient)
            return
        sizes = [gradient.numel() for gradient in gradients]
        flat = self.buffer[: sum(sizes) * gradients[0].itemsize].view(gradients[0].dtype)
        parts = [part.view_as(gradient) for part, gradient in zip(flat.split(sizes), gradients, strict=True)]
        torch._foreach_copy_(parts, gradients)
        self.ranks.sum(flat)
        torch._foreach_copy_(gradients, parts)
