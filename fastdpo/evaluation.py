"""Evaluation: metrics of the evaluation sets, the best of them, and what compute_metrics adds.

The same step as training's, without gradients, over batches in the table's own order, each process its share of each.

Legend: P pairs.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import SaveStrategy

from fastdpo import build
from fastdpo.batch import OptimizerBatch, Share, pairs_of
from fastdpo.by_hand import ByHand
from fastdpo.collator import Collator
from fastdpo.config import DPOConfig
from fastdpo.generate import Sampler
from fastdpo.loader import eval_loader
from fastdpo.metrics import MetricSums
from fastdpo.model import evaluation_mode
from fastdpo.optimizer import STEPPED_BY_EVALUATION
from fastdpo.predictions import Predictions
from fastdpo.ranks import Ranks
from fastdpo.retry import Retry
from fastdpo.step import PAIR_METRICS, ROUTER_METRICS, TOKEN_METRICS, PreferenceStep, scores_chosen
from fastdpo_kernels.pair_loss import PairwiseLoss


class Evaluation(ByHand):
    """The part of DPOTrainer that evaluates, with what it takes of the rest."""

    ranks: Ranks
    sampler: Sampler
    state: TrainerState
    control: TrainerControl
    callback_handler: CallbackHandler
    collator: Collator | None
    compute_metrics: Any
    preprocess_logits_for_metrics: Any
    lr_scheduler: Any
    log: Callable[[dict[str, float]], None]
    _eval_tables: dict[str, build.Table]
    _retry: Retry
    _preference_step: Callable[..., PreferenceStep]
    _fused_blocks: Callable[[], AbstractContextManager[object]]

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, Any]:
        """Metrics of the evaluation sets, of one of them by its name, or of another dataset; logged, and returned under
        "eval_..." names, or those of another prefix. The trainer's own sets under "eval" decide what is best and step
        the schedule. `ignore_keys` changes nothing: of the model's outputs logits alone are kept, if any.
        """
        tables = {metric_key_prefix + name.removeprefix("eval"): table for name, table in self._eval_tables.items()}
        named, best, own = f"{metric_key_prefix}_{eval_dataset}", _best_key(self.args), True
        if isinstance(eval_dataset, str) and named in tables:
            tables = {named: tables[named]}
        elif eval_dataset is not None:
            own = False
            tables = build.build_eval_tables(eval_dataset, self.processing_class, self.args, metric_key_prefix)
            tables = build.check_fit(self.policy, None, tables, self.processing_class, self.args)
        if not tables:
            raise ValueError("there is nothing to evaluate on: give eval_dataset to the trainer or to evaluate()")
        metrics: dict[str, Any] = {}
        with self._fused_blocks():
            for name, table in tables.items():
                metrics |= self._evaluate_table(name, table)
        self.log(metrics)
        every = eval_dataset is None and metric_key_prefix == "eval"
        if every and self.args.metric_for_best_model and best not in metrics:
            raise ValueError(
                f"metric_for_best_model={self.args.metric_for_best_model!r} is neither what evaluation nor what "
                f"compute_metrics gives: one of {', '.join(name.removeprefix('eval_') for name in metrics)}"
            )
        if self.args.generate_during_eval and (self.ranks.is_main or self.ranks.fsdp is not None):
            for name, table in tables.items():
                self.sampler.show(name, table, self.state, self.callback_handler.callbacks)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if own and best in metrics:
            self._note_best(metrics[best])
            if self.lr_scheduler is not None and self.args.lr_scheduler_type in STEPPED_BY_EVALUATION:
                self.lr_scheduler.step(metrics[best])
        return metrics

    def _evaluate_table(self, name: str, table: build.Table, rows: list[Tensor] | None = None) -> dict[str, Any]:
        """-> its metrics, compute_metrics' among them; for `rows` see `_evaluate_loader`."""
        loader = eval_loader(table, self.layout, self.args, self.ranks, self.collator)
        predictions = None if self.compute_metrics is None else self._predictions()
        return self._evaluate_loader(name, loader, rows, predictions)[0]

    def _evaluate_loader(
        self,
        name: str,
        loader: DataLoader,
        rows: list[Tensor] | None = None,
        predictions: Predictions | None = None,
    ) -> tuple[dict[str, Any], int]:
        """-> metrics, and the number of pairs. To `rows` goes a (P, 4) fp64 a batch of this process's share: a row's
        number in the table, its two rewards, its loss.
        """
        started = time.time()
        step, pairs, count = self._preference_step(training=False), 0, 0
        sums, found = MetricSums(bool(step.router_coef), step.scores_chosen), {}
        handler: Any = self.callback_handler
        handler.eval_dataloader = loader

        def add(whole: OptimizerBatch) -> None:
            nonlocal sums, pairs, found
            window, values = copy.copy(sums), []
            for _, result, summed in step(whole.to(self.args.device, non_blocking=True)):
                window.add(summed)
                values.append(torch.cat([result.rewards, result.losses[:, None]], 1))
            keys = [key for batch in whole.microbatches for key in batch.keys]
            by_key = dict(zip(keys, torch.cat(values).unbind(0), strict=True))
            self.ranks.agree()
            sums, found = window, by_key  # counted once all of the batch is through
            pairs += whole.num_pairs

        with torch.no_grad(), evaluation_mode(self.policy):
            for batches in loader:
                self._retry(add, batches, loader)
                first, count = count * (loader.batch_size or 0), count + 1
                _keep_rows(batches, found, first, rows, predictions)
                self.control = handler.on_prediction_step(self.args, self.state, self.control)
            theirs = {} if predictions is None else predictions.result()
        if sums.sums is None:
            raise ValueError(f"the evaluation set {name} gave no row")
        metrics, _ = sums.read(self.ranks)
        seconds = time.time() - started
        metrics |= {"runtime": round(seconds, 4), "samples_per_second": round(pairs / seconds, 3)}
        metrics["steps_per_second"] = round(count / seconds, 3)
        return {f"{name}_{key.removeprefix(f'{name}_')}": value for key, value in (theirs | metrics).items()}, pairs

    def _predictions(self) -> Predictions:
        hooks = self.compute_metrics, self.preprocess_logits_for_metrics
        return Predictions(self.policy, self.args, self.ranks, self.layout.pad_token_id, *hooks)

    def _note_best(self, value: float) -> None:
        args, state = self.args, self.state
        best = state.best_metric
        better = best is None or (value > best if args.greater_is_better else value < best)
        if better:
            state.best_metric, state.best_global_step = value, state.global_step
        if args.save_strategy == SaveStrategy.BEST:
            self.control.should_save = better


