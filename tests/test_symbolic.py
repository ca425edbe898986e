"""symbolic: derivatives, the printed source and the LaTeX of a formula; what cannot be traced says so."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import sympy as sp
import torch

from fastdpo_kernels import device_math, symbolic
from fastdpo_kernels.pair_loss import LossTerm, torch_math

POINTS = (-31.0, -2.5, -0.7, -1e-3, 1e-3, 0.3, 1.9, 33.5)
POSITIVE = {"log", "sqrt", "log1p"}
NEGATIVE = {"log1mexp"}
OF_TWO = {"minimum", "maximum"}


def sigmoid(m: Any, chosen: Any, rejected: Any, beta: Any, smoothing: Any) -> Any:
    margin = beta * (chosen - rejected)
    return -(1 - smoothing) * m.log_sigmoid(margin) - smoothing * m.log_sigmoid(-margin)


def ipo(m: Any, chosen: Any, rejected: Any, beta: Any) -> Any:
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def run(terms: tuple[LossTerm, ...], **inputs: float) -> dict[str, float]:
    """The source as plain Python, on numbers; what is not given is NaN, so that using it shows."""
    functions = {name: getattr(symbolic.symbol_math, name, None) for name in symbolic.DEVICE_FUNCTIONS}
    slopes = {slope.__name__: slope for slope in symbolic._SLOPES}
    scope: dict[str, Any] = {"number": sp.Float, "whole_power": lambda x, n: x**n, **functions, **slopes}
    exec(symbolic.source(terms), scope)
    values = [sp.Float(inputs.get(name, math.nan)) for name in symbolic.INPUTS]
    return dict(zip(symbolic.OUTPUTS, map(float, scope["formula"](*values)), strict=True))


def slope_by_torch(function: Callable[[Any], Any], at: float) -> tuple[float, float]:
    x = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    value = function(x)
    return float(value.detach()), float(torch.autograd.grad(value, x)[0])


# The functions of m


def test_tensors_symbols_and_devices_know_the_same_functions() -> None:
    assert set(vars(torch_math)) == set(vars(symbolic.symbol_math))
    assert all(hasattr(device_math, name) for name in symbolic.DEVICE_FUNCTIONS)


@pytest.mark.parametrize("name", vars(torch_math))
def test_a_function_has_the_value_and_the_slope_that_torch_gives_it(name: str) -> None:
    points = [x for x in POINTS if not (name in POSITIVE and x < 0) and not (name in NEGATIVE and x > 0)]
    others = (0.5,) if name in OF_TWO else ()
    for x in points:
        value, slope = slope_by_torch(lambda x: getattr(torch_math, name)(x, *others), x)
        found = run((LossTerm(lambda m, chosen, rejected: getattr(m, name)(chosen, *others)),), chosen_ratio=x)
        assert found["loss"] == pytest.approx(value, rel=1e-14, abs=0), x
        cancelled = 1e-15 if name in ("tanh", "expm1") else 0  # torch takes their slopes from their values: 1 - t^2
        assert found["d_chosen"] == pytest.approx(slope, rel=1e-14, abs=cancelled), x


@pytest.mark.parametrize(
    "formula",
    [
        lambda m, x, y: m.relu(x),
        lambda m, x, y: m.abs(x),
        lambda m, x, y: abs(x),
        lambda m, x, y: m.minimum(x, y),
        lambda m, x, y: m.maximum(y, x),
        lambda m, x, y: m.maximum(0, x),
    ],
)
def test_a_kink_has_the_slope_that_torch_gives_it(formula: Callable[..., Any]) -> None:
    _, slope = slope_by_torch(lambda x: formula(torch_math, x, torch.zeros((), dtype=torch.float64)), 0.0)
    assert run((LossTerm(formula),), chosen_ratio=0.0, rejected_ratio=0.0)["d_chosen"] == slope


@pytest.mark.parametrize(
    "formula",
    [
        lambda m, x, y: x**3 - x**-2 + 1 / y**2,
        lambda m, x, y: x**0.5 * y**-0.5 + x**1.7 + m.sqrt(y) ** 3,
        lambda m, x, y: 2**x + 0.3 ** (x * y) + m.log(2) * x,
        lambda m, x, y: abs(x - y) * abs(m.exp(x) / y) + abs(-y),
        lambda m, x, y: (x - y) / (x + y) / 3 - -x,
        lambda m, x, y: -(x - y) * (y - x) + x * y * x * y,
        lambda m, x, y: numpy.float64(0.1) * x + y * numpy.float32(0.5),
        lambda m, x, y: (m.minimum(0.1, x) + 7) ** 9,
    ],
)
def test_arithmetic_is_printed_as_it_was_meant(formula: Callable[..., Any]) -> None:
    x, y = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (1.3, 0.4))
    value = formula(torch_math, x, y)
    slopes = torch.autograd.grad(value, (x, y), allow_unused=True)
    found = run((LossTerm(formula),), chosen_ratio=1.3, rejected_ratio=0.4)
    expected = [float(value.detach()), *(0.0 if slope is None else float(slope) for slope in slopes)]
    assert [found["loss"], found["d_chosen"], found["d_rejected"]] == pytest.approx(expected, rel=1e-14)


# Terms


def test_log_ratios_are_differentiated_through_their_score_and_their_number_of_tokens() -> None:
    term = LossTerm(ipo, {"beta": 0.25}, per="token", score=lambda m, log_ratio: 1 - m.capped_exp(-log_ratio))
    inputs = {"chosen_ratio": 0.3, "rejected_ratio": -0.2, "chosen_tokens": 4.0, "rejected_tokens": 5.0}
    found = run((term,), **inputs)
    difference = (1 - math.exp(-0.3)) / 4 - (1 - math.exp(0.2)) / 5 - 2
    expected = [difference**2, 2 * difference * math.exp(-0.3) / 4, -2 * difference * math.exp(0.2) / 5, 0, 0]
    assert list(found.values()) == pytest.approx(expected, rel=1e-14)


def test_a_list_of_terms_is_their_weighted_sum_each_by_its_own_arguments() -> None:
    terms = (
        LossTerm(lambda m, a, b: 3 * a - b, weight=2.0),
        LossTerm(lambda m, u, v: 5 * u * v, weight=0.5, of="logps"),
        LossTerm(lambda m, u, v: -u, weight=0.25, of="logps", per="batch_token"),
        LossTerm(lambda m, margin, other: margin * other, matched="margins"),
        LossTerm(lambda m, a, b: a * a * b, matched="sides"),
    )
    inputs = {"chosen_ratio": 1.0, "rejected_ratio": 2.0, "chosen_sum": 3.0, "rejected_sum": 4.0}
    inputs |= {"chosen_plain_sum": 8.0, "tokens_per_pair": 16.0, "margin": -1.0}
    inputs |= {"ref_margin_match": 7.0, "rejected_match": 11.0, "chosen_match": 13.0}
    assert run(terms, **inputs) == {
        "loss": 2.0 * 1 + 0.5 * 60 - 0.25 * 0.5 - 7 + 11,
        "d_chosen": 2.0 * 3 + 0.5 * 20 + 7 + 22,
        "d_rejected": -2.0 + 0.5 * 15 - 7 + 169,
        "d_chosen_plain": -0.25 / 16,
        "d_rejected_plain": 0.0,
    }


def test_a_formula_receives_the_mean_reward_only_if_it_asks() -> None:
    asks = LossTerm(lambda m, a, b, beta, mean_reward: beta * a - mean_reward, {"beta": 3.0})
    assert run((asks,), chosen_ratio=2.0, mean_reward=0.5)["loss"] == 5.5
    assert "mean_reward)" not in symbolic.source((LossTerm(ipo, {"beta": 0.1}),)).split(":", 1)[1]


# Source


def test_differences_of_large_log_ratios_keep_their_digits() -> None:
    """0.1 a - 0.1 b would lose them, and so would adding a small number to a large value that cancels later."""
    found = run((LossTerm(sigmoid, {"beta": 0.1, "smoothing": 0.0}),), chosen_ratio=1e9 + 1e-3, rejected_ratio=1e9)
    margin = 0.1 * ((1e9 + 1e-3) - 1e9)
    assert found["loss"] == pytest.approx(math.log1p(math.exp(-margin)), rel=1e-15)
    huge = run((LossTerm(ipo, {"beta": 0.3}),), chosen_ratio=1e30, rejected_ratio=1e30)
    assert huge["loss"] == pytest.approx((1 / 0.6) ** 2, rel=1e-15)


def test_hyper_parameters_keep_all_of_their_digits() -> None:
    beta = 0.1 + 2**-56
    assert beta != 0.1
    assert repr(beta) in symbolic.source((LossTerm(lambda m, a, b, beta: beta * a, {"beta": beta}),))


def test_numbers_are_computed_once_and_not_by_every_pair() -> None:
    formula = lambda m, a, b, smoothing: a * (m.log(smoothing) + m.sqrt(m.log(2)) + m.log(1 - smoothing))  # noqa: E731
    source = symbolic.source((LossTerm(formula, {"smoothing": 0.1}),))
    assert "log" not in source and "sqrt" not in source


def test_a_number_as_an_argument_is_an_fp64_scalar() -> None:
    """Triton would take a bare Python float for fp32."""
    assert "minimum(chosen_ratio, number(0.1))" in symbolic.source((LossTerm(lambda m, a, b: m.minimum(a, 0.1)),))


def test_a_term_whose_weight_is_zero_is_not_computed() -> None:
    assert "sigmoid" not in symbolic.source((LossTerm(sigmoid, {"beta": 0.1, "smoothing": 0.1}, 0.0),))


def test_only_known_functions_are_called() -> None:
    """A rename that one of the three tables missed would fail here, before any kernel compiles."""
    for name in vars(symbolic.symbol_math):
        others = (0.5,) if name in OF_TWO else ()
        term = LossTerm(lambda m, a, b, name=name, others=others: getattr(m, name)(a, *others))
        run((term,), chosen_ratio=-0.5 if name in NEGATIVE else 0.5)


# What cannot be traced


def asks_if(m: Any, chosen: Any, rejected: Any) -> Any:
    return chosen if chosen > rejected else rejected


UNTRACEABLE = {
    "if": (asks_if, "asks_if cannot be traced: cannot determine truth value"),
    "max": (lambda m, a, b: max(a, b), "cannot determine truth value"),
    "torch": (lambda m, a, b: torch.exp(a), "must be Tensor, not Symbol"),
    "math": (lambda m, a, b: math.exp(a), "Cannot convert expression to float"),
    "unknown": (lambda m, a, b: m.sin(a), "no attribute 'sin'"),
    "floor": (lambda m, a, b: a // 2, "uses floor"),
    "remainder": (lambda m, a, b: a % 2, "uses Mod"),
    "nothing": (lambda m, a, b: None, "cannot be traced"),
    "two values": (lambda m, a, b: (a, b), "returned Tuple, expected a value"),
    "truth": (lambda m, a, b: a > b, "returned StrictGreaterThan, expected a value"),
    "hyper-parameter": (lambda m, a, b, beta: beta * a, "missing 1 required positional argument: 'beta'"),
    "log of 0": (lambda m, a, b: m.log(0.0) * a, "math domain error"),
    "1 / 0": (lambda m, a, b: a / 0.0, "a hyper-parameter is outside"),
    "complex": (lambda m, a, b: a * (-1.0) ** 0.5, "a hyper-parameter is outside"),
}


@pytest.mark.parametrize("formula, message", UNTRACEABLE.values(), ids=UNTRACEABLE)
def test_a_formula_that_cannot_be_traced_says_why(formula: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        symbolic.expressions((LossTerm(formula),))
    assert "the formula" in str(caught.value)


def test_the_message_lists_what_may_be_used() -> None:
    with pytest.raises(ValueError, match=r"functions of m \(abs, capped_exp, exp, .*m\.relu, m\.minimum or m\.maximum"):
        symbolic.trace(asks_if, *sp.symbols("a b"))


# LaTeX


def test_latex_is_in_the_names_that_it_is_given() -> None:
    text = symbolic.latex(ipo, r"\bar a", r"\bar b", beta=r"\beta")
    assert text == r"\left(\bar a - \bar b - \frac{1}{2 \beta}\right)^{2}"
    text = symbolic.latex(sigmoid, "a", "b", beta=r"\beta", smoothing=r"\varepsilon")
    assert r"\left(1 - \varepsilon\right) \log\sigma\left(\beta \left(a - b\right)\right)" in text


def test_latex_of_every_function_and_of_its_powers() -> None:
    for name in vars(symbolic.symbol_math):
        others = ("b",) if name in OF_TWO else ()
        formula = lambda m, *sides, name=name: getattr(m, name)(*sides) ** 2 / 3  # noqa: E731
        text = symbolic.latex(formula, "a", *others)
        assert text.count("{") == text.count("}") and text.count(r"\left") == text.count(r"\right")
        assert (
            "a" in text and "^{2}" in text and name not in ("sigmoid", "relu") or r"\sigma" in text or r"\max" in text
        )


def test_constants_of_a_formula_stay_as_they_are_written() -> None:
    text = symbolic.latex(lambda m, log_ratio: m.log(2) + m.log_sigmoid(log_ratio), "a")
    assert r"\log\left(2\right)" in text and r"\log\sigma\left(a\right)" in text
