"""report.html shows the numbers of the log, whatever they and the texts beside them are."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_llama
from transformers import TrainerCallback, TrainerState

import fastdpo
from fastdpo import report
from fastdpo.config import DPOConfig
from fastdpo.ranks import Ranks
from fastdpo.reference import NoReference
from fastdpo.report import HtmlReport, Reading, thinned

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)><!-- body -->"


class Page(HTMLParser):
    """What a browser finds in a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words, self.inside = "", ""
        self.curves: list[dict[str, Any]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self.inside = tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script" and self.tags[-1][1].get("id") == "curves":
            self.curves = json.loads(data, parse_constant=pytest.fail)  # no NaN, which browsers do not read
        elif self.inside not in ("script", "style"):
            self.words += data

    def series(self, title: str, name: str) -> list[list[Any]]:
        (panel,) = [panel for panel in self.curves if panel["title"] == title]
        (series,) = [series for series in panel["series"] if series["name"] == name]
        return series["raw"]


def page_of(options: dict[str, Any]) -> Page:
    return Page((Path(options["output_dir"]) / "report.html").read_text(encoding="utf-8"))


def trainer_of(rows: list, tokenizer: Any, options: dict, **more: Any) -> fastdpo.DPOTrainer:
    more = {"train_dataset": rows[:18], "processing_class": tokenizer, **more}
    return fastdpo.DPOTrainer(more.pop("model", None) or tiny_llama(), args=DPOConfig(**options), **more)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., HtmlReport]:
    """A report without a run."""

    def made(plan: Any = None, **options: Any) -> HtmlReport:
        config = DPOConfig(output_dir=str(tmp_path), use_cpu=True, **{"report_to": "none", **options})
        return HtmlReport(config, "a model", [("layout", "packed")], 8, plan, NoReference(), time.time())

    return made


def rows_of(history: list[dict[str, Any]], key: str) -> list[list[Any]]:
    return [[row["step"], pytest.approx(row[key], rel=1e-5)] for row in history if key in row]


def test_curves_are_the_numbers_of_the_log_those_of_each_evaluation_set_beside_the_trainings(
    rows, tokenizer, quick
) -> None:
    options = {**quick, "eval_strategy": "steps", "eval_steps": 2}
    trainer = trainer_of(rows, tokenizer, options, eval_dataset={"seen": rows[:4], "new": rows[18:]})
    trainer.train()
    history, page = trainer.state.log_history, page_of(options)
    for title, key in {
        "Loss": "loss",
        "Reward margin": "rewards/margins",
        "Reward accuracy": "rewards/accuracies",
    }.items():
        assert page.series(title, "training") == rows_of(history, key)
        assert page.series(title, "new") == rows_of(history, f"eval_new_{key}")
    assert page.series("Rewards", "chosen, seen") == rows_of(history, "eval_seen_rewards/chosen")
    assert page.series("Log-probs of answers", "rejected, training") == rows_of(history, "logps/rejected")
    assert page.series("Learning rate", "training") == rows_of(history, "learning_rate")
    assert page.series("Gradient norm", "training") == rows_of(history, "grad_norm")
    assert page.series("entropy", "new") == rows_of(history, "eval_new_entropy")
    assert all(0.05 < size < 100 for _, size in page.series("Memory, GiB", "training"))
    assert "step 4 of 4" in page.words and "running when" not in page.words
    assert f"{history[-2]['eval_new_loss']:.4g}" in page.words


def test_each_set_goes_with_the_longest_name_of_a_metric_that_its_key_ends_with() -> None:
    history = [{"loss": 1.0, "nll_loss": 2.0, "num_tokens": 1, "step": 1}, {"eval_nll_loss": 3.0, "step": 1}]
    history += [
        {"eval_mine": 4.0, "eval_runtime": 5.0, "step": 1},
        {"train_loss": 6.0, "train_runtime": 7.0, "step": 1},
    ]
    assert report.curves_of(history) == {
        "loss": {"training": [(1, 1.0)]},
        "nll_loss": {"training": [(1, 2.0)], "evaluation": [(1, 3.0)]},
        "eval_mine": {"evaluation": [(1, 4.0)]},
    }


def test_what_ran_the_options_that_were_set_and_the_runs_own_warnings_are_there(rows, tokenizer, quick) -> None:
    logging.getLogger("fastdpo").warning("of another run")
    options = {**quick, "loss_type": "ipo"}
    trainer = trainer_of(rows, tokenizer, options)
    logging.getLogger("fastdpo.retry").warning("memory ran out: %d tokens", 77)
    trainer.train()
    page = page_of(options)
    assert "packed, prompts and other beginnings shared" in page.words and "train: 18 pairs" in page.words
    assert "reference remembers18 rows" in page.words
    assert 'loss_type["ipo"]' in page.words and "ipo" in page.words.split("at their defaults")[0]
    assert "memory ran out: 77 tokens" in page.words and "of another run" not in page.words


