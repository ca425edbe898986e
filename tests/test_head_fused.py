"""What only method="fused" has: ranges of the vocabulary, slabs, tensor descriptors, and a forward without workspace.

What every method promises is in test_linear_logps. Legend: N rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from accuracy import assert_errs_at_most_twice
from conftest import KERNEL_DEVICE, KERNEL_DTYPES
from torch import Tensor

from fastdpo_kernels import launch
from fastdpo_kernels.head import STATS, HeadOptions, Wants
from fastdpo_kernels.linear_logps import linear_logps_reference

if not launch.triton_installed():
    pytest.skip("triton is not installed", allow_module_level=True)
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from fastdpo_kernels import head_fused  # noqa: E402 (needs triton)

pytestmark = pytest.mark.kernels
NAMES = ("logps", *STATS, "grad of hidden", "grad of weight", "grad of bias")
MODELS: dict[str, dict[str, float]] = {
    "plain": {},
    "scaled": {"logit_scale": 0.3, "temperature": 0.7},
    "softcapped": {"logit_scale": 1.7, "softcap": 3.0, "temperature": 0.7},
}
Given = tuple[Tensor, Tensor, Tensor | None, Tensor]  # hidden, weight, bias, targets
N, V, D = 37, 150, 48  # in the interpreter three tiles of rows and of the vocabulary, two of D, the last of each cut


def inputs(
    dtype: torch.dtype = torch.float32, shape: tuple[int, int, int] = (N, V, D)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, vocabulary, hidden_size = shape
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*size, generator=generator).mul(scale).to(KERNEL_DEVICE, dtype)
        for size, scale in (((rows, hidden_size), 1.0), ((vocabulary, hidden_size), 0.4), ((vocabulary,), 1.0))
    )
    return hidden, weight, bias, torch.randint(vocabulary, (rows,), generator=generator).to(KERNEL_DEVICE)


def upstream(rows: int, like: Tensor) -> Tensor:
    return torch.linspace(-1, 1.3, rows, dtype=like.dtype, device=like.device)


def fused(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    workspace_bytes: int = 10**6,
    needs: tuple[bool, bool, bool] = (True, True, True),
    **model: float,
) -> dict[str, Tensor]:
    options = HeadOptions(**model, stats=STATS, workspace_bytes=workspace_bytes)
    made = head_fused.forward(hidden, weight, bias, targets, options, Wants.ALL_GRADIENTS)
    gradients = head_fused.backward(
        hidden, weight, bias, targets, made.saved, None, upstream(len(targets), made.logps), options, needs
    )
    values = (made.logps, *(made.stats[name] for name in STATS), *gradients)
    return {name: value for name, value in zip(NAMES, values, strict=True) if value is not None}


def reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, dtype: torch.dtype, **model: float
) -> dict[str, Tensor]:
    hidden, weight = (tensor.detach().to(dtype).requires_grad_() for tensor in (hidden, weight))
    bias = None if bias is None else bias.detach().to(dtype).requires_grad_()
    logps, stats = linear_logps_reference(hidden, weight, targets, bias, **model)
    (logps * upstream(len(targets), logps)).sum().backward()
    gradients = hidden.grad, weight.grad, None if bias is None else bias.grad
    values = (logps.detach(), *(stats[name].detach() for name in STATS), *gradients)
    return {name: value for name, value in zip(NAMES, values, strict=True) if value is not None}


def assert_accurate(given: Given, ours: dict[str, Tensor], **model: float) -> None:
    truth, torchs = reference(*given, torch.float64, **model), reference(*given, given[0].dtype, **model)
    for name, value in ours.items():
        assert_errs_at_most_twice(name, value, torchs[name], truth[name])


def assert_alike(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Equal but for the order of fp32 sums, and where that tips the rounding of the result's dtype."""
    for name, value in left.items():
        ulp = torch.finfo(value.dtype).eps
        torch.testing.assert_close(
            value, right[name], rtol=20 * ulp, atol=20 * ulp, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.fixture(params=["pointers", "descriptors"])
def loads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to read a tile, each where the device would take the other."""
    if request.param == "pointers":
        monkeypatch.setattr(head_fused, "_aligned", lambda *_: False)
    elif KERNEL_DEVICE == "cpu":
        change_config(monkeypatch, descriptors=True)
    elif not launch.fused_config(torch.float16, launch.device_of(torch.device(KERNEL_DEVICE)), True).logits.descriptors:
        pytest.skip("no tensor descriptors on this device")
    return request.param


def change_config(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    usual = launch.fused_config

    def changed(dtype: torch.dtype, device: launch.Device, aligned: bool) -> launch.FusedConfig:
        config = usual(dtype, device, aligned)
        return launch.FusedConfig(
            *(replace(getattr(config, field.name), **changes if aligned else {}) for field in fields(config))
        )

    monkeypatch.setattr(launch, "fused_config", changed)


# ---- the numbers


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
def test_both_ways_to_read_tiles_err_at_most_twice_as_torch(
    dtype: torch.dtype, model: dict, with_bias: bool, loads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    described, from_tensor = [], TensorDescriptor.from_tensor
    monkeypatch.setattr(TensorDescriptor, "from_tensor", lambda *of: described.append(of) or from_tensor(*of))
    hidden, weight, bias, targets = inputs(dtype)
    given = hidden, weight, bias if with_bias else None, targets
    assert_accurate(given, fused(*given, **model), **model)
    device = launch.device_of(torch.device(KERNEL_DEVICE))
    assert bool(described) == (loads == "descriptors" and launch.fused_config(dtype, device, True).logits.descriptors)


@pytest.mark.parametrize(
    "shape",
    [(32, 64, 32), (48, 1, 16), (47, 65, 80), (33, 127, 16), (150, 40, 16), (35, 70, 65), (34, 66, 1)],
    ids="{0[0]}x{0[1]}x{0[2]}".format,
)
def test_every_tail_of_rows_vocabulary_and_hidden_size_is_right(shape: tuple[int, int, int], loads: str) -> None:
    """(150, 40, 16) has more row tiles than go side by side. The largest error of a few rows would be luck."""
    given = inputs(torch.float16 if KERNEL_DEVICE == "cuda" else torch.float32, shape)  # where descriptors are for fp16
    assert_accurate(given, fused(*given, workspace_bytes=1))


@pytest.mark.parametrize("ranges", [1, 2, 3, 7])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_ranges_of_the_vocabulary_change_no_more_than_rounding(
    dtype: torch.dtype, ranges: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three tiles in the interpreter: a range has up to three, or none."""
    given = inputs(dtype)
    usual = fused(*given)
    monkeypatch.setattr(launch, "fused_ranges", lambda *_: ranges)
    ours = fused(*given)
    assert_accurate(given, ours)
    assert_alike(ours, usual)


def test_a_range_that_holds_nothing_but_the_target_adds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    block = launch.fused_logits(N, torch.float32, launch.device_of(torch.device(KERNEL_DEVICE)), True).block_n
    monkeypatch.setattr(launch, "fused_ranges", lambda *_: 2)
    hidden, weight, bias, targets = inputs(torch.float32, (N, block + 1, 16))
    targets = torch.full_like(targets, block)
    assert_accurate((hidden, weight, bias, targets), fused(hidden, weight, bias, targets))


@pytest.mark.parametrize("epilogue", [16, 32, 64])
def test_taking_tiles_apart_changes_no_more_than_rounding(epilogue: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs()
    usual = fused(*given, softcap=3.0)
    change_config(monkeypatch, epilogue=epilogue)
    assert_alike(fused(*given, softcap=3.0), usual)


@pytest.mark.parametrize("needs", [(True, False, False), (True, True, True)], ids=["frozen", "trained"])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_slabs_and_chunks_change_no_more_than_rounding(dtype: torch.dtype, needs: tuple[bool, bool, bool]) -> None:
    """A workspace of one byte takes the smallest of both: one tile."""
    given = inputs(dtype)
    ours = fused(*given, workspace_bytes=1, needs=needs)
    assert_accurate(given, ours)
    assert_alike(ours, fused(*given, needs=needs))


# ---- what a row's numbers depend on


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_rows_in_another_order_have_bitwise_the_same_numbers(dtype: torch.dtype, loads: str) -> None:
    hidden, weight, bias, targets = inputs(dtype)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1)).to(KERNEL_DEVICE)
    options = HeadOptions(stats=STATS)
    first = head_fused.forward(hidden, weight, bias, targets, options, Wants.VALUES)
    other = head_fused.forward(hidden[order], weight, bias, targets[order], options, Wants.VALUES)
    assert torch.equal(first.logps[order], other.logps)
    for name in STATS:
        assert torch.equal(first.stats[name][order], other.stats[name]), name
    ones, needs = torch.ones_like(first.logps), (True, False, False)
    gradient, *_ = head_fused.backward(hidden, weight, bias, targets, first.saved, None, ones, options, needs)
    permuted, *_ = head_fused.backward(
        hidden[order], weight, bias, targets[order], other.saved, None, ones, options, needs
    )
    assert gradient is not None and permuted is not None and torch.equal(gradient[order], permuted)


