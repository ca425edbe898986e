"""pair_loss: the Triton method against plain autograd, both against explicit numbers, and what must hold of any loss.

The losses are written here: those of fastdpo, and one formula of every function that a formula may use. Legend: N
scored tokens, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mpmath
import pytest
import torch
from conftest import KERNEL_DEVICE
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdpo_kernels import launch, pair_loss_triton
from fastdpo_kernels.pair_loss import LossTerm, PairLoss, PairwiseLoss, match_pairs, pair_loss, sequence_sums

pytestmark = pytest.mark.kernels
DEVICE = torch.device(KERNEL_DEVICE)
METHODS = ("torch", "triton")
BETA = 0.3
BLOCK = launch.pair_loss_config().block


# Formulas


def sigmoid(m: Any, chosen: Any, rejected: Any, beta: Any = BETA, smoothing: Any = 0.1) -> Any:
    margin = beta * (chosen - rejected)
    return -(1 - smoothing) * m.log_sigmoid(margin) - smoothing * m.log_sigmoid(-margin)


def exo_pair(m: Any, chosen: Any, rejected: Any, beta: Any, smoothing: Any) -> Any:
    margin = beta * (chosen - rejected)
    kept = m.sigmoid(margin) * (m.log_sigmoid(margin) - m.log(1 - smoothing))
    return kept + m.sigmoid(-margin) * (m.log_sigmoid(-margin) - m.log(smoothing))


def bco_pair(m: Any, chosen: Any, rejected: Any, beta: Any, mean_reward: Any) -> Any:
    return -m.log_sigmoid(beta * chosen - mean_reward) - m.log_sigmoid(mean_reward - beta * rejected)


def nca_pair(m: Any, chosen: Any, rejected: Any, beta: Any) -> Any:
    either = m.log_sigmoid(-beta * chosen) + m.log_sigmoid(-beta * rejected)
    return -m.log_sigmoid(beta * chosen) - either / 2


def discopop(m: Any, chosen: Any, rejected: Any, beta: Any, tau: Any) -> Any:
    margin = beta * (chosen - rejected)
    gate = m.sigmoid(margin / tau)
    return -m.log_sigmoid(margin) * (1 - gate) + m.capped_exp(-margin) * gate


def orpo(m: Any, chosen: Any, rejected: Any, beta: Any) -> Any:
    log_odds = chosen - rejected - (m.log1mexp(chosen) - m.log1mexp(rejected))
    return -beta * m.log_sigmoid(log_odds)


def ipo(m: Any, chosen: Any, rejected: Any, beta: Any) -> Any:
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def hinge(m: Any, chosen: Any, rejected: Any, beta: Any) -> Any:
    return m.relu(1 - beta * (chosen - rejected))


def sppo_hard(m: Any, chosen: Any, rejected: Any, beta: Any) -> Any:
    return (chosen - 1 / (2 * beta)) ** 2 + (rejected + 1 / (2 * beta)) ** 2


def robust(m: Any, chosen: Any, rejected: Any, beta: Any, smoothing: Any) -> Any:
    margin = beta * (chosen - rejected)
    return (smoothing * m.log_sigmoid(-margin) - (1 - smoothing) * m.log_sigmoid(margin)) / (1 - 2 * smoothing)


def apo_zero(m: Any, chosen: Any, rejected: Any, beta: Any) -> Any:
    return m.sigmoid(-beta * chosen) + m.sigmoid(beta * rejected)


def apo_down(m: Any, chosen: Any, rejected: Any, beta: Any) -> Any:
    return m.sigmoid(beta * chosen) + m.sigmoid(-beta * (chosen - rejected))


def sft(m: Any, chosen: Any, rejected: Any) -> Any:
    return -chosen


def every_function(m: Any, chosen: Any, rejected: Any, beta: Any, mean_reward: Any) -> Any:
    """No loss that anybody wants; `user` in its name would do as well."""
    x, y, size = chosen + 0.1, rejected - 0.2, m.abs(chosen - 3)
    smooth = m.exp(-size) + m.log(size + m.sqrt(size)) + m.log1p(m.sqrt(size)) + m.expm1(beta * x) + m.tanh(x * y)
    steep = m.relu(x - mean_reward) + m.minimum(x, -0.05) + m.maximum(x, 2 * y) + m.minimum(m.log(2), y) + abs(y - 1)
    bounded = m.sigmoid(x) * m.softplus(y) - m.log_sigmoid(x / (1 + y**2)) + m.log1mexp(-size) ** 3
    return smooth + steep / 3 + bounded + m.capped_exp(y) ** 2 + size**1.5 + 1 / (1 + size) ** 0.5 + 2**x


def forward_kl(m: Any, log_ratio: Any) -> Any:
    return 1 - m.capped_exp(-log_ratio)


def js_divergence(m: Any, log_ratio: Any) -> Any:
    return m.log(2) + m.log_sigmoid(log_ratio)


def alpha_divergence(m: Any, log_ratio: Any) -> Any:
    return (1 - m.capped_exp(-0.7 * log_ratio)) / 0.7


HYPER = {"beta": BETA}
SMOOTHED = {"beta": BETA, "smoothing": 0.15}
LOG_RATIOS = {
    "sigmoid": LossTerm(sigmoid, SMOOTHED),
    "hinge": LossTerm(hinge, HYPER),
    "ipo": LossTerm(ipo, HYPER, per="token"),
    "robust": LossTerm(robust, SMOOTHED),
    "exo_pair": LossTerm(exo_pair, SMOOTHED),
    "bco_pair": LossTerm(bco_pair, HYPER),
    "sppo_hard": LossTerm(sppo_hard, HYPER),
    "nca_pair": LossTerm(nca_pair, HYPER),
    "apo_zero": LossTerm(apo_zero, HYPER),
    "apo_down": LossTerm(apo_down, HYPER),
    "discopop": LossTerm(discopop, {**HYPER, "tau": 0.05}),
    "sigmoid_norm": LossTerm(sigmoid, SMOOTHED, per="token"),
    "forward_kl": LossTerm(sigmoid, SMOOTHED, score=forward_kl),
    "forward_kl-ipo": LossTerm(ipo, HYPER, per="token", score=forward_kl),
    "forward_kl-discopop": LossTerm(discopop, {**HYPER, "tau": 0.05}, score=forward_kl),
    "js_divergence": LossTerm(hinge, HYPER, score=js_divergence),
    "alpha_divergence": LossTerm(exo_pair, SMOOTHED, score=alpha_divergence),
}
LOGPS = {
    "simpo": LossTerm(
        lambda m, u, v, beta: -m.log_sigmoid(beta * (u - v) - 0.7), {"beta": 2.0}, of="logps", per="token"
    ),
    "orpo": LossTerm(orpo, HYPER, of="logps", per="token"),
    "cpo": LossTerm(sigmoid, SMOOTHED, of="logps"),
    "sft": LossTerm(sft, of="logps", per="batch_token"),
}
MATCHED = {
    "aot": LossTerm(sigmoid, SMOOTHED, matched="margins"),
    "aot_pair": LossTerm(sigmoid, SMOOTHED, matched="sides"),
}
EVERY = {
    "every_function": LossTerm(every_function, HYPER),
    "every_function-tokens": LossTerm(every_function, HYPER, per="token"),
}
UNMATCHED = {name: (term,) for name, term in {**LOG_RATIOS, **LOGPS, **EVERY}.items()}
LISTS = {
    **UNMATCHED,
    **{name: (term,) for name, term in MATCHED.items()},
    "weighted list": tuple(
        LossTerm(**{**vars(term), "weight": 0.3 + 0.1 * place})
        for place, term in enumerate({**LOG_RATIOS, **LOGPS, **MATCHED}.values())
    ),
}
losses = pytest.mark.parametrize("terms", LISTS.values(), ids=LISTS)
unmatched = pytest.mark.parametrize("terms", UNMATCHED.values(), ids=UNMATCHED)
both_methods = pytest.mark.parametrize("method", METHODS)


# Inputs

RAGGED = (3, 5, 1, 1, 0, 4, 2, 0, 17, 6)  # ten sequences, five pairs


def offsets(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)


def tokens(lengths: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (-torch.rand(sum(lengths), generator=generator, dtype=torch.float64)).to(DEVICE, dtype)


def sums_of_reference(lengths: Sequence[int], ld_alpha: float | None = None, seed: int = 1) -> Tensor:
    return sequence_sums(tokens(lengths, seed), offsets(lengths), ld_alpha).view(-1, 2)


def call(
    lengths: Sequence[int], loss: PairwiseLoss, method: str, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[PairLoss, Tensor]:
    """-> the result, and d mean loss / d token_logps."""
    token_logps = tokens(lengths, dtype=dtype).requires_grad_()
    options = {"mean_reward": torch.tensor(0.2, dtype=torch.float64, device=DEVICE), **options}
    if loss.weighting:
        options["log_sum_sq_probs"] = tokens(lengths, seed=2, dtype=dtype)
    reference = sums_of_reference(lengths, loss.ld_alpha)
    result = pair_loss(token_logps, offsets(lengths), reference, loss, method=method, **options)
    (gradient,) = torch.autograd.grad(result.losses.mean(), token_logps)
    return result, gradient


def numbers(result: PairLoss, gradient: Tensor) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in vars(result).items()} | {"gradient": gradient}


def assert_close(ours: dict[str, Tensor], truth: dict[str, Tensor], relative: float) -> None:
    """Elementwise, by the scale of its tensor: sums of different order differ by an ulp, and log-ratios may cancel."""
    for name, expected in truth.items():
        scale = expected.abs().max() if expected.numel() else 1.0
        torch.testing.assert_close(ours[name], expected, rtol=relative, atol=float(relative * scale), msg=name)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def single_tokens(sides: Sequence[Sequence[float]]) -> tuple[Tensor, Tensor]:
    """Each sequence one token with these values: token_logps and cu_seqlens."""
    values = torch.tensor(sides, dtype=torch.float64, device=DEVICE).view(-1)
    return values, offsets([1] * len(values))


# The two methods


@pytest.mark.parametrize("ld_alpha", [None, 0.4], ids=["", "ld_alpha"])
@losses
def test_the_kernel_computes_what_autograd_does(terms: tuple[LossTerm, ...], ld_alpha: float | None) -> None:
    loss = PairwiseLoss(terms, BETA, ld_alpha)
    truth, ours = (numbers(*call(RAGGED, loss, method)) for method in METHODS)
    assert_close(ours, truth, relative=1e-12)


@losses
def test_fp32_tokens_lose_no_more_than_the_rounding_of_the_results(terms: tuple[LossTerm, ...]) -> None:
    loss = PairwiseLoss(terms, BETA)
    truth, ours = (numbers(*call(RAGGED, loss, method, torch.float32)) for method in METHODS)
    assert ours["losses"].dtype == ours["rewards"].dtype == ours["gradient"].dtype == torch.float32
    assert ours["logps"].dtype == ours["log_ratios"].dtype == torch.float64
    for name in ("losses", "rewards", "gradient"):  # the gradient is rounded twice, by the forward and the backward
        cancelled = 1e-15 * float(truth[name].abs().max())  # summands of a gradient may cancel
        torch.testing.assert_close(ours[name], truth[name], rtol=2.0**-22, atol=cancelled)


@pytest.mark.parametrize(
    "lengths",
    [(), (0, 0), (1, 1), (0, 3), (3, 0), (BLOCK, BLOCK + 1), (2 * BLOCK + 452, 7, 1, BLOCK - 1)],
    ids=["no pair", "no token", "one token", "no chosen", "no rejected", "block", "blocks"],
)
@pytest.mark.parametrize("ld_alpha", [None, 0.4], ids=["", "ld_alpha"])
def test_any_length_will_do(lengths: tuple[int, ...], ld_alpha: float | None) -> None:
    loss = PairwiseLoss((LOG_RATIOS["ipo"], LOGPS["sft"], LOGPS["orpo"], MATCHED["aot_pair"]), BETA, ld_alpha)
    truth, ours = (numbers(*call(lengths, loss, method)) for method in METHODS)
    assert all(value.isfinite().all() for value in truth.values())
    assert_close(ours, truth, relative=1e-12)


@losses
def test_gradients_of_the_torch_method_pass_gradcheck(terms: tuple[LossTerm, ...]) -> None:
    lengths = (2, 3, 1, 2, 4, 1)
    loss, reference = PairwiseLoss(terms, BETA, 0.5), sums_of_reference(lengths, 0.5)

    def check(token_logps: Tensor) -> Tensor:
        return pair_loss(token_logps, offsets(lengths), reference, loss, method="torch").losses

    assert torch.autograd.gradcheck(check, tokens(lengths).requires_grad_())


@unmatched
def test_any_upstream_gradient_scales_its_pair(terms: tuple[LossTerm, ...]) -> None:
    upstream = torch.tensor([2.0, -0.5, 0.0, 7.0, 1e-3], dtype=torch.float64, device=DEVICE)
    gradients = []
    for method in METHODS:
        token_logps = tokens(RAGGED).requires_grad_()
        loss = PairwiseLoss(terms, BETA)
        result = pair_loss(token_logps, offsets(RAGGED), sums_of_reference(RAGGED), loss, method=method)
        gradients += torch.autograd.grad(result.losses, token_logps, upstream, retain_graph=True)
        again = torch.autograd.grad(result.losses, token_logps, upstream[::1])[0]
        assert torch.equal(gradients[-1], again)
    assert_close({"gradient": gradients[1]}, {"gradient": gradients[0]}, relative=1e-12)


# Far out and close by

CORNERS = ((800.0, -800.0), (-800.0, 800.0), (800.0, 800.0), (-800.0, -800.0), (0.0, 0.0), (800.0, 0.0), (0.0, -800.0))


@both_methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", [*LOG_RATIOS, *MATCHED])
def test_log_ratios_of_800_stay_finite(name: str, dtype: torch.dtype, method: str) -> None:
    values, cu_seqlens = single_tokens(CORNERS)
    token_logps = values.to(dtype).requires_grad_()
    loss = PairwiseLoss((({**LOG_RATIOS, **MATCHED})[name],), BETA)
    result = pair_loss(token_logps, cu_seqlens, None, loss, method=method)
    (gradient,) = torch.autograd.grad(result.losses.sum(), token_logps)
    assert result.losses.isfinite().all() and gradient.isfinite().all()
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("name", [*LOG_RATIOS, *MATCHED])
def test_both_methods_agree_at_log_ratios_of_800(name: str) -> None:
    values, cu_seqlens = single_tokens(CORNERS)
    loss, found = PairwiseLoss((({**LOG_RATIOS, **MATCHED})[name],), BETA), []
    for method in METHODS:
        token_logps = values.clone().requires_grad_()
        result = pair_loss(token_logps, cu_seqlens, None, loss, method=method)
        found.append((result.losses.detach(), *torch.autograd.grad(result.losses.sum(), token_logps)))
    for truth, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-300)


@both_methods
@pytest.mark.parametrize("name", LOGPS)
def test_log_probs_of_minus_800_and_of_certainty_stay_finite(name: str, method: str) -> None:
    values, cu_seqlens = single_tokens([(-800.0, 0.0), (0.0, -800.0), (0.0, 0.0), (-800.0, -800.0), (-1e-12, -1e-3)])
    token_logps = values.requires_grad_()
    result = pair_loss(token_logps, cu_seqlens, None, PairwiseLoss((LOGPS[name],), BETA), method=method)
    (gradient,) = torch.autograd.grad(result.losses.sum(), token_logps)
    assert result.losses.isfinite().all() and gradient.isfinite().all()


@both_methods
def test_losses_far_below_1e_16_are_right_in_every_digit(method: str) -> None:
    """At a margin of 40 the loss is 4e-18: 1 + e^-40 is 1 in fp64, so it takes log1p."""
    margins = [-40.0, -17.3, -1.0, 1e-9, 3.0, 17.3, 40.0, 300.0]
    values, cu_seqlens = single_tokens([(margin, 0.0) for margin in margins])
    token_logps = values.requires_grad_()
    loss = PairwiseLoss((LossTerm(sigmoid, {"beta": 1.0, "smoothing": 0.0}),), 1.0)
    result = pair_loss(token_logps, cu_seqlens, None, loss, method=method)
    (gradient,) = torch.autograd.grad(result.losses.sum(), token_logps)
    with mpmath.workdps(60):
        truth = [float(mpmath.log1p(mpmath.exp(-mpmath.mpf(margin)))) for margin in margins]
        slopes = [float(-1 / (1 + mpmath.exp(mpmath.mpf(margin)))) for margin in margins]
    assert_relative(result.losses, truth, 1e-12)
    assert_relative(gradient[0::2], slopes, 1e-12)
    assert_relative(gradient[1::2], [-slope for slope in slopes], 1e-12)


def assert_relative(got: Tensor, truth: Sequence[float], relative: float) -> None:
    expected = torch.tensor(truth, dtype=got.dtype, device=got.device)
    torch.testing.assert_close(got.detach(), expected, rtol=relative, atol=0)


TINY = (1e-30, 3e-17, 2e-10, 1e-3, 0.4, 0.99)
ANY = (*TINY, *(-x for x in TINY), -3.0, 2.5, 17.0, -36.0, 50.0, -200.0, 200.0)
POSITIVE = (*TINY, 2.5, 17.0, 200.0)
MATHEMATICS: dict[str, tuple[Callable[[Any], Any], Sequence[float]]] = {
    "exp": (mpmath.exp, ANY),
    "log": (mpmath.log, POSITIVE),
    "log1p": (mpmath.log1p, (*(x for x in ANY if x > -1), -0.999)),
    "expm1": (mpmath.expm1, ANY),
    "sqrt": (mpmath.sqrt, POSITIVE),
    "tanh": (mpmath.tanh, ANY),
    "abs": (abs, ANY),
    "sigmoid": (lambda x: 1 / (1 + mpmath.exp(-x)), ANY),
    "log_sigmoid": (lambda x: -mpmath.log1p(mpmath.exp(-x)), ANY),
    "softplus": (lambda x: mpmath.log1p(mpmath.exp(x)), ANY),
    "relu": (lambda x: max(x, mpmath.mpf(0)), ANY),
    "log1mexp": (lambda x: mpmath.log(-mpmath.expm1(x)), [-x for x in POSITIVE if x > 1e-15]),
    "capped_exp": (lambda x: mpmath.exp(min(x, 32)) * (1 + max(x - 32, mpmath.mpf(0))), ANY),
}


@pytest.mark.parametrize("name", MATHEMATICS)
def test_a_function_of_m_is_right_to_a_few_units_in_the_last_place(name: str) -> None:
    """Values and slopes, against 300 digits."""
    truth, at = MATHEMATICS[name]
    values, cu_seqlens = single_tokens([(x, 0.0) for x in at])
    token_logps = values.requires_grad_()
    loss = PairwiseLoss((LossTerm(lambda m, chosen, rejected: getattr(m, name)(chosen)),), 1.0)
    result = pair_loss(token_logps, cu_seqlens, None, loss, method="triton")
    (gradient,) = torch.autograd.grad(result.losses.sum(), token_logps)
    with mpmath.workdps(300):
        points = [(mpmath.mpf(x), abs(mpmath.mpf(x)) * mpmath.mpf(10) ** -60) for x in at]
        values_at = [float(truth(x)) for x, _ in points]
        slopes = [float((truth(x + step) - truth(x - step)) / (2 * step)) for x, step in points]
    assert_relative(result.losses, values_at, 1e-15)
    assert_relative(gradient[0::2], slopes, 2e-15)


def test_slopes_at_kinks_are_those_of_torch() -> None:
    terms = (
        LossTerm(lambda m, chosen, rejected: m.relu(chosen) + 2 * m.abs(rejected)),
        LossTerm(lambda m, chosen, rejected: 4 * m.minimum(chosen, rejected) + 8 * m.maximum(rejected, 0.0)),
    )
    gradients = []
    for method in METHODS:
        values, cu_seqlens = single_tokens([(0.0, 0.0)])
        token_logps = values.requires_grad_()
        result = pair_loss(token_logps, cu_seqlens, None, PairwiseLoss(terms, 1.0), method=method)
        gradients += torch.autograd.grad(result.losses.sum(), token_logps)
    assert torch.equal(*gradients)


@both_methods
def test_a_token_that_is_nan_shows_in_its_pair_and_in_no_other(method: str) -> None:
    token_logps = tokens((2, 3, 1, 2))
    token_logps[1] = float("nan")
    for name in ("hinge", "sigmoid", "ipo"):
        loss = PairwiseLoss((LOG_RATIOS[name],), BETA)
        losses = pair_loss(token_logps, offsets((2, 3, 1, 2)), None, loss, method=method).losses
        assert losses.isnan().tolist() == [True, False], name


# What the options mean


@both_methods
def test_without_a_reference_its_log_probs_are_zero(method: str) -> None:
    loss = PairwiseLoss((LOG_RATIOS["sigmoid"], *MATCHED.values()), BETA)
    free = pair_loss(tokens(RAGGED), offsets(RAGGED), None, loss, method=method)
    zeros = torch.zeros(5, 2, dtype=torch.float64, device=DEVICE)
    assert_same(vars(free), vars(pair_loss(tokens(RAGGED), offsets(RAGGED), zeros, loss, method=method)))
    assert torch.equal(free.log_ratios, free.logps)


@both_methods
def test_rewards_are_beta_times_summed_log_ratios(method: str) -> None:
    result, _ = call(RAGGED, PairwiseLoss((LOG_RATIOS["ipo"],), 0.37), method)
    assert torch.equal(result.log_ratios, result.logps - sums_of_reference(RAGGED))
    torch.testing.assert_close(result.rewards, 0.37 * result.log_ratios, rtol=1e-15, atol=0)


@both_methods
def test_ld_alpha_weights_the_tokens_beyond_the_shorter_response(method: str) -> None:
    result, gradient = call((2, 4), PairwiseLoss((LOG_RATIOS["sigmoid"],), BETA, 0.25), method)
    values = tokens((2, 4)).tolist()
    by_hand = [values[0] + values[1], values[2] + values[3] + 0.25 * (values[4] + values[5])]
    torch.testing.assert_close(result.logps[0].tolist(), by_hand, rtol=1e-14, atol=0)
    slope = gradient[0].item()
    shape = torch.tensor([1, 1, -1, -1, -0.25, -0.25], dtype=torch.float64, device=DEVICE)
    torch.testing.assert_close(gradient, slope * shape, rtol=1e-14, atol=0)


@both_methods
def test_per_token_divides_each_side_by_its_own_number_of_tokens(method: str) -> None:
    terms = (LossTerm(lambda m, u, v: 3 * u + 5 * v, of="logps", per="token"),)
    result, gradient = call((2, 4), PairwiseLoss(terms, BETA), method)
    values = tokens((2, 4))
    expected = 3 * values[:2].mean() + 5 * values[2:].mean()
    torch.testing.assert_close(result.losses[0].detach(), expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(gradient.tolist(), [1.5] * 2 + [1.25] * 4)


@both_methods
def test_the_mean_of_a_batch_token_loss_is_that_over_all_chosen_tokens(method: str) -> None:
    """Whatever ld_alpha says, and over micro-batches when it is told the batch's number of tokens a pair."""
    loss = PairwiseLoss((LOGPS["sft"],), BETA, 0.25)
    result, gradient = call(RAGGED, loss, method)
    sequences = tokens(RAGGED).split(RAGGED)
    chosen = torch.cat(sequences[0::2])
    torch.testing.assert_close(result.losses.detach().mean(), -chosen.mean(), rtol=1e-14, atol=0)
    of_sequences = [-1 / len(chosen) * (1 - place % 2) for place in range(len(RAGGED))]
    expected = torch.tensor(of_sequences, dtype=torch.float64).repeat_interleave(torch.tensor(RAGGED))
    torch.testing.assert_close(gradient.cpu(), expected, rtol=1e-14, atol=0)


