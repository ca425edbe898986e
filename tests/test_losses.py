"""The declared losses through `pair_loss`: against two versions of TRL, and by properties that the formulas must have.

Legend: P pairs, N scored tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo.losses import LOSSES, loss_terms
from fastdpo_kernels.pair_loss import LossTerm, PairLoss, pair_loss, sequence_sums

GOLDEN = Path(__file__).parent / "golden"
TRL_0_11, TRL_1_16 = (json.loads((GOLDEN / name).read_text()) for name in ("trl_0_11_4.json", "trl_1_16_0.json"))
SMOOTHINGS = (0.0, 0.1, 0.3)


def case_id(case: dict[str, Any]) -> str:
    return f"{case['loss']}-beta{case['beta']}"


def terms_of(*names: str, weights: Any = None, **hyper: float) -> tuple[LossTerm, ...]:
    config = SimpleNamespace(**{"beta": 0.1, "label_smoothing": 0.0, **hyper})
    return loss_terms(names, weights, config)


def offsets(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def losses_at(terms: tuple[LossTerm, ...], log_ratios: Sequence[Sequence[float]], lengths: tuple[int, int] = (1, 1)):
    """Losses of pairs with these log-ratios of chosen and rejected, and d mean loss / d log-ratio; (P,) and (P, 2)."""
    ratios = torch.tensor(log_ratios)
    shares = ratios / torch.tensor(lengths)  # each sequence's log-ratio is spread evenly over its tokens
    token_logps = torch.cat([shares[:, :1].expand(-1, lengths[0]), shares[:, 1:].expand(-1, lengths[1])], 1).reshape(-1)
    token_logps.requires_grad_()
    result = pair_loss(token_logps, offsets(lengths * len(ratios)), torch.zeros_like(ratios), terms)
    (gradient,) = torch.autograd.grad(result.losses.mean(), token_logps)
    first_tokens = offsets(lengths * len(ratios))[:-1].long()
    return result.losses.detach(), gradient[first_tokens].view(-1, 2)


def assert_relative(got: Tensor, expected: Sequence | float | Tensor, relative: float = 1e-5) -> None:
    torch.testing.assert_close(got, torch.as_tensor(expected, dtype=got.dtype), rtol=relative, atol=0)


def golden_0_11(case: dict[str, Any]) -> tuple[PairLoss, Tensor]:
    """Each sequence is one token with the sequence's log-prob; d mean loss / d it, (6,) in TRL's order."""
    policy, reference = (torch.tensor(case[name]).view(2, -1).T for name in ("policy_logps", "ref_logps"))
    token_logps = policy.reshape(-1).clone().requires_grad_()
    terms = terms_of(case["loss"], beta=case["beta"], label_smoothing=case["label_smoothing"])
    result = pair_loss(token_logps, offsets([1] * 6), reference, terms)
    (gradient,) = torch.autograd.grad(result.losses.mean(), token_logps)
    return result, gradient.view(-1, 2).T.reshape(-1)


@pytest.mark.parametrize("case", TRL_0_11["cases"], ids=case_id)
def test_losses_gradients_and_rewards_are_those_of_trl_0_11(case: dict[str, Any]) -> None:
    result, gradient = golden_0_11(case)
    assert_relative(result.losses.detach(), case["losses"])
    assert_relative(gradient, case["grad_logps"])
    assert_relative(case["beta"] * result.log_ratios.T, [case["chosen_rewards"], case["rejected_rewards"]])


def golden_rows(name: str, data: Any = None) -> list[Tensor]:
    """Scored tokens of chosen_0, rejected_0, chosen_1, ... of a table in TRL's layout."""
    table = torch.tensor(TRL_1_16[name] if data is None else data)
    scored = torch.tensor(TRL_1_16["completion_mask"])[:, 1:].bool()
    pairs = len(table) // 2
    return [table[row][scored[row]] for pair in range(pairs) for row in (pair, pairs + pair)]


def golden_1_16(loss: str, **hyper: float) -> tuple[PairLoss, Tensor]:
    policy, reference = golden_rows("policy_token_logps"), golden_rows("ref_token_logps")
    token_logps = torch.cat(policy).requires_grad_()
    ref_logps = torch.stack([row.sum() for row in reference]).view(-1, 2)
    result = pair_loss(token_logps, offsets([len(row) for row in policy]), ref_logps, terms_of(loss, **hyper))
    (gradient,) = torch.autograd.grad(result.losses.mean(), token_logps)
    return result, gradient


