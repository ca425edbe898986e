"""Preference losses, each written once as a formula of the two log-ratios of policy to reference.

`chosen` and `rejected` are log pi(y|x) - log pi_ref(y|x), summed over the response's scored tokens (or averaged, where
a loss says `length_normalised`). `m` is the mathematics: tensors in training; symbols where derivatives, kernels and
documents are made from the same lines. A loss's keyword arguments are fields of DPOConfig.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

from fastdpo_kernels.pair_loss import LossTerm

Formula = Callable[..., Any]


@dataclass(frozen=True)
class PreferenceLoss:
    """A formula with its name in DPOConfig.loss_type, its paper and the hyper-parameters that it takes."""

    name: str
    formula: Formula
    paper: str  # arXiv number
    length_normalised: bool = False

    @property
    def hyper_parameters(self) -> tuple[str, ...]:
        return tuple(signature(self.formula).parameters)[3:]  # after m, chosen, rejected

    def term(self, weight: float, **values: float) -> LossTerm:
        return LossTerm(self.formula, values, weight, self.length_normalised)


LOSSES: dict[str, PreferenceLoss] = {}


def preference_loss(paper: str, length_normalised: bool = False) -> Callable[[Formula], Formula]:
    """Registers a formula under its function's name."""

    def register(formula: Formula) -> Formula:
        name = getattr(formula, "__name__")  # noqa: B009 (a Callable need not have one for the type checker)
        LOSSES[name] = PreferenceLoss(name, formula, paper, length_normalised)
        return formula

    return register


def loss_terms(names: Sequence[str], weights: Sequence[float] | None, config: object) -> tuple[LossTerm, ...]:
    """The weighted sum that `loss_type` and `loss_weights` ask for, hyper-parameters read from `config` by name."""
    losses = [LOSSES[name] for name in names]
    return tuple(
        loss.term(weight, **{name: float(getattr(config, name)) for name in loss.hyper_parameters})
        for loss, weight in zip(losses, weights or [1.0] * len(losses), strict=True)
    )


@preference_loss("2305.18290")
def sigmoid(m: Any, chosen: Any, rejected: Any, beta: Any, label_smoothing: Any) -> Any:
    """DPO; with label_smoothing the conservative form, where that share of the labels is taken to be flipped."""
    margin = beta * (chosen - rejected)
    return -(1 - label_smoothing) * m.log_sigmoid(margin) - label_smoothing * m.log_sigmoid(-margin)


@preference_loss("2305.10425")
def hinge(m: Any, chosen: Any, rejected: Any, beta: Any) -> Any:
    """SLiC-HF's hinge on the DPO margin."""
    return m.relu(1 - beta * (chosen - rejected))


@preference_loss("2310.12036", length_normalised=True)
def ipo(m: Any, chosen: Any, rejected: Any, beta: Any) -> Any:
    """IPO; beta is the paper's tau. Each side is averaged over its tokens, as the authors' released runs were."""
    return (chosen - rejected - 1 / (2 * beta)) ** 2