@both_methods
def test_tokens_per_pair_may_be_a_number_or_a_tensor(method: str) -> None:
    loss = PairwiseLoss((LOGPS["sft"],), BETA)
    found = []
    for given in (4.7, torch.tensor(4.7, dtype=torch.float64, device=DEVICE)):
        result, gradient = call(RAGGED, loss, method, tokens_per_pair=given)
        found.append(numbers(result, gradient))
        torch.testing.assert_close(result.losses.detach(), -result.logps[:, 0] / 4.7, rtol=1e-14, atol=0)
    assert_same(*found)


@both_methods
@pytest.mark.parametrize("ld_alpha", [None, 0.4], ids=["", "ld_alpha"])
def test_weighting_multiplies_by_what_is_no_part_of_the_gradient(method: str, ld_alpha: float | None) -> None:
    """WPO: exp of the mean over tokens of logp - log sum p^2, of both sides, plain whatever ld_alpha says."""
    terms = (LOG_RATIOS["sigmoid"], LOGPS["sft"])
    plain, plain_gradient = call(RAGGED, PairwiseLoss(terms, BETA, ld_alpha), method)
    result, gradient = call(RAGGED, PairwiseLoss(terms, BETA, ld_alpha, weighting=True), method)
    excess = (tokens(RAGGED) - tokens(RAGGED, seed=2)).split(RAGGED)
    means = torch.stack([part.sum() / max(1, len(part)) for part in excess]).view(-1, 2)
    weights = means.sum(1).exp()
    torch.testing.assert_close(result.losses, plain.losses * weights, rtol=1e-13, atol=0)
    of_tokens = weights.repeat_interleave(offsets(RAGGED).diff().view(-1, 2).sum(1))
    torch.testing.assert_close(gradient, plain_gradient * of_tokens, rtol=1e-13, atol=0)


