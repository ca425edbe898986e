"""Every loss and modifier trained for three steps: beside TRL 1.16, and beside a plain loop in float64.

Policy and reference differ from the start, by a reference model of its own, so that nothing is compared at a margin of
0, where most losses have one slope. The plain loop takes the model's own logits, one sequence at a time, and a formula
that is written here anew; it takes the gradients by autograd and steps by plain SGD, whose error does not grow as
Adam's does where a gradient is nearly 0. Loss and gradient norm are compared at every step, weights after the last.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import draw_no_picture, tiny_llama
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model
from tokenizers_for_tests import TEXT, byte_level, config
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import fastdpo
from fastdpo.config import DPOConfig
from fastdpo.data import load_rows, tokenize_pairs
from fastdpo.losses import LOSSES
from fastdpo.quantized import is_quantized

STEPS, PAIRS, SPEED, RELATIVE = 3, 5, 0.01, 1e-4
EPS = torch.finfo(torch.float32).eps
LORA = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
POLICY_ALONE = {"sft", "simpo", "orpo", "cpo"}


# The formulas, once more


@dataclass(frozen=True)
class Seen:
    """What a loss sees of P pairs: each (P, 2), chosen and rejected."""

    policy: Tensor  # log-probs, summed
    ref: Tensor
    tokens: Tensor  # scored
    sft: Tensor  # mean log-prob of all chosen tokens, 0-dim
    c: DPOConfig
    mean_reward: float

    @property
    def ratios(self) -> tuple[Tensor, Tensor]:
        chosen, rejected = (self.policy - self.ref).unbind(1)
        return chosen, rejected

    @property
    def scores(self) -> Tensor:
        """f'(ratio), of the divergence."""
        t, alpha = self.policy - self.ref, self.c.f_alpha_divergence_coef
        return {
            "reverse_kl": lambda: t,
            "forward_kl": lambda: 1 - torch.exp(-t),
            "js_divergence": lambda: math.log(2) + logsigmoid(t),
            "alpha_divergence": lambda: (1 - torch.exp(-alpha * t)) / alpha,
        }[self.c.f_divergence_type]()

    @property
    def margin(self) -> Tensor:
        """(P,) beta times the difference of the scores."""
        return self.c.beta * difference(self.scores)

    def smooth(self, margin: Tensor) -> Tensor:
        share = self.c.label_smoothing
        return -(1 - share) * logsigmoid(margin) - share * logsigmoid(-margin)


def difference(sides: Tensor) -> Tensor:
    return sides[:, 0] - sides[:, 1]


def sorted_difference(one: Tensor, other: Tensor) -> Tensor:
    return one.sort().values - other.sort().values


def robust(x: Seen) -> Tensor:
    share = x.c.label_smoothing
    return (share * logsigmoid(-x.margin) - (1 - share) * logsigmoid(x.margin)) / (1 - 2 * share)


def exo_pair(x: Seen) -> Tensor:
    """The KL divergence from the policy's preference to the label's."""
    share = x.c.label_smoothing or 1e-3
    label = torch.tensor([1 - share, share], dtype=x.margin.dtype)
    preference = torch.stack([x.margin, -x.margin], 1).sigmoid()
    return (preference * (preference / label).log()).sum(1)


def bco_pair(x: Seen) -> Tensor:
    chosen, rejected = x.ratios
    return -logsigmoid(x.c.beta * chosen - x.mean_reward) - logsigmoid(-(x.c.beta * rejected - x.mean_reward))


def sppo_hard(x: Seen) -> Tensor:
    (chosen, rejected), half = x.ratios, 0.5 / x.c.beta
    return (chosen - half) ** 2 + (rejected + half) ** 2


def nca_pair(x: Seen) -> Tensor:
    chosen, rejected = (x.c.beta * side for side in x.ratios)
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def discopop(x: Seen) -> Tensor:
    share = (x.margin / x.c.discopop_tau).sigmoid()
    return -logsigmoid(x.margin) * (1 - share) + torch.exp(-x.margin) * share


def orpo(x: Seen) -> Tensor:
    odds = [mean.exp() / (1 - mean.exp()) for mean in (x.policy / x.tokens).unbind(1)]
    return -x.c.beta * logsigmoid(torch.log(odds[0] / odds[1])) - x.sft


