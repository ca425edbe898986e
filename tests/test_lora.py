"""LoRA projections: every gradient against plain torch and peft, what is kept for it, and what is left alone."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_errs_at_most_twice
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastdpo_kernels import launch, nf4
from fastdpo_kernels.lora import Adapter, Projection, _product, lora_linear, lora_mlp, lora_qkv

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes has no wheel for macOS")

N, D, I = 12, 16, 24  # noqa: E741 (rows, hidden and intermediate size)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BASES = ("dense", "4-bit")
Made = dict[str, Projection]


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32, size: float = 1.0) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (size * values).to(dtype)


def packed(weight: Tensor) -> nf4.Packed:
    data, state = bitsandbytes.functional.quantize_4bit(weight.float(), compress_statistics=True, quant_type="nf4")
    return nf4.Packed.of(data, state)


def projection(
    rows: int,
    columns: int,
    seed: int,
    *,
    base: str = "dense",
    bias: bool = False,
    rank: int | None = 4,
    dtype: torch.dtype = torch.float32,  # of the base
    adapter_dtype: torch.dtype = torch.float32,
) -> Projection:
    weight = random(rows, columns, seed=seed, dtype=dtype, size=columns**-0.5)
    adapter = None
    if rank is not None:
        a = random(rank, columns, seed=seed + 1, dtype=adapter_dtype, size=columns**-0.5).requires_grad_()
        b = random(rows, rank, seed=seed + 2, dtype=adapter_dtype, size=rank**-0.5).requires_grad_()
        adapter = Adapter(a, b, 1.5)
    return Projection(
        packed(weight) if base == "4-bit" else weight,
        random(rows, seed=seed + 3, dtype=dtype) if bias else None,
        adapter,
    )


def made(function: str, ranks: tuple[int | None, ...] = (4, 4, 4), **options: Any) -> Made:
    """The projections of `lora_linear`, `lora_qkv` or `lora_mlp`, by their names."""
    shapes = {
        "linear": {"projection": (I, D)},
        "qkv": {"q": (D, D), "k": (8, D), "v": (8, D)},
        "mlp": {"gate": (I, D), "up": (I, D), "down": (D, I)},
    }[function]
    return {
        name: projection(*shape, seed=10 * place, rank=rank, **options)
        for place, ((name, shape), rank) in enumerate(zip(shapes.items(), ranks, strict=False))
    }


def call(function: str, x: Tensor, projections: Made) -> tuple[Tensor, ...]:
    if function == "linear":
        return (lora_linear(x, **projections),)
    return lora_qkv(x, **projections) if function == "qkv" else (lora_mlp(x, **projections, activation="silu"),)


def plain(function: str, x: Tensor, projections: Made) -> tuple[Tensor, ...]:
    """The same from torch's own parts, with autograd's own gradients."""

    def linear(x: Tensor, one: Projection) -> Tensor:
        weight = nf4.dequantize(one.weight, x.dtype) if isinstance(one.weight, nf4.Packed) else one.weight.to(x.dtype)
        y = F.linear(x, weight, None if one.bias is None else one.bias.to(x.dtype))
        if one.adapter is None:
            return y
        a, b = one.adapter.a.to(x.dtype), one.adapter.b.to(x.dtype)
        return y + F.linear(F.linear(x, a), b) * one.adapter.scaling

    if function == "mlp":
        gate, up, down = projections.values()
        return (linear(F.silu(linear(x, gate)) * linear(x, up), down),)
    return tuple(linear(x, one) for one in projections.values())


def adapters(projections: Made) -> dict[str, Tensor]:
    found = {name: one.adapter for name, one in projections.items() if one.adapter is not None}
    return {f"{name}.{factor}": getattr(one, factor) for name, one in found.items() for factor in ("a", "b")}


def run(compute: Callable[..., tuple[Tensor, ...]], function: str, x: Tensor, projections: Made) -> dict[str, Tensor]:
    """Outputs and gradients by name, under uneven upstream gradients."""
    x = x.detach().clone().requires_grad_()
    outputs = compute(function, x, projections)
    upstream = [random(*y.shape, seed=77 + n, dtype=y.dtype) for n, y in enumerate(outputs)]
    leaves = {"x": x, **adapters(projections)}
    found = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    gradients = {f"gradient of {name}": gradient for name, gradient in zip(leaves, found, strict=True)}
    return {**{f"output {n}": y.detach() for n, y in enumerate(outputs)}, **gradients}


def in_double(projections: Made) -> Made:
    def doubled(one: Projection) -> Projection:
        weight = one.weight if isinstance(one.weight, nf4.Packed) else one.weight.double()
        adapter = one.adapter and Adapter(
            one.adapter.a.detach().double().requires_grad_(),
            one.adapter.b.detach().double().requires_grad_(),
            one.adapter.scaling,
        )
        return Projection(weight, None if one.bias is None else one.bias.double(), adapter)

    return {name: doubled(one) for name, one in projections.items()}


def assert_accurate(function: str, x: Tensor, projections: Made) -> None:
    ours, torchs = run(call, function, x, projections), run(plain, function, x, projections)
    truth = run(plain, function, x.double(), in_double(projections))
    for name, value in ours.items():
        assert_errs_at_most_twice(name, value, torchs[name], truth[name])


FUNCTIONS = ("linear", "qkv", "mlp")


# ---- the numbers


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_gradients_of_x_a_and_b_are_the_derivatives(function: str, base: str, bias: bool) -> None:
    projections = in_double(made(function, base=base, bias=bias))
    x = random(3, D, seed=5, dtype=torch.float64).requires_grad_()
    leaves = list(adapters(projections).values())

    def compute(x: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        given = iter(factors)
        changed = {
            name: replace(one, adapter=one.adapter and replace(one.adapter, a=next(given), b=next(given)))
            for name, one in projections.items()
        }
        return call(function, x, changed)

    assert torch.autograd.gradcheck(compute, (x, *leaves))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_outputs_and_gradients_err_at_most_twice_as_torchs(
    function: str, base: str, dtype: torch.dtype, bias: bool
) -> None:
    x = random(64, D, seed=5, dtype=dtype)
    assert_accurate(function, x, made(function, base=base, bias=bias, dtype=dtype, adapter_dtype=dtype))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_adapters_in_fp32_get_gradients_in_fp32(function: str, dtype: torch.dtype) -> None:
    projections, x = made(function, base="4-bit"), random(64, D, seed=5, dtype=dtype)
    assert_accurate(function, x, projections)
    ours = run(call, function, x, projections)
    assert {ours[f"gradient of {name}"].dtype for name in adapters(projections)} == {torch.float32}
    assert ours["gradient of x"].dtype == ours["output 0"].dtype == dtype


@pytest.mark.parametrize("ranks", [(2, 7, 3), (None, 4, None), (4, None, 2), (1, 2, None)], ids=str)
@pytest.mark.parametrize("function", ["qkv", "mlp"])
@pytest.mark.parametrize("base", BASES)
def test_ranks_may_differ_and_adapters_may_be_missing(function: str, ranks: tuple, base: str) -> None:
    assert_accurate(function, random(64, D, seed=5), made(function, ranks, base=base, bias=True))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("shape", [(D,), (0, D), (2, 0, D), (1, D), (2, 3, 4, D)], ids=str)
def test_x_may_have_any_leading_shape_and_no_rows(function: str, shape: tuple[int, ...]) -> None:
    x, projections = random(*shape, seed=5), made(function, base="4-bit")
    ours, torchs = run(call, function, x, projections), run(plain, function, x, projections)
    for name, value in ours.items():
        torch.testing.assert_close(value, torchs[name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_x_and_upstream_gradients_may_have_any_strides(function: str) -> None:
    projections, x = made(function), random(D, N, seed=5).T
    assert not x.is_contiguous()
    expected = run(call, function, x.contiguous(), projections)
    leaf = x.detach().requires_grad_()
    outputs = call(function, leaf, projections)
    torch.testing.assert_close(outputs[0], expected["output 0"])
    sums = [y.sum() for y in outputs]  # their gradients have strides of 0
    ours = torch.autograd.grad(sums, leaf)[0]
    theirs = torch.autograd.grad([y.sum() for y in plain(function, leaf, projections)], leaf)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", BASES)
def test_adapters_with_b_of_zero_leave_the_output_as_without_them_bit_for_bit(
    function: str, dtype: torch.dtype, base: str
) -> None:
    projections, x = made(function, base=base, dtype=dtype, bias=True), random(N, D, seed=5, dtype=dtype)
    with torch.no_grad():
        for name, factor in adapters(projections).items():
            if name.endswith(".b"):
                factor.zero_()
    without = {name: replace(one, adapter=None) for name, one in projections.items()}
    for ours, theirs in zip(call(function, x, projections), call(function, x, without), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("base", BASES)
def test_gradients_are_right_where_what_was_saved_comes_back_with_other_strides(function: str, base: str) -> None:
    projections, x = made(function, base=base, bias=True), random(N, D, seed=5)
    expected = run(call, function, x, projections)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: tensor.t().clone(memory_format=torch.contiguous_format).t(), lambda tensor: tensor
    ):
        found = run(call, function, x, projections)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_gradient_alone_is_the_one_among_all(function: str) -> None:
    projections, x = made(function, base="4-bit", bias=True), random(N, D, seed=5)
    whole = run(call, function, x, projections)
    for wanted in ("x", *adapters(projections)):
        leaves = {"x": x.detach().clone(), **adapters(projections)}
        for name, leaf in leaves.items():
            leaf.requires_grad_(name == wanted)
        outputs = call(function, leaves["x"], projections)
        upstream = [random(*y.shape, seed=77 + n) for n, y in enumerate(outputs)]
        (alone,) = torch.autograd.grad(outputs, leaves[wanted], upstream)
        assert torch.equal(alone, whole[f"gradient of {wanted}"]), wanted
        for leaf in adapters(projections).values():
            leaf.requires_grad_()


def test_outputs_that_nobody_uses_cost_and_add_nothing() -> None:
    projections, x = made("qkv", base="4-bit"), random(N, D, seed=5).requires_grad_()
    leaves = {"x": x, **adapters(projections)}
    _, keys, _ = call("qkv", x, projections)
    ours = torch.autograd.grad(keys.square().sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
    _, keys, _ = plain("qkv", x, projections)
    theirs = torch.autograd.grad(keys.square().sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
    for name, mine, torchs in zip(leaves, ours, theirs, strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_second_backward_gives_the_same(function: str) -> None:
    projections, x = made(function), random(N, D, seed=5).requires_grad_()
    total = sum(y.square().sum() for y in call(function, x, projections))
    first = torch.autograd.grad(total, [x, *adapters(projections).values()], retain_graph=True)
    second = torch.autograd.grad(total, [x, *adapters(projections).values()])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ---- peft


class Block(nn.Module):
    """The projections of a block, without what stands between them."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(64, 64, bias), nn.Linear(64, 32, bias), nn.Linear(64, 32, bias)
        self.gate, self.up, self.down = (nn.Linear(*shape, bias=False) for shape in ((64, 128), (64, 128), (128, 64)))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q(x), self.k(x), self.v(x), self.down(F.silu(self.gate(x)) * self.up(x))


