"""The declared losses through `pair_loss`: against two versions of TRL, by hand, and by properties that they must have.

Legend: P pairs, N scored tokens.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo import losses as declared
from fastdpo.losses import (
    DIVERGENCES,
    LOSSES,
    divergence_score,
    pairwise_loss,
    preference_loss,
    sees_mean_reward,
    sees_reference,
)
from fastdpo_kernels.pair_loss import PairLoss, PairwiseLoss, match_pairs, pair_loss, sequence_sums, torch_math
from fastdpo_kernels.symbolic import symbol_math

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests/golden"
TRL_0_11, TRL_1_16 = (json.loads((GOLDEN / name).read_text()) for name in ("trl_0_11_4.json", "trl_1_16_0.json"))
SMOOTHINGS = (0.0, 0.1, 0.3)
DEFAULTS: dict[str, Any] = {
    "loss_weights": None,
    "beta": 0.1,
    "label_smoothing": 0.0,
    "discopop_tau": 0.05,
    "simpo_gamma": 0.5,
    "cpo_alpha": 1.0,
    "bco_running_mean": True,
    "rpo_alpha": None,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 1.0,
    "ld_alpha": None,
    "use_weighting": False,
    "reference_free": False,
}
# Losses of a pair by itself that see only the difference of the two log-ratios.
OF_MARGINS = ("sigmoid", "hinge", "ipo", "robust", "exo_pair", "discopop", "sigmoid_norm", "simpo", "cpo")


def config_of(*losses: Any, **options: Any) -> SimpleNamespace:
    unknown = set(options) - set(DEFAULTS)
    assert not unknown, unknown
    return SimpleNamespace(**DEFAULTS | {"loss_type": list(losses)} | options)


def loss_of(*losses: Any, **options: Any) -> PairwiseLoss:
    return pairwise_loss(config_of(*losses, **options))


def offsets(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def losses_at(loss: PairwiseLoss, sums: Sequence[Sequence[float]], lengths: tuple[int, int] = (1, 1)):
    """Losses of pairs with these sums of chosen and rejected, reference 0, and d mean loss / d sum; (P,) and (P, 2)."""
    shares = torch.tensor(sums) / torch.tensor(lengths)  # each sequence's sum is spread evenly over its tokens
    token_logps = torch.cat([shares[:, :1].expand(-1, lengths[0]), shares[:, 1:].expand(-1, lengths[1])], 1).reshape(-1)
    token_logps.requires_grad_()
    cu_seqlens = offsets(lengths * len(shares))
    losses = pair_loss(token_logps, cu_seqlens, None, loss).losses
    (gradient,) = torch.autograd.grad(losses.mean(), token_logps)
    return losses.detach(), gradient[cu_seqlens[:-1].long()].view(-1, 2)


def assert_relative(got: Tensor, expected: Sequence | float | Tensor, relative: float = 1e-5) -> None:
    torch.testing.assert_close(got, torch.as_tensor(expected, dtype=got.dtype), rtol=relative, atol=0)


def assert_gradient(got: Tensor, expected: Tensor) -> None:
    """1e-5 of each entry; of the largest one, 1e-6: apo_down's are differences of larger ones, which fp32 rounded."""
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


# TRL's figures


def case_id(case: dict[str, Any]) -> str:
    cfg = case["cfg"]
    loss = cfg["loss"] if isinstance(cfg["loss"], str) else "+".join(cfg["loss"])
    more = {name: cfg[name] for name in ("ld", "wpo", "reference_free") if cfg.get(name)}
    return "-".join([loss, f"beta{cfg['beta']}", cfg["fdiv"], *map(str, more)])


def golden_0_11(case: dict[str, Any]) -> tuple[PairLoss, Tensor]:
    """Each sequence is one token with the sequence's log-prob; d mean loss / d it, (6,) in TRL's order."""
    cfg = case["cfg"]
    policy, reference = (torch.tensor(case[name]).view(2, -1).T for name in ("policy_logps", "ref_logps"))
    token_logps = policy.reshape(-1).clone().requires_grad_()
    loss = loss_of(
        cfg["loss"],
        beta=cfg["beta"],
        label_smoothing=cfg["ls"],
        f_divergence_type=cfg["fdiv"],
        f_alpha_divergence_coef=cfg["alpha"],
        reference_free=cfg["reference_free"],
    )
    first_mean = (cfg["beta"] * (policy - reference)).double().mean()
    ref_logps = None if cfg["reference_free"] else reference.double()
    result = pair_loss(token_logps, offsets([1] * 6), ref_logps, loss, mean_reward=first_mean)
    (gradient,) = torch.autograd.grad(result.losses.mean(), token_logps)
    return result, gradient.view(-1, 2).T.reshape(-1)


