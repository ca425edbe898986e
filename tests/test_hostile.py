"""Hostile and broken input: whatever comes either trains with finite numbers or is refused by one clear ValueError.

Hypothesis makes the cases: FASTDPO_CASES of them, by default 300, which are always the same ones; where the variable
is set they are drawn from a seed that is printed, and that FASTDPO_SEED repeats. Each test takes a share of them. A
refusal is clear if fastdpo says it itself, in a few lines that can be printed and name the row, the file or the option.
"""

from __future__ import annotations

import copy
import math
import os
import random
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pyarrow.parquet as pq
import pytest
import torch
from conftest import figure, tiny_llama
from datasets import Dataset, IterableDataset
from hostile import a_run, an_option, arrow_tables, files, padded_batches, tables, token_logps, token_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers_for_tests import byte_level, config, metaspace
from transformers import training_args

import fastdpo
from fastdpo import DPOConfig
from fastdpo.batch import OptimizerBatch
from fastdpo.collator import padded_pairs
from fastdpo.data import check_vocabulary, load_rows, pair_of, prepare_tokenizer, tokenize_pairs
from fastdpo.layout import find_layout
from fastdpo.losses import LOSSES, pairwise_loss
from fastdpo.model import Policy
from fastdpo.step import PreferenceStep
from fastdpo.verdicts import VERDICTS
from fastdpo_kernels.pair_loss import pair_loss

CASES = int(os.environ.get("FASTDPO_CASES", 300))
SEED = int(os.environ.get("FASTDPO_SEED", random.randrange(2**32) if "FASTDPO_CASES" in os.environ else 0))
WHERE = (Path(fastdpo.__file__).parent, Path(training_args.__file__))  # transformers checks a few options itself
FATES: Counter[str] = Counter()


@pytest.fixture(autouse=True, scope="module")
def said_what_was_tried() -> Iterator[None]:
    yield
    told = ", ".join(f"{fate} {count}" for fate, count in sorted(FATES.items()))
    figure(f"{sum(FATES.values())} cases of FASTDPO_SEED={SEED}: {told}")


def cases(share: float, **strategies: Any) -> Callable:
    """A test of `share` of all cases."""
    options: Any = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}

    def decorate(test: Callable) -> Callable:
        many = settings(max_examples=math.ceil(CASES * share), **options)
        return hypothesis.seed(SEED)(many(given(**strategies)(test)))

    return decorate


def fate(run: Callable[[], Any], *named: str) -> str:
    """Of a run: "trained", or "refused", and then clearly, by one of these names."""
    try:
        run()
        return "trained"
    except ValueError as error:
        message, place = str(error), Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        assert place in WHERE or place.parent in WHERE, f"raised in {place}: {message}"
        assert message.encode() and message.replace("\n", " ").isprintable(), ascii(message)
        assert 20 < len(message) < 1500, message
        assert any(name in message for name in named), message
        return "refused"


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "bytes": byte_level,
    "bytes, bos": lambda: byte_level(adds_bos=True),
    "bytes, bos and eos": lambda: byte_level(adds_bos=True, adds_eos=True),
    "pieces": metaspace,
    "pieces, no pad": lambda: metaspace(pad_token=None),
    "no template": lambda: byte_level(template=None),
    "no eos": lambda: byte_level(eos_token=None),
    "a template that fails": lambda: byte_level(template="{{ messages[0].content.nothing.at_all }}"),
    "a template that divides": lambda: byte_level(template="{{ 1 // (messages | length - 2) }}{{ messages }}"),
    "a template that says nothing": lambda: byte_level(template=" "),
}


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    made = {name: make() for name, make in TOKENIZERS.items()}
    for tokenizer in made.values():
        prepare_tokenizer(tokenizer)
    return made


def small_llama(vocabulary: int = 500) -> Any:
    return tiny_llama(vocabulary, hidden_size=16, intermediate_size=16, num_attention_heads=2)