def pefts_block(base: str, bias: bool) -> nn.Module:
    torch.manual_seed(0)
    block = Block(bias)
    if base == "4-bit":
        for name, layer in list(block.named_children()):
            assert isinstance(layer, nn.Linear)
            four_bit = bitsandbytes.nn.Linear4bit(
                layer.in_features, layer.out_features, layer.bias is not None, torch.float32, quant_type="nf4"
            )
            four_bit.load_state_dict(layer.state_dict())
            four_bit.support_avx512bf16_for_cpu = False
            setattr(block, name, four_bit.to("cpu"))
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["q", "k", "v", "gate", "up", "down"])
    model = get_peft_model(block, config)  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def of_peft(layer: Any) -> Projection:
    base, adapter = (
        layer.base_layer,
        Adapter(layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]),
    )
    state = getattr(base.weight, "quant_state", None)
    weight = base.weight if state is None else nf4.Packed.of(base.weight.data, state)
    return Projection(weight, base.bias, adapter)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_a_block_computes_what_pefts_layers_do(base: str, bias: bool) -> None:
    """Rows are whole blocks of 64: others bitsandbytes 0.50.2 itself gets wrong on a CPU."""
    model = pefts_block(base, bias)
    layers = {name: of_peft(getattr(model.base_model.model, name)) for name in ("q", "k", "v", "gate", "up", "down")}
    x = random(3, 5, 64, seed=5).requires_grad_()
    leaves = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
    theirs = model(x)
    upstream = [random(*y.shape, seed=77 + n) for n, y in enumerate(theirs)]
    expected = torch.autograd.grad(theirs, leaves, upstream)
    q, k, v, gate, up, down = layers.values()
    ours = *lora_qkv(x, q, k, v), lora_mlp(x, gate, up, down, "silu")
    found = torch.autograd.grad(ours, leaves, upstream)
    assert len(leaves) == 13
    for mine, pefts in itertools.chain(zip(ours, theirs, strict=True), zip(found, expected, strict=True)):
        torch.testing.assert_close(mine, pefts, rtol=1e-5, atol=1e-5)