FORMULAS: dict[str, Callable[[Seen], Tensor]] = {
    "sigmoid": lambda x: x.smooth(x.margin),
    "hinge": lambda x: torch.relu(1 - x.margin),
    "ipo": lambda x: (difference(x.scores / x.tokens) - 0.5 / x.c.beta) ** 2,
    "robust": robust,
    "exo_pair": exo_pair,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "nca_pair": nca_pair,
    "aot": lambda x: x.smooth(x.c.beta * sorted_difference(difference(x.policy), difference(x.ref))),
    "aot_pair": lambda x: x.smooth(x.c.beta * sorted_difference(*x.ratios)),
    "aot_unpaired": lambda x: x.smooth(x.c.beta * sorted_difference(*x.ratios)),
    "apo_zero": lambda x: 1 - (x.c.beta * x.ratios[0]).sigmoid() + (x.c.beta * x.ratios[1]).sigmoid(),
    "apo_down": lambda x: (x.c.beta * x.ratios[0]).sigmoid() + 1 - (x.c.beta * difference(x.policy - x.ref)).sigmoid(),
    "discopop": discopop,
    "sigmoid_norm": lambda x: -logsigmoid(x.c.beta * difference(x.scores / x.tokens)),
    "sft": lambda x: -x.sft.expand(len(x.policy)),
    "simpo": lambda x: x.smooth(x.c.beta * difference(x.policy / x.tokens) - x.c.simpo_gamma),
    "orpo": orpo,
    "cpo": lambda x: x.smooth(x.c.beta * difference(x.policy)) - x.c.cpo_alpha * x.sft,
}


# The cases


@dataclass(frozen=True)
class Case:
    """Options of a run; `trl` are those that TRL 1.16 is given instead, None where it has no such run."""

    name: str
    options: dict[str, Any]
    trl: dict[str, Any] | None = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    @property
    def has_reference(self) -> bool:
        return not self.options.get("reference_free") and not set(self.options["loss_type"]) <= POLICY_ALONE


def _loss(name: str) -> Case:
    smoothed = {"label_smoothing": 0.1} if name in ("exo_pair", "robust") else {}
    theirs = {"aot_pair": {"loss_type": ["aot_unpaired"]}, **dict.fromkeys(("simpo", "orpo", "cpo"))}
    return Case(name, {"loss_type": [name], **smoothed}, theirs.get(name, {}))


def _modifier(name: str, trl: dict[str, Any] | None = None, *, as_trl: bool = True, **options: Any) -> Case:
    return Case(name, {"loss_type": ["sigmoid"], **options}, (trl or {}) if as_trl else None)


WITH_SFT = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3], "rpo_alpha": None}
MPO = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
LOSS_CASES = [_loss(name) for name in LOSSES]
MODIFIERS = [
    _modifier("MPO", **MPO),
    _modifier("rpo_alpha", WITH_SFT, rpo_alpha=0.3),
    _modifier("ld_alpha", ld_alpha=0.4),
    _modifier("ld_alpha-ipo", ld_alpha=0.4, loss_type=["ipo"]),
    _modifier("use_weighting", use_weighting=True),
    _modifier("forward_kl", f_divergence_type="forward_kl"),
    _modifier("js_divergence", f_divergence_type="js_divergence"),
    _modifier("js_divergence-ipo", f_divergence_type="js_divergence", loss_type=["ipo"]),
    _modifier("js_divergence-exo_pair", f_divergence_type="js_divergence", loss_type=["exo_pair"], label_smoothing=0.2),
    _modifier(
        "alpha_divergence",
        {"f_alpha_divergence_coef": 0.3},  # counts 1 - alpha
        f_divergence_type="alpha_divergence",
        f_alpha_divergence_coef=0.7,
    ),
    _modifier("discopop_tau", loss_type=["discopop"], discopop_tau=0.5),
    _modifier("label_smoothing-aot", loss_type=["aot"], label_smoothing=0.2),
    # what TRL 1.16 has no more, ignores or never had
    _modifier("label_smoothing", label_smoothing=0.2, as_trl=False),
    _modifier("label_smoothing-simpo", loss_type=["simpo"], simpo_gamma=1.5, label_smoothing=0.1, as_trl=False),
    _modifier("cpo_alpha", loss_type=["cpo"], cpo_alpha=0.3, as_trl=False),
    _modifier("exo_pair without smoothing", loss_type=["exo_pair"], as_trl=False),
    _modifier("bco_running_mean", loss_type=["bco_pair"], bco_running_mean=True, as_trl=False),
    _modifier("reference_free", reference_free=True, as_trl=False),
    _modifier("reference_free-bco_pair", reference_free=True, loss_type=["bco_pair"], as_trl=False),
    _modifier("use_weighting-hinge", loss_type=["hinge"], use_weighting=True, as_trl=False),
    _modifier("sync_ref_model", sync_ref_model=True, ref_model_mixup_alpha=0.6, ref_model_sync_steps=2, as_trl=False),
]