def test_targets_outside_the_vocabulary_give_nan_and_spare_their_neighbours() -> None:
    """V + 60 would be a column of the last tile, 2^32 + 5 column 5 in 32 bits."""
    hidden, weight, bias, targets = inputs()
    wrong = torch.tensor([-1, V, V + 60, -(2**40), 2**32 + 5, 2**62], device=KERNEL_DEVICE)
    broken = targets.clone()
    broken[3 : 3 + len(wrong)] = wrong
    others = broken == targets
    assert others.sum() == N - len(wrong)
    usual, ours = fused(hidden, weight, bias, targets), fused(hidden, weight, bias, broken)
    for name in ("logps", *STATS):
        assert ours[name][~others].isnan().all(), name
        assert torch.equal(ours[name][others], usual[name][others]), name
    assert torch.equal(ours["grad of hidden"][others], usual["grad of hidden"][others])


def test_a_hidden_size_of_one_may_have_any_stride() -> None:
    hidden, weight, bias, targets = inputs(shape=(N, V, 1))
    turned = weight.as_strided((V, 1), (1, V))
    assert_alike(fused(hidden.as_strided((N, 1), (1, N)), turned, bias, targets), fused(hidden, weight, bias, targets))


def test_a_weight_without_contiguous_rows_is_refused_with_the_way_out() -> None:
    hidden, weight, bias, targets = inputs()
    with pytest.raises(ValueError, match=r"strides \(1, 150\): pass weight.contiguous\(\), or use method='streamed'"):
        fused(hidden, weight.T.contiguous().T, bias, targets)