@pytest.mark.parametrize("case", TRL_0_11["cases"], ids=case_id)
def test_losses_gradients_and_rewards_are_those_of_trl_0_11(case: dict[str, Any]) -> None:
    result, gradient = golden_0_11(case)
    losses, expected = result.losses.detach(), torch.tensor(case["losses"])
    if case["cfg"]["loss"].startswith("aot"):  # TRL's are in the order of ranks
        losses, expected = losses.sort().values, expected.sort().values
    assert_relative(losses, expected)
    assert_gradient(gradient, torch.tensor(case["grad_logps"]))
    rewards = [case["chosen_rewards"], case["rejected_rewards"]]
    if case["cfg"]["reference_free"]:  # TRL's rewards still see the reference
        rewards = case["cfg"]["beta"] * torch.tensor(case["policy_logps"]).view(2, -1)
    assert_relative(result.rewards.T, rewards)


def golden_rows(data: Any) -> list[Tensor]:
    """Scored tokens of chosen_0, rejected_0, chosen_1, ... of a table in TRL's layout."""
    table = torch.tensor(data)
    scored = torch.tensor(TRL_1_16["completion_mask"])[:, 1:].bool()
    pairs = len(table) // 2
    return [table[row][scored[row]] for pair in range(pairs) for row in (pair, pairs + pair)]


def golden_1_16(loss: PairwiseLoss) -> tuple[PairLoss, Tensor]:
    policy, reference = golden_rows(TRL_1_16["policy_token_logps"]), golden_rows(TRL_1_16["ref_token_logps"])
    token_logps, cu_seqlens = torch.cat(policy).requires_grad_(), offsets([len(row) for row in policy])
    ref_logps = sequence_sums(torch.cat(reference), cu_seqlens, loss.ld_alpha).view(-1, 2)
    sum_sq = torch.cat(golden_rows(TRL_1_16["log_sum_sq_probs"]))
    result = pair_loss(token_logps, cu_seqlens, ref_logps, loss, log_sum_sq_probs=sum_sq)
    (gradient,) = torch.autograd.grad(result.losses.mean(), token_logps)
    return result, gradient


@pytest.mark.parametrize("case", TRL_1_16["cases"], ids=case_id)
def test_mean_loss_token_gradients_and_metrics_are_those_of_trl_1_16(case: dict[str, Any]) -> None:
    cfg, metrics = case["cfg"], case["metrics"]
    loss = loss_of(
        *cfg["loss"],
        loss_weights=cfg["weights"],
        beta=cfg["beta"],
        label_smoothing=cfg["ls"],
        f_divergence_type=cfg["fdiv"],
        f_alpha_divergence_coef=1 - cfg["falpha"],
        ld_alpha=cfg["ld"],
        use_weighting=cfg["wpo"],
        discopop_tau=cfg["tau"],
    )
    result, gradient = golden_1_16(loss)
    assert_relative(result.losses.detach().mean(), case["loss"])
    assert_gradient(gradient, torch.cat(golden_rows(case["grad_logps"])))
    chosen, rejected = result.rewards.unbind(1)
    assert_relative(result.rewards.mean(0), [metrics["rewards/chosen"], metrics["rewards/rejected"]])
    assert_relative((chosen - rejected).mean(), metrics["rewards/margins"])
    assert (chosen > rejected).float().mean() == metrics["rewards/accuracies"]
    assert_relative(result.logps.mean(0), [metrics["logps/chosen"], metrics["logps/rejected"]])


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_label_smoothing_is_the_mixture_that_trl_s_sigmoid_and_robust_figures_imply(beta: float) -> None:
    """TRL 0.11 smooths sigmoid, 1.16 ignores the option; tests/golden/README.md says how the figures give it."""
    plainest = {"beta": beta, "fdiv": "reverse_kl", "ld": None, "wpo": False}
    chosen = [case for case in TRL_1_16["cases"] if plainest.items() <= case["cfg"].items()]
    cases = {case["cfg"]["loss"][0]: case for case in chosen if len(case["cfg"]["loss"]) == 1}
    smoothing = cases["robust"]["cfg"]["ls"]
    assert smoothing > 0 and cases["sigmoid"]["cfg"]["ls"] == 0
    plain, robust = 2 * (1 - smoothing), -(1 - 2 * smoothing)
    result, gradient = golden_1_16(loss_of("sigmoid", beta=beta, label_smoothing=smoothing))
    expected = plain * cases["sigmoid"]["loss"] + robust * cases["robust"]["loss"]
    assert_relative(result.losses.detach().mean(), expected)
    rows = [torch.cat(golden_rows(cases[name]["grad_logps"])) for name in ("sigmoid", "robust")]
    assert_relative(gradient, plain * rows[0] + robust * rows[1])