# ---- what is kept


def kept(compute: Callable[[], object], parameters: list[Tensor]) -> dict[int, int]:
    """{storage: bytes} of what autograd keeps, without parameters."""
    known = {tensor.untyped_storage().data_ptr() for tensor in parameters}
    found: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        alive.append(tensor)
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive.append(compute())
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", BASES)
def test_only_x_gate_up_the_low_rank_products_and_factors_made_for_them_are_kept(dtype: torch.dtype, base: str) -> None:
    """Factors that had to be stacked, or cast to the dtype of x: all but those of a single adapter in that dtype."""
    x, cast = random(N, D, seed=5, dtype=dtype).requires_grad_(), dtype != torch.float32
    wide, low, a, b = (rows * dtype.itemsize for rows in (N * I, N * 4, 4 * D, 4 * I))
    expected = {
        "linear": [x.nbytes, low, *[a, b] * cast],
        "qkv": [x.nbytes, 3 * low, 3 * a, *[a, a // 2, a // 2] * cast],
        "mlp": [x.nbytes, wide, wide, 2 * low, low, 2 * a, *[b, b, b, a] * cast],
    }
    for function, sizes in expected.items():
        projections = made(function, base=base, dtype=dtype, bias=True)
        found = kept(lambda f=function, p=projections: call(f, x, p), list(adapters(projections).values()))
        assert sorted(found.values()) == sorted(sizes), function
        assert x.untyped_storage().data_ptr() in found


@pytest.mark.parametrize("function", ["linear", "qkv"])
def test_without_adapters_nothing_is_kept(function: str) -> None:
    x, projections = random(N, D, seed=5).requires_grad_(), made(function, (None,) * 3, base="4-bit")
    assert not kept(lambda: call(function, x, projections), [])


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__)
def test_without_gradients_nothing_is_kept_and_the_numbers_are_the_same(function: str, mode: Any) -> None:
    projections, x = made(function, base="4-bit", bias=True), random(N, D, seed=5).requires_grad_()
    expected = call(function, x, projections)
    with mode():
        results = []
        assert not kept(lambda: results.extend(call(function, x, projections)), [])
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(results, expected, strict=True))
    after = run(call, function, x, projections)  # the scratch buffer that inference mode made serves training
    assert torch.equal(after["output 0"], expected[0])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_nothing_that_lives_on_lies_in_scratch(function: str) -> None:
    nf4.free_scratch()
    projections, x = made(function, base="4-bit", bias=True), random(N, D, seed=5).requires_grad_()
    outputs = call(function, x, projections)
    ours = kept(lambda: call(function, x, projections), [])
    gradients = torch.autograd.grad(outputs, [x, *adapters(projections).values()], [y.detach() for y in outputs])
    buffers = {buffer.untyped_storage().data_ptr() for buffer in nf4._scratch.values()}
    assert len(buffers) == 1
    assert not buffers & {tensor.untyped_storage().data_ptr() for tensor in (*outputs, *gradients)} | buffers & {*ours}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_each_weight_is_dequantised_once_each_way(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[nf4.Packed] = []
    real = nf4.dequantize
    monkeypatch.setattr(nf4, "dequantize", lambda one, *a, **k: asked.append(one) or real(one, *a, **k))
    projections, x = made(function, base="4-bit"), random(N, D, seed=5).requires_grad_()
    outputs = call(function, x, projections)
    every = {id(one.weight) for one in projections.values()}
    assert {*map(id, asked)} == every and len(asked) == len(every)
    asked.clear()
    sum(y.sum() for y in outputs).backward()
    assert {*map(id, asked)} == every and len(asked) == len(every)


@pytest.mark.parametrize("base", BASES)
def test_threads_in_one_model_do_not_overwrite_each_others_weight(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first waits with its weight in the buffer for longer than the second, if let, needs to put its own there."""
    x = random(N, D, seed=5, dtype=torch.bfloat16)  # an fp32 base is cast for it
    first, second = (projection(I, D, seed, base=base, rank=None) for seed in (0, 50))
    expected = lora_linear(x, first)
    filled, multiply = threading.Event(), Tensor.__matmul__
    thread = threading.Thread(target=lambda: filled.wait(10) and lora_linear(x, second))

    def waiting(left: Tensor, right: Tensor) -> Tensor:
        if not filled.is_set():
            filled.set()
            thread.join(0.5)
        return multiply(left, right)

    monkeypatch.setattr(Tensor, "__matmul__", waiting)
    thread.start()
    result = lora_linear(x, first)
    thread.join()
    assert torch.equal(result, expected)


# ---- what is left alone


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("base", BASES)
def test_inputs_weights_and_upstream_gradients_stay_as_they_are(function: str, base: str) -> None:
    projections, x = made(function, base=base, bias=True), random(N, D, seed=5).requires_grad_()
    watched = [x, *adapters(projections).values()]
    for one in projections.values():
        weight = one.weight
        watched += (
            [weight] if isinstance(weight, Tensor) else [t for t in vars(weight).values() if isinstance(t, Tensor)]
        )
        watched += [] if one.bias is None else [one.bias]
    outputs = call(function, x, projections)
    upstream = [random(*y.shape, seed=7) for y in outputs]
    watched += [*outputs, *upstream]
    before = [(tensor.detach().clone(), tensor._version) for tensor in watched]
    torch.autograd.backward(outputs, upstream)
    for tensor, (values, version) in zip(watched, before, strict=True):
        assert torch.equal(tensor, values) and tensor._version == version


@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_x_that_is_used_elsewhere_gets_the_sum_of_its_gradients(function: str) -> None:
    projections = in_double(made(function, base="4-bit"))

    def total(compute: Callable[..., tuple[Tensor, ...]], x: Tensor) -> Tensor:
        scaled = x * 2
        before, outputs, after = scaled.sin(), compute(function, scaled, projections), scaled.square()
        return before.sum() + after.sum() + sum(y.square().sum() for y in outputs)

    x = random(N, D, seed=5, dtype=torch.float64).requires_grad_()
    (ours,), (theirs,) = (torch.autograd.grad(total(compute, x), x) for compute in (call, plain))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_outputs_may_be_changed_in_place(function: str) -> None:
    projections, x = made(function), random(N, D, seed=5).requires_grad_()
    expected = torch.autograd.grad(sum((y * 3).sum() for y in call(function, x, projections)), x)[0]
    changed = torch.autograd.grad(sum(y.mul_(3).sum() for y in call(function, x, projections)), x)[0]
    torch.testing.assert_close(changed, expected)


def test_an_adapter_that_was_stepped_before_its_backward_is_noticed() -> None:
    projections, x = made("linear"), random(N, D, seed=5)
    (y,) = call("linear", x, projections)
    with torch.no_grad():
        adapters(projections)["projection.a"].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_frozen_weight_that_was_changed_before_its_backward_is_noticed(function: str) -> None:
    projections, x = made(function), random(N, D, seed=5).requires_grad_()
    outputs = call(function, x, projections)
    weight = list(projections.values())[-1].weight
    assert isinstance(weight, Tensor)
    weight.mul_(2.0)
    with pytest.raises(RuntimeError, match=r"frozen weight of shape .* was changed in place .* version 1, expected"):
        sum(y.sum() for y in outputs).backward()
    sum(y.sum() for y in call(function, x, projections)).backward()


def test_scratch_keeps_no_tensor_without_memory() -> None:
    nf4.free_scratch()
    with FakeTensorMode():
        assert type(nf4.scratch(8, torch.bfloat16, torch.device("cpu"))) is FakeTensor
    assert not nf4._scratch
    real = nf4.scratch(8, torch.float32, torch.device("cpu"))
    with FakeTensorMode():
        assert type(nf4.scratch(8, torch.float32, torch.device("cpu"))) is FakeTensor
    assert nf4.scratch(8, torch.float32, torch.device("cpu")).data_ptr() == real.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_only_16_bit_factors_ask_a_gpu_for_sums_in_fp32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch, "addmm", lambda *_, out, **options: (asked.append(options["out_dtype"]), out)[1])
    with FakeTensorMode():
        left, right = (torch.empty(shape, dtype=dtype, device="cuda") for shape in ((4, 8), (8, 2)))
        assert _product(left, right, torch.float32).dtype == torch.float32
    assert asked == ([torch.float32] if dtype == torch.bfloat16 else [])


class Counted(TorchDispatchMode):
    """Operations by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.name().split("::")[1]] += 1
        return func(*args, **(kwargs or {}))


def test_a_block_asks_for_each_product_once_and_casts_and_stacks_each_factor_once_for_both_ways() -> None:
    """Operations under autocast in bf16, with adapters in fp32; a GPU launches each of them."""
    parts = [(function, made(function, dtype=torch.bfloat16)) for function in ("qkv", "linear", "mlp")]
    x = random(N, D, seed=5, dtype=torch.bfloat16).requires_grad_()
    with Counted() as counted, torch.autocast("cpu", torch.bfloat16):
        outputs = [y for function, projections in parts for y in call(function, x, projections)]
    forward, casts = counted.names["mm"] + counted.names["addmm_"], counted.names["_to_copy"]
    with counted:
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    both = counted.names["mm"] + counted.names["addmm_"]
    assert (forward, both - forward) == (4 + 7 + 7, 7 + 4 + 7 + 4 + 7)  # u, W, u B; dU, dA, dB, dU A, dY W
    assert counted.names["cat"] == 2  # the A's of q, k and v, and of gate and up
    assert (casts, counted.names["_to_copy"] - casts) == (4 + 7, 4 + 7)  # A, B; dA, dB, which a GPU's products cast


# ---- among torch's other ways


@pytest.mark.parametrize("function", FUNCTIONS)
def test_checkpointed_gradients_are_the_same(function: str) -> None:
    projections, x = made(function, base="4-bit", bias=True), random(N, D, seed=5)
    expected = run(call, function, x, projections)
    again = run(lambda *given: checkpoint(call, *given, use_reentrant=False), function, x, projections)
    assert all(torch.equal(again[name], value) for name, value in expected.items())


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast_computes_in_its_dtype(function: str, base: str, backward_inside: bool) -> None:
    projections, x = made(function, base=base, bias=True), random(N, D, seed=5).requires_grad_()
    expected = run(call, function, x.bfloat16(), projections)
    leaves = {"x": x, **adapters(projections)}
    with torch.autocast("cpu", torch.bfloat16):
        outputs = call(function, x, projections)
        upstream = [random(*y.shape, seed=77 + n, dtype=y.dtype) for n, y in enumerate(outputs)]
        found = torch.autograd.grad(outputs, list(leaves.values()), upstream) if backward_inside else ()
    found = found or torch.autograd.grad(outputs, list(leaves.values()), upstream)
    assert all(torch.equal(y, expected[f"output {n}"]) for n, y in enumerate(outputs))
    for name, gradient in zip(leaves, found, strict=True):
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, expected[f"gradient of {name}"].float()), name


