"""linear_logps: against fp64 truth, with every gradient, in bounded memory. Legend: N tokens, D hidden size, V
vocabulary.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastdpo_kernels.linear_logps import STATS, linear_logps, linear_logps_reference

N, D, V = 37, 16, 101
OPTIONS = {
    "plain": {},
    "scaled": {"logit_scale": 0.3},
    "softcapped": {"softcap": 2.0},
    "all": {"logit_scale": 1.7, "softcap": 3.0, "temperature": 0.7},
}


def inputs(
    dtype: torch.dtype = torch.float64, rows: int = N, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).mul(factor).to(dtype)
        for shape, factor in (((rows, D), scale), ((V, D), 1.0), ((V,), 1.0))
    )
    return hidden, weight, bias, torch.randint(V, (rows,), generator=generator)


@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
def test_values_statistics_and_gradients_are_those_of_the_logits(options: dict, with_bias: bool, trained: bool) -> None:
    hidden, weight, bias, targets = inputs()
    bias = bias if with_bias else None
    leaves = [hidden, *([weight] if trained else []), *([bias] if trained and bias is not None else [])]
    upstream = torch.randn(N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for chunked in (True, False):
        for leaf in leaves:
            leaf.requires_grad_().grad = None
        if chunked:
            logps, stats = linear_logps(
                hidden, weight, targets, bias, stats=STATS, workspace_bytes=5 * V * 8, **options
            )
        else:
            logps, stats = linear_logps_reference(hidden, weight, targets, bias, **options)
        (logps.sin() * upstream).sum().backward()
        results.append([logps, *(stats[name] for name in STATS), *(leaf.grad for leaf in leaves)])
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-12)


def test_gradcheck_in_fp64_for_frozen_and_trained_heads() -> None:
    hidden, weight, bias, targets = inputs(rows=7)
    hidden.requires_grad_()
    options = {"logit_scale": 0.5, "softcap": 2.0, "workspace_bytes": 3 * V * 8}
    assert torch.autograd.gradcheck(lambda h: linear_logps(h, weight, targets, bias, **options)[0], (hidden,))
    weight.requires_grad_(), bias.requires_grad_()
    check = torch.autograd.gradcheck
    assert check(lambda h, w, b: linear_logps(h, w, targets, b, **options)[0], (hidden, weight, bias))


@pytest.mark.parametrize("rows_per_chunk", [1, 2, 5, N, 10 * N])
def test_results_do_not_depend_on_how_rows_are_chunked(rows_per_chunk: int) -> None:
    hidden, weight, _, targets = inputs()
    hidden.requires_grad_()
    logps, _ = linear_logps(hidden, weight, targets, workspace_bytes=rows_per_chunk * V * 8)
    whole, _ = linear_logps(hidden, weight, targets)
    torch.testing.assert_close(logps, whole, rtol=1e-13, atol=1e-13)


def test_a_pass_without_gradient_gives_bitwise_the_values_of_one_with() -> None:
    hidden, weight, bias, targets = inputs(torch.float32)
    with_gradient, _ = linear_logps(hidden.clone().requires_grad_(), weight, targets, bias)
    with torch.no_grad():
        without, _ = linear_logps(hidden, weight, targets, bias)
    assert torch.equal(with_gradient, without)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("peak", [0.0, 5.0, 15.0, 40.0])
def test_errors_are_at_most_twice_torchs_and_log_probs_never_positive(dtype: torch.dtype, peak: float) -> None:
    """`peak` aligns a hidden row with its target's weight row: p(target) from about 1/V to 1 - 1e-6 and beyond."""
    hidden, weight, bias, targets = inputs(scale=0.5)
    rows = weight[targets]
    hidden = (hidden + peak * rows / rows.square().sum(1, keepdim=True)).to(dtype)
    weight, bias = weight.to(dtype), bias.to(dtype)
    truth, truth_grad = _values_and_gradient(
        linear_logps_reference, *(t.double() for t in (hidden, weight)), targets, bias.double()
    )
    plain, plain_grad = _values_and_gradient(linear_logps_reference, hidden, weight, targets, bias)
    ours, ours_grad = _values_and_gradient(linear_logps, hidden, weight, targets, bias)
    assert ours.max() <= 0
    for mine, torchs, exact in ((ours, plain, truth), (ours_grad, plain_grad, truth_grad)):
        error, allowed = (mine.double() - exact).abs(), (torchs.double() - exact).abs()
        floor = (
            torch.finfo(torch.promote_types(dtype, torch.float32) if mine is ours else dtype).eps * exact.abs().max()
        )
        assert error.max() <= 2 * allowed.max() + floor
        assert error.square().mean().sqrt() <= 2 * allowed.square().mean().sqrt() + floor