# By hand

BY_HAND = ("simpo", "orpo", "cpo")


def test_every_declared_loss_has_figures_of_trl_or_a_test_by_hand() -> None:
    """Whoever adds a formula adds its figures."""
    figures = {case["cfg"]["loss"] for case in TRL_0_11["cases"]}
    figures |= {name for case in TRL_1_16["cases"] for name in case["cfg"]["loss"]}
    assert figures | set(BY_HAND) == set(LOSSES)
    assert {case["cfg"]["fdiv"] for case in TRL_1_16["cases"]} == set(DIVERGENCES)


@dataclass(frozen=True)
class Hand:
    """Two pairs of the policy's token log-probs, for arithmetic in plain Python."""

    chosen: tuple[tuple[float, ...], ...] = ((-0.5, -1.5, -0.25), (-2.0,))
    rejected: tuple[tuple[float, ...], ...] = ((-1.0, -0.125), (-0.75, -3.0, -0.5, -1.25))

    def sums(self) -> list[tuple[float, float]]:
        return [(sum(c), sum(r)) for c, r in zip(self.chosen, self.rejected, strict=True)]

    def means(self) -> list[tuple[float, float]]:
        return [(sum(c) / len(c), sum(r) / len(r)) for c, r in zip(self.chosen, self.rejected, strict=True)]

    def cross_entropy(self) -> float:
        """Over the four tokens of the chosen responses."""
        return -sum(map(sum, self.chosen)) / 4

    def losses(self, loss: PairwiseLoss, ref_logps: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rows = [row for pair in zip(self.chosen, self.rejected, strict=True) for row in pair]
        token_logps = torch.tensor([x for row in rows for x in row], dtype=torch.float64, requires_grad=True)
        losses = pair_loss(token_logps, offsets([len(row) for row in rows]), ref_logps, loss).losses
        (gradient,) = torch.autograd.grad(losses.mean(), token_logps)
        return losses.detach(), gradient


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_simpo_is_a_logistic_loss_of_mean_log_probs_with_a_margin(smoothing: float) -> None:
    hand = Hand()
    loss = loss_of("simpo", beta=2.0, simpo_gamma=0.7, label_smoothing=smoothing)
    losses, gradient = hand.losses(loss, ref_logps=torch.full((2, 2), -7.0, dtype=torch.float64))  # never looked at
    margins = [2.0 * (chosen - rejected) - 0.7 for chosen, rejected in hand.means()]
    expected = [-(1 - smoothing) * log_sigmoid(m) - smoothing * log_sigmoid(-m) for m in margins]
    assert_relative(losses, expected, 1e-12)
    slope = -(1 - smoothing) / (1 + math.exp(margins[0])) + smoothing / (1 + math.exp(-margins[0]))
    assert_relative(gradient[:5], [slope * 2.0 / 3 / 2] * 3 + [-slope * 2.0 / 2 / 2] * 2, 1e-12)


def test_orpo_is_the_cross_entropy_and_the_log_odds_ratio_of_mean_probabilities() -> None:
    hand = Hand()
    losses, _ = hand.losses(loss_of("orpo", beta=0.3))
    expected = []
    for chosen, rejected in hand.means():
        odds = [math.exp(mean) / (1 - math.exp(mean)) for mean in (chosen, rejected)]
        expected.append(-0.3 * log_sigmoid(math.log(odds[0] / odds[1])))
    assert_relative(losses.mean(), sum(expected) / 2 + hand.cross_entropy(), 1e-12)
    alone = hand.losses(loss_of("sft"))[0]
    assert_relative(losses - alone, expected, 1e-12)


@pytest.mark.parametrize("sure", [0.0, -1e-9], ids=["probability 1", "nearly 1"])
def test_orpo_of_a_response_that_the_policy_is_sure_of_is_finite_and_still_pushes(sure: float) -> None:
    losses, gradient = losses_at(loss_of("orpo"), [[-1.0, sure]])
    assert losses.isfinite().all() and gradient.isfinite().all() and gradient[0, 1] > 0


@pytest.mark.parametrize(("alpha", "smoothing"), [(1.0, 0.0), (0.25, 0.1), (0.0, 0.0)])
def test_cpo_is_dpo_without_a_reference_and_the_weighted_cross_entropy(alpha: float, smoothing: float) -> None:
    hand = Hand()
    losses, _ = hand.losses(loss_of("cpo", beta=0.4, cpo_alpha=alpha, label_smoothing=smoothing))
    margins = [0.4 * (chosen - rejected) for chosen, rejected in hand.sums()]
    expected = [-(1 - smoothing) * log_sigmoid(m) - smoothing * log_sigmoid(-m) for m in margins]
    assert_relative(losses.mean(), sum(expected) / 2 + alpha * hand.cross_entropy(), 1e-12)


def test_rpo_alpha_is_sft_added_with_that_weight() -> None:
    hand = Hand()
    losses, gradient = hand.losses(loss_of("sigmoid", "hinge", loss_weights=[2.0, 0.5], rpo_alpha=0.3))
    listed, listed_gradient = hand.losses(loss_of("sigmoid", "hinge", "sft", loss_weights=[2.0, 0.5, 0.3]))
    assert torch.equal(losses, listed) and torch.equal(gradient, listed_gradient)


def test_exo_pair_takes_a_smoothing_of_0_for_a_thousandth_and_any_other_as_it_is() -> None:
    pairs = [[0.7, -1.2], [-3.0, 0.4]]
    losses = {e: losses_at(loss_of("exo_pair", label_smoothing=e), pairs)[0] for e in (0.0, 1e-3, 1e-4)}
    assert torch.equal(losses[0.0], losses[1e-3]) and not torch.equal(losses[0.0], losses[1e-4])


def test_bco_pair_compares_rewards_with_the_mean_that_it_is_given() -> None:
    token_logps, cu_seqlens = torch.tensor([2.0, -3.0], dtype=torch.float64), offsets([1, 1])
    loss = loss_of("bco_pair", beta=0.5)
    assert sees_mean_reward(loss) and not sees_mean_reward(loss_of(*(set(LOSSES) - {"bco_pair"})))
    mean = torch.tensor(0.3, dtype=torch.float64)
    got = pair_loss(token_logps, cu_seqlens, None, loss, mean_reward=mean).losses
    assert_relative(got, [-log_sigmoid(1.0 - 0.3) - log_sigmoid(-(-1.5 - 0.3))], 1e-12)
    without = pair_loss(token_logps, cu_seqlens, None, loss).losses
    assert_relative(without, [-log_sigmoid(1.0) - log_sigmoid(1.5)], 1e-12)


@pytest.mark.parametrize("name", ["aot", "aot_pair"])
def test_matches_of_a_whole_batch_give_its_gradient_piece_by_piece(name: str) -> None:
    generator = torch.Generator().manual_seed(8)
    token_logps = torch.randn(12, generator=generator, dtype=torch.float64, requires_grad=True)
    ref_logps = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    loss, cu_seqlens = loss_of(name, beta=0.7, label_smoothing=0.1), offsets([1] * 12)
    whole = pair_loss(token_logps, cu_seqlens, ref_logps, loss).losses
    (expected,) = torch.autograd.grad(whole.mean(), token_logps)
    matches = match_pairs(token_logps.view(-1, 2), ref_logps)
    pieces = [slice(0, 4), slice(4, 6)]
    parts = [
        pair_loss(
            token_logps[2 * part.start : 2 * part.stop],
            offsets([1] * 2 * (part.stop - part.start)),
            ref_logps[part],
            loss,
            matches=matches[part],
        ).losses
        for part in pieces
    ]
    (gradient,) = torch.autograd.grad(torch.cat(parts).sum() / 6, token_logps)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)


