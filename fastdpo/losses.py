"""Preference losses, each declared once: a formula with what it sees and the options that it reads.

    chosen, rejected    log pi(y|x) - log pi_ref(y|x), summed over the response's scored tokens; another loss says so

`m` is the mathematics. Tensors give the loss in plain torch; symbols give its derivatives, its Triton function and the
tables in docs/losses.md (`python -m fastdpo.losses` prints them), all from the same lines. A formula's other arguments
are fields of DPOConfig. A function in `loss_type` is a loss like those below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from inspect import Parameter, signature
from numbers import Real
from typing import Any

from fastdpo_kernels.pair_loss import LossTerm, PairwiseLoss, takes_mean_reward

Formula = Callable[..., Any]

# What bco_pair's formula takes beside options: the step knows it, no config does.
MEAN_REWARD = "mean_reward"


@dataclass(frozen=True, eq=False)
class PreferenceLoss:
    """One loss of `loss_type`."""

    names: tuple[str, ...]
    formula: Formula
    paper: str = ""  # arXiv number
    of: str = "log_ratios"  # or "logps": the policy's own log-probs, without a reference
    per: str = "sequence"  # "token": a response's mean; "batch_token": the sum over the mean length of the chosen ones
    matched: str | None = None  # "margins" or "sides" are paired anew by rank over the optimizer batch
    divergence: bool = False  # an f-divergence may take the place of the log-ratio
    sft_weight: float | str = 0.0  # of the sft loss that belongs to it, or the option that says it
    at_zero: Mapping[str, float] = field(default_factory=dict)  # what a hyper-parameter of 0 means

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def arguments(self) -> list[Parameter]:
        """The formula's arguments after m, chosen and rejected."""
        arguments = list(signature(self.formula).parameters.values())
        unnamed = [a for a in arguments if a.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)]
        if len(arguments) < 3 or unnamed:
            raise ValueError(
                f"the loss {self.name} takes ({', '.join(map(str, arguments))}): a formula takes m, chosen, rejected, "
                "then each hyper-parameter by name, such as (m, chosen, rejected, beta)"
            )
        return arguments[3:]

    @property
    def options(self) -> tuple[str, ...]:
        """The fields of DPOConfig that it reads; a formula of the user's own may name others beside them."""
        own = ["bco_running_mean" if a.name == MEAN_REWARD else a.name for a in self.arguments]
        return (*own, self.sft_weight) if isinstance(self.sft_weight, str) else tuple(own)

    def terms(self, weight: float, config: object, score: Formula | None) -> list[LossTerm]:
        """Its summands, hyper-parameters read from `config` by name; `score` takes the place of the log-ratio."""
        hyper = {a.name: self._value(a, config) for a in self.arguments if a.name != MEAN_REWARD}
        terms = [LossTerm(self.formula, hyper, weight, self.of, self.per, score, self.matched)]
        share = getattr(config, self.sft_weight) if isinstance(self.sft_weight, str) else self.sft_weight
        return terms + LOSSES["sft"].terms(weight * share, config, None) if share else terms

    def _value(self, argument: Parameter, config: object) -> float:
        value = getattr(config, argument.name, None)
        if value is None:
            value = argument.default
        if not isinstance(value, Real):
            raise ValueError(
                f"the loss {self.name} takes {argument.name}, which is no number of DPOConfig: give it a default, as "
                f"in def {self.name}(m, chosen, rejected, {argument.name}=1.0)"
            )
        return self.at_zero.get(argument.name, 0.0) if value == 0 else float(value)


LOSSES: dict[str, PreferenceLoss] = {}


def preference_loss(paper: str = "", also: tuple[str, ...] = (), **declared: Any) -> Callable[[Formula], Formula]:
    """Registers a formula under its function's name, and under the names in `also`; see PreferenceLoss for the rest."""

    def register(formula: Formula) -> Formula:
        loss = PreferenceLoss((formula_name(formula), *also), formula, paper, **declared)
        LOSSES.update(dict.fromkeys(loss.names, loss))
        return formula

    return register


def formula_name(formula: Formula) -> str:
    return getattr(formula, "__name__", type(formula).__name__)


def find_loss(given: str | Formula) -> PreferenceLoss:
    """The loss of a name or a function; a function that nobody declared sees summed log-ratios."""
    if isinstance(given, str):
        return LOSSES[given]
    declared = (loss for loss in LOSSES.values() if loss.formula is given)
    return next(declared, PreferenceLoss((formula_name(given),), given))