def _values_and_gradient(
    function, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    hidden = hidden.clone().requires_grad_()
    logps, _ = function(hidden, weight, targets, bias)
    upstream = torch.linspace(-1, 1, len(targets), dtype=logps.dtype)
    (logps * upstream).sum().backward()
    return logps.detach(), hidden.grad


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("trained", [False, True])
def test_no_row_and_one_row_work(rows: int, trained: bool) -> None:
    hidden, weight, bias, targets = inputs(rows=rows)
    hidden.requires_grad_(), weight.requires_grad_(trained)
    logps, stats = linear_logps(hidden, weight, targets, bias, stats=STATS)
    logps.sum().backward()
    assert logps.shape == (rows,) and all(value.shape == (rows,) for value in stats.values())
    assert hidden.grad.shape == (rows, D)
    assert not trained or (weight.grad.abs().sum() > 0) == (rows > 0)


def test_strided_hidden_rows_give_the_same_numbers() -> None:
    hidden, weight, _, targets = inputs()
    strided = torch.stack([hidden, -hidden], dim=2)[:, :, 0]
    assert not strided.is_contiguous()
    assert torch.equal(linear_logps(strided, weight, targets)[0], linear_logps(hidden, weight, targets)[0])


def test_logits_of_a_thousand_stay_finite() -> None:
    hidden, weight, _, targets = inputs(torch.float32, scale=1e3)
    hidden.requires_grad_()
    logps, stats = linear_logps(hidden, weight, targets, stats=STATS)
    logps.sum().backward()
    assert logps.isfinite().all() and hidden.grad.isfinite().all() and all(v.isfinite().all() for v in stats.values())


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}], ids=["plain", "softcapped"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_memory_stays_within_the_workspace_and_what_comes_out(options: dict, trained: bool) -> None:
    """In fp32, as bf16 products on a CPU make copies of their own. The peak of what is alive at once, by the
    profiler's allocation events; the logits would take 16 workspaces.
    """
    rows, vocabulary, width, workspace = 512, 4000, 8, 2**19
    hidden = torch.randn(rows, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=trained)
    targets = torch.randint(vocabulary, (rows,))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        logps, _ = linear_logps(hidden, weight, targets, stats=STATS, workspace_bytes=workspace, **options)
        logps.sum().backward()
    alive = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    gradients = rows * width * 8 + (2 * vocabulary * width * 8 if trained else 0)
    assert rows * vocabulary * 4 > 15 * workspace
    assert peak <= 1.1 * workspace + gradients + rows * 64


def test_products_run_in_the_autocast_dtype() -> None:
    hidden, weight, _, targets = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = linear_logps(hidden, weight, targets)
    half, _ = linear_logps(hidden.bfloat16(), weight.bfloat16(), targets)
    assert cast.dtype == torch.float32 and torch.equal(cast, half)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(V, D + 1, dtype=torch.float64)}, "weight"),
        ({"targets": torch.zeros(N + 1, dtype=torch.int64)}, "targets"),
        ({"targets": torch.zeros(N, dtype=torch.int32)}, "int64"),
        ({"bias": torch.zeros(V + 1, dtype=torch.float64)}, "bias"),
        ({"stats": ("perplexity",)}, "perplexity"),
        ({"method": "magic"}, "magic"),
    ],
    ids=["weight", "targets", "target dtype", "bias", "stats", "method"],
)
def test_arguments_that_do_not_fit_are_refused_by_name(change: dict, message: str) -> None:
    hidden, weight, bias, targets = inputs()
    arguments = {"hidden": hidden, "weight": weight, "targets": targets, "bias": bias, **change}
    with pytest.raises(ValueError, match=message):
        linear_logps(**arguments)