# f-divergences

DIVERGENCE_CASES = [
    ("forward_kl", 1.0),
    ("js_divergence", 1.0),
    ("alpha_divergence", 1.0),
    ("alpha_divergence", 0.5),
    ("alpha_divergence", -0.5),
]
OF_DIVERGENCES = tuple(name for name, loss in LOSSES.items() if loss.divergence)


def test_f_divergences_apply_to_the_losses_of_the_log_ratio_difference_and_are_refused_elsewhere() -> None:
    assert OF_DIVERGENCES == ("sigmoid", "hinge", "ipo", "robust", "exo_pair", "discopop", "sigmoid_norm")
    for name in set(LOSSES) - set(OF_DIVERGENCES) - {"sft"}:
        with pytest.raises(ValueError, match=f"'js_divergence' does not apply to {LOSSES[name].name}: leave it out"):
            loss_of(name, "sigmoid", f_divergence_type="js_divergence")
    terms = loss_of("sigmoid", "sft", f_divergence_type="js_divergence", rpo_alpha=1.0).terms
    assert [term.score is None for term in terms] == [False, True, True]


@pytest.mark.parametrize(("kind", "alpha"), DIVERGENCE_CASES)
def test_a_score_is_the_derivative_of_its_divergence_s_f_at_the_probability_ratio(kind: str, alpha: float) -> None:
    """f of f-DPO (arXiv:2309.16240), up to a constant slope, which no difference of scores sees."""
    forward = lambda u: u - u.log()  # noqa: E731
    generators = {
        "forward_kl": forward,
        "js_divergence": lambda u: u * u.log() - (u + 1) * ((u + 1) / 2).log(),
        "alpha_divergence": forward if alpha == 1 else lambda u: (u - u ** (1 - alpha) / (1 - alpha)) / alpha,
    }
    score = divergence_score(config_of(f_divergence_type=kind, f_alpha_divergence_coef=alpha))
    log_ratios = torch.tensor([-3.0, -1.2, 0.0, 0.4, 2.0], dtype=torch.float64)
    ratios = log_ratios.exp().requires_grad_()
    (slopes,) = torch.autograd.grad(generators[kind](ratios).sum(), ratios)
    assert score is not None
    torch.testing.assert_close(score(torch_math, log_ratios), slopes, rtol=1e-12, atol=1e-12)