@both_methods
def test_mean_reward_reaches_the_formula_that_asks_for_it(method: str) -> None:
    values, cu_seqlens = single_tokens([(1.0, -2.0)])
    loss = PairwiseLoss((LossTerm(lambda m, a, b, beta, mean_reward: beta * a - mean_reward, {"beta": 2.0}),), 2.0)
    assert pair_loss(values, cu_seqlens, None, loss, method=method).losses.tolist() == [2.0]
    reward = torch.tensor(0.5, dtype=torch.float64, device=DEVICE)
    assert pair_loss(values, cu_seqlens, None, loss, mean_reward=reward, method=method).losses.tolist() == [1.5]


# Matched losses

TIED = ((1.0, -2.0), (0.5, -2.0), (1.0, 3.0), (-1.0, 0.0), (0.5, 3.0), (1.0, 1.0))
TIED_REFERENCE = ((0.0, 0.5), (1.0, 1.0), (0.0, 0.5), (2.0, -1.0), (-1.0, 0.25), (0.0, 0.0))


def test_matches_are_partners_of_the_same_rank_and_ties_rank_by_position() -> None:
    logps, reference = (torch.tensor(table, dtype=torch.float64, device=DEVICE) for table in (TIED, TIED_REFERENCE))
    ratios = (logps - reference).tolist()
    chosen, rejected = [pair[0] for pair in ratios], [pair[1] for pair in ratios]
    margins, ref_margins = ([u - v for u, v in table] for table in (TIED, TIED_REFERENCE))

    def matched(of: list[float], partners: list[float]) -> list[float]:
        order = sorted(range(len(of)), key=lambda place: (of[place], place))
        return [sorted(partners)[order.index(place)] for place in range(len(of))]

    expected = [matched(margins, ref_margins), matched(chosen, rejected), matched(rejected, chosen)]
    assert match_pairs(logps, reference).T.tolist() == expected
    assert match_pairs(logps, None)[:, 0].tolist() == [0.0] * 6


