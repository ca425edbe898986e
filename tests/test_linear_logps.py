"""linear_logps, every method of it: against fp64 truth, with every gradient, in bounded memory.

Legend: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import importlib
import math
import resource
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accuracy import assert_errs_at_most_twice
from conftest import KERNEL_DEVICE, KERNEL_DTYPES
from torch import Tensor

from fastdpo_kernels import launch
from fastdpo_kernels.head import STATS, HeadOptions
from fastdpo_kernels.linear_logps import linear_logps, linear_logps_reference

# The interpreter computes with what lies behind the vocabulary's end before it is masked.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")

Given = dict[str, Any]  # tensors by the name of their argument, or of what they are
N, D, V = 9, 16, 101  # the interpreter takes 30 ms a row
KERNELS = [pytest.param(name, marks=pytest.mark.kernels, id=name) for name in ("streamed", "fused")]
METHODS = ["torch", *KERNELS]
CASES = [
    *(pytest.param("torch", dtype, id=f"torch-{dtype}") for dtype in (torch.float32, torch.float16, torch.bfloat16)),
    *(
        pytest.param(name, dtype, marks=pytest.mark.kernels, id=f"{name}-{dtype}")
        for name in ("streamed", "fused")
        for dtype in KERNEL_DTYPES
    ),
]
OPTIONS: dict[str, dict[str, float]] = {
    "plain": {},
    "scaled": {"logit_scale": 0.3, "temperature": 0.7},
    "softcapped": {"logit_scale": 1.7, "softcap": 3.0, "temperature": 0.7},
}
LEAVES = ("hidden", "weight", "bias")


def device_of(method: str) -> str:
    return "cpu" if method == "torch" else KERNEL_DEVICE


def rows_of(method: str) -> int:
    """More where they are cheap: the maximum of few errors is luck."""
    return N if method != "torch" and KERNEL_DEVICE == "cpu" else 64


def module_of(method: str) -> Any:
    return importlib.import_module(f"fastdpo_kernels.head_{method}")


def inputs(
    dtype: torch.dtype = torch.float32, device: str = "cpu", rows: int = N, shape: tuple[int, int] = (V, D), scale=1.0
) -> Given:
    (vocabulary, hidden_size), (first, second, third, fourth) = (
        shape,
        (torch.Generator().manual_seed(n) for n in range(4)),
    )
    hidden = torch.randn(rows, hidden_size, generator=first, dtype=torch.float64) * scale
    weight = torch.randn(vocabulary, hidden_size, generator=second, dtype=torch.float64)
    bias = torch.randn(vocabulary, generator=third, dtype=torch.float64)
    targets = torch.randint(vocabulary, (rows,), generator=fourth)
    made = {"hidden": hidden.to(dtype), "weight": weight.to(dtype), "targets": targets, "bias": bias.to(dtype)}
    return {name: tensor.to(device) for name, tensor in made.items()}


def without_bias(given: Given) -> Given:
    return {name: tensor for name, tensor in given.items() if name != "bias"}


def run(
    function: Callable[..., tuple[Tensor, dict[str, Tensor]]],
    given: Given,
    wanted: tuple[str, ...] = LEAVES,
    **options: Any,
) -> Given:
    """Log-probs, whatever statistics come with them, and the gradients of `wanted` under uneven upstream gradients."""
    leaves = {name: tensor.detach().clone() for name, tensor in given.items()}
    wanted = tuple(name for name in wanted if name in leaves)
    for name in wanted:
        leaves[name].requires_grad_()
    logps, stats = function(**leaves, **options)
    if wanted:
        (logps * upstream(logps)).sum().backward()
    gradients = {f"grad of {name}": leaves[name].grad for name in wanted}
    assert not any(leaves[name].grad is not None for name in LEAVES if name in leaves and name not in wanted)
    return {"logps": logps.detach(), **stats, **gradients}


def upstream(logps: Tensor) -> Tensor:
    return torch.linspace(-1, 1.3, len(logps), dtype=logps.dtype, device=logps.device)


def exactly(given: Given) -> Given:
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in given.items()}


def assert_accurate(given: Given, wanted: tuple[str, ...] = LEAVES, **options: Any) -> Given:
    of_head = {name: value for name, value in options.items() if name in ("logit_scale", "softcap", "temperature")}
    ours = run(linear_logps, given, wanted, **options)
    torchs = run(linear_logps_reference, given, wanted, **of_head)
    truth = run(linear_logps_reference, exactly(given), wanted, **of_head)
    for name, value in ours.items():
        assert_errs_at_most_twice(name, value, torchs[name], truth[name])
    assert ours["logps"].numel() == 0 or ours["logps"].max() <= 0
    return ours


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Bitwise, in what both have."""
    shared = left.keys() & right.keys()
    assert shared
    for name in shared:
        assert torch.equal(left[name], right[name]), name