def test_before_the_first_log_line_there_are_no_curves(make) -> None:
    assert Page(make().page(TrainerState(max_steps=5))).curves == []


def test_no_token_of_an_account_is_on_the_page(make) -> None:
    page = Page(make(hub_token="hf_1", model_init_kwargs={"token": "hf_2"}).page(TrainerState()))
    assert "hub_token(hidden)" in page.words and '{"token": "(hidden)"}' in page.words and "hf_" not in page.words


def test_text_from_outside_stays_text(rows, tokenizer, quick) -> None:
    hostile = [{**row, "prompt": HOSTILE + row["prompt"]} for row in rows]
    options = {**quick, "eval_strategy": "steps", "eval_steps": 4, "generate_during_eval": True, "run_name": HOSTILE}
    options |= {"max_length": 100}
    model = tiny_llama()
    model.config._name_or_path = HOSTILE
    trainer = trainer_of(hostile, tokenizer, options, model=model, eval_dataset={HOSTILE: hostile[:3]})
    trainer.store_metrics({HOSTILE: 1.0})
    logging.getLogger("fastdpo").warning(HOSTILE)
    trainer.train()
    page = page_of(options)
    assert [found for tag, found in page.tags if tag == "script"] == [{"type": "application/json", "id": "curves"}, {}]
    assert not {tag for tag, _ in page.tags} & {"img", "link", "iframe", "base", "object", "form", "a"}
    assert not [name for _, found in page.tags for name in found if name.startswith("on") or name in ("src", "href")]
    assert page.words.count(HOSTILE) >= 7  # title, heading, warning, set, prompts, run_name
    assert page.series(HOSTILE, "training")[0] == [1, 1.0]


def test_the_page_asks_the_network_for_nothing() -> None:
    template = report.TEMPLATE.read_text(encoding="utf-8")
    assert "default-src 'none'" in template
    assert not [word for word in ("src=", "href=", "url(", "@import", "fetch(", "https:") if word in template]


def test_ten_thousand_rows_take_less_than_300_kb_and_lose_no_spike(make) -> None:
    made, names = make(), ("loss", "grad_norm", "learning_rate", *report.PLACED, *(f"own {n}" for n in range(30)))
    history = [{**{name: math.sin(at * 0.37) for name in names}, "num_tokens": at, "step": at} for at in range(10_000)]
    history[5003] |= {"loss": 77.0, "grad_norm": math.inf, "rewards/margins": math.nan}
    history += [{f"eval_{name}": 0.123456789 for name in report.PLACED} | {"step": at} for at in range(0, 10_000, 10)]
    made.readings = [Reading(at, 1, 1000 + at % 7, 0.1, 10**9 + at) for at in range(10_000)]
    made.add_samples("eval", 1, ["prompt", "policy"], [["<" * 9999] * 2] * 99)
    text = made.page(TrainerState(global_step=9999, log_history=history))
    page = Page(text)
    assert len(text.encode()) < 300_000
    loss = page.series("Loss", "training")
    assert [5003, 77.0] in loss and len(loss) <= 400 and loss[0][0] < 100 and loss[-1][0] > 9900
    assert [5003, None] in page.series("Gradient norm", "training")
    assert [5003, None] in page.series("Reward margin", "training")


def test_thinned_stretches_keep_order_and_extremes() -> None:
    points = [(at, float(at * 7 % 31)) for at in range(1000)]
    kept = thinned(points, 100)
    assert kept == sorted(set(kept)) and len(kept) <= 100 and set(kept) <= set(points)
    assert {value for _, value in kept} >= {0.0, 30.0}


def test_a_smoothed_line_is_the_mean_of_what_is_finite_around() -> None:
    points = [(at, math.nan if at == 50 else float(at % 2)) for at in range(100)]
    line = dict(report.smoothed(points, 200))
    assert line[20] == pytest.approx(sum(at % 2 for at in range(17, 24)) / 7)
    assert line[50] == pytest.approx(4 / 6)
    assert report.smoothed(points[:20], 200) == []


