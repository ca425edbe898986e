"""One formula, more readers: from a loss as it is declared to its derivatives, the source of a device function, LaTeX.

A formula such as `lambda m, chosen, rejected, beta: -m.log_sigmoid(beta * (chosen - rejected))` is called with symbols
in place of tensors and with `symbol_math` in place of torch's functions. What comes back is an expression: sympy
differentiates it, common subexpressions become variables, and it is printed as Python that Triton compiles.

Every function of `m` is a class of its own rather than sympy's, for two reasons. Its derivative is the form that stays
finite and keeps its digits (sigmoid' = sigmoid(x) sigmoid(-x)), and sympy rewrites nothing inside it. For the same
reason products are not multiplied out: 0.1 * (a - b) of two nearly equal log-ratios must stay that.

Needs sympy only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import sympy as sp
from sympy.core.parameters import distribute

from fastdpo_kernels.pair_loss import EXP_CAP, LOG1MEXP_MAX, LossTerm, takes_mean_reward

# Arguments of the device function, fp64: of each side the log-ratio, the policy's sum, its sum without ld_alpha and its
# number of tokens; the policy's margin; two numbers of the batch; the three columns of `match_pairs`.
INPUTS = (
    *("chosen_ratio", "rejected_ratio", "chosen_sum", "rejected_sum", "chosen_plain_sum", "rejected_plain_sum"),
    *("chosen_tokens", "rejected_tokens", "margin", "tokens_per_pair", "mean_reward"),
    *("ref_margin_match", "rejected_match", "chosen_match"),
)
# Its results: the loss, and its derivatives by the sums of each side, then by the sums without ld_alpha.
OUTPUTS = ("loss", "d_chosen", "d_rejected", "d_chosen_plain", "d_rejected_plain")

_x = SimpleNamespace(**{name: sp.Symbol(name, real=True) for name in INPUTS})


# The functions of m


def _function(name: str, of_numbers: Callable[..., Any], latex: str, *slopes: Callable[..., Any]) -> Any:
    """A sympy function class with its value for numbers, its LaTeX, and its derivative by each argument."""

    def evaluated(cls: type, *arguments: sp.Expr) -> sp.Expr | None:
        if all(argument.is_Float for argument in arguments):  # log(2) stays: it reads better, and is `_folded` later
            return sp.Float(of_numbers(*map(float, arguments)))
        return None

    def printed(self: sp.Function, printer: Any, exp: str | None = None) -> str:
        text = latex.format(*map(printer._print, self.args))
        return text if exp is None else rf"\left({text}\right)^{{{exp}}}"

    members = {
        "nargs": len(slopes) or None,
        "eval": classmethod(evaluated),
        "fdiff": lambda self, argindex=1: slopes[argindex - 1](symbol_math, *self.args),
        "_latex": printed,
        "_eval_is_extended_real": lambda self: True,
    }
    return type(name, (sp.Function,), members)


def _log_sigmoid(x: float) -> float:
    return min(x, 0.0) - math.log1p(math.exp(-abs(x)))


def _sigmoid(x: float) -> float:
    return math.exp(_log_sigmoid(x))


def _softplus(x: float) -> float:
    return -_log_sigmoid(-x)


def _log1mexp(x: float) -> float:
    x = min(x, LOG1MEXP_MAX)
    return math.log(-math.expm1(x)) if x > -math.log(2) else math.log1p(-math.exp(x))


def _capped_exp(x: float) -> float:
    return math.exp(min(x, EXP_CAP)) * (1 + max(x - EXP_CAP, 0.0))


# Only derivatives hold these, so they need none of their own. At kinks they are what torch's autograd gives.
_SIGN = _function("sign", lambda x: float((x > 0) - (x < 0)), r"\mathrm{{sign}}\left({0}\right)")
_STEP = _function("step", lambda x: float(x > 0), r"\left[{0} > 0\right]")
_BELOW = _function("below", lambda x, y: (1.0 + (x < y) - (x > y)) / 2, r"\left[{0} < {1}\right]")
_LOG1MEXP_SLOPE = _function(
    "log1mexp_slope", lambda x: 0.0 if x > LOG1MEXP_MAX else -1 / math.expm1(-x), r"\frac{{1}}{{1 - e^{{-{0}}}}}"
)
_SLOPES = (_SIGN, _STEP, _BELOW, _LOG1MEXP_SLOPE)

_FUNCTIONS = (
    _function("exp", math.exp, "e^{{{0}}}", lambda m, x: m.exp(x)),
    _function("log", math.log, r"\log\left({0}\right)", lambda m, x: 1 / x),
    _function("log1p", math.log1p, r"\log\left(1 + {0}\right)", lambda m, x: 1 / (1 + x)),
    _function("expm1", math.expm1, r"\left(e^{{{0}}} - 1\right)", lambda m, x: m.exp(x)),
    _function("sqrt", math.sqrt, r"\sqrt{{{0}}}", lambda m, x: 1 / (2 * m.sqrt(x))),
    _function("tanh", math.tanh, r"\tanh\left({0}\right)", lambda m, x: 4 * m.sigmoid(2 * x) * m.sigmoid(-2 * x)),
    _function("abs", abs, r"\left|{0}\right|", lambda m, x: _SIGN(x)),
    _function("sigmoid", _sigmoid, r"\sigma\left({0}\right)", lambda m, x: m.sigmoid(x) * m.sigmoid(-x)),
    _function("log_sigmoid", _log_sigmoid, r"\log\sigma\left({0}\right)", lambda m, x: m.sigmoid(-x)),
    _function("softplus", _softplus, r"\log\left(1 + e^{{{0}}}\right)", lambda m, x: m.sigmoid(x)),
    _function("relu", lambda x: max(x, 0.0), r"\max\left(0, {0}\right)", lambda m, x: _STEP(x)),
    _function("minimum", min, r"\min\left({0}, {1}\right)", lambda m, x, y: _BELOW(x, y), lambda m, x, y: _BELOW(y, x)),
    _function("maximum", max, r"\max\left({0}, {1}\right)", lambda m, x, y: _BELOW(y, x), lambda m, x, y: _BELOW(x, y)),
    _function("log1mexp", _log1mexp, r"\log\left(1 - e^{{{0}}}\right)", lambda m, x: _LOG1MEXP_SLOPE(x)),
    _function("capped_exp", _capped_exp, "e^{{{0}}}", lambda m, x: m.exp(m.minimum(x, EXP_CAP))),
)
symbol_math = SimpleNamespace(**{function.__name__: function for function in _FUNCTIONS})
MOST_POWER = 64  # whole powers are products
DEVICE_FUNCTIONS = tuple(function.__name__ for function in (*_FUNCTIONS, *_SLOPES))  # names that the source may call


# Formulas to expressions


def trace(formula: Callable[..., Any], *arguments: Any, **hyper: Any) -> sp.Expr:
    """The formula's expression in its arguments. ValueError where it is not made of arithmetic and functions of m."""
    try:
        with distribute(False):
            value = sp.sympify(formula(symbol_math, *arguments, **hyper), strict=True).replace(sp.Abs, symbol_math.abs)
    except (TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{_name(formula)} cannot be traced: {error}. {_HOW_TO_WRITE}") from error
    if not isinstance(value, sp.Expr):
        raise ValueError(f"{_name(formula)} returned {type(value).__name__}, expected a value. {_HOW_TO_WRITE}")
    if unknown := {call.func.__name__ for call in value.atoms(sp.Function)} - set(DEVICE_FUNCTIONS):
        raise ValueError(f"{_name(formula)} uses {', '.join(sorted(unknown))}. {_HOW_TO_WRITE}")
    whole = [int(power.exp) for power in value.atoms(sp.Pow) if power.exp.is_Number and float(power.exp).is_integer()]
    if max(map(abs, whole), default=0) > MOST_POWER:
        raise ValueError(f"{_name(formula)} has a power of {max(whole, key=abs)}, expected up to {MOST_POWER}")
    if value.has(sp.nan, sp.zoo, sp.oo, -sp.oo, sp.I):
        raise ValueError(f"{_name(formula)} is {value} with {hyper}: a hyper-parameter is outside what it is made for")
    return value


_HOW_TO_WRITE = (
    "A formula is called with symbols to be differentiated and compiled, so write it with +, -, *, /, ** and the "
    f"functions of m ({', '.join(sorted(vars(symbol_math)))}); where it would ask `if` of a value, use m.relu, "
    "m.minimum or m.maximum; what is raised to a power that is no whole number has to be above 0."
)


def _name(formula: Callable[..., Any]) -> str:
    return f"the formula {getattr(formula, '__name__', repr(formula))}"


def latex(formula: Callable[..., Any], *arguments: str, **names: str) -> str:
    r"""The formula as LaTeX; `arguments` are the names of what it is called with, `names` those of hyper-parameters.

    latex(sigmoid, "a", "b", beta=r"\beta") -> -\log\sigma\left(\beta \left(a - b\right)\right)
    """
    symbols = [sp.Symbol(name, real=True) for name in arguments]
    hyper = {name: sp.Symbol(text, real=True) for name, text in names.items()}
    with distribute(False):
        return sp.latex(
            trace(formula, *symbols, **hyper), symbol_names={x: x.name for x in (*symbols, *hyper.values())}
        )


def expressions(terms: Sequence[LossTerm]) -> list[sp.Expr]:
    """OUTPUTS of the weighted list, in INPUTS."""
    with distribute(False):
        each = [[term.weight * value if term.weight != 1 else value for value in _outputs(term)] for term in terms]
        return [_folded(sp.Add(*values)) for values in zip(*each, strict=True)]


def _folded(value: sp.Expr) -> Any:
    """Functions of numbers become numbers."""
    return value.replace(
        lambda call: isinstance(call, sp.Function) and not call.free_symbols,
        lambda call: call.func(*map(sp.Float, call.args)),
    )


def _outputs(term: LossTerm) -> list[sp.Expr]:
    hyper: dict[str, Any] = {name: sp.Float(float(value)) for name, value in term.hyper.items()}
    if takes_mean_reward(term.formula):
        hyper["mean_reward"] = _x.mean_reward
    if term.matched == "margins":
        value = trace(term.formula, _x.margin, _x.ref_margin_match, **hyper)
        return [value, value.diff(_x.margin), -value.diff(_x.margin), *_NOTHING]
    if term.matched == "sides":
        value = trace(term.formula, _x.chosen_ratio, _x.rejected_match, **hyper)
        of_rejected = trace(term.formula, _x.chosen_match, _x.rejected_ratio, **hyper)
        return [value, value.diff(_x.chosen_ratio), of_rejected.diff(_x.rejected_ratio), *_NOTHING]
    chosen, rejected = _sums(term)
    value = trace(term.formula, *_sides(term), **hyper)
    slopes = value.diff(chosen), value.diff(rejected)
    return [value, *_NOTHING, *slopes] if term.per == "batch_token" else [value, *slopes, *_NOTHING]


_NOTHING = (sp.Integer(0), sp.Integer(0))


def _sums(term: LossTerm) -> tuple[sp.Symbol, sp.Symbol]:
    """What a term is differentiated by: log-ratios serve as well as the policy's sums, the reference being fixed."""
    if term.per == "batch_token":
        return _x.chosen_plain_sum, _x.rejected_plain_sum
    return (_x.chosen_sum, _x.rejected_sum) if term.of == "logps" else (_x.chosen_ratio, _x.rejected_ratio)


def _sides(term: LossTerm) -> list[sp.Expr]:
    """What the formula is called with: sums, or their scores, divided as `per` says."""
    sides = [side if term.score is None else trace(term.score, side) for side in _sums(term)]
    divisors = {
        "sequence": (1, 1),
        "token": (_x.chosen_tokens, _x.rejected_tokens),
        "batch_token": (_x.tokens_per_pair, _x.tokens_per_pair),
    }
    return [side / divisor for side, divisor in zip(sides, divisors[term.per], strict=True)]


# Expressions to source


def source(terms: Sequence[LossTerm]) -> str:
    """Python source of `formula(*INPUTS) -> OUTPUTS`, calling DEVICE_FUNCTIONS, `number` and `whole_power`."""
    with distribute(False):
        shared, results = sp.cse(expressions(terms), symbols=sp.numbered_symbols("t", real=True))
        lines = [f"{symbol} = {_code(value)}" for symbol, value in shared]
        lines += [f"{name} = {_argument(value)}" for name, value in zip(OUTPUTS, results, strict=True)]
    return "\n    ".join([f"def formula({', '.join(INPUTS)}):", *lines, f"return {', '.join(OUTPUTS)}"]) + "\n"


def _code(value: Any) -> str:
    if isinstance(value, sp.Symbol):
        return value.name
    if value.is_Number:
        return repr(float(value))  # repr of a double reads back as the same double
    if isinstance(value, sp.Add):  # numbers last: a small one must not vanish in a large value that cancels later
        return "(" + " + ".join(map(_code, sorted(value.args, key=lambda summand: bool(summand.is_Number)))) + ")"
    if isinstance(value, sp.Mul):
        return _product(value)
    if isinstance(value, sp.Pow):
        return _power(*value.args)
    return f"{value.func.__name__}({', '.join(map(_argument, value.args))})"


def _argument(value: Any) -> str:
    """A number by itself becomes an fp64 scalar: Triton would take a Python float for fp32."""
    return f"number({_code(value)})" if value.is_Number else _code(value)


def _product(value: Any) -> str:
    above = [factor for factor in value.args if not _is_divisor(factor)]
    below = [1 / factor for factor in value.args if _is_divisor(factor)]
    sign = "-" if above and above[0] == -1 else ""
    factors = " * ".join(map(_code, above[len(sign) :])) or "1.0"
    return f"({sign}{factors}" + "".join(f" / {_code(factor)}" for factor in below) + ")"


def _is_divisor(factor: Any) -> bool:
    return isinstance(factor, sp.Pow) and bool(factor.args[1].is_Number) and bool(factor.args[1].is_negative)


def _power(base: Any, exponent: Any) -> str:
    """Whole powers are products, so that the base may be negative; under any other power it has to be positive."""
    if exponent.is_Number and exponent < 0:
        return f"(1.0 / {_code(base**-exponent)})"
    if exponent.is_Number and float(exponent).is_integer():
        return f"whole_power({_argument(base)}, {int(exponent)})"
    if exponent == 0.5:
        return f"sqrt({_argument(base)})"
    logarithm = repr(math.log(base)) if base.is_Number else f"log({_code(base)})"
    return f"exp({_code(exponent)} * {logarithm})"