@both_methods
@pytest.mark.parametrize("name", MATCHED)
def test_matched_losses_and_gradients_are_those_of_sorting(name: str, method: str) -> None:
    """Ties included. Sorted values carry the gradient to where they came from."""
    values, cu_seqlens = single_tokens(TIED)
    reference = torch.tensor(TIED_REFERENCE, dtype=torch.float64, device=DEVICE)
    matches = match_pairs(values.view(-1, 2), reference)
    loss = PairwiseLoss((MATCHED[name],), BETA)
    token_logps = values.requires_grad_()
    result = pair_loss(token_logps, cu_seqlens, reference, loss, matches=matches, method=method)
    (gradient,) = torch.autograd.grad(result.losses.mean(), token_logps)

    policy = values.detach().view(-1, 2).requires_grad_()
    pairs = (policy, reference) if name == "aot" else ((policy - reference).unbind(1))
    one, other = (x[:, 0] - x[:, 1] for x in pairs) if name == "aot" else pairs
    margins = BETA * (one.sort(stable=True).values - other.sort(stable=True).values)
    log_sigmoid = torch.nn.functional.logsigmoid
    of_ranks = -0.85 * log_sigmoid(margins) - 0.15 * log_sigmoid(-margins)
    (truth,) = torch.autograd.grad(of_ranks.mean(), policy)
    torch.testing.assert_close(result.losses.sort().values, of_ranks.sort().values, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient, truth.view(-1), rtol=1e-13, atol=1e-17)