# ---- memory


@pytest.fixture
def allocated(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What is made while a test runs; the interpreter makes tensors without elements."""
    tensors: list[Tensor] = []

    def recorded(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*arguments: Any, **options: Any) -> Tensor:
            tensor = make(*arguments, **options)
            tensors.extend([tensor] if tensor.numel() else [])
            return tensor

        return made

    for owner, names in ((torch.Tensor, ("new_empty", "new_zeros")), (torch, ("empty", "stack", "zeros_like"))):
        for name in names:
            monkeypatch.setattr(owner, name, recorded(getattr(owner, name)))
    return tensors


@pytest.mark.parametrize("stats", [(), STATS], ids=["no statistics", "statistics"])
def test_a_forward_allocates_its_results_and_the_states_of_ranges_alone(
    stats: tuple[str, ...], allocated: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, bias, targets = inputs(torch.float16)  # fp32's states are always those of statistics
    monkeypatch.setattr(launch, "fused_ranges", lambda *_: 3)
    allocated.clear()
    made = head_fused.forward(hidden, weight, bias, targets, HeadOptions(stats=stats), Wants.VALUES)
    results = [made.logps, *made.saved, *made.stats.values()]
    rest = [tensor for tensor in allocated if not any(tensor is result for result in results)]
    assert len(allocated) == len(results) + 1 and all(tensor.shape == (N,) for tensor in results)
    assert [tuple(tensor.shape) for tensor in rest] == [(3, 6 if stats else 2, N)]


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_a_backward_allocates_a_slab_and_sums_beside_its_gradients(
    dtype: torch.dtype, trained: bool, allocated: list[Tensor]
) -> None:
    """Both within the workspace for a frozen head; a trained one's sums are another N x D."""
    rows, vocabulary, hidden_size = 40, 600, 4
    hidden, weight, bias, targets = inputs(dtype, (rows, vocabulary, hidden_size))
    ones = torch.ones(rows, device=KERNEL_DEVICE)
    options = HeadOptions(workspace_bytes=rows * 140 * dtype.itemsize)
    allocated.clear()
    needs = (True, trained, trained)
    made = head_fused.backward(hidden, weight, bias, targets, (ones, ones, ones), None, ones, options, needs)
    rest = [tensor for tensor in allocated if not any(tensor is gradient for gradient in made)]
    factors = [tensor for tensor in rest if tensor.shape == (4, rows)]
    buffers = [tensor for tensor in rest if tensor.shape != (4, rows)]
    assert len(factors) == 1 and len(buffers) == (1 if dtype == torch.float32 else 2)
    assert max(tensor.numel() for tensor in buffers) < rows * vocabulary / 4
    sums = 4 * rows * hidden_size if trained and dtype != torch.float32 else 0
    assert sum(tensor.nbytes for tensor in buffers) <= options.workspace_bytes + sums


# ---- launch numbers

DEVICES = {name: device for name, device in launch.EXAMPLES.items() if device.has_matrix_products}
SHAPES = [(1, 128256, 4096), (24, 50257, 768), (1001, 1003, 67), (2048, 32000, 4096), (8192, 151936, 3584)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids="{0[0]}x{0[1]}x{0[2]}".format)
@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_ranges_fill_the_multiprocessors_and_their_states_stay_small(
    device: launch.Device, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    rows, vocabulary, hidden_size = shape
    config = launch.fused_logits(rows, dtype, device, aligned=True)
    ranges = launch.fused_ranges(rows, vocabulary, config, device)
    row_tiles, tiles = math.ceil(rows / config.block_m), math.ceil(vocabulary / config.block_n)
    assert 1 <= ranges <= tiles
    programs, places = row_tiles * ranges, device.multiprocessors * config.resident
    busy = row_tiles * tiles / (places * math.ceil(programs / places) * math.ceil(tiles / ranges))
    assert busy > 0.85 or row_tiles * tiles < 8 * places
    assert ranges * 6 * rows * 4 < 0.02 * vocabulary * hidden_size * dtype.itemsize or vocabulary < 2000


@pytest.mark.parametrize("workspace", [1, 10**6, 64 * 2**20, 384 * 2**20])
@pytest.mark.parametrize("whole_rows", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids="{0[0]}x{0[1]}x{0[2]}".format)
def test_slab_and_sums_fit_the_workspace_unless_one_tile_does_not(
    shape: tuple[int, int, int], dtype: torch.dtype, whole_rows: bool, workspace: int
) -> None:
    rows, vocabulary, hidden_size = shape
    for device in [*DEVICES.values(), launch.INTERPRETER]:
        chunk, columns = launch.fused_slab(rows, vocabulary, hidden_size, dtype, device, workspace, whole_rows)
        tile = launch.fused_logits(rows, dtype, device, aligned=True)
        sums = 0 if whole_rows or dtype == torch.float32 else 4 * hidden_size
        assert 1 <= chunk <= rows and columns % tile.block_n == 0
        assert chunk == rows or (not whole_rows and chunk % tile.block_m == 0)
        smallest = columns == tile.block_n and chunk <= (rows if whole_rows else tile.block_m)
        assert chunk * (columns * dtype.itemsize + sums) <= workspace or smallest
        assert columns * 3 < vocabulary or columns == tile.block_n