def test_backward_under_autocast_of_a_forward_without_it_keeps_its_dtype() -> None:
    projections, x = made("mlp", base="4-bit"), random(N, D, seed=5)
    expected = run(call, "mlp", x, projections)
    leaf = x.clone().requires_grad_()
    (y,) = call("mlp", leaf, projections)
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = torch.autograd.grad(y, leaf, random(*y.shape, seed=77))
    assert torch.equal(found, expected["gradient of x"])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_compiled_caller_gets_the_same(function: str) -> None:
    """Its graph breaks at our functions."""
    projections, x = made(function, base="4-bit", bias=True), random(N, D, seed=5)
    torch._dynamo.reset()
    ours = run(torch.compile(call, backend="aot_eager"), function, x, projections)
    for name, value in run(call, function, x, projections).items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.gpu
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_gpu_errs_at_most_twice_as_torch_and_sums_adapters_gradients_in_fp32(function: str) -> None:
    x = random(512, 256, seed=5, dtype=torch.bfloat16).cuda()
    shapes = {"linear": ["projection"], "qkv": ["q", "k", "v"], "mlp": ["gate", "up", "down"]}[function]
    projections = {}
    for place, name in enumerate(shapes):
        one = projection(256, 256, seed=10 * place, rank=16)
        assert isinstance(one.weight, Tensor) and one.adapter is not None
        a, b = (factor.detach().cuda().requires_grad_() for factor in (one.adapter.a, one.adapter.b))
        data, state = bitsandbytes.functional.quantize_4bit(one.weight.cuda(), quant_type="nf4")
        projections[name] = Projection(nf4.Packed.of(data, state), None, Adapter(a, b, 2.0))
    leaves = [x.requires_grad_(), *adapters(projections).values()]
    outputs = call(function, x, projections)
    ours = torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])
    outputs = plain(function, x, projections)
    torchs = torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])
    exact = in_double(projections)
    wide = x.detach().double().requires_grad_()
    outputs = plain(function, wide, exact)
    truth = torch.autograd.grad(outputs, [wide, *adapters(exact).values()], [torch.ones_like(y) for y in outputs])
    for name, mine, theirs, true in zip(["x", *adapters(projections)], ours, torchs, truth, strict=True):
        assert_errs_at_most_twice(name, mine, theirs, true)