@both_methods
@pytest.mark.parametrize("name", MATCHED)
def test_micro_batches_with_matches_of_the_batch_add_up_to_it(name: str, method: str) -> None:
    loss, reference = PairwiseLoss((MATCHED[name],), BETA), sums_of_reference(RAGGED)
    whole, gradient = call(RAGGED, loss, method)
    matches = match_pairs(whole.logps, reference)
    parts, losses = [], []
    for pairs in (slice(0, 2), slice(2, 5)):
        lengths = RAGGED[2 * pairs.start : 2 * pairs.stop]
        first = sum(RAGGED[: 2 * pairs.start])
        token_logps = tokens(RAGGED)[first : first + sum(lengths)].requires_grad_()
        part = pair_loss(
            token_logps, offsets(lengths), reference[pairs], loss, matches=matches[pairs].clone(), method=method
        )
        parts += torch.autograd.grad(part.losses.sum() / 5, token_logps)
        losses.append(part.losses.detach())
    torch.testing.assert_close(torch.cat(losses), whole.losses.detach(), rtol=1e-14, atol=0)
    torch.testing.assert_close(torch.cat(parts), gradient, rtol=1e-14, atol=0)


# What must hold of the kernel


class Counted:
    """A jitted function that notes its launches."""

    def __init__(self, kernel: Any, launched: list[str]) -> None:
        self.kernel, self.launched = kernel, launched

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        self.launched.append(self.kernel.__name__)
        return self.kernel[grid]


