"""What must hold of any operation of a block, whatever it computes: a test file hands each check its calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import assert_errs_at_most_twice
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Given = dict[str, Tensor]  # tensors by the name of their argument
Compute = Callable[..., "Tensor | tuple[Tensor, ...]"]


def run(compute: Compute, given: Given, wanted: tuple[str, ...]) -> Given:
    """Results, and the gradients of `wanted` under upstream gradients that depend on nothing but shapes."""
    leaves = {name: tensor.detach() for name, tensor in given.items()}
    for name in wanted:
        leaves[name].requires_grad_()
    results = compute(**leaves)
    results = results if isinstance(results, tuple) else (results,)
    found = {f"result {place}": result.detach() for place, result in enumerate(results)}
    if wanted:
        gradients = torch.autograd.grad(results, [leaves[name] for name in wanted], [upstream(r) for r in results])
        found |= {f"gradient of {name}": gradient for name, gradient in zip(wanted, gradients, strict=True)}
        for name in wanted:
            assert found[f"gradient of {name}"].dtype == given[name].dtype
    return found


def upstream(result: Tensor) -> Tensor:
    """In fp16's digits, so that it is the same in every dtype but bf16."""
    generator = torch.Generator().manual_seed(result.numel())
    values = torch.randn(result.shape, generator=generator).half().to(result.dtype)
    return values.to(result.device)


def exactly(given: Given) -> Given:
    return {name: tensor.double() for name, tensor in given.items()}


def assert_accurate(ours: Given, torchs: Given, truth: Given) -> None:
    assert ours.keys() == torchs.keys() == truth.keys()
    for name, value in ours.items():
        assert value.dtype == torchs[name].dtype, name
        assert_errs_at_most_twice(name, value, torchs[name], truth[name])


def assert_same(one: Given, other: Given) -> None:
    """Bitwise."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype and torch.equal(value, other[name]), name


def assert_each_gradient_alone_is_the_one_among_all(compute: Compute, given: Given, wanted: tuple[str, ...]) -> None:
    every = run(compute, given, wanted)
    for name in wanted:
        alone = run(compute, given, (name,))
        assert_same(alone, {key: every[key] for key in alone})
    values = run(compute, given, ())
    assert_same(values, {key: every[key] for key in values})


def assert_inputs_stay(compute: Compute, given: Given, wanted: tuple[str, ...]) -> None:
    before = {name: tensor.clone() for name, tensor in given.items()}
    run(compute, given, wanted)
    assert_same(given, before)


def assert_every_element_is_written(
    compute: Compute, given: Given, wanted: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fresh allocations hold NaN, so an element that nobody wrote shows."""
    clean = run(compute, given, wanted)

    def poisons(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisons(torch.Tensor.new_empty))
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisons(getattr(torch, name)))
    assert_same(run(compute, given, wanted), clean)


def assert_checkpoints_alike(compute: Compute, given: Given, wanted: tuple[str, ...]) -> None:
    def recomputed(**leaves: Tensor) -> Any:
        return checkpoint(compute, **leaves, use_reentrant=False)

    assert_same(run(recomputed, given, wanted), run(compute, given, wanted))


def assert_compiles_alike(compute: Compute, given: Given, wanted: tuple[str, ...]) -> None:
    """As part of a compiled function; a graph may break at the operation."""

    def around(**leaves: Tensor) -> Any:
        results = compute(**{name: leaf * 1 for name, leaf in leaves.items()})
        return tuple(result * 2 for result in (results if isinstance(results, tuple) else (results,)))

    torch.compiler.reset()
    assert_same(run(torch.compile(around, backend="aot_eager"), given, wanted), run(around, given, wanted))


def assert_saved_tensors_may_come_back_with_other_strides(
    compute: Compute, given: Given, wanted: tuple[str, ...]
) -> None:
    """As from the host, where torch's save_on_cpu(pin_memory=True) and TRL's OffloadActivations pack them densely."""
    expected = run(compute, given, wanted)
    for moved in (Tensor.contiguous, _backwards):
        with torch.autograd.graph.saved_tensors_hooks(moved, lambda tensor: tensor):
            found = run(compute, given, wanted)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


def _backwards(tensor: Tensor) -> Tensor:
    """A copy whose first dimension lies innermost, the last one outermost."""
    reverse = [*range(tensor.ndim)][::-1]
    return tensor.permute(reverse).clone(memory_format=torch.contiguous_format).permute(reverse)


def saved_beside(compute: Compute, given: Given, wanted: tuple[str, ...]) -> int:
    """Bytes that a forward keeps for its backward, its inputs not counted. Of a view the whole storage counts."""
    leaves = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in given.items()}
    inputs = {tensor.untyped_storage().data_ptr() for tensor in leaves.values()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        results = compute(**leaves)
    del results
    return sum(size for place, size in kept.items() if place not in inputs)
