"""Twenty steps beside TRL 1.16: padded there, packed with shared prompts here, otherwise the same run.

The same rows as strings go through both tokenization paths into the same tiny Llama in fp32 on CPU, with the same optimizer, schedule
and order. Ten batches an epoch, so the second half of a run takes its reference log-probs from memory here while TRL computes them.

TRL logs its token metrics (entropy, logits, accuracy of tokens) as a mean of micro-batch means, fastdpo as a mean over tokens: the two
are one number only where a step is one micro-batch, so accumulating cases leave these keys out.

Legend: A_x is a number of TRL's run, B_x the same of fastdpo's.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers_for_tests import TEXT, byte_level
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import fastdpo

trl = pytest.importorskip("trl", reason="parity is measured against TRL, which is in the test extra: pip install -e '.[test]'")

STEPS, PAIRS_A_STEP, ROWS = 20, 4, 40
RTOL = 1e-4
# A log-prob is an fp32 sum of up to 50 terms, so a difference of two carries rounding of the sums' size, however small it is itself.
ROUNDING = 8 * torch.finfo(torch.float32).eps
TOKEN_KEYS = {"entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected"}
KEYS = {"loss", "grad_norm", "learning_rate", "epoch", "num_tokens", "logps/chosen", "logps/rejected"}
KEYS |= {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"} | TOKEN_KEYS


@dataclass(frozen=True)
class Case:
    """One pair of runs."""

    loss: str
    beta: float
    lora: bool
    accumulation: int  # micro-batches that the 4 pairs of a step come in
    learning_rate: float
    tied: bool = False

    def __str__(self) -> str:
        return f"{self.loss}-{'lora' if self.lora else 'full'}-{'tied-' * self.tied}accumulate{self.accumulation}"


CASES = (
    Case("sigmoid", 0.1, lora=True, accumulation=1, learning_rate=1e-2),
    Case("sigmoid", 0.5, lora=False, accumulation=2, learning_rate=1e-3),
    Case("ipo", 0.1, lora=True, accumulation=2, learning_rate=1e-2),
    Case("ipo", 0.3, lora=False, accumulation=1, learning_rate=1e-3, tied=True),
    Case("hinge", 0.05, lora=True, accumulation=2, learning_rate=1e-2),
    Case("hinge", 0.02, lora=False, accumulation=1, learning_rate=1e-3),
)


def make_rows() -> dict[str, list[str]]:
    """Strings of ragged lengths: prompts of 1 to 25 words, answers of 1 to 18."""
    draw = random.Random(20)
    words = TEXT.split()
    text = lambda most: " ".join(draw.choice(words) for _ in range(draw.randint(1, most)))  # noqa: E731
    rows = [(text(25), " " + text(18), " " + text(18)) for _ in range(ROWS)]
    return {name: list(column) for name, column in zip(("prompt", "chosen", "rejected"), zip(*rows, strict=True), strict=True)}


def make_model(vocabulary: int, tied: bool) -> LlamaForCausalLM:
    """Weights much larger than a fresh model's, so that log-probs differ from row to row and move within a few steps."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def options(case: Case, output_dir: Path) -> dict[str, Any]:
    """What both configs are given, under the same names."""
    return {
        "output_dir": str(output_dir),
        "loss_type": [case.loss],
        "beta": case.beta,
        "learning_rate": case.learning_rate,
        "optim": "adamw_torch",
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


def train_with_trl(case: Case, model: LlamaForCausalLM, tokenizer: Any, adapters: LoraConfig | None, folder: Path) -> Run:
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
    case: Case, model: LlamaForCausalLM, tokenizer: Any, adapters: LoraConfig | None, folder: Path, start: dict[str, Tensor]
) -> Run:
    trainer = fastdpo.DPOTrainer(
        copy.deepcopy(model),
        args=fastdpo.DPOConfig(**options(case, folder)),
        train_dataset=make_rows(),
        processing_class=tokenizer,
        peft_config=copy.deepcopy(adapters),
    )
    trainer.model.load_state_dict(start)
    return finish(trainer, start)


def finish(trainer: Any, start: dict[str, Tensor]) -> Run:
    trainer.train()
    return Run(trainer, [row for row in trainer.state.log_history if "loss" in row], start)


def train_both(case: Case, folder: Path) -> tuple[Run, Run]:
    """One after the other: either trainer's config takes Accelerate's state of the process from the other."""
    tokenizer = byte_level(adds_bos=True)
    model = make_model(len(tokenizer), case.tied)
    adapters = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear") if case.lora else None
    theirs = train_with_trl(case, model, tokenizer, adapters, folder / "trl")
    return theirs, train_with_fastdpo(case, model, tokenizer, adapters, folder / "fastdpo", theirs.start)