# ---- the numbers


@pytest.mark.parametrize(("method", "dtype"), CASES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("wanted", [("hidden",), LEAVES], ids=["frozen", "trained"])
def test_values_statistics_and_gradients_err_at_most_twice_as_torchs(
    method: str, dtype: torch.dtype, options: dict, with_bias: bool, wanted: tuple[str, ...]
) -> None:
    given = inputs(dtype, device_of(method), rows_of(method))
    given = given if with_bias else without_bias(given)
    assert_accurate(given, wanted, method=method, stats=STATS, workspace_bytes=4 * 128 * dtype.itemsize, **options)


@pytest.mark.parametrize(("method", "dtype"), CASES)
@pytest.mark.parametrize("wanted", [("weight",), ("bias",), ("hidden", "bias"), ("hidden", "weight")], ids="+".join)
def test_each_gradient_alone_is_the_one_among_all(method: str, dtype: torch.dtype, wanted: tuple[str, ...]) -> None:
    given = inputs(dtype, device_of(method))
    assert_same(run(linear_logps, given, wanted, method=method), run(linear_logps, given, method=method))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(1, 7), (2, 1), (63, 16), (257, 65), (1025, 7)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("wanted", [("hidden",), LEAVES], ids=["frozen", "trained"])
def test_odd_vocabularies_and_hidden_sizes_are_right(method: str, shape: tuple[int, int], wanted: tuple) -> None:
    rows = 5 if rows_of(method) == N else rows_of(method)
    given = inputs(torch.float32, device_of(method), rows, shape, scale=0.5)
    assert_accurate(given, wanted, method=method, stats=STATS, workspace_bytes=2 * 4 * (shape[0] + 63))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wanted", [(), ("hidden",), LEAVES], ids=["values", "frozen", "trained"])
def test_no_row_gives_nothing_and_gradients_of_zero(method: str, wanted: tuple[str, ...]) -> None:
    ours = run(linear_logps, inputs(rows=0, device=device_of(method)), wanted, method=method, stats=STATS)
    assert all(ours[name].shape == (0,) and ours[name].dtype == torch.float32 for name in ("logps", *STATS))
    shapes = {"hidden": (0, D), "weight": (V, D), "bias": (V,)}
    assert all(ours[f"grad of {name}"].shape == shapes[name] for name in wanted)
    assert not any(ours[f"grad of {name}"].any() for name in wanted)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wanted", [(), ("hidden",), LEAVES], ids=["values", "frozen", "trained"])
def test_one_row_alone_is_what_it_is_among_others(method: str, wanted: tuple[str, ...]) -> None:
    given = inputs(device=device_of(method))
    alone = given | {name: given[name][:1] for name in ("hidden", "targets")}
    expected = {name: value[:1] for name, value in run(linear_logps, given, wanted, method=method, stats=STATS).items()}
    if wanted == LEAVES:  # sums over rows
        truth = run(linear_logps_reference, exactly(alone))
        expected |= {name: truth[name].float() for name in ("grad of weight", "grad of bias")}
    for name, value in run(linear_logps, alone, wanted, method=method, stats=STATS).items():
        torch.testing.assert_close(value, expected[name], rtol=2e-6, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(("method", "dtype"), CASES)
@pytest.mark.parametrize(
    ("peak", "lowest", "highest"),
    [
        (-4, 1e-7, 1e-2),
        (4, 5e-4, 0.9),
        (8, 0.03, 0.997),
        (14, 0.9, 1 - 1e-5),
        (20, 1 - 1e-3, 1 - 1e-7),
        (30, 1 - 1e-6, 1),
    ],
)
def test_errors_and_signs_hold_from_improbable_to_certain(
    method: str, dtype: torch.dtype, peak: float, lowest: float, highest: float
) -> None:
    """`peak` aligns a hidden row with its target's weight row."""
    given = peaked(inputs(dtype, device_of(method), rows_of(method), (V, 64), 0.25), peak)
    probability = run(linear_logps_reference, exactly(given), ())["logps"][:N].exp()
    assert lowest <= probability.min() <= probability.max() <= highest
    assert_accurate(given, ("hidden",), method=method, stats=STATS)


def peaked(given: Given, peak: float) -> Given:
    """Every hidden row moved along its target's row of weight until that logit is higher by `peak`. The rows of weight
    are equally long and, with D=64, far from parallel, or another one's logit would rise as well: the largest error
    would be that row's alone, and torch's at it luck.
    """
    weight = 8 * torch.nn.functional.normalize(given["weight"].double())
    hidden = given["hidden"] + peak / 64 * weight[given["targets"]]
    dtype = given["hidden"].dtype
    return given | {"hidden": hidden.to(dtype), "weight": weight.to(dtype)}


@pytest.mark.parametrize("method", KERNELS)
@pytest.mark.parametrize("peak", [20, 28])
def test_log_probs_keep_their_digits_where_one_less_the_probability_has_none(method: str, peak: float) -> None:
    given = peaked(inputs(device=device_of(method), shape=(V, 64), scale=0.25), peak)
    truth = run(linear_logps_reference, exactly(given), ())["logps"]
    assert truth.max() > -2e-7
    torch.testing.assert_close(
        run(linear_logps, given, (), method=method)["logps"].double(), truth, rtol=1e-4, atol=1e-30
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_row_of_equal_logits_is_uniform(method: str) -> None:
    given = inputs(device=device_of(method))
    given["weight"] = given["weight"][:1].expand(V, D).contiguous()
    given["targets"] = torch.arange(N, device=device_of(method))
    ours = run(linear_logps, without_bias(given), ("hidden",), method=method, stats=STATS)
    for name, expected in {"logps": -math.log(V), "entropy": math.log(V), "log_sum_sq_probs": -math.log(V)}.items():
        torch.testing.assert_close(ours[name], torch.full_like(ours[name], expected), rtol=1e-6, atol=1e-6)
    rounding = V * torch.finfo(torch.float32).eps * given["weight"].abs().max()  # of a sum of V terms that cancel
    assert ours["grad of hidden"].abs().max() <= rounding


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wanted", [("hidden",), LEAVES], ids=["frozen", "trained"])
def test_logits_of_ten_thousand_stay_finite_and_right(method: str, wanted: tuple[str, ...]) -> None:
    given = inputs(device=device_of(method), scale=3e3)
    ours = assert_accurate(given, wanted, method=method, stats=STATS)
    assert ours["logps"].min() < -1e4 and all(value.isfinite().all() for value in ours.values())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_of_equally_likely_tokens_the_first_is_the_top(method: str, options: dict) -> None:
    """Integers, so that the target's fp32 dot and the products of its equals are the same number in any order."""
    device = device_of(method)
    weight = torch.zeros(V, 4, device=device)
    weight[[3, 70, 90], 0] = 2.0
    weight[50, 1] = 1.0
    targets = torch.tensor([3, 70, 90, 50, 0], device=device)
    hidden = torch.ones(5, 4, device=device)
    _, stats = linear_logps(hidden, weight, targets, method=method, stats=("is_top1",), **options)
    assert stats["is_top1"].tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]
    _, stats = linear_logps(hidden[:2], weight.zero_(), targets[[0, 4]], method=method, stats=("is_top1",), **options)
    assert stats["is_top1"].tolist() == [0.0, 1.0]


def test_gradcheck_in_fp64_for_frozen_and_trained_heads() -> None:
    given = inputs(torch.float64, rows=5, shape=(23, 6))
    options = {"logit_scale": 0.5, "softcap": 2.0, "workspace_bytes": 3 * 2 * 23 * 8}
    hidden, weight, bias = (given[name].requires_grad_() for name in LEAVES)
    targets, check = given["targets"], torch.autograd.gradcheck
    assert check(lambda h: linear_logps(h, weight.detach(), targets, bias.detach(), **options)[0], (hidden,))
    assert check(lambda h, w, b: linear_logps(h, w, targets, b, **options)[0], (hidden, weight, bias))


# ---- what must not change them


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wanted", [("hidden",), LEAVES], ids=["frozen", "trained"])
@pytest.mark.parametrize("rows_per_chunk", [1, 4, N])
def test_results_do_not_depend_on_how_rows_are_chunked(method: str, wanted: tuple, rows_per_chunk: int) -> None:
    """Of rows that are computed alike: a product of fewer rows may add up in another order."""
    given = inputs(device=device_of(method))
    whole = run(linear_logps, given, wanted, method=method, stats=STATS)
    chunked = run(linear_logps, given, wanted, method=method, stats=STATS, workspace_bytes=rows_per_chunk * 128 * 4)
    for name, value in whole.items():
        torch.testing.assert_close(chunked[name], value, rtol=2e-5, atol=5e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(("method", "dtype"), CASES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_log_probs_are_bitwise_the_same_whatever_else_is_asked_for(
    method: str, dtype: torch.dtype, options: dict
) -> None:
    """A reference asks for no gradient and no statistics, its policy for both, and margins start at 0."""
    given = inputs(dtype, device_of(method), 4)
    alone = run(linear_logps, given, (), method=method, **options)
    for wanted, stats in (((), STATS), (("hidden",), STATS), (LEAVES, ())):
        assert_same(alone, run(linear_logps, given, wanted, method=method, stats=stats, **options))
    with torch.no_grad():
        given["hidden"].requires_grad_()
        assert torch.equal(linear_logps(**given, method=method, **options)[0], alone["logps"])


@pytest.mark.parametrize(("method", "dtype"), CASES)
@pytest.mark.parametrize("wanted", [("hidden",), LEAVES], ids=["frozen", "trained"])
def test_two_runs_are_bitwise_the_same(method: str, dtype: torch.dtype, wanted: tuple[str, ...]) -> None:
    given, options = inputs(dtype, device_of(method)), {"method": method, "stats": STATS, "workspace_bytes": 4000}
    assert_same(run(linear_logps, given, wanted, **options), run(linear_logps, given, wanted, **options))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wanted", [("hidden",), LEAVES], ids=["frozen", "trained"])
def test_an_expanded_upstream_gradient_is_its_numbers(method: str, wanted: tuple[str, ...]) -> None:
    """What logps.sum() sends back is one number with strides of 0."""
    given = inputs(device=device_of(method), rows=4)
    leaves = [given[name].requires_grad_() for name in wanted]
    logps, _ = linear_logps(**given, method=method)
    expanded = torch.autograd.grad(logps, leaves, torch.ones_like(logps[:1]).expand(4), retain_graph=True)
    dense = torch.autograd.grad(logps, leaves, torch.ones_like(logps))
    assert all(torch.equal(*pair) for pair in zip(expanded, dense, strict=True))


def test_statistics_do_not_change_how_plain_torch_chunks_rows() -> None:
    """A product of other rows may round otherwise: the policy's, with statistics, against its reference's, without."""
    plain, asked = (module_of("torch")._rows_per_chunk(torch.empty(V, D), HeadOptions(stats=s)) for s in ((), STATS))
    assert plain == asked


@pytest.mark.parametrize("method", METHODS)
def test_a_second_backward_gives_what_the_first_did(method: str) -> None:
    """The first may turn logits that the forward kept into their gradient."""
    given = inputs(device=device_of(method))
    leaves = [given[name].requires_grad_() for name in LEAVES]
    logps, _ = linear_logps(**given, method=method)
    loss = (logps * upstream(logps)).sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("method", "a_row"), [("torch", 2 * V * 4), pytest.param("streamed", 128 * 4, marks=KERNELS[0].marks)]
)
@pytest.mark.parametrize(("fitting", "in_backward"), [(N, 1), (N - 1, 4)])
def test_a_trained_head_keeps_its_logits_where_they_fit_the_workspace(
    method: str, a_row: int, fitting: int, in_backward: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first backward then is one product a gradient; the second, and chunks, compute the logits again."""
    given, products, mm = inputs(device=device_of(method)), [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **out: products.append(args) or mm(*args, **out))
    hidden = given["hidden"].requires_grad_()
    given["weight"].requires_grad_()
    logps, _ = linear_logps(**given, method=method, workspace_bytes=fitting * a_row)
    counts = [len(products)]
    for _ in "12":
        torch.autograd.grad(logps.sum(), hidden, retain_graph=True)
        counts.append(len(products) - sum(counts))
    chunks = 1 if fitting == N else 2
    assert counts == [chunks, in_backward, 2 * chunks]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wanted", [("hidden",), LEAVES], ids=["frozen", "trained"])
def test_strided_inputs_give_the_same_numbers(method: str, wanted: tuple[str, ...]) -> None:
    given = inputs(device=device_of(method))
    dense = run(linear_logps, given, wanted, method=method, stats=STATS)

    def every_second(tensor: Tensor) -> Tensor:
        return torch.stack([tensor, torch.full_like(tensor, 77)], dim=-1).requires_grad_(tensor.requires_grad)[..., 0]

    def strided(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor, **options: Any):
        turned = weight if method == "fused" else every_second(weight)
        assert not every_second(hidden).is_contiguous()
        return linear_logps(every_second(hidden), turned, every_second(targets), every_second(bias), **options)

    assert_same(dense, run(strided, given, wanted, method=method, stats=STATS))


@pytest.mark.parametrize("method", ["torch", KERNELS[0]])
def test_a_transposed_or_padded_weight_gives_the_same_numbers(method: str) -> None:
    given = inputs(device=device_of(method))
    dense = run(linear_logps, given, (), method=method, stats=STATS)
    padded = torch.cat([given["weight"], torch.full_like(given["weight"], torch.nan)], 1)[:, :D]
    for weight in (given["weight"].T.contiguous().T, padded):
        assert not weight.is_contiguous()
        for name, value in run(linear_logps, given | {"weight": weight}, (), method=method, stats=STATS).items():
            torch.testing.assert_close(value, dense[name], rtol=1e-6, atol=1e-6)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh allocations hold NaN, so an element that nobody wrote shows."""

    def poisons(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisons(torch.Tensor.new_empty))
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisons(getattr(torch, name)))
    yield


@pytest.mark.parametrize(("method", "dtype"), CASES)
@pytest.mark.parametrize("wanted", [("hidden",), LEAVES], ids=["frozen", "trained"])
@pytest.mark.parametrize("workspace", [10**6, 1100], ids=["one chunk", "chunks"])
def test_every_element_that_comes_out_is_written(
    method: str, dtype: torch.dtype, wanted: tuple, workspace: int, request: pytest.FixtureRequest
) -> None:
    given, options = inputs(dtype, device_of(method)), {"method": method, "stats": STATS, "workspace_bytes": workspace}
    clean = run(linear_logps, given, wanted, **options)
    request.getfixturevalue("poisoned")
    assert_same(clean, run(linear_logps, given, wanted, **options))


# ---- memory


def peak_bytes(call: Callable[[], object]) -> int:
    """Of what is alive at once, by the profiler's allocation events."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    profiler: Any = profile.profiler
    alive = peak = 0
    for event in profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak


@pytest.mark.parametrize(
    ("method", "options"), [("torch", {}), ("torch", {"softcap": 2.0}), ("streamed", {}), ("fused", {})]
)
@pytest.mark.parametrize("wanted", [(), ("hidden",), LEAVES], ids=["values", "frozen", "trained"])
def test_memory_stays_within_the_workspace_and_what_comes_out(method: str, options: dict, wanted: tuple) -> None:
    """On the CPU (test_gpu has the allocator's numbers), in fp32, as bf16 products there make copies of their own."""
    if method != "torch" and KERNEL_DEVICE != "cpu":
        pytest.skip("compiled kernels take no tensors of the CPU")
    rows, shape = (512, (4000, 8)) if method == "torch" else (17, (1000, 2))
    given, workspace = inputs(rows=rows, shape=shape), rows * shape[0] * 4 // 16
    peak = peak_bytes(
        lambda: run(linear_logps, given, wanted, method=method, stats=STATS, workspace_bytes=workspace, **options)
    )
    assert peak <= 1.1 * workspace + beside_the_workspace(given, wanted)


def beside_the_workspace(given: Given, wanted: tuple[str, ...]) -> int:
    """Bytes of the leaves' clones, of gradients and the sums that become them, and of what has a number a row."""
    copies = sum(tensor.nbytes for tensor in given.values())
    return copies + sum(2 * given[name].nbytes for name in wanted) + 100 * len(given["targets"])


@pytest.mark.parametrize("workspace", [1, 3000, 10**6])
def test_chunks_are_as_many_rows_as_the_workspace_holds(workspace: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two numbers of fp32 a logit are alive at once; one row goes where not even that fits."""
    sizes, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda left, right, **out: sizes.append(len(left)) or mm(left, right, **out))
    linear_logps(**without_bias(inputs()), workspace_bytes=workspace)
    assert sum(sizes) == N and max(sizes) == min(N, max(1, workspace // (2 * V * 4)))


# ---- offsets beyond 2^31 elements

FAR = 2**30 + 64  # from one row to the next, so that the third starts beyond


@pytest.fixture
def vast() -> Tensor:
    """5 GB of which only the pages that are touched exist, on a CPU that lets a process have them."""
    device = torch.device(KERNEL_DEVICE)
    if device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory < 8e9:
        pytest.skip("needs 5 GB of device memory")
    try:
        return torch.empty(2 * FAR + 4096, dtype=torch.float16, device=device)
    except RuntimeError as error:
        pytest.skip(f"5 GB of address space are not to be had: {error}")


def spread_out(vast: Tensor, tensor: Tensor, dim: int) -> Tensor:
    """`tensor` with FAR elements between its entries along `dim`."""
    view = vast.as_strided(tensor.shape, (FAR, 1) if dim == 0 else (1, FAR))
    return view.copy_(tensor)


@pytest.mark.parametrize(
    ("method", "name", "dim"),
    [
        pytest.param(method, name, dim, marks=pytest.mark.kernels, id=f"{method}-{name}-{dim}")
        for method, name, dim in (
            ("streamed", "weight", 0),
            ("streamed", "weight", 1),
            ("streamed", "hidden", 0),
            ("streamed", "hidden", 1),
            ("fused", "weight", 0),
            ("fused", "hidden", 0),
            ("fused", "hidden", 1),
        )
    ],
)
@pytest.mark.parametrize("wanted", [("hidden",), LEAVES], ids=["frozen", "trained"])
def test_rows_and_columns_may_lie_beyond_two_to_the_31_elements(
    method: str, name: str, dim: int, wanted: tuple[str, ...], vast: Tensor
) -> None:
    given = inputs(torch.float16, KERNEL_DEVICE, 3, (3, 3))
    given["targets"] = torch.tensor([2, 0, 2], device=KERNEL_DEVICE)
    far = spread_out(vast, given[name], dim)

    def with_far(**leaves: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return linear_logps(**leaves | {name: _As.apply(leaves[name], far)}, method=method, stats=STATS)

    expected = run(linear_logps, given, wanted, method=method, stats=STATS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for key, value in run(with_far, given, wanted).items():
        torch.testing.assert_close(value, expected[key], rtol=2e-3, atol=2e-3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB: nothing went through all of it


class _As(torch.autograd.Function):
    """Another tensor in a leaf's place, which gets its gradient: cloned, a strided leaf would be dense."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, other: Tensor) -> Tensor:
        return other.view_as(other)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


@pytest.mark.kernels
def test_a_row_of_streameds_workspace_may_start_beyond_two_to_the_31_elements(vast: Tensor) -> None:
    head = module_of("streamed")
    given = inputs(torch.float16, KERNEL_DEVICE, 3)
    operands = [given[name] for name in ("hidden", "weight", "bias", "targets")]
    products = given["hidden"] @ given["weight"].T
    near = torch.zeros(3, 128, dtype=torch.float16, device=KERNEL_DEVICE)[:, :V]
    results = []
    for workspace in (near, vast.as_strided((3, V), (FAR, 1))):
        workspace.copy_(products)
        result = head.HeadForward(
            logps=products.new_empty(3, dtype=torch.float32),
            stats={},
            hidden_jacobian=None,
            saved=tuple(products.new_empty(3, dtype=torch.float32) for _ in range(3)),
        )
        head._softmax_rows(workspace, 0, *operands, HeadOptions(), result)
        head._gradient_rows(workspace, 0, operands[2], operands[3], result.saved, HeadOptions())
        sums = products.new_zeros(V, dtype=torch.float32)
        head._add_column_sums(sums, workspace, torch.ones(3, 1, device=KERNEL_DEVICE))
        results.append([result.logps, *result.saved, workspace.clone(), sums])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


# ---- what is refused, and what decides


@pytest.mark.parametrize("target", [-1, V, 2**40])
def test_a_target_outside_the_vocabulary_is_refused_on_the_cpu(target: int) -> None:
    given = inputs()
    given["targets"][4] = target
    with pytest.raises(ValueError, match=rf"targets\[4\] is {target}, expected a row of weight in \[0, {V}\)"):
        linear_logps(**given)


@pytest.mark.parametrize("method", KERNELS)
@pytest.mark.parametrize("wanted", [("hidden",), LEAVES], ids=["frozen", "trained"])
def test_unchecked_such_a_target_makes_nan_of_its_own_row(
    method: str, wanted: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = inputs(device=KERNEL_DEVICE)
    right = run(linear_logps, given, ("hidden",), method=method)
    monkeypatch.setattr("fastdpo_kernels.linear_logps._check_targets", lambda targets, vocabulary: None)
    given["targets"][[1, 3, 5, 7]] = torch.tensor([-1, V, 2**40, -(2**62)], device=KERNEL_DEVICE)
    wrong = run(linear_logps, given, wanted, method=method, stats=STATS)
    assert wrong["logps"][1::2].isnan().all()
    assert torch.equal(wrong["logps"][::2], right["logps"][::2])
    torch.testing.assert_close(wrong["grad of hidden"][::2], right["grad of hidden"][::2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wanted", [("hidden",), LEAVES], ids=["frozen", "trained"])
def test_products_run_in_the_autocast_dtype(method: str, wanted: tuple[str, ...]) -> None:
    device = device_of(method)
    dtype = torch.bfloat16 if method == "torch" else torch.float16
    given = inputs(device=device)

    def cast(**arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast(device, dtype):
            return linear_logps(**arguments)

    several_chunks = {"method": method, "workspace_bytes": 1000}
    ours = run(cast, given, wanted, **several_chunks)
    half = run(linear_logps, inputs(dtype, device), wanted, **several_chunks)
    assert ours["logps"].dtype == torch.float32
    for name, value in ours.items():
        assert value.dtype == torch.float32 and torch.equal(value.to(half[name].dtype), half[name])
    if method != "fused" and "weight" in wanted:  # fp32 leaves get what was summed over chunks in fp32
        assert not torch.equal(ours["grad of weight"], half["grad of weight"].float())


def test_auto_is_torch_on_a_cpu_even_where_kernels_could_be_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    torch_forward = module_of("torch").forward
    monkeypatch.setattr(module_of("torch"), "forward", lambda *a: called.append(a) or torch_forward(*a))
    linear_logps(**inputs())
    assert len(called) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(V, D + 1)}, r"weight \(101, 17\)"),
        ({"hidden": torch.zeros(N, 1, D)}, r"hidden \(9, 1, 16\)"),
        ({"targets": torch.zeros(N + 1, dtype=torch.int64)}, r"targets is \(10,\)"),
        ({"targets": torch.zeros(N, dtype=torch.int32)}, r"torch.int32, expected \(9,\) torch.int64"),
        ({"bias": torch.zeros(V + 1)}, r"bias is \(102,\)"),
        ({"stats": ("perplexity",)}, "perplexity"),
        ({"method": "magic"}, "magic"),
        ({"workspace_bytes": 0}, "workspace_bytes=0"),
    ],
    ids=["weight", "hidden", "targets", "target dtype", "bias", "stats", "method", "workspace"],
)
def test_arguments_that_do_not_fit_are_refused_by_name(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_logps(**inputs() | change)


@pytest.mark.kernels
@pytest.mark.parametrize("method", KERNELS)
def test_kernels_refuse_fp64_and_name_the_way_out(method: str) -> None:
    with pytest.raises(ValueError, match="use method='torch'"):
        linear_logps(**inputs(torch.float64, KERNEL_DEVICE), method=method)


@pytest.mark.parametrize("method", ["streamed", "fused"])
def test_kernels_refuse_a_device_that_triton_has_nothing_for(method: str) -> None:
    with launch.pretend(launch.Device("other")), pytest.raises(ValueError, match="use method='torch'"):
        linear_logps(**inputs(), method=method)


@pytest.mark.kernels
def test_fused_refuses_rows_of_weight_that_are_not_contiguous() -> None:
    given = inputs(device=KERNEL_DEVICE)
    given["weight"] = given["weight"].T.contiguous().T
    with pytest.raises(ValueError, match="weight.contiguous"):
        linear_logps(**given, method="fused")