# ---- what is refused


def test_what_does_not_fit_is_refused_with_what_came_and_what_was_expected() -> None:
    x, one = random(N, D, seed=5), projection(I, D, 0)
    assert isinstance(one.weight, Tensor) and one.adapter is not None
    a, b = one.adapter.a, one.adapter.b
    for changed, said in (
        (replace(one, weight=one.weight.T), r"weight is \(16, 24\), expected \(O, 16\)"),
        (replace(one, bias=torch.zeros(D)), r"bias is \(16,\), expected \(24,\)"),
        (replace(one, adapter=Adapter(a, b.T, 1.0)), r"expected \(r, 16\) and \(24, r\)"),
        (replace(one, adapter=Adapter(a[:2], b, 1.0)), r"expected \(r, 16\) and \(24, r\)"),
        (replace(one, weight=one.weight.clone().requires_grad_()), "weight requires a gradient and would get none"),
    ):
        with pytest.raises(ValueError, match=said):
            lora_linear(x, changed)
    mlp = made("mlp")
    with pytest.raises(ValueError, match="gate and up have 24 and 16 rows"):
        lora_mlp(x, mlp["gate"], projection(D, D, 0), mlp["down"], "silu")
    with pytest.raises(ValueError, match="activation='relu'"):
        lora_mlp(x, **mlp, activation="relu")