def options_of(case: Case, output_dir: Path) -> dict[str, Any]:
    """What TRL's config takes, too."""
    return {
        "output_dir": str(output_dir),
        "beta": 0.3,
        "learning_rate": SPEED,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1e6,  # measured and never reached
        "per_device_train_batch_size": PAIRS,
        "max_steps": STEPS,
        "max_length": 256,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **case.options,
    }


def make_rows() -> dict[str, list[str]]:
    """Answers of so many words that margins lie close together, and the reference ranks them otherwise."""
    draw = random.Random(5)
    words = {"prompt": (9, 2, 1, 6, 4), "chosen": (4, 5, 2, 6, 3), "rejected": (5, 6, 3, 5, 4)}
    return {side: [" " + " ".join(draw.choices(TEXT.split(), k=k)) for k in lengths] for side, lengths in words.items()}


# The plain loop


@dataclass(frozen=True)
class Numbers:
    """Of one run."""

    losses: list[float]
    norms: list[float]
    trained: dict[str, Tensor]  # after the last step


def token_logps(model: Any, prompt: list[int], response: list[int]) -> tuple[Tensor, Tensor]:
    """-> (T,) log-probs of the response and (T,) log of the sum of all squared probabilities there."""
    log_probs = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return log_probs.gather(1, torch.tensor(response)[:, None])[:, 0], (2 * log_probs).logsumexp(-1)


def see(model: Any, table: Any, c: DPOConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> (P, 2) sums, (P, 2) counts, the mean of all chosen tokens, (P,) weights."""
    sums, counts, chosen, weights = [], [], [], []
    for row in table:
        sides = [token_logps(model, row["prompt_ids"], row[side]) for side in ("chosen_ids", "rejected_ids")]
        shorter = min(len(logps) for logps, _ in sides)
        tail = 1.0 if c.ld_alpha is None else c.ld_alpha
        sums.append(torch.stack([logps[:shorter].sum() + tail * logps[shorter:].sum() for logps, _ in sides]))
        counts.append([len(logps) for logps, _ in sides])
        chosen.append(sides[0][0])
        weights.append(sum((logps - squares).mean() for logps, squares in sides).exp())  # type: ignore[union-attr]
    return torch.stack(sums), torch.tensor(counts), torch.cat(chosen).mean(), torch.stack(weights).detach()


def plain_loss(x: Seen, weights: Tensor) -> Tensor:
    names = x.c.loss_type
    total = torch.zeros((), dtype=x.policy.dtype)
    for name, weight in zip(names, x.c.loss_weights or [1.0] * len(names), strict=True):
        losses = FORMULAS[str(name)](x)
        total = total + weight * (losses * weights if x.c.use_weighting else losses).mean()
    return total - (x.c.rpo_alpha or 0.0) * x.sft


def train_plainly(model: Any, ref_model: Any, table: Any, c: DPOConfig) -> Numbers:
    """In float64; ref_model None: log-probs of 0, but with sync_ref_model a copy that follows the policy."""
    model = copy.deepcopy(model).double().eval()
    other: Any = copy.deepcopy(model if c.sync_ref_model else ref_model)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    losses, norms, seen_rewards = [], [], []
    for step in range(1, STEPS + 1):
        policy, tokens, sft, weights = see(model, table, c)
        with torch.no_grad():
            ref = torch.zeros_like(policy) if other is None else see(other.double().eval(), table, c)[0]
        seen_rewards.append((c.beta * (policy - ref)).mean().item())
        mean = sum(seen_rewards) / step if c.bco_running_mean else 0.0
        loss = plain_loss(Seen(policy, ref, tokens, sft, c, mean), weights)
        gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        norms.append(torch.stack([g.norm() for g in gradients if g is not None]).norm().item())
        losses.append(loss.item())
        with torch.no_grad():
            for value, gradient in zip(trained.values(), gradients, strict=True):
                value -= 0 if gradient is None else SPEED * gradient
            if c.sync_ref_model and step % c.ref_model_sync_steps == 0:
                for name, value in other.named_parameters():  # type: ignore[union-attr]
                    value.data.lerp_(dict(model.named_parameters())[name], c.ref_model_mixup_alpha)
    return Numbers(losses, norms, {name: value.detach() for name, value in trained.items()})


# The runs


@dataclass(frozen=True)
class Kind:
    """What is trained, and how it is batched."""

    model: Any
    ref_model: Any
    plain: Any  # the same weights for the plain loop
    packed: bool
    microbatches: int = 1
    options: dict[str, Any] = field(default_factory=dict)


def shifted(model: Any) -> Any:
    """A model a little way off: log-ratios of some units."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(4)
    with torch.no_grad():
        for value in other.parameters():
            value += 0.25 * value.std() * torch.randn(value.shape, generator=generator) if value.ndim > 1 else 0
    return other.requires_grad_(False)


def lora_of(base: Any) -> Any:
    torch.manual_seed(2)
    adapted = get_peft_model(base, copy.deepcopy(LORA))
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_" in name:
                value *= 0.3
    return adapted


def llama() -> Any:
    return tiny_llama(hidden_size=64, intermediate_size=64, initializer_range=0.15)


@pytest.fixture(scope="module")
def lora() -> Kind:
    model = lora_of(llama())
    return Kind(model, shifted(llama()), model, packed=True)


@pytest.fixture(scope="module")
def padded() -> Kind:
    """Full training of a model without position ids; pairs come in several micro-batches."""
    model: Any = tiny_model("bloom", vocab_size=500)
    return Kind(model, shifted(model), model, packed=False, microbatches=2, options={"max_tokens_per_microbatch": 100})


@pytest.fixture(scope="module")
def in_4_bits(tmp_path_factory: pytest.TempPathFactory) -> Kind:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    llama().save_pretrained(folder := tmp_path_factory.mktemp("whole"))
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    packed: Any = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32
    )
    state = {
        f"{name}.weight": bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        for name, layer in packed.named_modules()
        if is_quantized(layer)
    }
    assert len(state) == 2 * 7
    dense = llama()
    dense.load_state_dict(state, strict=False)
    return Kind(lora_of(packed), shifted(llama()), lora_of(dense), packed=True, options={"fused_kernels": True})


