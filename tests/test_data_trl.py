"""Real and odd rows get the very tokens that TRL gives them, but for implicit prompts that TRL ends inside a word."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tokenizers_for_tests import BAD, CHAT, GOOD, TOKENIZERS, USER, byte_level, pairs_of

from fastdpo.data import TokenPair, load_rows
from fastdpo.rows import common_prefix_length

DATA = Path(os.environ.get("FASTDPO_DATA", Path(__file__).parents[2] / "shared" / "data"))
REAL_FILES = ("hh_explicit_prompt", "hh_implicit_prompt", "hh_conversational")


def real_file(name: str) -> Path:
    path = DATA / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"no real preference data: {path} does not exist (FASTDPO_DATA names another directory)")
    return path


@pytest.fixture(scope="module")
def trl_pairs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What TRL's own trainer makes of rows; a one-layer model satisfies its constructor."""
    trl = pytest.importorskip("trl", reason="trl is not installed")
    from transformers import LlamaConfig, LlamaForCausalLM

    def tokenize(rows: Dataset, tokenizer: Any) -> list[TokenPair]:
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
        directory = str(tmp_path_factory.mktemp("trl"))
        args = trl.DPOConfig(output_dir=directory, max_length=None, use_cpu=True, bf16=False, report_to=[])
        trainer = trl.DPOTrainer(
            model, ref_model=copy.deepcopy(model), args=args, train_dataset=rows, processing_class=tokenizer
        )
        return [TokenPair(r["prompt_ids"], r["chosen_ids"], r["rejected_ids"]) for r in trainer.train_dataset]

    return tokenize


@pytest.mark.parametrize("make", TOKENIZERS, ids=["gpt2", "bos", "llama2"])
@pytest.mark.parametrize("name", REAL_FILES)
def test_real_rows_have_the_tokens_that_trl_gives_them(name, make, trl_pairs):
    tokenizer, rows = make(), load_rows(real_file(name), "train", "train")
    ours, theirs = pairs_of(rows, tokenizer), trl_pairs(rows, tokenizer)
    assert len(ours) == len(theirs) == len(rows)
    moved = 0
    for row, our, their in zip(rows, ours, theirs, strict=True):
        if our != their:
            # the one difference: TRL ends an implicit prompt at a character, also inside a word
            assert name == "hh_implicit_prompt"
            assert our.prompt == their.prompt[: len(our.prompt)]
            assert our.prompt + our.chosen == their.prompt + their.chosen
            assert our.prompt + our.rejected == their.prompt + their.rejected
            end = common_prefix_length(row["chosen"], row["rejected"])
            assert row["chosen"][end - 1] != " " and any(row[s][end : end + 1].strip() for s in ("chosen", "rejected"))
            moved += 1
    assert moved <= len(rows) // 3


TOOLS = json.dumps([{"type": "function", "function": {"name": "clock"}}])
HISTORY = [{"role": "system", "content": "Be kind."}, USER, GOOD, {"role": "user", "content": "And you?"}]


@pytest.mark.parametrize(
    "rows",
    [
        [CHAT, {"prompt": HISTORY, "chosen": [GOOD, USER, BAD], "rejected": [BAD]}],
        [{"chosen": [*HISTORY, GOOD], "rejected": [*HISTORY, BAD]}, {"chosen": [USER, GOOD], "rejected": [USER, BAD]}],
        [{**CHAT, "tools": TOOLS, "chat_template_kwargs": {"no_thinking": True}}],
        [{"prompt": "the answer is that you wel", "chosen": "come", "rejected": "l"}],
        [{"prompt": "", "chosen": "the dog", "rejected": "the fox"}],
    ],
    ids=["many turns", "implicit chats", "tools and options", "merged tokens", "no prompt"],
)
def test_odd_rows_have_the_tokens_that_trl_gives_them(rows, trl_pairs):
    tokenizer = byte_level()
    table = Dataset.from_list(rows)
    assert pairs_of(table, tokenizer) == trl_pairs(table, tokenizer)
