"""Twenty steps beside TRL 1.16: padded there, packed with shared prompts here, otherwise the same run.

The same rows, as strings, go through both tokenization paths into the same tiny Llama in fp32 on CPU, with the same
optimizer, schedule and order. An epoch has ten steps, so the second half of a run takes its reference log-probs from
memory here, while TRL computes them again. Everything that both log is compared at every step, then the weights.

TRL logs token metrics (entropy, logits/*, mean_token_accuracy) as means of micro-batch means, fastdpo as means over
tokens: the same number only where a step is one micro-batch, so cases that accumulate leave these four out.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import draw_no_picture
from datasets import Dataset
from peft import LoraConfig
from tokenizers_for_tests import TEXT, byte_level
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedModel

import fastdpo

trl = pytest.importorskip("trl", "1.16", reason="parity is measured beside TRL 1.16, from the test extra (trl==1.16.0)")

STEPS, PAIRS_A_STEP, ROWS = 20, 4, 40
RELATIVE = 1e-4
EPS = torch.finfo(torch.float32).eps
TOKEN_KEYS = {"entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected"}
REWARD_KEYS = {"rewards/chosen", "rewards/rejected", "rewards/margins"}
OTHER_KEYS = {"loss", "grad_norm", "rewards/accuracies", "logps/chosen", "logps/rejected"}
OTHER_KEYS |= {"learning_rate", "num_tokens", "epoch", "step"}
KEYS = TOKEN_KEYS | REWARD_KEYS | OTHER_KEYS


@dataclass(frozen=True)
class Case:
    """One pair of runs."""

    loss: str
    beta: float
    lora: bool
    accumulation: int  # micro-batches that the 4 pairs of a step come in
    learning_rate: float
    tied: bool = False
    weights: tuple[float, ...] | None = None  # of the losses in `loss`, joined by +
    router_coef: float | None = None  # of a mixture of experts
    synced: tuple[float, int] | None = None  # share of the policy in the reference, and every how many steps

    def __str__(self) -> str:
        more = "tied-" * self.tied + "synced-" * bool(self.synced) + "experts-" * bool(self.router_coef)
        return f"{self.loss}-{'lora' if self.lora else 'full'}-{more}accumulate{self.accumulation}"


SYNCED = {"sync_ref_model": False, "ref_model_mixup_alpha": 0.9, "ref_model_sync_steps": 64}
CASES = (
    Case("sigmoid", 0.1, lora=True, accumulation=1, learning_rate=1e-2),
    Case("sigmoid", 0.5, lora=False, accumulation=2, learning_rate=1e-3),
    Case("ipo", 0.1, lora=True, accumulation=2, learning_rate=1e-2),
    Case("ipo", 0.3, lora=False, accumulation=1, learning_rate=1e-3, tied=True),
    # beta so large that the hinge is flat for some pairs by the end
    Case("hinge", 0.5, lora=True, accumulation=2, learning_rate=1e-2),
    Case("hinge", 1.0, lora=False, accumulation=1, learning_rate=1e-3),
    Case("apo_zero", 0.5, lora=True, accumulation=2, learning_rate=1e-2),
    Case("sppo_hard", 0.3, lora=False, accumulation=2, learning_rate=1e-3),
    Case("sigmoid", 0.5, lora=False, accumulation=2, learning_rate=1e-3, synced=(0.6, 3)),
    Case("sigmoid", 0.5, lora=False, accumulation=1, learning_rate=1e-3, router_coef=0.1),
    Case("ipo", 0.1, lora=True, accumulation=1, learning_rate=1e-2, router_coef=0.1),
    # sft is a mean over the tokens of the optimizer batch here, of the micro-batch there
    Case("sigmoid+sft", 0.2, lora=True, accumulation=1, learning_rate=1e-2, weights=(1.0, 0.3)),
)


def make_rows() -> dict[str, list[str]]:
    """Strings of ragged lengths: prompts of 1 to 25 words, answers of 1 to 18, some words twice in a row."""
    draw = random.Random(20)
    words = [word for text in (TEXT, "the a of") for word in text.split()]

    def text(most: int) -> str:
        chosen = draw.choices(words, k=draw.randint(1, most))
        return " ".join(word for word in chosen for _ in range(draw.choice((1, 1, 2))))

    rows = [(text(25), " " + text(18), " " + text(18)) for _ in range(ROWS)]
    return dict(zip(("prompt", "chosen", "rejected"), map(list, zip(*rows, strict=True)), strict=True))


def make_model(vocabulary: int, tied: bool, experts: bool) -> PreTrainedModel:
    """Weights much larger than a fresh model's, so that log-probs differ from row to row and soon move."""
    torch.manual_seed(1)
    kind, more = (MixtralConfig, {"num_local_experts": 4}) if experts else (LlamaConfig, {})
    config = kind(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        **more,
    )
    return AutoModelForCausalLM.from_config(config)