def pairwise_loss(config: Any) -> PairwiseLoss:
    """The weighted sum that a config asks for. Raises ValueError for options that exclude each other."""
    losses = [find_loss(given) for given in config.loss_type]
    weights = config.loss_weights or [1.0] * len(losses)
    score = divergence_score(config)
    if config.f_divergence_type != "reverse_kl":
        _check_divergence(losses, config.f_divergence_type)
    if config.use_weighting and (matched := [loss.name for loss in losses if loss.matched]):
        raise ValueError(
            f"use_weighting=True does not go with {', '.join(matched)}: they pair responses anew, and a weight belongs "
            "to one pair; take another loss, or leave it out."
        )
    terms: list[LossTerm] = []
    for loss, weight in zip(losses, weights, strict=True):
        own = loss.terms(weight, config, score if loss.divergence else None)
        if getattr(loss.formula, "__module__", "") != __name__:
            _check_formula(own)
        terms += own
    if config.rpo_alpha:
        terms += LOSSES["sft"].terms(config.rpo_alpha, config, None)
    return PairwiseLoss(tuple(terms), config.beta, config.ld_alpha, config.use_weighting)


def _check_divergence(losses: Iterable[PreferenceLoss], kind: str) -> None:
    refused = [loss.name for loss in losses if not loss.divergence and loss is not LOSSES["sft"]]
    if refused:
        fits = dict.fromkeys(loss.name for loss in LOSSES.values() if loss.divergence)
        raise ValueError(
            f"f_divergence_type={kind!r} does not apply to {', '.join(refused)}: leave it out, or take "
            f"{', '.join(fits)}; sft may stand beside them."
        )


def _check_formula(terms: list[LossTerm]) -> None:
    """A formula that a kernel cannot be made of is refused wherever it runs."""
    from fastdpo_kernels import symbolic  # half a second, for sympy

    _, *derivatives = symbolic.expressions(terms)
    if not any(derivatives):
        raise ValueError(
            f"the loss {formula_name(terms[0].formula)} is the same whatever the model says: use chosen and rejected"
        )


def check_idle_options(config: Any, defaults: Mapping[str, Any]) -> None:
    """An option that no loss of the run reads stays at its default, or ValueError says so."""
    losses = [find_loss(given) for given in config.loss_type]
    names = ", ".join(loss.name for loss in losses)
    for option in ("label_smoothing", "discopop_tau", "simpo_gamma", "cpo_alpha", "bco_running_mean"):
        value, default = getattr(config, option), defaults[option]
        if value != default and not any(option in loss.options for loss in losses):
            readers = dict.fromkeys(loss.name for loss in LOSSES.values() if option in loss.options)
            raise ValueError(
                f"{option}={value!r} has no effect on {names}: leave it at {default!r}, or add a loss that reads it "
                f"({', '.join(readers)})."
            )
    kind, coefficient = config.f_divergence_type, config.f_alpha_divergence_coef
    if all(loss is LOSSES["sft"] for loss in losses):
        for option in ("f_divergence_type", "ld_alpha"):
            if getattr(config, option) != defaults[option]:
                raise ValueError(
                    f"{option}={getattr(config, option)!r} has no effect on sft, the mean of the chosen tokens' "
                    "log-probs: leave it out, or add a loss that reads it."
                )
    if coefficient != defaults["f_alpha_divergence_coef"] and kind != "alpha_divergence":
        raise ValueError(
            f"f_alpha_divergence_coef={coefficient!r} has no effect on f_divergence_type={kind!r}: leave it out, or "
            "take alpha_divergence."
        )


def loss_differences(config: Any) -> list[str]:
    """A line for each thing about the losses in use that is not as in TRL 1.16."""
    names, smoothing = [given for given in config.loss_type if isinstance(given, str)], config.label_smoothing
    alpha = config.f_alpha_divergence_coef
    lines = (
        (
            smoothing and "sigmoid" in names,
            f"label_smoothing={smoothing} makes sigmoid conservative DPO (TRL 1.16 ignores it there)",
        ),
        (
            "exo_pair" in names and not smoothing,
            "exo_pair takes a label_smoothing of 0 for 0.001 (TRL 1.16 refuses 0)",
        ),
        (
            "bco_pair" in names and config.bco_running_mean,
            "bco_running_mean: bco_pair compares rewards with their mean so far (TRL 1.16: with 0)",
        ),
        (
            any(name.startswith("aot") for name in names),
            "aot pairs up the whole optimizer batch (TRL 1.16: each micro-batch by itself)",
        ),
        (
            config.rpo_alpha or {"sft", "orpo", "cpo"} & set(names),
            "sft is a mean over the chosen tokens of the optimizer batch (TRL 1.16: of each micro-batch)",
        ),
        ("orpo" in names, "orpo's sft part scores responses only (TRL 1.16: prompts, too)"),
        (
            config.f_divergence_type == "alpha_divergence",
            f"f_alpha_divergence_coef={alpha:g} is alpha as in TRL 0.11 ({1 - alpha:g} in TRL 1.16)",
        ),
    )
    return [line for holds, line in lines if holds]