def test_alpha_divergence_is_forward_kl_at_1_and_reverse_kl_towards_0() -> None:
    pairs = [[0.7, -1.2], [-3.0, 0.4]]
    plain = losses_at(loss_of("sigmoid"), pairs)[0]
    forward = losses_at(loss_of("sigmoid", f_divergence_type="forward_kl"), pairs)[0]
    for alpha, expected in ((1.0, forward), (0.0, plain), (1e-7, plain), (1e-5, plain)):
        options = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": alpha}
        assert_relative(losses_at(loss_of("sigmoid", **options), pairs)[0], expected, 1e-5)


# Properties


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_stay_finite_at_log_ratios_of_800(name: str, beta: float, smoothing: float) -> None:
    corners = [[800.0, -800.0], [-800.0, 800.0], [800.0, 800.0], [-800.0, -800.0], [0.0, 0.0]]
    for pair in corners:  # one by one, as matched losses would pair them anew
        losses, gradient = losses_at(loss_of(name, beta=beta, label_smoothing=smoothing), [pair])
        assert losses.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("name", OF_DIVERGENCES)
@pytest.mark.parametrize(("kind", "alpha"), DIVERGENCE_CASES)
def test_with_a_divergence_they_stay_finite_too(name: str, kind: str, alpha: float) -> None:
    corners = [[800.0, -800.0], [-800.0, 800.0], [800.0, 800.0], [-800.0, -800.0], [0.0, 0.0]]
    for beta in (0.01, 0.1, 1.0):
        loss = loss_of(name, beta=beta, f_divergence_type=kind, f_alpha_divergence_coef=alpha)
        losses, gradient = losses_at(loss, corners)
        assert losses.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("apo_zero", "apo_down", "exo_pair", "sft")])
def test_rejected_far_more_likely_than_chosen_is_pushed_apart(name: str) -> None:
    """Not the losses that level off there, and not the one that looks at one side."""
    losses, gradient = losses_at(loss_of(name), [[-800.0, 800.0]] if sees_reference(loss_of(name)) else [[-800.0, 0.0]])
    assert losses[0] > 0 and gradient[0, 0] < 0 < gradient[0, 1]