def options(case: Case, output_dir: Path) -> dict[str, Any]:
    """What both configs are given, under the same names."""
    return {
        "output_dir": str(output_dir),
        "loss_type": case.loss.split("+"),
        "loss_weights": None if case.weights is None else list(case.weights),
        "router_aux_loss_coef": case.router_coef,
        **(SYNCED if case.synced is None else dict(zip(SYNCED, (True, *case.synced), strict=True))),
        "beta": case.beta,
        "learning_rate": case.learning_rate,
        "optim": "adamw_torch",
        # Adam moves an entry whose gradient is rounding noise by the whole learning rate, in a direction that two
        # right computations need not share. With the usual 1e-8 one entry of an adapter parts ways, as it also does
        # between two splits into micro-batches here; 1e-6 is above the noise of these gradients, far below their size.
        "adam_epsilon": 1e-6,
        "weight_decay": 0.1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 4,
        "max_grad_norm": 1.0,
        "per_device_train_batch_size": PAIRS_A_STEP // case.accumulation,
        "gradient_accumulation_steps": case.accumulation,
        "max_steps": STEPS,
        "train_sampling_strategy": "sequential",
        "max_length": 512,
        "disable_dropout": True,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 3,
    }


@dataclass(frozen=True)
class Run:
    """What a finished run leaves."""

    trainer: Any
    rows: list[dict[str, float]]  # one a step
    start: dict[str, Tensor]  # the model's weights and adapters before the first step


def train_with_trl(
    case: Case, model: PreTrainedModel, tokenizer: Any, adapters: LoraConfig | None, folder: Path
) -> Run:
    trainer = trl.DPOTrainer(
        copy.deepcopy(model),
        ref_model=None if case.lora else copy.deepcopy(model),  # TRL would read it from disk
        args=trl.DPOConfig(**options(case, folder)),
        train_dataset=Dataset.from_dict(make_rows()),
        processing_class=tokenizer,
        peft_config=copy.deepcopy(adapters),
    )
    return finish(trainer, copy.deepcopy(trainer.model.state_dict()))


def train_with_fastdpo(
    case: Case,
    model: PreTrainedModel,
    tokenizer: Any,
    adapters: LoraConfig | None,
    folder: Path,
    start: dict[str, Tensor],
) -> Run:
    # the routers' auxiliary loss is a micro-batch's own
    one_microbatch: dict[str, Any] = {"max_tokens_per_microbatch": 100_000} if case.router_coef else {}
    trainer = fastdpo.DPOTrainer(
        copy.deepcopy(model),
        args=fastdpo.DPOConfig(**options(case, folder), **one_microbatch),
        train_dataset=make_rows(),
        processing_class=tokenizer,
        peft_config=copy.deepcopy(adapters),
    )
    trainer.model.load_state_dict(start)
    return finish(trainer, start)


def finish(trainer: Any, start: dict[str, Tensor]) -> Run:
    trainer.train()
    return Run(trainer, [row for row in trainer.state.log_history if "loss" in row], start)


