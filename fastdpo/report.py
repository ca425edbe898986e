"""report.html: a run on one page, for a browser.

Curves of all that is logged, what the run resolved to, where its memory went beside what was planned, its options, its
samples and its warnings. The page is one file: it asks the network for nothing, and opens from a disk, on a phone, in
the dark and on paper. It is written when training begins, at saves, at the end, and now and then at log lines and
evaluations; each time into a file of its own that then takes the name, so that a browser never reads half of one.

A long run's curves are thinned: of each stretch of rows the least and the greatest value stay, so no spike is lost,
and the line is a mean over neighbouring rows, all of them. What log rows do not have, speed and memory, the report
keeps itself, in checkpoints too.
"""

from __future__ import annotations

import html
import json
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

from fastdpo.card import versions
from fastdpo.config import DPOConfig
from fastdpo.memory import GiB, Plan
from fastdpo.messages import WARNINGS
from fastdpo.reference import NoReference, Reference
from fastdpo.verdicts import changes_nothing

logger = logging.getLogger(__name__)

Point = tuple[int, float]  # step, value
Curves = dict[str, dict[str, list[Point]]]  # metric -> "training" or an evaluation set -> points

TEMPLATE = Path(__file__).with_name("report.html")
EVERY_SECONDS = 30  # at log lines and evaluations: 10,000 rows take a page 0.2 s
POINTS, MOST_A_CURVE, MOST_PANELS = 9000, 400, 40  # which keep a page below 300 KB
SAMPLED_ROWS, SAMPLED_CHARACTERS, MOST_WARNINGS = 8, 600, 30
SPEED, MEMORY = "tokens a second", "memory, GiB"
PANELS = {
    "Loss": ("loss",),
    "Reward margin": ("rewards/margins",),
    "Reward accuracy": ("rewards/accuracies",),
    "Rewards": ("rewards/chosen", "rewards/rejected"),
    "Log-probs of answers": ("logps/chosen", "logps/rejected"),
    "Learning rate": ("learning_rate",),
    "Gradient norm": ("grad_norm",),
    "Tokens a second": (SPEED,),
    "Memory, GiB": (MEMORY,),
}
HEADLINES = {"rewards/accuracies": "reward accuracy", "rewards/margins": "reward margin", "loss": "loss"}
PLACED = {metric for metrics in PANELS.values() for metric in metrics}
NO_CURVE, NO_CURVE_ENDS = ("step", "epoch", "num_tokens"), ("_runtime", "_per_second")
SECRETS = ("token", "key", "secret", "password")


class Reading(NamedTuple):
    """Of one log row of training."""

    step: int
    steps: int  # since the row before, as the next two
    tokens: int | None  # None where a run goes on amid a window: how many there were before, no row says
    seconds: float  # without evaluations and saves
    bytes: int  # the most that was allocated on the GPU so far; on a CPU, what the process has

    @property
    def speed(self) -> float:
        return math.nan if self.tokens is None else self.tokens / self.seconds


