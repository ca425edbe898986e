"""Checkpointing of every k-th block, and block inputs on the host: the same numbers, and what is kept."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from conftest import tiny_llama
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastdpo.batch import pack
from fastdpo.config import DPOConfig
from fastdpo.data import TokenPair
from fastdpo.model import Policy, checkpointing
from fastdpo.offload import HostCopies, _Kept, _SideStream

PAIRS = [TokenPair([1, 2, 3, 4], [5, 6, 7], [8, 9]), TokenPair([9], [11, 3], [12, 4, 5, 6])]


def gradients(model: nn.Module, device: str = "cpu", **kwargs: Any) -> dict[str, torch.Tensor]:
    """Of one step with these arguments of `checkpointing`; without any, of a step that keeps everything."""
    policy = Policy(model.to(device)).train()
    batch = pack(PAIRS).to(torch.device(device))
    model.zero_grad()
    if kwargs:
        with checkpointing(policy, kwargs):
            policy(batch)[0].square().sum().backward()
    else:
        policy(batch)[0].square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    "kwargs",
    [{"every_n_layers": 2}, {"every_n_layers": 3}, {"offload": True}, {"every_n_layers": 2, "offload": True}],
    ids=str,
)
def test_gradients_are_bitwise_those_of_a_step_that_keeps_everything(kwargs) -> None:
    model = tiny_llama(num_hidden_layers=5)
    expected = gradients(model)
    for name, gradient in gradients(model, **kwargs).items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("every, runs", [(1, 10), (2, 8), (3, 7), (5, 6)])
def test_every_kth_block_runs_twice(every: int, runs: int) -> None:
    """Blocks 0, k, 2k, ... of five."""
    model = tiny_llama(num_hidden_layers=5)
    count = 0

    def counted(*_: Any) -> None:
        nonlocal count
        count += 1

    for block in model.model.layers:
        block.mlp.register_forward_pre_hook(counted)
    gradients(model, every_n_layers=every)
    assert count == runs


def test_fewer_blocks_than_every_n_layers_says_are_said_to_be_so() -> None:
    with pytest.raises(ValueError, match="every_n_layers=9 of LlamaForCausalLM, which has 5 blocks: give .* at most 5"):
        gradients(tiny_llama(num_hidden_layers=5), every_n_layers=9)


def test_all_block_inputs_but_the_last_two_are_on_the_host_alone_between_the_passes() -> None:
    """The last is wanted at once, and the copy of the one before it may be under way still."""
    model = tiny_llama(num_hidden_layers=5)
    policy = Policy(model).train()
    with checkpointing(policy, {"offload": True}):
        loss = policy(pack(PAIRS))[0].sum()
        kept = [thing for thing in gc.get_objects() if isinstance(thing, _Kept)]
        assert sorted(one.on_device is None for one in kept) == [False, False, True, True, True]
        assert sorted(one.on_host is not None for one in kept) == [False, True, True, True, True]
        loss.backward()
        del loss, kept
    gc.collect()
    assert not [thing for thing in gc.get_objects() if isinstance(thing, _Kept)]  # none outlives its graph


def test_a_forward_pass_that_failed_leaves_nothing_behind_for_the_next() -> None:
    model = tiny_llama(num_hidden_layers=3)
    policy = Policy(model).train()
    with checkpointing(policy, {"offload": True}):
        handle = model.model.layers[2].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            policy(pack(PAIRS))
        handle.remove()
    expected = gradients(model)
    for name, gradient in gradients(model, offload=True).items():
        assert torch.equal(gradient, expected[name]), name


def test_only_the_blocks_input_goes_to_the_host() -> None:
    """What else a block is given, such as a mask that all blocks share, would be copied once a block."""
    sent: list[Any] = []
    copies = HostCopies(partial(checkpoint, use_reentrant=False))
    copies._keep = lambda tensor: sent.append(tensor) or tensor  # type: ignore[method-assign]
    hidden, mask = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    out = copies(lambda a, b: (a * b).sin(), hidden, mask)
    out.sum().backward()
    assert [one.data_ptr() for one in sent] == [hidden.data_ptr()]


@pytest.mark.parametrize("kwargs", [{"every_n_layers": 1}, {"offload": True}], ids=str)
def test_a_second_backward_pass_through_the_same_graph_adds_the_same(kwargs) -> None:
    model = tiny_llama(num_hidden_layers=3)
    policy = Policy(model).train()
    with checkpointing(policy, kwargs):
        loss = policy(pack(PAIRS))[0].square().sum()
        loss.backward(retain_graph=True)
        once = [parameter.grad.clone() for parameter in model.parameters()]
        loss.backward()
    for parameter, first in zip(model.parameters(), once, strict=True):
        assert torch.equal(parameter.grad, 2 * first)


@pytest.mark.parametrize("kwargs", [{}, {"offload": True}], ids=str)
def test_checkpointing_leaves_nothing_on_the_model(kwargs) -> None:
    model = tiny_llama().requires_grad_(False)
    before = [dict(vars(module)) for module in model.modules()]
    for _ in range(2):
        with checkpointing(Policy(model).train(), kwargs):
            pass
    model.eval()
    assert [vars(module).keys() for module in model.modules()] == [one.keys() for one in before]
    assert not model.get_input_embeddings()._forward_hooks
    assert not model(torch.arange(4)[None]).logits.requires_grad


class LateStream:
    """Stands for a side stream: a copy is made when it is waited for, and no sooner."""

    def __init__(self) -> None:
        self.under_way: list[Any] = []
        self.let_go: list[str] = []

    def copy(self, to: torch.Tensor, tensor: torch.Tensor) -> int:
        to.fill_(torch.nan)
        self.under_way.append((weakref.ref(to), weakref.ref(tensor)))
        return len(self.under_way)

    def wait(self, copied: int) -> None:
        """A wait for one copy is one for those before it."""
        for place, copy in enumerate(self.under_way[:copied]):
            to, tensor = (end() for end in copy or (lambda: None, lambda: None))
            if copy and to is not None and tensor is not None:
                with torch.no_grad():
                    to.copy_(tensor)
            elif copy:
                self.let_go.append(f"copy {place} was under way when an end of it was let go of")
            self.under_way[place] = None

    def finish(self) -> list[str]:
        self.wait(len(self.under_way))
        return self.let_go


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> LateStream:
    stream = LateStream()
    monkeypatch.setattr(HostCopies, "_side_stream", lambda self, device: stream)
    return stream


def test_copies_are_waited_for_before_their_tensors_are_read_or_let_go_of(late: LateStream) -> None:
    model = tiny_llama(num_hidden_layers=5)
    expected = gradients(model)
    for name, gradient in gradients(model, offload=True).items():
        assert torch.equal(gradient, expected[name]), name
    assert len(late.under_way) == 4 + 3  # the last block sends nothing, and the one before it is not let go of
    assert not late.finish()


@pytest.mark.parametrize("fails", ["forward", "backward"])
def test_a_pass_that_failed_lets_go_of_no_memory_that_a_copy_still_writes_to(fails: str, late: LateStream) -> None:
    """The next pass would compute in it."""
    model = tiny_llama(num_hidden_layers=5)
    policy = Policy(model).train()
    with checkpointing(policy, {"offload": True}):
        loss = policy(pack(PAIRS))[0].sum() if fails == "backward" else None
        model.model.layers[3].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            policy(pack(PAIRS)) if loss is None else loss.backward()
        del loss
    gc.collect()
    assert late.under_way and not late.finish()


def test_a_copy_starts_when_the_device_has_come_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[Any] = []
    side, main = MagicMock(), MagicMock()
    side.wait_stream.side_effect = lambda stream: order.append(("side waits", stream is main))
    side.record_event.side_effect = lambda: order.append("recorded") or "event"
    main.wait_event.side_effect = lambda event: order.append(("main waits", event))
    to = MagicMock()
    to.copy_.side_effect = lambda *_, **__: order.append("copy")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext(order.append(("on side", stream is side))))
    stream = _SideStream(torch.device("cuda"))
    stream.wait(stream.copy(to, torch.ones(1)))
    assert order == [("side waits", True), ("on side", True), "copy", "recorded", ("main waits", "event")]


@pytest.mark.gpu
def test_offloading_frees_the_gpu_and_changes_no_bit() -> None:
    model = tiny_llama(num_hidden_layers=32, hidden_size=512, intermediate_size=512).cuda()
    pair = TokenPair(list(range(1, 400)), list(range(1, 400)), list(range(2, 450)))
    peaks, found = [], []
    for kwargs in ({"every_n_layers": 1}, {"offload": True}):
        policy = Policy(model).train()
        model.zero_grad(set_to_none=True)
        with checkpointing(policy, kwargs):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            loss = policy(pack([pair] * 8).to(torch.device("cuda")))[0].sum()
            loss.backward()  # nothing waits for the device until here
            torch.cuda.synchronize()
            peaks.append(torch.cuda.max_memory_reserved())
        found.append([parameter.grad.clone() for parameter in model.parameters()])
        del loss
    assert all(map(torch.equal, *found))
    tokens = 8 * (399 + 399 + 448)
    assert peaks[0] - peaks[1] >= 24 * tokens * 512 * 4  # of 32 inputs, where 29 are on the host alone


@pytest.mark.parametrize(
    "options, said",
    [
        ({"activation_offloading": True}, "moves activations from a GPU"),
        ({"gradient_checkpointing_kwargs": {"offload": True}}, "moves activations from a GPU"),
        ({"gradient_checkpointing_kwargs": {"every_n_layers": 0}}, "whole number of at least 1, got 0"),
        ({"gradient_checkpointing_kwargs": {"every_n_layers": "2"}}, "whole number of at least 1, got '2'"),
        ({"gradient_checkpointing_kwargs": {"every_n_layers": True}}, "whole number of at least 1, got True"),
        ({"gradient_checkpointing_kwargs": {"every_n_layer": 2}}, "unknown 'every_n_layer'.*mean 'every_n_layers'"),
        ({"gradient_checkpointing_kwargs": {"every_n_layers": 2}}, "no effect without gradient_checkpointing=True"),
        ({"memory": "auto"}, "memory='auto' plans for an NVIDIA GPU, and there is none"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused(options, said) -> None:
    with pytest.raises(ValueError, match=said):
        DPOConfig(use_cpu=True, **options)
