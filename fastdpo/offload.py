"""Block inputs in pinned host memory: what checkpointing still keeps on the GPU, kept on the host.

With every block checkpointed, one (T, D) tensor a block stays from the forward to the backward pass: for 32 blocks of
4096 columns in bf16 256 KiB a token. Here each is copied to the host on a side stream while the next block computes,
and back while the block behind it goes backward, so the copies are off the critical path as long as a block computes
longer than its input takes over the bus. The last block's input is wanted again at once, and stays.

What it gives up: host memory (pinned, in blocks of a power of two: up to twice the bytes), and the bus. At 25 GB/s a
token's 8 KiB a block take 0.33 us; a block of an 8B model computes 0.44 GFLOP a token forward, 0.55 us at
790 TFLOP/s (unmeasured).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class HostCopies:
    """Makes torch's `checkpoint` keep a block's input on the host. One a model: blocks follow each other in it."""

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint
        self.streams: dict[torch.device, _SideStream] = {}
        self.last: Callable[[], _Kept | None] = lambda: None

    def __call__(self, function: Callable[..., Any], hidden: Tensor, *inputs: Any, **options: Any) -> Any:
        """`checkpoint(function, hidden, ...)`; hidden is the block's input, (1, T, D) or (B, T, D)."""

        place = _place(hidden)  # the hooks live as long as the graph, and hidden is not to

        def pack(tensor: Tensor) -> Tensor | _Kept:
            return self._keep(tensor) if _place(tensor) == place else tensor

        with saved_tensors_hooks(pack, _unpack):
            return self.checkpoint(function, hidden, *inputs, **options)

    def _keep(self, tensor: Tensor) -> _Kept:
        before = self.last()
        if before is not None:
            before.send()  # only now: the last block's input is never sent
            if (sent := before.before()) is not None:
                sent.release()
        kept = _Kept(tensor.detach(), self._side_stream(tensor.device), self.last)
        self.last = weakref.ref(kept)
        return kept

    def _side_stream(self, device: torch.device) -> _SideStream | None:
        if device.type != "cuda":
            return None
        if device not in self.streams:
            self.streams[device] = _SideStream(device)
        return self.streams[device]


class _SideStream:
    """A device's stream of copies, beside the one that computes."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def copy(self, to: Tensor, tensor: Tensor) -> Any:
        """Starts the copy; -> what to wait for before `to` is read, or either is let go of."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))  # until `tensor` is made, and `to` is free
        with torch.cuda.stream(self.stream):
            to.copy_(tensor, non_blocking=True)
            return self.stream.record_event()

    def wait(self, copied: Any) -> None:
        """Makes the stream that computes wait, not the host."""
        torch.cuda.current_stream(self.device).wait_event(copied)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Where its numbers are, also of a tensor without data."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset()


def _unpack(kept: Tensor | _Kept) -> Tensor:
    return kept.take() if isinstance(kept, _Kept) else kept


class _Kept:
    """One block's input. The autograd graph holds it; when the graph goes, so do its copies.

    All copies go over one stream, so a way back never overtakes the way there. Device memory belongs to the stream that
    computes, which waits for a copy before memory is let go of or read: so the allocator can give it out again at once,
    also while the host is many blocks ahead, and two inputs are on the device at a time, three while one comes back.
    A pass that fails leaves copies under way: those are waited for when the graph goes.
    """

    def __init__(self, tensor: Tensor, stream: _SideStream | None, before: Callable[[], _Kept | None]) -> None:
        self.on_device: Tensor | None = tensor
        self.on_host: Tensor | None = None
        self.copied: Any = None  # an event of the stream: the last copy is through
        self.stream, self.before, self.device = stream, before, tensor.device

    def __del__(self) -> None:
        if self.on_device is not None:
            self._wait()

    def send(self) -> None:
        """Starts the copy to the host."""
        if self.on_device is not None and self.on_host is None:
            self.on_host = torch.empty_like(self.on_device, device="cpu", pin_memory=self.device.type == "cuda")
            self._copy(self.on_host, self.on_device)

    def release(self) -> None:
        """Lets go of the tensor on the device, once it is on the host."""
        if self.on_host is not None:
            self._wait()
            self.on_device = None

    def fetch(self) -> None:
        """Starts the copy back."""
        if self.on_device is None and self.on_host is not None:
            self.on_device = torch.empty_like(self.on_host, device=self.device)
            self._copy(self.on_device, self.on_host)

    def _copy(self, to: Tensor, tensor: Tensor) -> None:
        if self.stream is None:
            to.copy_(tensor)
        else:
            self.copied = self.stream.copy(to, tensor)

    def _wait(self) -> None:
        if self.stream is not None and self.copied is not None:
            self.stream.wait(self.copied)

    def take(self) -> Tensor:
        """The tensor, for the backward pass of its block; the one that will be wanted next is under way from then."""
        self.fetch()
        self._wait()
        tensor = self.on_device
        assert tensor is not None
        if self.on_host is not None:
            self.on_device = None  # what it was made for holds it now
        if (before := self.before()) is not None:
            before.fetch()
        return tensor