def test_sigmoid_is_linear_far_out_and_not_clamped() -> None:
    """At a margin of -1600 the loss is 1600, its slope the full beta; a clamped log-sigmoid has neither."""
    losses, gradient = losses_at(loss_of("sigmoid", beta=1.0), [[-800.0, 800.0]])
    assert_relative(losses, [1600.0])
    assert_relative(gradient, [[-1.0, 1.0]])


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_swapping_a_pair_is_smoothing_by_the_complement(smoothing: float) -> None:
    pairs = [[0.7, -1.2], [-3.0, 0.4], [20.0, 5.0], [0.0, 0.0]]
    swapped = [[rejected, chosen] for chosen, rejected in pairs]
    losses, gradient = losses_at(loss_of("sigmoid", beta=0.4, label_smoothing=smoothing), pairs)
    again, again_gradient = losses_at(loss_of("sigmoid", beta=0.4, label_smoothing=1 - smoothing), swapped)
    torch.testing.assert_close(again, losses)
    torch.testing.assert_close(again_gradient, gradient.flip(1))


@pytest.mark.parametrize("name", LOSSES)
def test_only_losses_of_margins_see_nothing_but_the_difference(name: str) -> None:
    loss = loss_of(name, beta=0.3, label_smoothing=0.1, cpo_alpha=0.0)
    pairs = torch.tensor([[-4.5, -6.0]])
    losses, gradient = losses_at(loss, pairs.tolist())
    shifted, _ = losses_at(loss, (pairs + 3).tolist())
    of_margins = name in (*OF_MARGINS, "aot", "aot_pair", "aot_unpaired")
    assert torch.allclose(shifted, losses) == of_margins
    assert torch.allclose(gradient[:, 0], -gradient[:, 1]) == of_margins


