"""What `compute_metrics` is given: logits of an evaluation's rows, which nothing else here ever makes.

They cost a pass of the model's own forward over padded rows beside each evaluation batch, at most
`per_device_eval_batch_size` pairs at a time, so there is none unless somebody reads them. Order and form are those that
transformers' evaluation gives to TRL's rows: of each batch the chosen rows, then the rejected ones; labels are the
token ids; what batches differ by in width is padded with -100. Other than there, the last batch is whole, and a loss is
a pair's own.

Legend: P pairs, R = 2P rows, T tokens of a padded row, V vocabulary.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object, recursively_apply, send_to_device
from torch import Tensor
from transformers.trainer_pt_utils import EvalLoopContainer, nested_concat
from transformers.trainer_utils import EvalPrediction, denumpify_detensorize

from fastdpo.collator import padded_rows
from fastdpo.config import DPOConfig
from fastdpo.data import TokenPair
from fastdpo.model import Policy
from fastdpo.ranks import Ranks
from fastdpo.retry import out_of_memory

logger = logging.getLogger(__name__)

# Options that compute_metrics alone makes sense of, with the value that asks for nothing
OPTIONS: dict[str, Any] = {
    "eval_accumulation_steps": None,
    "batch_eval_metrics": False,
    "eval_do_concat_batches": True,
    "include_for_metrics": [],
}


def check_hooks(compute_metrics: Any, preprocess: Any, config: DPOConfig) -> None:
    """Raises ValueError for options and functions that nothing would come of."""
    if compute_metrics is None:
        given = [name for name, nothing in OPTIONS.items() if getattr(config, name) != nothing]
        given += ["preprocess_logits_for_metrics"] if preprocess is not None else []
        if given:
            raise ValueError(f"{given[0]} is for what compute_metrics is given, and there is none: give it, too")
        return
    logger.info("compute_metrics: evaluations make logits, by another pass of the model's own forward over padded rows")
    if unknown := [name for name in config.include_for_metrics if name not in ("inputs", "loss")]:
        raise ValueError(f"include_for_metrics has {unknown[0]!r}: expected 'inputs' and 'loss'")
    if config.batch_eval_metrics and "compute_result" not in inspect.signature(compute_metrics).parameters:
        raise ValueError(
            "batch_eval_metrics=True calls compute_metrics after each batch, and with compute_result=True after the "
            "last one: give it the argument compute_result"
        )
    for name in ("eval_accumulation_steps", "eval_do_concat_batches"):
        if config.batch_eval_metrics and getattr(config, name) != OPTIONS[name]:
            raise ValueError(f"batch_eval_metrics=True keeps no batches, so {name} has no effect: leave one out")


def model_logits(policy: Policy, rows: Mapping[str, Tensor]) -> Tensor:
    """(R, T, V) in the weights' dtype, fp32 under autocast: the model's own forward over padded rows, (R, T) each."""
    device = rows["input_ids"].device.type
    with torch.autocast(device, policy.autocast) if policy.autocast else nullcontext():
        inputs = {name: rows[name] for name in ("input_ids", "attention_mask")}
        outputs = policy.within(lambda: policy.model(**inputs, use_cache=False, return_dict=True))
    return outputs.logits.float() if policy.autocast else outputs.logits


@dataclass
class Predictions:
    """Collects what `compute_metrics` takes over the batches of one evaluation."""

    policy: Policy
    args: DPOConfig
    ranks: Ranks
    pad_token_id: int
    compute_metrics: Callable[..., Mapping[str, Any]] | None  # None: they are only collected
    preprocess: Callable[[Any, Tensor], Any] | None

    def __post_init__(self) -> None:
        self.batches = 0
        self.held: EvalPrediction | None = None  # with batch_eval_metrics: a batch may turn out to be the last
        self.kept = [EvalLoopContainer(self.args.eval_do_concat_batches) for _ in range(4)]

    @torch.no_grad()
    def add(self, pairs: Sequence[Any], places: Sequence[int], losses: Tensor) -> None:
        """A batch: this process's share of its pairs, their numbers in the batch, (P,) their losses."""
        order = sorted(range(len(pairs)), key=places.__getitem__)  # of the dataset
        pairs, losses = [pairs[index] for index in order], losses[torch.tensor(order, dtype=torch.int64)]
        predictions = None
        if self.ranks.makes_pass(bool(pairs)):
            predictions = self._predict(pairs or [TokenPair([0], [0], [0])])
            predictions = predictions if pairs else None
        if self.ranks.count > 1:
            pairs, predictions, losses = _gathered(pairs, sorted(places), predictions, losses)
        rows = padded_rows(pairs, self.pad_token_id)
        parts = predictions, rows["input_ids"], rows["input_ids"], losses
        if self.args.batch_eval_metrics:
            self._compute(last=False)
            self.held = self._for_metrics(parts, rows)
            return
        self.batches += 1
        for container, value in zip(self.kept, parts, strict=True):
            container.add(value)
            if self.batches % (self.args.eval_accumulation_steps or 1) == 0:
                container.to_cpu_and_numpy()

    def _predict(self, pairs: Sequence[Any]) -> Any:
        rows = {name: values.to(self.args.device) for name, values in padded_rows(pairs, self.pad_token_id).items()}
        try:
            logits = model_logits(self.policy, rows)
            return logits if self.preprocess is None else self.preprocess(logits, rows["input_ids"])
        except RuntimeError as error:
            if out_of_memory(error):  # not done again in parts, which preprocess would see
                error.add_note(
                    f"fastdpo: {tuple(rows['input_ids'].shape)} rows and tokens of logits for compute_metrics do not "
                    "fit: lower per_device_eval_batch_size"
                )
            raise

    def result(self) -> dict[str, Any]:
        """What `compute_metrics` says of all batches, in every process; {} where there is none."""
        if self.args.batch_eval_metrics:
            found = self._compute(last=True)
        else:
            found = self.compute_metrics and self.compute_metrics(self._for_metrics(self.arrays()))
        return denumpify_detensorize(dict(found or {}))  # type: ignore[return-value]

    def arrays(self) -> list[Any]:
        """Predictions, labels, inputs and losses: nested arrays, or lists of one a batch (`eval_do_concat_batches`)."""
        return [container.get_arrays() for container in self.kept]

    def _compute(self, last: bool) -> Mapping[str, Any] | None:
        if self.held is None or self.compute_metrics is None:
            return None
        return self.compute_metrics(self.held, compute_result=last)

    def _for_metrics(self, parts: Sequence[Any], rows: Mapping[str, Tensor] | None = None) -> EvalPrediction:
        """`rows` in place of the inputs' token ids, where each batch is given alone."""
        predictions, labels, inputs, losses = parts
        included = {"inputs": rows or inputs, "losses": losses}
        wanted = {"inputs" if name == "inputs" else "losses" for name in self.args.include_for_metrics}
        return EvalPrediction(predictions, labels, **{name: included[name] for name in wanted})


def _gathered(
    pairs: Sequence[Any], places: Sequence[int], predictions: Any, losses: Tensor
) -> tuple[list[Any], Any, Tensor]:
    """The whole batch from the shares of all processes, in the order of the dataset, on the CPU."""
    mine = list(pairs), list(places), send_to_device(predictions, "cpu"), losses.cpu()
    shares = [share for share in gather_object([mine]) if share[0]]
    whole, by_row, by_pair = shares[0][2], [], []
    for number, (_, theirs, part, _) in enumerate(shares):
        whole = nested_concat(whole, part, padding_index=-100) if number else whole
        by_row += [(side, place) for side in range(2) for place in theirs]
        by_pair += theirs
    rows, order = (sorted(range(len(keys)), key=keys.__getitem__) for keys in (by_row, by_pair))
    everyone = [pair for share in shares for pair in share[0]]
    ordered = recursively_apply(lambda values: values[rows], whole)
    return [everyone[index] for index in order], ordered, torch.cat([share[3] for share in shares])[order]