def test_one_launch_computes_everything_and_one_more_the_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    for name in ("_pair_loss_kernel", "_sequence_sums_kernel", "_scale_kernel"):
        monkeypatch.setattr(pair_loss_triton, name, Counted(getattr(pair_loss_triton, name), launched))
    terms, matches = LISTS["weighted list"], torch.zeros(5, 3, dtype=torch.float64, device=DEVICE)
    token_logps = tokens(RAGGED).requires_grad_()
    options = {"matches": matches, "method": "triton", "tokens_per_pair": torch.tensor(3.5).to(matches)}
    loss, reference = PairwiseLoss(terms, BETA, 0.4), torch.zeros(5, 2, dtype=torch.float64, device=DEVICE)
    result = pair_loss(token_logps, offsets(RAGGED), reference, loss, **options)
    assert launched == ["_pair_loss_kernel"]
    result.losses.mean().backward()
    assert launched == ["_pair_loss_kernel", "_scale_kernel"]


class Computed(TorchDispatchMode):
    """Notes torch's operations that launch something on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not operation.is_view and "empty" not in str(operation):
            self.names.append(str(operation))
        return operation(*args, **(kwargs or {}))


def test_nothing_of_torch_is_launched_beside_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number of tokens a pair, which training always gives, was put on the device for losses that do not read it."""
    launched: list[str] = []
    kernel = pair_loss_triton._pair_loss_kernel
    monkeypatch.setattr(pair_loss_triton, "_launch", lambda kernel, *_, **__: launched.append(kernel.__name__))
    arguments = tokens(RAGGED).requires_grad_(), offsets(RAGGED), None, PairwiseLoss((LOG_RATIOS["ipo"],), BETA)
    with Computed() as computed:
        pair_loss_triton.pair_loss(*arguments, None, None, None, tokens_per_pair=3.5)
    assert launched == [kernel.__name__] and set(computed.names) <= {"aten.detach.default"}


@pytest.mark.parametrize("weighting", [False, True], ids=["", "weighting"])
@pytest.mark.parametrize("ld_alpha", [None, 0.4], ids=["", "ld_alpha"])
def test_every_element_of_every_result_is_written(
    monkeypatch: pytest.MonkeyPatch, ld_alpha: float | None, weighting: bool
) -> None:
    loss = PairwiseLoss((LOG_RATIOS["ipo"], LOGPS["sft"]), BETA, ld_alpha, weighting)
    clean = numbers(*call(RAGGED, loss, "triton"))
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)

        def poisoned(*args: Any, real: Any = real, **options: Any) -> Tensor:
            fresh = real(*args, **options)
            return fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh

        monkeypatch.setattr(pair_loss_triton.torch, name, poisoned)
    assert_same(numbers(*call(RAGGED, loss, "triton")), clean)


def test_a_second_run_gives_the_same_bits() -> None:
    loss = PairwiseLoss(LISTS["weighted list"], BETA, 0.4)
    lengths = (BLOCK + 3, 700, 31, 2 * BLOCK)
    first, second = (numbers(*call(lengths, loss, "triton", torch.float32)) for _ in range(2))
    assert_same(first, second)


def test_a_pair_has_the_same_bits_whatever_stands_beside_it() -> None:
    lengths = (BLOCK + 3, 70, 31, 200, 5, 5)
    values, reference = tokens(lengths, dtype=torch.float32), sums_of_reference(lengths)
    loss = PairwiseLoss((LOG_RATIOS["ipo"], LOGPS["orpo"]), BETA, 0.4)

    def run(first: int, last: int) -> dict[str, Tensor]:
        of = lengths[2 * first : 2 * last]
        begin = sum(lengths[: 2 * first])
        token_logps = values[begin : begin + sum(of)].clone().requires_grad_()
        result = pair_loss(token_logps, offsets(of), reference[first:last], loss, method="triton")
        return numbers(result, *torch.autograd.grad(result.losses.sum(), token_logps))

    together, alone = run(0, 3), [run(pair, pair + 1) for pair in range(3)]
    assert_same(together, {name: torch.cat([one[name] for one in alone]) for name in together})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("ld_alpha", [None, 0.4], ids=["", "ld_alpha"])