def run_fastdpo(case: Case, kind: Kind, folder: Path) -> tuple[fastdpo.DPOTrainer, Numbers]:
    options = {**options_of(case, folder), **kind.options}
    if "bco_pair" in options["loss_type"] and "bco_running_mean" not in options:
        options["bco_running_mean"] = False  # TRL 1.16's, and what an evaluation before the first step has
    given = case.has_reference and not options.get("sync_ref_model")
    trainer = fastdpo.DPOTrainer(
        copy.deepcopy(kind.model),
        ref_model=copy.deepcopy(kind.ref_model) if given else None,
        args=DPOConfig(**options, eval_on_start=True, eval_strategy="epoch", per_device_eval_batch_size=PAIRS),
        train_dataset=make_rows(),
        eval_dataset=make_rows(),
        processing_class=byte_level(adds_bos=True),
    )
    trainer.train()
    return trainer, numbers_of(trainer)


def numbers_of(trainer: Any) -> Numbers:
    rows = [row for row in trainer.state.log_history if "grad_norm" in row]
    trained = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    return Numbers([row["loss"] for row in rows], [row["grad_norm"] for row in rows], trained)


def assert_equal(got: Numbers, expected: Numbers, before: Any) -> None:
    """Weights to 1e-4 of the way that a tensor has come, and what each step of it rounds in float32."""
    assert len(got.losses) == STEPS
    assert got.losses == pytest.approx(expected.losses, rel=RELATIVE)
    assert got.norms == pytest.approx(expected.norms, rel=RELATIVE)
    assert got.trained.keys() == expected.trained.keys()
    start = {name: value.detach() for name, value in before.named_parameters()}
    for name, value in expected.trained.items():
        way, rounding = (value - start[name]).norm(), STEPS * EPS / 2 * start[name].norm()
        assert (got.trained[name] - value).norm() <= RELATIVE * way + rounding, name


@pytest.fixture(autouse=True)
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_no_picture(monkeypatch)