@pytest.mark.parametrize("weighting", [False, True])
@pytest.mark.parametrize("ld_alpha", [None, 0.3])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_pass_gradcheck_in_double_precision(name: str, ld_alpha: float | None, weighting: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    lengths = [3, 1, 2, 4, 1, 1, 5, 2]
    draw = lambda *shape: -3 * torch.rand(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    token_logps, ref_logps, sum_sq = draw(sum(lengths)), draw(4, 2), draw(sum(lengths))
    if weighting and LOSSES[name].matched:
        with pytest.raises(ValueError, match=f"use_weighting=True does not go with {LOSSES[name].name}"):
            loss_of(name, use_weighting=True)
        return
    loss = loss_of(name, beta=0.35, label_smoothing=0.1, ld_alpha=ld_alpha, use_weighting=weighting)
    distances = 1 - 0.35 * pair_loss(token_logps, offsets(lengths), ref_logps, loss_of("hinge")).log_ratios.diff(dim=1)
    assert distances.abs().min() > 1e-3, "a finite difference across the hinge's corner means nothing"
    weights = sequence_sums(token_logps - sum_sq, offsets(lengths)).view(-1, 2)
    weights = (weights / torch.tensor(lengths).view(-1, 2)).sum(1).exp() if weighting else torch.ones(4)

    def total(tokens: Tensor) -> Tensor:  # WPO's weights are constants for the gradient
        result = pair_loss(tokens, offsets(lengths), ref_logps, loss, log_sum_sq_probs=sum_sq)
        with torch.no_grad():
            now = sequence_sums(tokens - sum_sq, offsets(lengths)).view(-1, 2) / torch.tensor(lengths).view(-1, 2)
            factor = weights / now.sum(1).exp() if weighting else weights
        return (result.losses * factor).mean()

    assert torch.autograd.gradcheck(total, token_logps.requires_grad_())


def test_at_the_reference_margins_are_exactly_zero_and_sigmoid_is_ln_2() -> None:
    token_logps = -5 * torch.rand(400, generator=torch.Generator().manual_seed(6))
    cu_seqlens = offsets([37, 63, 1, 99, 150, 50])
    for ld_alpha in (None, 0.5):
        reference = sequence_sums(token_logps, cu_seqlens, ld_alpha).view(-1, 2)
        for smoothing in SMOOTHINGS:
            loss = loss_of("sigmoid", label_smoothing=smoothing, ld_alpha=ld_alpha)
            result = pair_loss(token_logps, cu_seqlens, reference, loss)
            assert (result.log_ratios == 0).all() and (result.rewards == 0).all()
            assert (result.losses - math.log(2)).abs().max() <= 1e-6


def test_a_weighted_list_is_the_weighted_sum_of_its_losses() -> None:
    pairs = [[-0.7, -1.2], [-3.0, -0.4], [-2.0, -5.0]]
    options = {"beta": 0.2, "label_smoothing": 0.15}
    names, weights = list(LOSSES), [0.1 * (place + 1) for place in range(len(LOSSES))]
    losses, gradient = losses_at(loss_of(*names, loss_weights=weights, **options), pairs, (2, 3))
    single = [losses_at(loss_of(name, **options), pairs, (2, 3)) for name in names]
    torch.testing.assert_close(losses, sum(w * one[0] for w, one in zip(weights, single, strict=True)))
    torch.testing.assert_close(gradient, sum(w * one[1] for w, one in zip(weights, single, strict=True)))


def test_without_weights_each_loss_counts_once_and_too_few_are_refused() -> None:
    assert [term.weight for term in loss_of("sigmoid", "ipo").terms] == [1.0, 1.0]
    with pytest.raises(ValueError):
        loss_of("sigmoid", "ipo", loss_weights=[1.0])


def test_a_loss_reads_its_own_hyper_parameters_from_the_config() -> None:
    options = {"beta": 0.2, "label_smoothing": 0.15, "discopop_tau": 0.3, "cpo_alpha": 0.6}
    taken = {name: [dict(term.hyper) for term in loss_of(name, **options).terms] for name in LOSSES}
    assert taken["sigmoid"] == [{"beta": 0.2, "label_smoothing": 0.15}] and taken["hinge"] == [{"beta": 0.2}]
    assert taken["discopop"] == [{"beta": 0.2, "discopop_tau": 0.3}] and taken["bco_pair"] == [{"beta": 0.2}]
    assert [term.weight for term in loss_of("cpo", **options).terms] == [1.0, 0.6]


def test_only_some_losses_see_the_reference() -> None:
    assert {name for name in LOSSES if not sees_reference(loss_of(name))} == {"sft", "simpo", "orpo", "cpo"}
    assert sees_reference(loss_of("simpo", "sigmoid"))


@pytest.mark.parametrize("name", ["ipo", "sigmoid_norm"])
def test_length_normalised_losses_divide_each_side_by_its_own_scored_tokens(name: str) -> None:
    sums, gradient = losses_at(loss_of(name, beta=0.25), [[6.0, -4.0]], lengths=(3, 8))
    means, mean_gradient = losses_at(loss_of(name, beta=0.25), [[6.0 / 3, -4.0 / 8]])
    torch.testing.assert_close(sums, means)
    torch.testing.assert_close(gradient, mean_gradient / torch.tensor([3, 8]))


def test_ipo_by_hand() -> None:
    """beta 0.25 aims at a difference of 2 between log-ratios a token."""
    losses, gradient = losses_at(loss_of("ipo", beta=0.25), [[6.0, -4.0]], lengths=(3, 8))
    difference = 6 / 3 - (-4 / 8) - 2
    assert_relative(losses, [difference**2])
    assert_relative(gradient, [[2 * difference / 3, -2 * difference / 8]])


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.per == "sequence" and name != "cpo"])
def test_losses_of_sums_do_not_see_lengths(name: str) -> None:
    loss = loss_of(name, beta=0.3)
    short, gradient = losses_at(loss, [[0.5, -1.0]])
    long, long_gradient = losses_at(loss, [[0.5, -1.0]], lengths=(4, 16))
    torch.testing.assert_close(long, short)
    torch.testing.assert_close(long_gradient, gradient)


@pytest.mark.parametrize("lengths", [[2, 0, 3, 1], [0, 4, 0, 2], [3, 2, 0, 0], [0, 0, 0, 0]], ids=str)
def test_a_sequence_without_tokens_sums_to_zero_and_disturbs_no_gradient(lengths: list[int]) -> None:
    values = torch.arange(1.0, sum(lengths) + 1, requires_grad=True)
    sums = sequence_sums(values, offsets(lengths))
    assert sums.tolist() == [float(part.sum()) for part in values.detach().split(lengths)]
    upstream = torch.tensor([2.0, 3.0, 5.0, 7.0])
    (gradient,) = torch.autograd.grad(sums, values, upstream)
    assert gradient.tolist() == upstream.repeat_interleave(torch.tensor(lengths)).tolist()