@pytest.fixture(scope="module")
def train_once() -> Callable:
    """One step over all rows of a source: what a run does to them, but for the update."""
    policy = Policy(small_llama(), None)
    layout = find_layout(policy)
    step = PreferenceStep(policy, lambda _: None, pairwise_loss(DPOConfig(reference_free=True)))

    def train(source: Any, tokenizer: Any, **limits: Any) -> None:
        options = config(**limits)
        table = tokenize_pairs(load_rows(source, "train", "train"), tokenizer, options, "train")
        pairs = [pair_of(row) for row in check_vocabulary(table, 500, tokenizer)]
        for pair in pairs:
            assert len(pair.prompt) + min(len(pair.chosen), len(pair.rejected)) > 1
            assert len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) <= (options.max_length or math.inf)
        whole = OptimizerBatch([layout.collate(pairs)] * bool(pairs), len(pairs) or 1, 1, 1, [len(pairs)])
        for loss, result, sums in step(whole):
            loss.backward()
            assert sums.isfinite().all() and result.losses.isfinite().all()
        assert all(p.grad is None or p.grad.isfinite().all() for p in policy.parameters())
        policy.zero_grad()

    return train


LIMITS = st.fixed_dictionaries(
    {"max_length": st.sampled_from([1, 2, 3, 10, 100, 100, 500])},
    optional={
        "max_prompt_length": st.sampled_from([1, 5, 50]),
        "max_completion_length": st.sampled_from([1, 2, 50]),
        "truncation_mode": st.sampled_from(["keep_start", "keep_end"]),
    },
)
FORMS: dict[str, Callable[[list[dict]], Any]] = {
    "rows": list,
    "columns": lambda rows: {name: [row.get(name) for row in rows] for name in {name for row in rows for name in row}},
    "stream": lambda rows: IterableDataset.from_generator(lambda: iter(rows)),
}
ANY_FORM, ANY_TOKENIZER = st.sampled_from(list(FORMS)), st.sampled_from([*list(TOKENIZERS)[:5] * 2, *TOKENIZERS])


def test_rows_of_any_shape_train_or_are_refused(tokenizers, train_once) -> None:
    @cases(0.3, rows=tables(), name=ANY_TOKENIZER, limits=LIMITS, form=ANY_FORM)
    def run(rows, name, limits, form) -> None:
        FATES["rows " + fate(lambda: train_once(FORMS[form](rows), tokenizers[name], **limits), "dataset", "row")] += 1

    run()


def test_files_that_are_broken_anywhere_train_or_are_refused(tokenizers, train_once, tmp_path) -> None:
    @cases(0.2, file=files())
    def run(file) -> None:
        path = tmp_path / f"rows{file[0]}"
        path.write_bytes(file[1])
        FATES["files " + fate(lambda: train_once(path, tokenizers["bytes"], max_length=100), "dataset", "row")] += 1

    run()


def test_rows_of_any_token_ids_train_or_are_refused(tokenizers, train_once) -> None:
    @cases(0.1, rows=token_rows(), limits=LIMITS, form=ANY_FORM)
    def run(rows, limits, form) -> None:
        source = FORMS[form](rows)
        FATES["ids " + fate(lambda: train_once(source, tokenizers["bytes"], **limits), "dataset", "token id")] += 1

    run()


def test_tables_of_any_type_train_or_are_refused(tokenizers, train_once, tmp_path) -> None:
    @cases(0.1, table=arrow_tables(), name=ANY_TOKENIZER, as_file=st.booleans())
    def run(table, name, as_file) -> None:
        path = tmp_path / "rows.parquet"
        pq.write_table(table, path)
        source = path if as_file else Dataset.from_parquet(str(path))
        FATES["tables " + fate(lambda: train_once(source, tokenizers[name], max_length=100), "dataset", "row")] += 1

    run()