class HtmlReport(TrainerCallback, ExportableState):
    """Writes output_dir/report.html; of several processes the first one has it.

    facts: (what, in words) of what the run resolved to; pairs: of an optimizer step, of all processes. A page that
    cannot be written is a warning, once, and the run goes on.
    """

    def __init__(
        self,
        config: DPOConfig,
        title: str,
        facts: Sequence[tuple[str, str]],
        pairs: int,
        plan: Plan | None,
        reference: Reference | NoReference,
        since: float,
    ) -> None:
        self.config, self.title, self.facts, self.pairs, self.plan = config, title, facts, pairs, plan
        self.reference = reference
        self.path = Path(str(config.output_dir)) / "report.html"
        self.of_gpu = config.device.type == "cuda"
        self.since = since  # a time; what is warned of from then on is this run's
        self.failed = self.training = False
        self._begin()

    def _begin(self) -> None:
        self.readings: list[Reading] = []
        self.samples: dict[str, list[dict[str, Any]]] = {}  # by set: of the first evaluation and the last
        self.warnings: list[str] = []

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; not samples, as checkpoints are uploaded and the rows of a dataset are not."""
        self._note_warnings()
        return {"args": {}, "attributes": {"readings": self.readings, "warnings": self.warnings}}

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._begin()
        self.readings = [Reading(*reading) for reading in self.readings]
        rows = [{"step": 0, "num_tokens": 0}, *(row for row in state.log_history if "num_tokens" in row)]
        self.step = state.global_step
        self.tokens: int | None = rows[-1]["num_tokens"] if rows[-1]["step"] == self.step else None
        self.training = True
        self.write(state)
        self.started = self.left = time.perf_counter()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.left = time.perf_counter()

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        now, row = time.perf_counter(), dict[str, Any](state.log_history[-1])
        if not self.training or "num_tokens" not in row:
            return
        tokens = None if self.tokens is None else row["num_tokens"] - self.tokens
        reading = Reading(row["step"], row["step"] - self.step, tokens, now - self.started, self._bytes())
        self.readings.append(reading)
        self.step, self.tokens, self.started, self.left = row["step"], row["num_tokens"], now, now
        self._write_now_and_then(state)

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._write_now_and_then(state)
        self._skip_time()

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.write(state)
        self._skip_time()

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.training = False
        self.write(state)
        if not self.failed:
            logger.info("report: %s", self.path)

    def add_samples(self, name: str, step: int, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Of one evaluation, cut to what a page can show."""
        cut = [[_cut(text) for text in row] for row in rows[:SAMPLED_ROWS]]
        self.samples[name] = [*self.samples.get(name, [])[:1], {"step": step, "columns": list(columns), "rows": cut}]

    def _skip_time(self) -> None:
        """What passed since the last step or log line was no training."""
        if self.training:
            now = time.perf_counter()
            self.started, self.left = self.started + now - self.left, now

    def _write_now_and_then(self, state: TrainerState) -> None:
        if not self.training or time.perf_counter() - self.written > EVERY_SECONDS:
            self.write(state)

    def write(self, state: TrainerState) -> None:
        self._note_warnings()
        draft = self.path.with_name(".report.html.writing")
        try:
            draft.write_text(self.page(state), encoding="utf-8", errors="replace")
            os.replace(draft, self.path)
        except Exception as error:  # whatever a page lacks, the run is worth more
            draft.unlink(missing_ok=True)
            if not self.failed:
                logger.warning("%s is not written (%s: %s): the run goes on", self.path, type(error).__name__, error)
            self.failed = True
        self.written = time.perf_counter()

    def _bytes(self) -> int:
        if self.of_gpu:
            return torch.cuda.max_memory_allocated(self.config.device)
        return psutil.Process().memory_info().rss

    def _note_warnings(self) -> None:
        new = [(when, text) for when, text in WARNINGS if when > self.since]
        self.since = new[-1][0] if new else self.since
        self.warnings = list(dict.fromkeys([*self.warnings, *(text for _, text in new)]))[-MOST_WARNINGS:]

    def page(self, state: TrainerState) -> str:
        curves = curves_of(state.log_history)
        if self.readings:
            curves[SPEED] = {"training": [(one.step, one.speed) for one in self.readings]}
            curves[MEMORY] = {"training": [(one.step, one.bytes / GiB) for one in self.readings]}
        # of what comes from outside no "<" stays, so that none of it is taken for a mark or a tag
        data = json.dumps(panels_of(curves), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
        title, known = _text(self.title), self.reference.known_rows
        parts = [
            f"<header><h1>{title}</h1><p class=soft>{_text(self._in_words(state))}</p></header>",
            _cards(self._figures(curves)),
            _warnings(self.warnings),
            "<h2>Curves</h2>",
            CURVES,
            "<h2>What ran</h2>",
            _table(
                [
                    *self.facts,
                    *([("reference remembers", f"{known:,} rows, for which it runs no more")] if known else []),
                ]
            ),
            "<h2>Memory</h2>",
            self._memory(),
            *(_samples(name, shown) for name, shown in self.samples.items()),
            _options(self.config),
            f"<footer>{_text(', '.join(versions()))}; written {time.strftime('%Y-%m-%d %H:%M:%S')}</footer>",
            f'<script type="application/json" id="curves">{data}</script>',
        ]
        page = TEMPLATE.read_text(encoding="utf-8").replace("<!-- title -->", title)
        return page.replace("<!-- body -->", "\n".join(parts))

    def _in_words(self, state: TrainerState) -> str:
        words = [f"step {state.global_step:,} of {state.max_steps:,}" if state.max_steps else "not trained"]
        words += ["running when this was written"] if self.training else []
        words += [f"{state.epoch:.3g} epochs"] if state.epoch else []
        if seconds := round(sum(one.seconds for one in self.readings)):
            minutes, hours = seconds // 60 % 60, seconds // 3600
            words.append(f"{hours}:{minutes:02}:{seconds % 60:02} of training, evaluations and saves not counted")
        return ", ".join(words)

    def _figures(self, curves: Curves) -> Iterator[tuple[str, str, str]]:
        """(figure, what it is, about it)"""
        for metric, what in HEADLINES.items():
            last = [(where, _figure(points[-1][1])) for where, points in _training_first(curves.get(metric, {}))]
            if last:
                *others, (where, figure) = last
                yield figure, f"{what}, {where}", ", ".join(" ".join(other) for other in others[:2])
        timed = [one for one in self.readings if one.tokens is not None]
        if seconds := sum(one.seconds for one in timed):
            yield f"{sum(one.tokens or 0 for one in timed) / seconds:,.0f}", "tokens a second", "mean of the training"
            yield f"{sum(one.steps for one in timed) * self.pairs / seconds:,.3g}", "pairs a second", ""
        if self.readings:
            of = "allocated on the GPU" if self.of_gpu else "of the process"
            yield f"{max(one.bytes for one in self.readings) / GiB:.2f} GiB", "peak memory", of

    def _memory(self) -> str:
        """The plan beside what was used."""
        peak = max((one.bytes for one in self.readings), default=self._bytes())
        if self.plan is None:
            why = "for this kind of model, or this run" if self.of_gpu else "on a CPU, where nothing is planned"
            return f"<p>There is no plan {why}. The most memory that was seen at a log line: {peak / GiB:.2f} GiB.</p>"
        tokens = self.plan.largest
        rows = [(name, size / GiB, about) for name, size, about in self.plan.rows(tokens) if size]
        rows.append(("planned in all", self.plan.total(tokens) / GiB, f"of {self.plan.memory / GiB:.2f} GiB"))
        rows.append(("planned of torch", self.plan.allocated(tokens) / GiB, "without reserve and context"))
        rows.append(("used by torch", peak / GiB, "the most that was allocated"))
        rows.append(("held by torch", torch.cuda.max_memory_reserved(self.config.device) / GiB, "the most reserved"))
        words = f"<p>{_text(self.plan.model)}; micro-batches of up to {tokens} tokens.</p>"
        return words + _table([(name, f"{size:.2f} GiB", about) for name, size, about in rows], "memory")


CURVES = """<noscript><p>They are drawn by JavaScript; metrics.jsonl has the numbers.</p></noscript>
<div class=curves id=main></div>
<details><summary>More curves</summary><div class=curves id=more></div></details>
<p class=soft>Bold: a mean over neighbouring log rows. Dashed: evaluation. Long runs are thinned, and keep the least and
the greatest of each stretch. Tokens are counted as TRL does, a prompt twice.</p>"""

# ---- curves


def curves_of(history: Sequence[Mapping[str, Any]]) -> Curves:
    """The numbers of log rows. A metric of an evaluation goes with training's of that name: "eval_test_loss" is the
    loss of the set "test".
    """
    trained = {key for row in history if "num_tokens" in row for key in row} | PLACED
    curves: Curves = {}
    for row in (row for row in history if "train_runtime" not in row):  # of the whole run
        for key, value in row.items():
            if key in NO_CURVE or key.endswith(NO_CURVE_ENDS) or not isinstance(value, (int, float)):
                continue
            metric, where = key, "training"
            if "num_tokens" not in row:
                metric = max((name for name in trained if key.endswith("_" + name)), key=len, default=key)
                where = key.removesuffix(metric).removesuffix("_").removeprefix("eval_")
                where = "evaluation" if where in ("eval", "") else where
            curves.setdefault(metric, {}).setdefault(where, []).append((row["step"], value))
    return curves


def panels_of(curves: Curves) -> list[dict[str, Any]]:
    """What the page draws: those that everybody looks at, then the others."""
    others = [name for name in curves if name not in PLACED][:MOST_PANELS]
    chosen = [*PANELS.items(), *((name, (name,)) for name in others)]
    number = sum(len(curves.get(name, ())) for _, names in chosen for name in names)
    most = min(MOST_A_CURVE, max(20, POINTS // max(number, 1)))
    panels = []
    for place, (title, names) in enumerate(chosen):
        series = [
            {"color": color + 2 * sets, **_series(name, where, points, most, alone=len(names) == 1)}
            for color, name in enumerate(names)
            for sets, (where, points) in enumerate(_training_first(curves.get(name, {})))
        ]
        if series:
            panels.append({"title": title, "more": place >= len(PANELS), "series": series})
    return panels


def _training_first(by_set: dict[str, list[Point]]) -> list[tuple[str, list[Point]]]:
    return sorted(by_set.items(), key=lambda item: item[0] != "training")


def _series(metric: str, where: str, points: list[Point], most: int, alone: bool) -> dict[str, Any]:
    line = smoothed(points, most // 2) if where == "training" and metric not in ("learning_rate", MEMORY) else []
    return {
        "name": where if alone else f"{metric.rpartition('/')[2]}, {where}",
        "evaluation": where != "training",
        "raw": [(step, _short(value)) for step, value in thinned(points, most)],
        "line": [(step, _short(value)) for step, value in line],
    }


def thinned(points: list[Point], most: int) -> list[Point]:
    """At most `most`: of each stretch the least, the greatest and what is not finite."""
    if len(points) <= most:
        return points
    kept: list[Point] = []
    size = math.ceil(3 * len(points) / most)
    for part in (points[start : start + size] for start in range(0, len(points), size)):
        part = sorted(part, key=lambda point: (not math.isfinite(point[1]), point[1]))  # not a number comes last
        finite = [point for point in part if math.isfinite(point[1])]
        kept += sorted({part[0], *finite[-1:], part[-1]}, key=lambda point: point[0])
    return kept


def smoothed(points: list[Point], most: int) -> list[Point]:
    """The mean over 1/15 of the rows, around each of at most `most`; nothing where that is one row."""
    count, half = len(points), len(points) // 30
    if half == 0:
        return []
    values = np.array([value for _, value in points], float)
    known = np.isfinite(values)
    sums, counts = (np.concatenate([[0], np.cumsum(these)]) for these in (np.where(known, values, 0), known))
    centres = np.array(sorted({*range(0, count, math.ceil(count / most)), count - 1}))
    low, high = np.maximum(centres - half, 0), np.minimum(centres + half + 1, count)
    with np.errstate(invalid="ignore"):
        means = (sums[high] - sums[low]) / (counts[high] - counts[low])
    return [(points[at][0], mean) for at, mean in zip(centres.tolist(), means.tolist(), strict=True)]


def _short(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


# ---- words, all of them escaped


def _text(words: object) -> str:
    return html.escape(str(words))


def _cut(text: str) -> str:
    return text if len(text) <= SAMPLED_CHARACTERS else text[:SAMPLED_CHARACTERS] + "…"


def _figure(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "not finite"


def _cards(figures: Iterable[tuple[str, str, str]]) -> str:
    cards = (
        f"<div><b>{_text(figure)}</b>{_text(what)}<br><span>{_text(more)}</span></div>"
        for figure, what, more in figures
    )
    return f"<div class=cards>{''.join(cards)}</div>"


def _warnings(warnings: Sequence[str]) -> str:
    shown = "".join(f"<p>{_text(_cut(text))}</p>" for text in warnings)
    return f"<div class=warnings><b>Warnings of the log</b>{shown}</div>" if warnings else ""


def _table(rows: Iterable[Sequence[str]], kind: str = "facts") -> str:
    lines = (
        f"<tr><th>{_text(row[0])}</th>{''.join(f'<td>{_text(cell)}</td>' for cell in row[1:])}</tr>" for row in rows
    )
    return f"<table class={kind}><tbody>{''.join(lines)}</tbody></table>"


def _samples(name: str, shown: Sequence[Mapping[str, Any]]) -> str:
    """The last ones, and the first folded."""
    *first, last = shown
    folded = "".join(f"<details><summary>At step {one['step']}</summary>{_answers(one)}</details>" for one in first)
    return f"<h2>Samples of {_text(name)}, step {last['step']}</h2>{_answers(last)}{folded}"


def _answers(shown: Mapping[str, Any]) -> str:
    columns = [_text(name) for name in shown["columns"]]
    rows = (
        "".join(f'<td data-name="{name}">{_text(text)}</td>' for name, text in zip(columns, row, strict=True))
        for row in shown["rows"]
    )
    head = "".join(f"<th>{name}</th>" for name in columns)
    return f"<table class=sample><thead><tr>{head}</tr></thead><tbody><tr>{'</tr><tr>'.join(rows)}</tr></tbody></table>"


def _options(config: DPOConfig) -> str:
    """Those that somebody set, or the run resolved, then the defaults."""
    changed, others = [], []
    for option in fields(config):
        value = getattr(config, option.name)
        default = option.default if option.default_factory is MISSING else option.default_factory()
        rows = others if changes_nothing(value, default) else changed
        shown = _masked(option.name, getattr(value, "value", value))
        rows.append((option.name, shown if isinstance(shown, str) else json.dumps(shown, default=str)))
    folded = f"<details><summary>{len(others)} more, at their defaults</summary>{_table(others)}</details>"
    return f"<h2>Options, as given or resolved</h2>{_table(changed)}{folded}"


def _masked(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _masked(str(key), inner) for key, inner in value.items()}
    secret = name != "pad_token" and name.lower().endswith(SECRETS)
    return "(hidden)" if secret and isinstance(value, str) else value