@pytest.mark.parametrize("case", [case for case in TRL_1_16["cases"] if case["loss"] in LOSSES], ids=case_id)
def test_mean_loss_token_gradients_and_metrics_are_those_of_trl_1_16(case: dict[str, Any]) -> None:
    result, gradient = golden_1_16(case["loss"], beta=case["beta"])
    assert_relative(result.losses.detach().mean(), case["mean_loss"])
    assert_relative(gradient, torch.cat(golden_rows("", case["grad_logps"])))
    rewards, metrics = case["beta"] * result.log_ratios, case["metrics"]
    assert_relative(rewards.mean(0), [metrics["rewards/chosen"], metrics["rewards/rejected"]])
    assert_relative((rewards[:, 0] - rewards[:, 1]).mean(), metrics["rewards/margins"])
    assert_relative(result.logps.mean(0), [metrics["logps/chosen"], metrics["logps/rejected"]])


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_label_smoothing_is_the_mixture_that_trl_s_sigmoid_and_robust_figures_imply(beta: float) -> None:
    """TRL 0.11 smooths sigmoid, 1.16 ignores the option; tests/golden/README.md says how the figures give it."""
    cases = {case["loss"]: case for case in TRL_1_16["cases"] if case["beta"] == beta}
    smoothing = cases["robust"]["label_smoothing"]
    assert smoothing > 0 and cases["sigmoid"]["label_smoothing"] == 0
    plain, robust = 2 * (1 - smoothing), -(1 - 2 * smoothing)
    result, gradient = golden_1_16("sigmoid", beta=beta, label_smoothing=smoothing)
    expected = plain * cases["sigmoid"]["mean_loss"] + robust * cases["robust"]["mean_loss"]
    assert_relative(result.losses.detach().mean(), expected)
    rows = [torch.cat(golden_rows("", cases[name]["grad_logps"])) for name in ("sigmoid", "robust")]
    assert_relative(gradient, plain * rows[0] + robust * rows[1])


def test_every_declared_loss_has_figures_of_both_versions() -> None:
    """Whoever adds a formula adds its figures."""
    for golden in (TRL_0_11, TRL_1_16):
        assert {case["loss"] for case in golden["cases"]} >= set(LOSSES)


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_stay_finite_at_log_ratios_of_800(name: str, beta: float, smoothing: float) -> None:
    corners = [[800.0, -800.0], [-800.0, 800.0], [800.0, 800.0], [-800.0, -800.0], [0.0, 0.0]]
    losses, gradient = losses_at(terms_of(name, beta=beta, label_smoothing=smoothing), corners)
    assert losses.isfinite().all() and gradient.isfinite().all()
    assert (losses >= 0).all()
    wrong_order = gradient[1]  # rejected far more likely than chosen: every loss must push them apart
    assert wrong_order[0] < 0 < wrong_order[1]


def test_sigmoid_is_linear_far_out_and_not_clamped() -> None:
    """At a margin of -1600 the loss is 1600, its slope the full beta; a clamped log-sigmoid has neither."""
    losses, gradient = losses_at(terms_of("sigmoid", beta=1.0), [[-800.0, 800.0]])
    assert_relative(losses, [1600.0])
    assert_relative(gradient, [[-1.0, 1.0]])


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_swapping_a_pair_is_smoothing_by_the_complement(smoothing: float) -> None:
    pairs = [[0.7, -1.2], [-3.0, 0.4], [20.0, 5.0], [0.0, 0.0]]
    swapped = [[rejected, chosen] for chosen, rejected in pairs]
    losses, gradient = losses_at(terms_of("sigmoid", beta=0.4, label_smoothing=smoothing), pairs)
    again, again_gradient = losses_at(terms_of("sigmoid", beta=0.4, label_smoothing=1 - smoothing), swapped)
    torch.testing.assert_close(again, losses)
    torch.testing.assert_close(again_gradient, gradient.flip(1))


@pytest.mark.parametrize("name", LOSSES)
def test_only_the_difference_of_the_log_ratios_counts(name: str) -> None:
    """Holds for the losses of this version; a loss that sees each side by itself does not belong in this list."""
    terms = terms_of(name, beta=0.3, label_smoothing=0.1)
    pairs = torch.tensor([[0.5, -1.0], [-2.0, 1.5]])
    losses, gradient = losses_at(terms, pairs.tolist())
    shifted, _ = losses_at(terms, (pairs + 4).tolist())
    torch.testing.assert_close(shifted, losses)
    torch.testing.assert_close(gradient[:, 0], -gradient[:, 1])


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_pass_gradcheck_in_double_precision(name: str) -> None:
    generator = torch.Generator().manual_seed(5)
    lengths = [3, 1, 2, 4, 1, 1, 5, 2]
    token_logps = -3 * torch.rand(sum(lengths), generator=generator, dtype=torch.float64)
    ref_logps = -3 * torch.rand(4, 2, generator=generator, dtype=torch.float64)
    terms = terms_of(name, beta=0.35, label_smoothing=0.1)
    distances = 1 - 0.35 * pair_loss(token_logps, offsets(lengths), ref_logps, terms).log_ratios.diff(dim=1).neg()
    assert distances.abs().min() > 1e-3, "a finite difference across the hinge's corner means nothing"
    check = lambda tokens: pair_loss(tokens, offsets(lengths), ref_logps, terms).losses  # noqa: E731
    assert torch.autograd.gradcheck(check, token_logps.requires_grad_())


