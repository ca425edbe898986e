"""A batch by hand: loss, metrics, log-probs and logits of a batch that a script holds.

The run itself calls none of these. A batch is what the loaders give (a PreferenceBatch, or the list of an optimizer
batch), or a padded dict in TRL's form, of 0.11 or 1.16 (see `collator.py`); numbers do not depend on which. Names and
returns are TRL 0.11's, as 1.16 has dropped them, but for `compute_loss` and `prediction_step`, which both have.

Dropout is that of training: off, unless `disable_dropout` is False. Nothing is changed: no metric joins the log, no
running mean moves. With several processes each has its own batch.

Legend: P pairs, R = 2P rows, chosen ones first, T tokens, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from fastdpo.batch import OptimizerBatch, PreferenceBatch, pairs_of
from fastdpo.collator import padded_pairs, padded_rows, with_both_names
from fastdpo.config import DPOConfig
from fastdpo.data import ID_COLUMNS, row_key, row_pair
from fastdpo.layout import Layout
from fastdpo.metrics import MetricSums
from fastdpo.model import Policy, evaluation_mode, without_dropout
from fastdpo.predictions import model_logits
from fastdpo.ranks import Ranks
from fastdpo.reference import NoReference, Reference
from fastdpo.step import MeanReward, PreferenceStep
from fastdpo_kernels.pair_loss import PairwiseLoss

IGNORED_LABEL = -100
_Method = TypeVar("_Method", bound=Callable[..., Any])


def _with_dropout_of_training(method: _Method) -> _Method:
    @functools.wraps(method)
    def called(self: ByHand, *args: Any, **kwargs: Any) -> Any:
        with without_dropout(self.policy) if self.args.disable_dropout else nullcontext():
            return method(self, *args, **kwargs)

    return called  # type: ignore[return-value]


class ByHand:
    """The part of DPOTrainer that computes one batch, with what it takes of the rest."""

    args: DPOConfig
    policy: Policy
    reference: Reference | NoReference
    loss: PairwiseLoss
    mean_reward: MeanReward | None
    layout: Layout
    processing_class: Any

    @_with_dropout_of_training
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """-> 0-dim loss of a batch, the mean over its pairs, with a gradient; with `return_outputs` also a dict of the
        metrics and of "logits", (R, T, V), which cost a pass of their own. `num_items_in_batch` has no part in it.
        """
        loss, metrics = self.get_batch_loss_metrics(model, inputs)
        if not return_outputs:
            return loss
        with torch.no_grad():
            logits = model_logits(self._policy_of(model), self._rows_of(inputs))
        return loss, ModelOutput({**metrics, "logits": logits})

    @_with_dropout_of_training
    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """-> loss, logits (R, T, V) and labels (R, T), the token ids; the last two None with `prediction_loss_only`. In
        evaluation mode. `ignore_keys` changes nothing: no other output is given.
        """
        with torch.no_grad(), evaluation_mode(self._policy_of(model)):
            loss, _ = self.get_batch_loss_metrics(model, inputs, "eval")
            if prediction_loss_only:
                return loss, None, None
            rows = self._rows_of(inputs)
            return loss, model_logits(self._policy_of(model), rows), rows["input_ids"]

    @_with_dropout_of_training
    def get_batch_loss_metrics(self, model: Any, batch: Any, train_eval: str = "train") -> tuple[Tensor, dict]:
        """-> the loss of a batch with a gradient, and its metrics as 0-dim tensors on the CPU, under "eval_" names for
        train_eval="eval".
        """
        policy = self._policy_of(model)
        chosen = self.loss, self.mean_reward, False, Ranks(), self.policy.router_coef
        step = PreferenceStep(policy, self.reference, *chosen)
        parts, sums = [], MetricSums(bool(step.router_coef), step.scores_chosen)
        for loss, _, summed in step(self._whole(batch)):
            parts.append(loss)
            sums.add(summed)
        metrics, _ = sums.read(Ranks())
        del metrics["loss"]
        prefix = "eval_" if train_eval == "eval" else ""
        return torch.stack(parts).sum(), {f"{prefix}{name}": torch.tensor(value) for name, value in metrics.items()}

    @_with_dropout_of_training
    def compute_ref_log_probs(self, batch: Any) -> tuple[Tensor, Tensor]:
        """-> (P,), (P,) fp64: summed reference log-probs of the chosen and of the rejected responses."""
        found = []
        for part in self._whole(batch).microbatches:
            logps = self.reference(part)
            zeros = torch.zeros(part.num_pairs, 2, dtype=torch.float64, device=self.args.device)
            found.append(zeros if logps is None else logps)
        chosen, rejected = torch.cat(found).unbind(1)
        return chosen, rejected

    compute_reference_log_probs = compute_ref_log_probs

    def concatenated_inputs(self, batch: Any) -> dict[str, Tensor]:
        """-> (R, T) each: concatenated_input_ids, concatenated_attention_mask, concatenated_labels."""
        rows = self._rows_of(batch)
        labels = rows["input_ids"].masked_fill(rows["completion_mask"] == 0, self.args.label_pad_token_id)
        rows = {"input_ids": rows["input_ids"], "attention_mask": rows["attention_mask"], "labels": labels}
        return {f"concatenated_{name}": values for name, values in rows.items()}

    @_with_dropout_of_training
    def concatenated_forward(self, model: Any, batch: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """-> (P,) log-probs of the chosen and of the rejected responses as `dpo_loss` takes them, (P, T, V) logits of
        both, and the cross-entropy of the chosen tokens: from logits of the model's own forward, with a gradient.
        """
        per_token = [term.per == "token" for term in self.loss.terms]
        if any(per_token) != all(per_token):
            raise ValueError(
                "loss_type has losses of a response's sum and of its mean, and concatenated_forward gives one of the "
                "two: call get_batch_loss_metrics"
            )
        rows = self._rows_of(batch)
        logits = model_logits(self._policy_of(model), rows)
        labels = rows["input_ids"].masked_fill(rows["completion_mask"] == 0, IGNORED_LABEL)[:, 1:]
        taken = labels.clamp(min=0)[:, :, None]
        token_logps = logits[:, :-1].float().log_softmax(-1).gather(2, taken)[:, :, 0] * (labels != IGNORED_LABEL)
        sums, sizes = token_logps.sum(1), (labels != IGNORED_LABEL).sum(1)
        pairs = len(sums) // 2
        cross_entropy = -sums[:pairs].sum() / sizes[:pairs].sum()
        chosen, rejected = (sums / sizes if all(per_token) else sums).chunk(2)
        return chosen, rejected, logits[:pairs], logits[pairs:], cross_entropy

    def tokenize_row(self, feature: Mapping[str, Any], model: Any = None) -> dict[str, list[int]]:
        """A row as lists of ids under TRL 0.11's names: prompt_input_ids, and chosen_ and rejected_ input_ids (prompt
        and response), attention_mask and labels. Raises ValueError for a row that a dataset would be rid of. `model`
        is not looked at.
        """
        pair = row_pair(feature, self.processing_class, self.args)
        row: dict[str, Any] = dict(zip(ID_COLUMNS, (pair.prompt, pair.chosen, pair.rejected), strict=True))
        both = with_both_names(row, self.args.label_pad_token_id)
        return {name: values for name, values in both.items() if name not in ID_COLUMNS}

    def _policy_of(self, model: Any) -> Policy:
        for policy in (self.policy, self.reference.policy):
            if policy is not None and model is policy.model:
                return policy
        raise ValueError(f"model is no {type(model).__name__} of this trainer: give its model or its ref_model")

    def _whole(self, batch: Any) -> OptimizerBatch:
        """On the run's device, and for itself: what other processes have is not counted."""
        parts = [batch] if isinstance(batch, PreferenceBatch) else batch
        if isinstance(batch, Mapping):
            pairs = padded_pairs(batch, self.args.label_pad_token_id)
            parts = [self.layout.collate(pairs, [row_key(pair) for pair in pairs])]
        if not isinstance(parts, Sequence) or not all(isinstance(part, PreferenceBatch) for part in parts):
            raise ValueError(
                f"a batch is a {type(batch).__name__}: expected what get_train_dataloader gives, or a dict of padded "
                "rows in TRL's form"
            )
        pairs, chosen, tokens = (
            sum(getattr(part, name) for part in parts) for name in ("num_pairs", "num_chosen_tokens", "num_tokens")
        )
        return OptimizerBatch([part.to(self.args.device) for part in parts], pairs, chosen, tokens, [pairs])

    def _rows_of(self, batch: Any) -> dict[str, Tensor]:
        """(R, T) of a batch in the form of TRL 1.16, on the run's device. Raises ValueError where rows are no text of a
        decoder-only model.
        """
        if self.layout.make is not None:
            raise ValueError("padded rows with logits are there for decoder-only models of text, and this is another")
        pairs = [pair for part in self._whole(batch).to("cpu").microbatches for pair in pairs_of(part)]
        return {
            name: values.to(self.args.device) for name, values in padded_rows(pairs, self.layout.pad_token_id).items()
        }