def sees_reference(loss: PairwiseLoss) -> bool:
    """Whether any of it depends on the reference."""
    return any(term.of == "log_ratios" for term in loss.terms)


def sees_mean_reward(loss: PairwiseLoss) -> bool:
    return any(takes_mean_reward(term.formula) for term in loss.terms)


# f-divergences (arXiv:2309.16240): f'(pi / pi_ref), a function of the log-ratio that takes its place.


def forward_kl(m: Any, log_ratio: Any) -> Any:
    return 1 - m.capped_exp(-log_ratio)


def js_divergence(m: Any, log_ratio: Any) -> Any:
    return m.log(2) + m.log_sigmoid(log_ratio)


def alpha_divergence(m: Any, log_ratio: Any, f_alpha_divergence_coef: Any) -> Any:
    return (1 - m.capped_exp(-f_alpha_divergence_coef * log_ratio)) / f_alpha_divergence_coef


DIVERGENCES: dict[str, Formula | None] = {"reverse_kl": None, "forward_kl": forward_kl, "js_divergence": js_divergence}
DIVERGENCES["alpha_divergence"] = alpha_divergence


def divergence_score(config: Any) -> Formula | None:
    """None is the log-ratio itself: reverse KL, which is also alpha-divergence at 0."""
    score = DIVERGENCES[config.f_divergence_type]
    if score is not alpha_divergence:
        return score
    coefficient = config.f_alpha_divergence_coef
    return partial(alpha_divergence, f_alpha_divergence_coef=coefficient) if abs(coefficient) >= 1e-6 else None


@preference_loss("2305.18290", divergence=True)
def sigmoid(m: Any, chosen: Any, rejected: Any, beta: Any, label_smoothing: Any) -> Any:
    """DPO; with label_smoothing the conservative form, where that share of the labels is taken to be flipped. Take it
    first: it is the default, and what the others are measured by.
    """
    margin = beta * (chosen - rejected)
    return -(1 - label_smoothing) * m.log_sigmoid(margin) - label_smoothing * m.log_sigmoid(-margin)


@preference_loss("2305.10425", divergence=True)
def hinge(m: Any, chosen: Any, rejected: Any, beta: Any) -> Any:
    """SLiC-HF's hinge on the DPO margin. Take it where a pair that is won by enough should stop to count."""
    return m.relu(1 - beta * (chosen - rejected))


@preference_loss("2310.12036", per="token", divergence=True)
def ipo(m: Any, chosen: Any, rejected: Any, beta: Any) -> Any:
    """IPO; beta is the paper's tau. Each side is averaged over its tokens, as the authors' released runs were. Take it
    where sigmoid drives margins without end, as on clean labels over several epochs: it aims at one margin.
    """
    return (chosen - rejected - 1 / (2 * beta)) ** 2


@preference_loss("2403.00409", divergence=True)
def robust(m: Any, chosen: Any, rejected: Any, beta: Any, label_smoothing: Any) -> Any:
    """Robust DPO: unbiased where that share of the labels is flipped. Take it where you know about how many labels are
    wrong, as of synthetic or crowd-sourced ones.
    """
    margin = beta * (chosen - rejected)
    flipped = label_smoothing * m.log_sigmoid(-margin) - (1 - label_smoothing) * m.log_sigmoid(margin)
    return flipped / (1 - 2 * label_smoothing)


@preference_loss("2402.00856", divergence=True, at_zero={"label_smoothing": 1e-3})
def exo_pair(m: Any, chosen: Any, rejected: Any, beta: Any, label_smoothing: Any) -> Any:
    """EXO: the KL from the policy's preference to the smoothed label; a smoothing of 0 is 1e-3, as the log needs. Take
    it where the policy should settle on the better answer rather than match how often it wins.
    """
    margin = beta * (chosen - rejected)
    kept = m.sigmoid(margin) * (m.log_sigmoid(margin) - m.log(1 - label_smoothing))
    return kept + m.sigmoid(-margin) * (m.log_sigmoid(-margin) - m.log(label_smoothing))