def test_speed_and_memory_of_a_run_that_goes_on_are_those_since_its_beginning(rows, tokenizer, quick, tmp_path) -> None:
    options = {**quick, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    options |= {"generate_during_eval": True, "per_device_eval_batch_size": 2, "max_length": 60}
    trainer_of(rows, tokenizer, options, eval_dataset=rows[18:]).train()
    again = {**options, "output_dir": str(tmp_path / "again")}
    resumed = trainer_of(rows, tokenizer, again, eval_dataset=rows[18:])
    resumed.train(f"{quick['output_dir']}/checkpoint-2")
    first, page = page_of(options), page_of(again)
    for title in ("Tokens a second", "Memory, GiB"):
        assert [step for step, _ in page.series(title, "training")] == [1, 2, 3, 4]
        assert page.series(title, "training")[:2] == first.series(title, "training")[:2]
    made = next(one for one in resumed.callback_handler.callbacks if isinstance(one, HtmlReport))
    assert sum(reading.tokens for reading in made.readings) == resumed.state.log_history[-3]["num_tokens"]
    assert [shown["step"] for shown in made.samples["eval"]] == [4]
    assert not [path for path in tmp_path.rglob("trainer_state.json") if rows[18]["prompt"] in path.read_text()]


def test_a_window_that_began_before_the_run_went_on_has_no_speed(make) -> None:
    made = make()
    state = TrainerState(global_step=3, log_history=[{"num_tokens": 100, "step": 2}])
    made.on_train_begin(made.config, state, None)
    for step in (4, 6):
        state.log_history.append({"num_tokens": 100 * step, "step": step})
        made.on_log(made.config, state, None)
    assert [(reading.steps, reading.tokens) for reading in made.readings] == [(1, None), (2, 200)]
    assert [value is None for _, value in Page(made.page(state)).series("Tokens a second", "training")] == [True, False]


class Slow(TrainerCallback):
    def on_prediction_step(self, *_: Any, **__: Any) -> None:
        time.sleep(0.3)


def test_time_spent_on_evaluations_is_no_time_of_the_training(rows, tokenizer, quick) -> None:
    options = {**quick, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    trainer = trainer_of(rows, tokenizer, options, eval_dataset=rows[18:], callbacks=[Slow()])
    trainer.train()
    made = next(one for one in trainer.callback_handler.callbacks if isinstance(one, HtmlReport))
    assert [reading.steps for reading in made.readings] == [2, 2]
    assert all(0 < reading.seconds < 0.3 for reading in made.readings)


def test_a_page_that_cannot_be_written_ends_no_run_and_is_said_once(
    rows, tokenizer, quick, monkeypatch, caplog
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    trainer = trainer_of(rows, tokenizer, {**quick, "save_strategy": "steps", "save_steps": 2})
    monkeypatch.setattr(report.os, "replace", full)
    trainer.train()
    assert trainer.state.global_step == 4
    assert caplog.text.count("report.html is not written (OSError: [Errno 28] No space left on device)") == 1
    assert not list(Path(quick["output_dir"]).glob("*report*")) + list(Path(quick["output_dir"]).glob(".report*"))


def test_the_first_process_alone_has_a_report_and_none_where_it_is_switched_off(
    rows, tokenizer, quick, monkeypatch
) -> None:
    def reports(options: dict[str, Any]) -> int:
        callbacks = trainer_of(rows, tokenizer, options).callback_handler.callbacks
        return sum(isinstance(one, HtmlReport) for one in callbacks)

    assert reports(quick) == 1
    assert reports({**quick, "report_html": False}) == 0
    monkeypatch.setattr(Ranks, "is_main", False)
    assert reports(quick) == 0


def test_an_evaluation_alone_and_one_after_training_are_on_the_page(rows, tokenizer, quick) -> None:
    trainer = trainer_of(rows, tokenizer, quick, eval_dataset=rows[18:])
    loss = trainer.evaluate()["eval_loss"]
    assert page_of(quick).series("Loss", "evaluation") == [[0, pytest.approx(loss, rel=1e-5)]]
    trainer.train()
    assert [found["name"] for found in page_of(quick).curves[0]["series"]] == ["training"]
    trainer.evaluate()
    assert [found["name"] for found in page_of(quick).curves[0]["series"]] == ["training", "evaluation"]


def test_on_a_gpu_the_plan_stands_beside_what_was_used(make, monkeypatch) -> None:
    class Planned:
        model, largest, memory = "Llama: 8.03B parameters", 4096, 24 * 2**30

        def rows(self, tokens: int) -> list[tuple[str, float, str]]:
            return [("weights", 15.5 * 2**30, ""), ("adapters", 0, "fp32"), ("CUDA", 0.5 * 2**30, "context")]

        def total(self, tokens: int) -> float:
            return 16.0 * 2**30

        def allocated(self, tokens: int) -> float:
            return 15.5 * 2**30

    made = make(Planned())
    made.of_gpu, made.readings = True, [Reading(1, 1, 100, 1.0, 14 * 2**30), Reading(2, 1, 100, 1.0, 15 * 2**30)]
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 17 * 2**30)
    words = Page(made.page(TrainerState())).words
    for line in ("weights15.50 GiB", "planned of torch15.50 GiB", "used by torch15.00 GiB", "held by torch17.00 GiB"):
        assert line in words
    assert (
        "micro-batches of up to 4096 tokens" in words
        and "adapters" not in words.split("Memory")[-1].split("Options")[0]
    )