# Many rows


@pytest.mark.parametrize("rows", [1, 5, 10, 11, 23])
def test_a_mlp_of_many_rows_goes_in_parts_with_the_same_numbers(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for most in (rows, 5):
        monkeypatch.setattr(launch, "MLP_ROWS", most)
        projections = made("mlp", base="4-bit", bias=True)
        x = random(rows, D, seed=1).requires_grad_()
        y = lora_mlp(x, **projections, activation="silu")
        y.backward(random(rows, D, seed=2))
        adapters = [one.adapter for one in projections.values() if one.adapter]
        found.append([y, x.grad, *(factor.grad for one in adapters for factor in (one.a, one.b))])
    for whole, in_parts in zip(*found, strict=True):
        assert (in_parts - whole).norm() <= 1e-6 * whole.norm()  # products of fewer rows are rounded otherwise


def test_the_widest_temporaries_of_a_mlp_do_not_grow_with_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside gate and up, which are kept, whatever is as wide as a MLP is there for MLP_ROWS rows."""
    monkeypatch.setattr(launch, "MLP_ROWS", 64)
    rows, width = 512, 2048
    projections = {name: projection(width, D, seed=1) for name in ("gate", "up")} | {"down": projection(D, width, 2)}
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    x = random(rows, D, seed=3).requires_grad_()
    with Largest():
        lora_mlp(x, **projections, activation="silu").sum().backward()
    assert largest <= 64 * width