def test_options_of_any_value_are_taken_or_refused_by_their_names(monkeypatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))  # transformers writes some options there

    @cases(0.15, options=st.lists(an_option(), min_size=1, max_size=2).map(dict))
    def run(options) -> None:
        named = {*options, *(VERDICTS[name].instead or name.replace("activation", "gradient") for name in options)}
        FATES["options " + fate(lambda: DPOConfig(**options), *named, "unknown loss", "the loss ")] += 1

    run()


def test_batches_of_a_collator_are_read_or_refused() -> None:
    @cases(0.05, batch=padded_batches())
    def run(batch) -> None:
        FATES["batches " + fate(lambda: padded_pairs(batch, -100), "batch", "rows", "labels")] += 1

    run()


def test_losses_of_any_log_probs_are_finite_and_show_what_is_not() -> None:
    """A number that is not finite stays with its pair: it is not made finite, and spoils no other pair's gradient."""
    losses = {name: pairwise_loss(DPOConfig(loss_type=name)) for name in LOSSES}
    apart = [name for name in LOSSES if not any(term.matched for term in losses[name].terms)]

    @cases(0.05, name=st.sampled_from(list(LOSSES)), values=token_logps())
    def run(name, values) -> None:
        policy, reference, lengths, broken = values
        logps = torch.tensor(policy, requires_grad=True)
        offsets = torch.tensor([0, *lengths]).cumsum(0).int()
        result = pair_loss(logps, offsets, torch.tensor(reference, dtype=torch.float64).view(-1, 2), losses[name])
        result.losses.sum().backward()
        spoiled = torch.tensor([pair in broken for pair in range(len(lengths) // 2)])
        if name in apart or not broken:
            tokens = spoiled.repeat_interleave(torch.tensor(lengths).view(-1, 2).sum(1))
            assert result.losses[~spoiled].isfinite().all() and logps.grad[~tokens].isfinite().all()
        if broken:
            assert not (result.rewards.isfinite().all() and result.losses.isfinite().all())
        FATES["losses " + ("broken" if broken else "finite")] += 1

    run()


def test_whole_runs_train_or_are_refused_before_anything_is_written(tokenizers, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)
    models = {rows: small_llama(rows) for rows in (500, 300)}  # the tokenizers know 400 to 500 tokens
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1, "use_cpu": True}

    @cases(
        0.05, rows=tables(), name=ANY_TOKENIZER, options=a_run(), form=ANY_FORM, size=st.sampled_from([500, 500, 300])
    )
    def run(rows, name, options, form, size) -> None:
        out = tmp_path / str(sum(FATES.values()))
        given = copy.deepcopy(models[size])

        def train() -> None:
            made = fastdpo.train(
                given, FORMS[form](rows), processing_class=tokenizers[name], output_dir=str(out), **quiet, **options
            )
            odd = [row for row in made.history if not all(map(math.isfinite, row.values()))]
            assert not odd, odd
            assert all(parameter.isfinite().all() for parameter in made.model.parameters())

        FATES["runs " + (one := fate(train, "dataset", "row", *options))] += 1
        assert any(out.glob("*.safetensors")) == (one == "trained")
        assert one == "trained" or form == "stream" or not any(out.glob("*"))  # a stream's rows come while it trains

    run()


@pytest.mark.parametrize("limit", [None, 20])
def test_hundreds_of_one_token_answers_are_one_step(limit, tmp_path, tokenizer, monkeypatch) -> None:
    """In one packed row, and in hundreds of micro-batches."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)
    rows = [{"prompt_ids": [7 + n % 3], "chosen_ids": [8], "rejected_ids": [9 + n % 400]} for n in range(200)]
    out = fastdpo.train(
        small_llama(),
        rows,
        processing_class=tokenizer,
        output_dir=str(tmp_path),
        per_device_train_batch_size=200,
        max_steps=1,
        max_tokens_per_microbatch=limit,
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
    )
    assert out.history[0]["num_tokens"] == 800
    assert out.history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