@preference_loss("2404.04656")
def bco_pair(m: Any, chosen: Any, rejected: Any, beta: Any, mean_reward: Any) -> Any:
    """BCO: a classifier of single responses, shifted by the mean reward so far. Take it where answers are good or bad
    by themselves, as by a thumb up or down, rather than against each other.
    """
    return -m.log_sigmoid(beta * chosen - mean_reward) - m.log_sigmoid(mean_reward - beta * rejected)


@preference_loss("2405.00675")
def sppo_hard(m: Any, chosen: Any, rejected: Any, beta: Any) -> Any:
    """SPPO with win probabilities of 1 and 0. Take it in rounds of self-play, where both answers come from the policy
    of the last round.
    """
    return (chosen - 1 / (2 * beta)) ** 2 + (rejected + 1 / (2 * beta)) ** 2


@preference_loss("2402.05369")
def nca_pair(m: Any, chosen: Any, rejected: Any, beta: Any) -> Any:
    """NCA: keeps the chosen response likely, not only likelier than the rejected one. Take it where the likelihood of
    chosen answers sinks along with that of the rejected ones.
    """
    either = m.log_sigmoid(-beta * chosen) + m.log_sigmoid(-beta * rejected)
    return -m.log_sigmoid(beta * chosen) - either / 2


@preference_loss("2406.05882", matched="margins")
def aot(m: Any, chosen: Any, rejected: Any, beta: Any, label_smoothing: Any) -> Any:
    """AOT: the policy's margin (chosen) against the reference's margin of the same rank (rejected). Take it where
    chosen answers are to beat rejected ones as a whole rather than pair by pair; in large batches.
    """
    return sigmoid(m, chosen, rejected, beta, label_smoothing)


@preference_loss("2406.05882", also=("aot_unpaired",), matched="sides")
def aot_pair(m: Any, chosen: Any, rejected: Any, beta: Any, label_smoothing: Any) -> Any:
    """AOT for unpaired data: a chosen response against the rejected one of the same rank. Take it where the two
    answers of a row do not belong together; in large batches.
    """
    return sigmoid(m, chosen, rejected, beta, label_smoothing)


@preference_loss("2408.06266")
def apo_zero(m: Any, chosen: Any, rejected: Any, beta: Any) -> Any:
    """APO: up with the chosen response, down with the rejected one. Take it where chosen responses are better than the
    policy's own, such as those of a stronger model.
    """
    return m.sigmoid(-beta * chosen) + m.sigmoid(beta * rejected)


@preference_loss("2408.06266")
def apo_down(m: Any, chosen: Any, rejected: Any, beta: Any) -> Any:
    """APO: down with both responses, more with the rejected one. Take it where chosen responses are worse than the
    policy's own, and only the difference teaches.
    """
    return m.sigmoid(beta * chosen) + m.sigmoid(-beta * (chosen - rejected))


@preference_loss("2406.08414", divergence=True)
def discopop(m: Any, chosen: Any, rejected: Any, beta: Any, discopop_tau: Any) -> Any:
    """DiscoPOP: logistic below a margin of 0, exponential above; their product is one exponential, which stays finite.
    Take it beside sigmoid, to see whether a loss that was found by search does better on your data.
    """
    margin = beta * (chosen - rejected)
    logistic = -m.log_sigmoid(margin) * m.sigmoid(-margin / discopop_tau)
    return logistic + m.exp(m.log_sigmoid(margin / discopop_tau) - margin)


@preference_loss("2411.15124", per="token", divergence=True)
def sigmoid_norm(m: Any, chosen: Any, rejected: Any, beta: Any) -> Any:
    """Length-normalised DPO, as for Tulu 3. Take it where answers of a pair differ in length, and the sum of log-probs
    would reward that.
    """
    return -m.log_sigmoid(beta * (chosen - rejected))


@preference_loss("2404.19733", of="logps", per="batch_token")
def sft(m: Any, chosen: Any, rejected: Any) -> Any:
    """Cross-entropy of the chosen responses, a mean over all of their tokens; rpo_alpha adds it. Take it beside another
    loss, to keep chosen answers likely; alone it is supervised fine-tuning on them.
    """
    return -chosen