def test_the_references_sums_have_the_bits_of_the_kernels_own(ld_alpha: float | None, dtype: torch.dtype) -> None:
    """So a policy that still is its reference has margins of exactly 0, and a loss of ln 2."""
    lengths = (BLOCK + 3, 70, 31, 3 * BLOCK, 0, 5, 1000, 1001)
    values, cu_seqlens = tokens(lengths, dtype=dtype), offsets(lengths)
    reference = pair_loss_triton.sequence_sums(values, cu_seqlens, ld_alpha).view(-1, 2)
    terms = (LossTerm(sigmoid, {"beta": 0.1, "smoothing": 0.0}),)
    result = pair_loss(values, cu_seqlens, reference, PairwiseLoss(terms, 0.1, ld_alpha), method="triton")
    assert torch.equal(result.logps, reference)
    assert (result.log_ratios == 0).all() and (result.rewards == 0).all()
    ln_2 = torch.full_like(result.losses, 0.6931471805599453)
    torch.testing.assert_close(result.losses, ln_2, rtol=2e-7 if dtype == torch.float32 else 1e-15, atol=0)
    margins = PairwiseLoss((LossTerm(lambda m, one, other: one - other, matched="margins"),), 0.1, ld_alpha)
    assert (pair_loss(values, cu_seqlens, reference, margins, method="triton").losses == 0).all()


@pytest.mark.parametrize("ld_alpha", [None, 0.4], ids=["", "ld_alpha"])
def test_sums_are_those_of_each_sequence_by_itself(ld_alpha: float | None) -> None:
    lengths = (BLOCK + 3, 70, 0, 3, 5, 5)
    values, cu_seqlens = tokens(lengths), offsets(lengths)
    shared = [min(lengths[place - place % 2 :][:2]) for place in range(6)]
    factor = 1.0 if ld_alpha is None else ld_alpha
    parts = values.split(lengths)
    truth = torch.stack([x[:n].sum() + factor * x[n:].sum() for x, n in zip(parts, shared, strict=True)])
    for sums in (sequence_sums, pair_loss_triton.sequence_sums):
        torch.testing.assert_close(sums(values, cu_seqlens, ld_alpha), truth, rtol=1e-14, atol=0)


def test_sums_of_values_with_more_dimensions_and_of_odd_numbers_of_sequences() -> None:
    table = torch.stack([tokens((2, 0, 5)), 2 * tokens((2, 0, 5))], 1)
    truth = torch.stack([part.sum(0) for part in table.split((2, 0, 5))])
    torch.testing.assert_close(sequence_sums(table, offsets((2, 0, 5))), truth)
    torch.testing.assert_close(pair_loss_triton.sequence_sums(table[:, 0], offsets((2, 0, 5)), None), truth[:, 0])


def test_sums_can_be_differentiated() -> None:
    values = tokens((2, 4)).requires_grad_()
    upstream = torch.tensor([3.0, 5.0], dtype=torch.float64, device=DEVICE)
    (gradient,) = torch.autograd.grad(sequence_sums(values, offsets((2, 4)), 0.2), values, upstream)
    assert gradient.tolist() == [3.0, 3.0, 5.0, 5.0, 1.0, 1.0]


@both_methods
def test_strides_of_the_inputs_do_not_matter(method: str) -> None:
    loss, reference = PairwiseLoss((LOG_RATIOS["ipo"],), BETA), sums_of_reference(RAGGED)
    plain = pair_loss(tokens(RAGGED), offsets(RAGGED), reference, loss, method=method)
    spread = [torch.stack([x, x], -1)[..., 0] for x in (tokens(RAGGED), offsets(RAGGED), reference)]
    assert_same(vars(pair_loss(*spread, loss, method=method)), vars(plain))


def test_without_gradient_the_numbers_are_the_same() -> None:
    loss = PairwiseLoss(LISTS["weighted list"], BETA)
    with_gradient, _ = call(RAGGED, loss, "triton")
    token_logps = tokens(RAGGED).requires_grad_()
    reward = torch.tensor(0.2, dtype=torch.float64, device=DEVICE)
    with torch.no_grad():
        options: dict[str, Any] = {"mean_reward": reward, "method": "triton"}
        result = pair_loss(token_logps, offsets(RAGGED), sums_of_reference(RAGGED), loss, **options)
    assert not result.losses.requires_grad
    assert_same(vars(result), vars(with_gradient))


def test_only_losses_carry_a_gradient() -> None:
    result, _ = call(RAGGED, PairwiseLoss((LOG_RATIOS["ipo"],), BETA), "triton")
    assert [value.requires_grad for value in vars(result).values()] == [True, False, False, False]


def test_a_device_function_is_made_once_for_the_same_formulas_and_numbers() -> None:
    made = pair_loss_triton.device_function
    formula = lambda m, chosen, rejected, beta: beta * chosen  # noqa: E731
    first = made((LossTerm(formula, {"beta": 1.0}),))
    assert made((LossTerm(formula, {"beta": 1.0}),)) is first
    other = lambda m, chosen, rejected, beta: beta * rejected  # noqa: E731
    for term in (
        LossTerm(formula, {"beta": 2.0}),
        LossTerm(formula, {"beta": 1.0}, 2.0),
        LossTerm(other, {"beta": 1.0}),
    ):
        assert made((term,)) is not first