@pytest.mark.parametrize("name", LOSSES)
def test_a_pair_without_scored_tokens_has_a_finite_loss_and_a_gradient(name: str) -> None:
    token_logps = torch.tensor([-1.0, -2.0], requires_grad=True)
    result = pair_loss(token_logps, offsets([0, 0, 1, 1]), None, loss_of(name))
    (gradient,) = torch.autograd.grad(result.losses.sum(), token_logps)
    assert result.losses.isfinite().all() and gradient.isfinite().all()
    assert (result.log_ratios[0] == 0).all()


def test_sums_are_the_same_to_the_last_bit_whatever_stands_beside_them() -> None:
    """Policy and reference meet a sequence in different batches; its sum must not depend on its neighbours."""
    parts = torch.rand(300, generator=torch.Generator().manual_seed(7)).split([120, 1, 80, 99])
    together = sequence_sums(torch.cat(parts), offsets([len(part) for part in parts]))
    alone = torch.cat([sequence_sums(part, offsets([len(part)])) for part in parts])
    assert torch.equal(together, alone)


# A loss of the user's own


def with_margin(m: Any, chosen: Any, rejected: Any, beta: Any, margin: float = 1.0) -> Any:
    return -m.log_sigmoid(beta * (chosen - rejected) - margin)


def test_a_function_works_like_a_declared_loss() -> None:
    pairs = [[0.7, -1.2], [-3.0, 0.4]]
    loss = loss_of(with_margin, "sft", loss_weights=[2.0, 0.1], beta=0.4)
    assert [dict(term.hyper) for term in loss.terms] == [{"beta": 0.4, "margin": 1.0}, {}] and sees_reference(loss)
    losses, _ = losses_at(loss, pairs)
    sft = losses_at(loss_of("sft"), pairs)[0]
    expected = [-2 * log_sigmoid(0.4 * (chosen - rejected) - 1) for chosen, rejected in pairs]
    assert_relative(losses - 0.1 * sft, expected, 1e-5)


def test_a_declared_function_is_known_by_its_name_and_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(declared, "LOSSES", dict(LOSSES))

    @preference_loss(of="logps", per="token")
    def mean_margin(m: Any, chosen: Any, rejected: Any, margin: float = 0.5) -> Any:
        return m.relu(margin - (chosen - rejected))

    for given in ("mean_margin", mean_margin):
        (term,) = loss_of(given).terms
        assert (term.of, term.per, dict(term.hyper)) == ("logps", "token", {"margin": 0.5})


@pytest.mark.parametrize(
    ("formula", "message"),
    [
        (lambda m, chosen, rejected, strength: strength * chosen, "takes strength, which is no number of DPOConfig"),
        (lambda m, chosen: chosen, "a formula takes m, chosen, rejected"),
        (lambda m, chosen, rejected, **hyper: chosen, "each hyper-parameter by name"),
        (lambda m, chosen, rejected: torch.relu(chosen), "cannot be traced"),
        (lambda m, chosen, rejected: chosen if chosen > rejected else rejected, "cannot be traced"),
        (lambda m, chosen, rejected: m.gelu(chosen), "cannot be traced"),
        (lambda m, chosen, rejected: m.exp(0.0), "is the same whatever the model says"),
    ],
    ids=["no default", "two arguments", "any hyper-parameter", "torch", "if", "unknown function", "constant"],
)
def test_a_function_that_is_no_formula_is_refused_with_a_line_that_says_why(formula: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        loss_of(formula)
    assert "\n" not in str(caught.value)


# docs/losses.md


def test_the_tables_in_the_docs_are_those_of_the_declarations() -> None:
    """`python -m fastdpo.losses` prints what belongs between the marks."""
    page = (ROOT / "docs/losses.md").read_text()
    (generated,) = re.findall(r"<!-- begin generated: python -m fastdpo.losses -->\n(.*)<!-- end gen", page, re.DOTALL)
    assert generated == declared.tables()


def test_the_docs_name_every_function_that_a_formula_has() -> None:
    (sentence,) = re.findall(r"functions of `m`: (.*?)\n\n", (ROOT / "docs/losses.md").read_text(), re.DOTALL)
    listed = re.sub(r"\(.*?\)+", "", sentence.split(". It is called")[0])
    assert set(re.findall(r"`(\w+)`", listed)) == set(vars(symbol_math))