def _keep_rows(
    batches: Share,
    found: Mapping[bytes, Tensor],  # (3,) a row: rewards of chosen and rejected, loss
    first: int,  # the number of the batch's first row in the table
    rows: list[Tensor] | None,
    predictions: Predictions | None,
) -> None:
    """Hands what was found of a batch to whoever asks for it, by row."""
    if rows is None and predictions is None:
        return
    places = [place for _, place in batches.places]
    values = [found[key] for key, _ in batches.places]
    own = torch.stack(values) if values else torch.empty(0, 3)
    if rows is not None:
        numbers = torch.tensor(places, dtype=torch.float64, device=own.device) + first
        rows.append(torch.cat([numbers[:, None], own.double()], 1))
    if predictions is not None:
        pairs = {key: pair for batch in batches for key, pair in zip(batch.keys, pairs_of(batch), strict=True)}
        predictions.add([pairs[key] for key, _ in batches.places], places, own[:, 2])


def check_best_metric(args: DPOConfig, sets: Iterable[str], loss: PairwiseLoss, compute_metrics: Any) -> None:
    """Raises ValueError for a `metric_for_best_model` that no evaluation gives, as far as it is known before the first:
    what compute_metrics gives is seen there.
    """
    metrics = [*PAIR_METRICS, *TOKEN_METRICS, *ROUTER_METRICS, *(["nll_loss"] if scores_chosen(loss) else [])]
    known = [f"{name}_{metric}" for name in sets for metric in metrics]
    if args.metric_for_best_model and known and compute_metrics is None and _best_key(args) not in known:
        raise ValueError(
            f"metric_for_best_model={args.metric_for_best_model!r} is not what evaluation gives: one of "
            f"{', '.join(name.removeprefix('eval_') for name in known)}"
        )


def _best_key(args: DPOConfig) -> str:
    name = str(args.metric_for_best_model)
    return name if name.startswith("eval_") else f"eval_{name}"