def test_auto_is_triton_on_gpus_and_torch_elsewhere() -> None:
    auto = vars(pair_loss(tokens(RAGGED), offsets(RAGGED), None, PairwiseLoss((LOG_RATIOS["ipo"],), BETA)))
    method = "triton" if DEVICE.type == "cuda" else "torch"
    loss = PairwiseLoss((LOG_RATIOS["ipo"],), BETA)
    assert_same(auto, vars(pair_loss(tokens(RAGGED), offsets(RAGGED), None, loss, method=method)))


# What is refused


def refused(message: str, **changes: Any) -> None:
    arguments = {
        "token_logps": tokens(RAGGED),
        "cu_seqlens": offsets(RAGGED),
        "ref_logps": sums_of_reference(RAGGED),
        "loss": PairwiseLoss((LOG_RATIOS["ipo"],), BETA),
    }
    with pytest.raises(ValueError, match=message):
        pair_loss(**{**arguments, **changes})


def test_tensors_that_do_not_fit_are_refused() -> None:
    refused(r"token_logps is \(38,\) torch.int64", token_logps=torch.ones(38, dtype=torch.int64))
    refused("token_logps", token_logps=tokens(RAGGED)[None])
    refused(r"ref_logps is \(4, 2\) torch.float64, expected \(5, 2\)", ref_logps=sums_of_reference(RAGGED)[1:])
    refused(r"ref_logps is \(5, 2\) torch.float32", ref_logps=sums_of_reference(RAGGED).float())
    refused("matches", matches=torch.zeros(5, 2, dtype=torch.float64))
    refused("matches", matches=torch.zeros(4, 3, dtype=torch.float64))
    refused(r"cu_seqlens is \(11,\) torch.int64", cu_seqlens=offsets(RAGGED).long())
    refused("cu_seqlens", cu_seqlens=offsets(RAGGED)[:0])
    refused("cu_seqlens bounds 9 sequences", cu_seqlens=offsets(RAGGED)[:-1])
    with pytest.raises(ValueError, match="cu_seqlens bounds 9 sequences"):
        sequence_sums(tokens(RAGGED), offsets(RAGGED)[:-1], 0.5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wrong", [[0, 1, 9], [0, 1, 1], [1, 1, 2], [0, 3, 2]], ids=str)
def test_offsets_that_do_not_fit_are_refused(method: str, wrong: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """They wrote past the end of memory."""
    monkeypatch.setenv("FASTDPO_DEBUG", "1")
    cu_seqlens = torch.tensor(wrong, dtype=torch.int32, device=DEVICE)
    token_logps, loss = torch.zeros(2, device=DEVICE), PairwiseLoss((LOG_RATIOS["ipo"],), BETA)
    with pytest.raises(ValueError, match=f"cu_seqlens goes from {wrong[0]} to {wrong[-1]} for 2 tokens, expected"):
        pair_loss(token_logps, cu_seqlens, None, loss, method=method)
    with pytest.raises(ValueError, match="cu_seqlens goes from"):
        sequence_sums(token_logps, cu_seqlens)


def test_a_mean_reward_that_is_no_tensor_is_refused() -> None:
    refused("mean_reward=0.5, expected a tensor", mean_reward=0.5)


def test_weighting_without_its_statistic_is_refused() -> None:
    loss = PairwiseLoss((LOG_RATIOS["ipo"],), BETA, weighting=True)
    refused("log_sum_sq_probs is None", loss=loss)
    refused(r"log_sum_sq_probs is \(3,\)", loss=loss, log_sum_sq_probs=torch.zeros(3))


def test_methods_that_are_unknown_or_cannot_run_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    refused("method='cuda', expected one of", method="cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="method='triton' needs a CUDA or ROCm device, not cpu"):
        arguments = tokens(RAGGED).cpu(), offsets(RAGGED).cpu(), None, PairwiseLoss((LOG_RATIOS["ipo"],), BETA)
        pair_loss(*arguments, method="triton")


@pytest.mark.parametrize("power", [1, 2, 3, 8, 9, 10, 10.0, 33, 64, -1, -2, -9])
def test_whole_powers_of_negative_numbers_are_what_torch_makes_of_them(power: float) -> None:
    def raised(m: Any, chosen: Any, rejected: Any) -> Any:
        return (0.25 * (chosen - rejected)) ** power

    loss = PairwiseLoss((LossTerm(raised),), BETA)
    (ours, gradient), (expected, slope) = (call(RAGGED, loss, method) for method in ("triton", "torch"))
    assert (expected.log_ratios[:, 0] < expected.log_ratios[:, 1]).any()
    torch.testing.assert_close(ours.losses, expected.losses, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, slope, rtol=1e-12, atol=0)


def test_a_power_beyond_64_is_refused() -> None:
    def steep(m: Any, chosen: Any, rejected: Any) -> Any:
        return (chosen - rejected) ** 65

    refused("the formula steep has a power of 65", loss=PairwiseLoss((LossTerm(steep),), BETA), method="triton")


def test_a_formula_that_is_not_made_of_m_is_refused_by_name() -> None:
    def clever(m: Any, chosen: Any, rejected: Any) -> Any:
        return chosen if chosen > rejected else rejected

    loss = PairwiseLoss((LossTerm(clever),), BETA)
    refused("the formula clever cannot be traced.*m.relu", loss=loss, method="triton")


def test_terms_that_make_no_sense_are_refused() -> None:
    for options in ({"of": "logits"}, {"per": "batch"}, {"matched": "pairs"}):
        with pytest.raises(ValueError, match="of a LossTerm, expected one of"):
            LossTerm(sigmoid, **options)
    for options in ({"per": "token"}, {"of": "logps"}, {"score": forward_kl}):
        with pytest.raises(ValueError, match="matched='sides' with"):
            LossTerm(sigmoid, matched="sides", **options)
    with pytest.raises(ValueError, match="batch_token"):
        LossTerm(sft, per="batch_token")
    with pytest.raises(ValueError, match="weighting=True with a matched term"):
        PairwiseLoss((MATCHED["aot"],), BETA, weighting=True)