@preference_loss("2405.14734", of="logps", per="token")
def simpo(m: Any, chosen: Any, rejected: Any, beta: Any, simpo_gamma: Any, label_smoothing: Any) -> Any:
    """SimPO: mean log-probs of a token instead of log-ratios, at least simpo_gamma apart. Take it without a reference,
    where memory is short or lengths differ; with a beta of 2 and more.
    """
    margin = beta * (chosen - rejected) - simpo_gamma
    return -(1 - label_smoothing) * m.log_sigmoid(margin) - label_smoothing * m.log_sigmoid(-margin)


@preference_loss("2403.07691", of="logps", per="token", sft_weight=1.0)
def orpo(m: Any, chosen: Any, rejected: Any, beta: Any) -> Any:
    """ORPO: the odds p / (1 - p) of the chosen response over those of the rejected one, p the mean probability of a
    token. Take it without a reference, in place of supervised fine-tuning and then DPO, from a base model.
    """
    # 1e-6 short of certainty, which is about as near as fp32 log-probs can tell, odds and slope are finite
    others = m.log1mexp(m.minimum(chosen, -1e-6)) - m.log1mexp(m.minimum(rejected, -1e-6))
    return -beta * m.log_sigmoid(chosen - rejected - others)


@preference_loss("2401.08417", of="logps", sft_weight="cpo_alpha")
def cpo(m: Any, chosen: Any, rejected: Any, beta: Any, label_smoothing: Any) -> Any:
    """CPO: DPO with a uniform reference, and the likelihood of the chosen response to make up for it. Take it without a
    reference, where chosen answers are close to perfect, as in translation.
    """
    return sigmoid(m, chosen, rejected, beta, label_smoothing)


# The tables of docs/losses.md

_SYMBOLS = {"beta": r"\beta", "label_smoothing": r"\epsilon", "discopop_tau": r"\tau", "simpo_gamma": r"\gamma"}
_SYMBOLS |= {"mean_reward": r"\delta", "f_alpha_divergence_coef": r"\alpha", "cpo_alpha": r"\alpha"}
# (of, per, matched) -> what a formula is called with, in symbols and in words
_SIDES = {
    ("log_ratios", "sequence", None): ("a", "b", "log-ratios"),
    ("log_ratios", "token", None): (r"\bar a", r"\bar b", "log-ratios, mean of a token"),
    ("log_ratios", "sequence", "margins"): ("p", "q^*", "margin of the policy, and of the reference by rank"),
    ("log_ratios", "sequence", "sides"): ("a", "b^*", "log-ratios, the rejected one by rank"),
    ("logps", "sequence", None): ("u", "v", "policy alone"),
    ("logps", "token", None): (r"\bar u", r"\bar v", "policy alone, mean of a token"),
    ("logps", "batch_token", None): (r"\hat u", r"\hat v", "policy alone, mean over all chosen tokens"),
}


def tables() -> str:
    """Every loss and f-divergence, in Markdown, from the declarations."""
    from fastdpo_kernels.symbolic import latex

    lines = ["| `loss_type` | loss of a pair | sees | options | f-divergence | paper |", "|---|---|---|---|---|---|"]
    for loss in dict.fromkeys(LOSSES.values()):
        chosen, rejected, sees = _SIDES[loss.of, loss.per, loss.matched]
        formula = latex(loss.formula, chosen, rejected, **{a.name: _SYMBOLS[a.name] for a in loss.arguments})
        if loss.sft_weight:
            formula += rf" + {_SYMBOLS.get(str(loss.sft_weight), '')} \mathrm{{sft}}"
        names, options = (", ".join(f"`{name}`" for name in group) for group in (loss.names, loss.options))
        paper = f"[{loss.paper}](https://arxiv.org/abs/{loss.paper})" if loss.paper else ""
        divergence = "yes" if loss.divergence else ""
        lines.append(f"| {names} | ${formula}$ | {sees} | {options} | {divergence} | {paper} |")
    lines += ["", "| `loss_type` | what it is, and when to take it |", "|---|---|"]
    for loss in dict.fromkeys(LOSSES.values()):
        lines.append(f"| `{loss.name}` | {' '.join((loss.formula.__doc__ or '').split())} |")
    lines += ["", "| `f_divergence_type` | in place of $a$ |", "|---|---|"]
    for name, score in DIVERGENCES.items():
        hyper = {} if score is None else {a: _SYMBOLS[a] for a in list(signature(score).parameters)[2:]}
        lines.append(f"| `{name}` | ${'a' if score is None else latex(score, 'a', **hyper)}$ |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(tables(), end="")