@contextmanager
def one_thread() -> Iterator[None]:
    """Matrices this small only wait for a second thread, on a busy machine for most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train_both(case: Case, folder: Path) -> tuple[Run, Run]:
    """One after the other: either trainer's config takes Accelerate's state of the process from the other."""
    tokenizer = byte_level(adds_bos=True)
    model = make_model(len(tokenizer), case.tied, case.router_coef is not None)
    adapters = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear") if case.lora else None
    theirs = train_with_trl(case, model, tokenizer, adapters, folder / "trl")
    return theirs, train_with_fastdpo(case, model, tokenizer, adapters, folder / "fastdpo", theirs.start)


@pytest.fixture(scope="module", params=CASES, ids=str)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Run, Run]:
    with one_thread(), pytest.MonkeyPatch.context() as patch:
        draw_no_picture(patch)
        return request.param, *train_both(request.param, tmp_path_factory.mktemp("parity"))


def tolerance(case: Case, key: str, row: dict[str, float]) -> float:
    """1e-4 relative, and a floor where a number is small because larger ones cancel in it.

    A reward is beta times a difference of two log-prob sums: close to 0 at first, but never more exact than the sums,
    which the trainers add up in an order of their own (up to 4 relative roundings of a sum seen, 8 allowed). The mean
    logit over tokens and vocabulary lies close to 0 too, and carries the rounding of logits of size 1.
    """
    floor = 0.0
    if key in REWARD_KEYS:
        floor = 8 * EPS * case.beta * max(abs(row["logps/chosen"]), abs(row["logps/rejected"]))
    elif key in ("logits/chosen", "logits/rejected"):
        floor = 8 * EPS
    return RELATIVE * abs(row[key]) + floor


def test_both_make_the_same_tokens_of_the_rows(runs: tuple[Case, Run, Run]) -> None:
    _, theirs, ours = runs
    tables = [run.trainer.train_dataset for run in (theirs, ours)]
    for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert list(tables[0][column]) == list(tables[1][column])
    lengths = {len(ids) for ids in tables[1]["prompt_ids"]}
    assert len(lengths) > 10, "the rows are meant to be ragged"


def test_fastdpo_packs_and_takes_the_reference_that_trl_takes(runs: tuple[Case, Run, Run]) -> None:
    case, theirs, ours = runs
    assert ours.trainer.layout.packed
    assert (ours.trainer.ref_model is None) == (theirs.trainer.ref_model is None) == case.lora


def test_every_logged_number_agrees_at_every_step(runs: tuple[Case, Run, Run]) -> None:
    case, theirs, ours = runs
    assert len(theirs.rows) == len(ours.rows) == STEPS
    for expected, got in zip(theirs.rows, ours.rows, strict=True):
        shared = set(expected) & set(got)
        assert shared >= (KEYS if case.router_coef is None else KEYS | {"aux_loss"})
        for key in shared - (TOKEN_KEYS if case.accumulation > 1 else set()):
            difference = abs(expected[key] - got[key])
            message = f"step {expected['step']}, {key}: TRL {expected[key]!r}, fastdpo {got[key]!r}"
            assert difference <= tolerance(case, key, expected), message


def test_the_run_moves_enough_to_mean_something(runs: tuple[Case, Run, Run]) -> None:
    case, _, ours = runs
    losses = [row["loss"] for row in ours.rows]
    assert abs(losses[-1] - losses[0]) > 1e-2
    assert ours.rows[0]["rewards/margins"] == 0.0
    assert max(abs(row["rewards/margins"]) for row in ours.rows) > 0.1
    assert max(row["grad_norm"] for row in ours.rows) > 1.0, "clipping is meant to act"
    if case.loss == "hinge":
        assert min(losses) < 0.5, "the flat part of the hinge is meant to be reached"


def test_weights_agree_after_twenty_steps(runs: tuple[Case, Run, Run]) -> None:
    """To 1e-4 of the way that a tensor has come, which is shorter than the tensor is long."""
    _, theirs, ours = runs
    expected, got = (dict(run.trainer.model.named_parameters()) for run in (theirs, ours))
    assert expected.keys() == got.keys()
    moved = 0
    for name, parameter in expected.items():
        way = (parameter - theirs.start[name]).norm()
        moved += int(way > 0)
        assert parameter.requires_grad == got[name].requires_grad, name
        assert (parameter - got[name]).norm() <= RELATIVE * way, name
    assert moved == sum(parameter.requires_grad for parameter in expected.values())