def check_beside_the_plain_loop(case: Case, kind: Kind, folder: Path) -> None:
    trainer, got = run_fastdpo(case, kind, folder)
    assert trainer.layout.packed == kind.packed
    (step,) = trainer.get_train_dataloader()
    assert len(step) == kind.microbatches
    ref_model = kind.ref_model if case.has_reference else None
    expected = train_plainly(kind.plain, ref_model, trainer.train_dataset, trainer.args)
    assert_equal(got, expected, kind.plain)
    if not trainer.args.bco_running_mean or "bco_pair" not in trainer.args.loss_type:
        evaluated = next(row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row)
        assert evaluated == pytest.approx(got.losses[0], rel=1e-6)


@pytest.mark.parametrize("case", [case for case in LOSS_CASES + MODIFIERS if case.trl is None], ids=str)
def test_adapters_train_as_a_plain_loop_trains_them_where_trl_has_no_such_loss(case, lora, tmp_path) -> None:
    check_beside_the_plain_loop(case, lora, tmp_path)


@pytest.mark.parametrize("case", LOSS_CASES, ids=str)
def test_every_loss_trains_all_weights_of_a_padded_model_as_a_plain_loop_does(case, padded, tmp_path) -> None:
    check_beside_the_plain_loop(case, padded, tmp_path)


@pytest.mark.parametrize("case", LOSS_CASES, ids=str)
def test_every_loss_trains_adapters_on_4_bits_as_a_plain_loop_does_on_what_they_stand_for(
    case, in_4_bits, tmp_path
) -> None:
    check_beside_the_plain_loop(case, in_4_bits, tmp_path)


@pytest.mark.parametrize("case", [case for case in LOSS_CASES + MODIFIERS if case.trl is not None], ids=str)
def test_adapters_train_as_trl_trains_them(case: Case, lora: Kind, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", "1.16", reason="measured beside TRL 1.16, from the test extra (trl==1.16.0)")
    options = {**options_of(case, tmp_path / "trl"), **(case.trl or {})}
    theirs = trl.DPOTrainer(
        copy.deepcopy(lora.model),
        ref_model=copy.deepcopy(lora.ref_model),
        args=trl.DPOConfig(**{name: value for name, value in options.items() if value is not None}),
        train_dataset=Dataset.from_dict(make_rows()),
        processing_class=byte_level(adds_bos=True),
    )
    theirs.train()
    ours, got = run_fastdpo(case, lora, tmp_path / "fastdpo")
    assert ours.layout.packed
    assert_equal(got, numbers_of(theirs), lora.model)
    evaluated = next(row["eval_loss"] for row in ours.state.log_history if "eval_loss" in row)
    assert evaluated == pytest.approx(got.losses[0], rel=1e-6)


def test_every_loss_is_trained_and_nearly_all_beside_trl() -> None:
    assert set(FORMULAS) == set(LOSSES)
    assert {str(case) for case in LOSS_CASES if case.trl is None} == {"simpo", "orpo", "cpo"}


@pytest.mark.parametrize("kind", ["lora", "padded", "in_4_bits"])
def test_the_rows_tell_all_losses_and_modifiers_apart(kind, request, tmp_path) -> None:
    """Two formulas that gave one number here could stand for each other above."""
    model: Kind = request.getfixturevalue(kind)
    ids = tokenize_pairs(load_rows(make_rows(), "train", "train"), byte_level(adds_bos=True), config(), "train")
    with torch.no_grad():
        ref = see(model.ref_model.eval(), ids, DPOConfig(str(tmp_path)))[0]
    losses = {}
    for case in LOSS_CASES + MODIFIERS if kind == "lora" else LOSS_CASES:
        c = DPOConfig(**options_of(case, tmp_path))
        with torch.no_grad():
            policy, tokens, sft, weights = see(model.plain.eval(), ids, c)
        mean = (c.beta * (policy - ref)).mean().item() if case.name == "bco_running_mean" else 0.0
        seen = Seen(policy, torch.zeros_like(ref) if c.reference_free else ref, tokens, sft, c, mean)
        losses[case.name] = float(plain_loss(seen, weights))
    del losses["aot_unpaired"]  # another name of aot_pair
    losses.pop("sync_ref_model", None)  # sigmoid, whose reference moves
    ordered = sorted(losses.values())
    assert all(more - less > 2 * RELATIVE * more for less, more in pairwise(ordered))
