"""Checkpointing of every k-th block, and block inputs on the host: the same numbers, and what is kept."""

from __future__ import annotations

import gc
from functools import partial
from typing import Any

import pytest
import torch
from conftest import tiny_llama
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastdpo.batch import pack
from fastdpo.config import DPOConfig
from fastdpo.data import TokenPair
from fastdpo.model import Policy, checkpointing
from fastdpo.offload import HostCopies, _Kept

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


@pytest.mark.parametrize("every, runs", [(1, 10), (2, 8), (3, 7), (9, 6)])
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
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused(options, said) -> None:
    with pytest.raises(ValueError, match=said):
        DPOConfig(use_cpu=True, **options)
