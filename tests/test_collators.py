"""A collator of the user decides which tokens train, and nothing else."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import tiny_llama
from datasets import Dataset
from tokenizers_for_tests import byte_level
from trl.trainer.dpo_trainer import DataCollatorForPreference

import fastdpo
from fastdpo import collator
from fastdpo.collator import Collator, padded_pairs, padded_rows
from fastdpo.data import TokenPair

PAIRS = [TokenPair([5, 6, 7], [8, 9], [10]), TokenPair([3], [4, 4, 2], [0, 2])]


def padded(rows: list[list[int]], value: int, left: bool, extra: int = 0) -> torch.Tensor:
    width = max(map(len, rows)) + extra
    fill = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([[*more, *row] if left else [*row, *more] for row, more in zip(rows, fill, strict=True)])


def of_both_sides(left: bool, label: int = -100, extra: int = 0) -> Callable[[list[dict]], dict[str, Any]]:
    """As collators for TRL 0.11 were written: chosen and rejected each padded to a width of their own."""

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {"prompt": [row.get("prompt") for row in rows]}
        for name in ("prompt", "chosen", "rejected"):
            for part, value in (("input_ids", 1), ("attention_mask", 0), ("labels", label)):
                if (key := f"{name}_{part}") in rows[0]:
                    batch[key] = padded([row[key] for row in rows], value, left or name == "prompt", extra)
        return batch

    return collate


def run_of(rows: Any, tokenizer: Any, quick: dict, data_collator: Any = None, **more: Any) -> fastdpo.DPOTrainer:
    options = {**quick, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, **more}
    trainer = fastdpo.DPOTrainer(
        tiny_llama(),
        args=fastdpo.DPOConfig(**options),
        train_dataset=rows,
        eval_dataset=rows[:5],
        processing_class=tokenizer,
        data_collator=data_collator,
    )
    trainer.train()
    trainer.evaluate()
    return trainer


def numbers(trainer: fastdpo.DPOTrainer) -> list[dict[str, float]]:
    """The log but for what depends on the clock."""
    clock = ("runtime", "per_second")
    return [{key: value for key, value in row.items() if not key.endswith(clock)} for row in trainer.state.log_history]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[dict[str, float]]]:
    found: list[Any] = []

    def log(rows: Any, tokenizer: Any, quick: dict) -> list[dict[str, float]]:
        if not found:
            found.append(numbers(run_of(rows, tokenizer, quick)))
        return found[0]

    return log


@pytest.mark.parametrize(
    "data_collator",
    [
        DataCollatorForPreference(pad_token_id=0),
        DataCollatorForPreference(pad_token_id=0, pad_to_multiple_of=16),
        of_both_sides(left=True),
        of_both_sides(left=False, extra=3),
    ],
    ids=["TRL 1.16's", "TRL 1.16's to multiples of 16", "0.11 on the left", "0.11 on the right"],
)
def test_a_run_does_not_depend_on_how_its_collator_pads(data_collator, plain, rows, tokenizer, quick) -> None:
    ours, expected = numbers(run_of(rows, tokenizer, quick, data_collator)), plain(rows, tokenizer, quick)
    assert len(ours) == len(expected) > 5
    for row, other in zip(ours, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-6, abs=1e-6)


def test_tokens_that_a_collator_leaves_out_do_not_train(rows, tokenizer, quick) -> None:
    table = run_of(rows, tokenizer, quick, max_steps=1).train_dataset
    cut = [
        {
            **{"prompt_ids": row["prompt_ids"]},
            **{f"{side}_ids": row[f"{side}_ids"][: 40 - len(row["prompt_ids"])] for side in ("chosen", "rejected")},
        }
        for row in table
    ]
    assert any(len(one["chosen_ids"]) < len(other["chosen_ids"]) for one, other in zip(cut, table, strict=True))
    expected = run_of(cut, tokenizer, quick)
    ours = run_of(rows, tokenizer, quick, DataCollatorForPreference(pad_token_id=0, max_length=40))
    assert numbers(ours) == numbers(expected)


def test_a_collator_is_called_with_groups_of_a_batch_and_the_columns_that_are_kept(rows, tokenizer, quick) -> None:
    seen: list[list[dict[str, Any]]] = []
    collate = of_both_sides(left=False)
    table = Dataset.from_list([{**row, "source": str(place)} for place, row in enumerate(rows)])
    more = {"remove_unused_columns": False, "train_sampling_strategy": "sequential", "per_device_eval_batch_size": 2}
    trainer = run_of(table, tokenizer, quick, lambda group: seen.append(group) or collate(group), max_steps=1, **more)
    assert [len(group) for group in seen] == [3, 3, 2, 2, 1]
    assert [row["source"] for group in seen[:2] for row in group] == list("012345")
    first = seen[0][0]
    assert first["chosen"] == rows[0]["chosen"]
    ids = first["prompt_ids"] + first["chosen_ids"]
    assert first["chosen_input_ids"] == ids and first["chosen_attention_mask"] == [1] * len(ids)
    assert first["chosen_labels"] == [-100] * len(first["prompt_ids"]) + first["chosen_ids"]
    assert first["prompt_input_ids"] == first["prompt_ids"]
    assert set(trainer.train_dataset.column_names) >= {"prompt", "source"}


def test_rewards_are_those_of_rows_though_workers_finish_in_any_order(rows, tokenizer, quick) -> None:
    first: list[int] = []

    def collate(group: list[dict[str, Any]]) -> dict[str, Any]:
        time.sleep(0.3 if group[0]["prompt_ids"] == first else 0)
        return of_both_sides(left=True)(group)

    more = {"dataloader_num_workers": 2, "dataloader_in_order": False, "max_steps": 1, "per_device_eval_batch_size": 4}
    trainer = run_of(rows[:6], tokenizer, quick, collate, **more)
    first += trainer.train_dataset[0]["prompt_ids"]
    found = trainer.predict(rows[:12]).predictions
    one = trainer.evaluate(rows[:1])
    assert found[0] == pytest.approx([one["eval_rewards/chosen"], one["eval_rewards/rejected"]], abs=1e-5)


def test_label_pad_token_id_is_what_labels_are_told_by(plain, rows, tokenizer, quick) -> None:
    ours = run_of(rows, tokenizer, quick, of_both_sides(left=True, label=-7), label_pad_token_id=-7)
    assert numbers(ours) == plain(rows, tokenizer, quick)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("labels", [True, False])
def test_pairs_come_back_from_padded_rows_of_either_form(left: bool, labels: bool) -> None:
    rows = padded_rows(PAIRS, pad_token_id=9)
    if left:
        places = rows["attention_mask"].argsort(dim=1, stable=True)
        rows = {name: values.gather(1, places) for name, values in rows.items()}
    if labels:
        split = {name: values.chunk(2) for name, values in rows.items()}
        rows = {}
        for place, side in enumerate(("chosen", "rejected")):
            ids, seen, scored = (split[name][place] for name in ("input_ids", "attention_mask", "completion_mask"))
            rows |= {f"{side}_input_ids": ids, f"{side}_attention_mask": seen}
            rows[f"{side}_labels"] = ids.masked_fill(scored == 0, -100)
    assert padded_pairs(rows, -100) == PAIRS


def changed(**changes: Any) -> dict[str, Any]:
    batch = {**padded_rows(PAIRS, pad_token_id=9), **changes}
    return {name: value for name, value in batch.items() if value is not None}


def mask(*rows: list[int]) -> torch.Tensor:
    return padded([list(row) for row in rows], 0, left=False)


SCORED = [0, 0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1], [0, 1, 1]


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ([1, 2], "a padded batch is a dict of tensors, got list"),
        (changed(completion_mask=None), "lacks completion_mask: expected input_ids, attention_mask, completion_mask"),
        (changed(input_ids=None), "lacks chosen_input_ids, chosen_attention_mask, chosen_labels, rejected_"),
        (changed(ref_chosen_logps=torch.zeros(2)), "ref_chosen_logps, and reference log-probs do not come with"),
        (changed(reference_chosen_logps=torch.zeros(2)), "precompute_ref_log_probs"),
        (changed(pixel_values=torch.zeros(2)), "has pixel_values, which the model would not be given"),
        (changed(attention_mask=torch.ones(4, 4)), r"\(4, 5\), \(4, 4\).*expected \(rows, tokens\)"),
        ({name: rows[:3] for name, rows in changed().items()}, "input_ids has 3 rows: expected all chosen rows"),
        (changed(completion_mask=mask(*SCORED[:3], [0, 0, 0])), "row 1 of rejected .* has no scored token"),
        (changed(completion_mask=mask(SCORED[0], [0, 1, 0, 1], *SCORED[2:])), "row 1 of chosen .* has holes"),
        (changed(completion_mask=mask(*SCORED[:3], [0, 1, 1, 1])), "row 1 of rejected .* where attention_mask is 0"),
        (
            changed(completion_mask=mask([0, 0, 1, 1, 1], *SCORED[1:])),
            "2 tokens before .* chosen, and 3 others",
        ),
        (changed(attention_mask=mask([1, 0, 1, 1, 1], *SCORED[1:])), "attention_mask has holes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_batch_of_pairs_is_named(batch: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        padded_pairs(batch, -100)


def test_labels_are_the_tokens_of_their_places() -> None:
    row = {"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5]}
    batch = of_both_sides(left=False)([collator.with_both_names(row, -100)])
    assert padded_pairs(batch, -100) == [TokenPair([1, 2], [3, 4], [5])]
    batch["chosen_labels"][0, 2] = 9
    with pytest.raises(ValueError, match="chosen_labels names other tokens than chosen_input_ids"):
        padded_pairs(batch, -100)


def test_rows_that_a_collator_loses_and_tokens_that_the_model_does_not_have_are_named() -> None:
    collate = DataCollatorForPreference(pad_token_id=0)
    rows = [{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}] * 3
    with pytest.raises(ValueError, match="was given 2 rows and returned 1 pairs"):
        Collator(lambda group: collate(group[:1]), -100, 10)(rows, 2)
    with pytest.raises(ValueError, match="token ids from 1 to 3, and the model's embedding has 3 rows"):
        Collator(collate, -100, 3)(rows, 2)


def test_other_keys_are_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fastdpo"):
        for _ in range(2):
            padded_pairs(changed(temperature=1.0), -100)
    assert [record.message for record in caplog.records] == [
        "data_collator: temperature of its batches is not looked at"
    ]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"precompute_ref_log_probs": True}, "data_collator makes tokens anew in each epoch"),
        ({"train_dataset": "stream", "remove_unused_columns": False}, "the dataset is a stream"),
        ({"train_dataset": "unpaired", "loss_type": "aot_unpaired"}, "the rows are unpaired"),
        ({"data_collator": 3}, "data_collator is a int, expected a function"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_does_not_go_with_a_collator_is_refused(given, words, rows, tokenizer, quick) -> None:
    sources = {
        "stream": lambda: Dataset.from_list(rows).to_iterable_dataset(),
        "unpaired": lambda: [
            {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            for row in rows
            for side in ("chosen", "rejected")
        ],
        "rows": lambda: rows,
    }
    given = {"data_collator": DataCollatorForPreference(pad_token_id=0), **given}
    hooks = {"data_collator": given.pop("data_collator")}
    source = sources[given.pop("train_dataset", "rows")]()
    with pytest.raises(ValueError, match=words):
        args = fastdpo.DPOConfig(**quick, **given)
        fastdpo.DPOTrainer(tiny_llama(), args=args, train_dataset=source, processing_class=tokenizer, **hooks).train()


def test_pad_token_and_padding_value_fill_padded_rows(rows, quick) -> None:
    def trainer_of(**options: Any) -> fastdpo.DPOTrainer:
        args = fastdpo.DPOConfig(**quick, **options)
        return fastdpo.DPOTrainer(tiny_llama(), args=args, train_dataset=rows, processing_class=byte_level())

    trainer = trainer_of(pad_token="<unk>")
    unknown = trainer.tokenizer.convert_tokens_to_ids("<unk>")
    assert trainer.tokenizer.pad_token == "<unk>" and trainer.layout.pad_token_id == unknown
    assert trainer_of(padding_value=7).layout.pad_token_id == 7
    for options, words in (
        ({"pad_token": "<nope>"}, "pad_token='<nope>' is not in the tokenizer's vocabulary"),
        ({"padding_value": 500}, "padding_value=500, and the model's embedding has 500 rows"),
        ({"padding_value": -1}, "padding_value must be 0 or above"),
    ):
        with pytest.raises(ValueError, match=words):
            trainer_of(**options)