def test_at_the_reference_margins_are_exactly_zero_and_sigmoid_is_ln_2() -> None:
    token_logps = -5 * torch.rand(400, generator=torch.Generator().manual_seed(6))
    cu_seqlens = offsets([37, 63, 1, 99, 150, 50])
    reference = sequence_sums(token_logps, cu_seqlens).view(-1, 2)
    for smoothing in SMOOTHINGS:
        result = pair_loss(token_logps, cu_seqlens, reference, terms_of("sigmoid", label_smoothing=smoothing))
        assert (result.log_ratios == 0).all()
        assert (result.losses - math.log(2)).abs().max() <= 1e-6


def test_a_weighted_list_is_the_weighted_sum_of_its_losses() -> None:
    pairs = [[0.7, -1.2], [-3.0, 0.4], [20.0, 5.0]]
    hyper = {"beta": 0.2, "label_smoothing": 0.15}
    names, weights = list(LOSSES), [0.5, 2.0, 0.25]
    losses, gradient = losses_at(terms_of(*names, weights=weights, **hyper), pairs, (2, 3))
    single = [losses_at(terms_of(name, **hyper), pairs, (2, 3)) for name in names]
    torch.testing.assert_close(losses, sum(w * one[0] for w, one in zip(weights, single, strict=True)))
    torch.testing.assert_close(gradient, sum(w * one[1] for w, one in zip(weights, single, strict=True)))


def test_without_weights_each_loss_counts_once() -> None:
    assert [term.weight for term in terms_of(*LOSSES)] == [1.0] * len(LOSSES)


def test_weights_that_do_not_match_the_losses_are_refused() -> None:
    with pytest.raises(ValueError):
        terms_of("sigmoid", "ipo", weights=[1.0])


def test_a_loss_reads_its_own_hyper_parameters_from_the_config() -> None:
    hyper = {"beta": 0.2, "label_smoothing": 0.15}
    taken = [dict(term.hyper) for term in terms_of("sigmoid", "hinge", "ipo", **hyper)]
    assert taken == [hyper, {"beta": 0.2}, {"beta": 0.2}]


def test_ipo_divides_each_side_by_its_own_scored_tokens() -> None:
    """Values by hand: beta 0.25 aims at a difference of 2 between log-ratios a token."""
    losses, gradient = losses_at(terms_of("ipo", beta=0.25), [[6.0, -4.0]], lengths=(3, 8))
    difference = 6 / 3 - (-4 / 8) - 2
    assert_relative(losses, [difference**2])
    assert_relative(gradient, [[2 * difference / 3, -2 * difference / 8]])


@pytest.mark.parametrize("name", ["sigmoid", "hinge"])
def test_losses_of_sums_do_not_see_lengths(name: str) -> None:
    terms = terms_of(name, beta=0.3)
    short, gradient = losses_at(terms, [[0.5, -1.0]])
    long, long_gradient = losses_at(terms, [[0.5, -1.0]], lengths=(4, 16))
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
    result = pair_loss(token_logps, offsets([0, 0, 1, 1]), torch.zeros(2, 2), terms_of(name))
    (gradient,) = torch.autograd.grad(result.losses.sum(), token_logps)
    assert result.losses.isfinite().all() and gradient.isfinite().all()
    assert (result.log_ratios[0] == 0).all()


def test_sums_are_the_same_to_the_last_bit_whatever_stands_beside_them() -> None:
    """Policy and reference meet a sequence in different batches; its sum must not depend on its neighbours."""
    parts = torch.rand(300, generator=torch.Generator().manual_seed(7)).split([120, 1, 80, 99])
    together = sequence_sums(torch.cat(parts), offsets([len(part) for part in parts]))
    alone = torch.cat([sequence_sums(part, offsets([len(part)])) for part in parts])
    assert torch.equal(together, alone)
