"""What scripts of TRL's trainer call besides `train`: files of metrics, loaders, the loss and the reference alone.

Names and meanings are TRL's, 0.11's where 1.16 has none. Each is a few lines around the parts of `train.py`.

Legend: P pairs, R rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from datasets import IterableDataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerControl, TrainerState, trainer_pt_utils
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import PredictionOutput

from fastdpo import build
from fastdpo.batch import PreferenceBatch
from fastdpo.config import DPOConfig
from fastdpo.data import row_key
from fastdpo.layout import Layout
from fastdpo.loader import eval_loader, train_loader
from fastdpo.model import Policy
from fastdpo.ranks import Ranks
from fastdpo.reference import NoReference, Reference, gather_rows
from fastdpo.reference_cache import pairs_of_table
from fastdpo.step import MeanReward
from fastdpo_kernels.pair_loss import PairwiseLoss, pair_loss


class Surface:
    """The part of DPOTrainer that a run itself does not need, with what it takes of the rest."""

    args: DPOConfig
    policy: Policy
    reference: Reference | NoReference
    loss: PairwiseLoss
    mean_reward: MeanReward | None
    layout: Layout
    ranks: Ranks
    state: TrainerState
    control: TrainerControl
    callback_handler: CallbackHandler
    log: Callable[[dict[str, float]], None]
    _evaluate_table: Callable[..., dict[str, float]]
    _fused_blocks: Callable[[], AbstractContextManager[object]]
    processing_class: Any
    optimizer: Any
    train_dataset: build.Table | None
    eval_dataset: dict[str, build.Table]

    log_metrics = trainer_pt_utils.log_metrics
    metrics_format = staticmethod(trainer_pt_utils.metrics_format)
    save_metrics = trainer_pt_utils.save_metrics
    save_state = trainer_pt_utils.save_state

    def is_world_process_zero(self) -> bool:
        return self.state.is_world_process_zero

    def is_local_process_zero(self) -> bool:
        return self.state.is_local_process_zero

    def add_callback(self, callback: Any) -> None:
        self.callback_handler.add_callback(callback)

    def remove_callback(self, callback: Any) -> None:
        self.callback_handler.remove_callback(callback)

    def pop_callback(self, callback: Any) -> Any:
        return self.callback_handler.pop_callback(callback)

    def get_num_trainable_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.policy.parameters() if parameter.requires_grad)

    def get_learning_rates(self) -> list[float]:
        """One a parameter group. Raises ValueError before `train`."""
        if self.optimizer is None:
            raise ValueError("there is no optimizer before train() has made it: call it first")
        return [group["lr"] for group in self.optimizer.param_groups]

    def get_train_dataloader(self) -> DataLoader:
        """-> lists of PreferenceBatches on the CPU, one list an optimizer step."""
        if self.train_dataset is None:
            raise ValueError("train_dataset is missing: the trainer was built without one")
        return train_loader(self.train_dataset, self.layout, self.args, self.ranks)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """The same for evaluation, of a dataset, of one of several evaluation sets by its name, or of the only one."""
        return eval_loader(self._eval_table(eval_dataset), self.layout, self.args, self.ranks)

    def _eval_table(self, eval_dataset: Any) -> build.Table:
        named = {name.removeprefix("eval_"): table for name, table in self.eval_dataset.items()}
        if isinstance(eval_dataset, str) and eval_dataset in named:
            return named[eval_dataset]
        if eval_dataset is not None:
            tables = build.build_eval_tables(eval_dataset, self.processing_class, self.args)
            if len(tables) != 1:
                raise ValueError(f"eval_dataset has {len(tables)} named sets, and a loader is for one: give one")
            (table,) = build.check_fit(self.policy, None, tables, self.processing_class, self.args).values()
            return table
        if len(named) != 1:
            raise ValueError(f"there are {len(named)} evaluation sets ({', '.join(named)}): name one")
        (table,) = named.values()
        return table

    def predict(self, test_dataset: Any, metric_key_prefix: str = "test") -> PredictionOutput:
        """-> `predictions`: (N, 2) fp64 array of implicit rewards, chosen and rejected, a row of the dataset each as
        far as its rows can be scored; `metrics`: those of an evaluation. Raises ValueError for a stream.
        """
        tables = build.build_eval_tables(test_dataset, self.processing_class, self.args, metric_key_prefix)
        if len(tables) != 1 or isinstance(tables.get(metric_key_prefix), IterableDataset):
            raise ValueError("predict takes one table of rows, not several and no stream: call it for each")
        (table,) = build.check_fit(self.policy, None, tables, self.processing_class, self.args).values()
        rewards: dict[bytes, Tensor] = {}
        with self._fused_blocks():
            metrics = self._evaluate_table(metric_key_prefix, table, rewards)
        own = torch.stack(list(rewards.values())) if rewards else torch.empty(0, 2)  # of a share without pairs
        keys, values = gather_rows(self.ranks, list(rewards), own.cpu().double())
        place = {key: index for index, key in enumerate(keys)}
        order = [place[row_key(pair)] for pair in pairs_of_table(table)]  # type: ignore[arg-type]
        self.log(metrics)
        self.control = self.callback_handler.on_predict(self.args, self.state, self.control, metrics)
        return PredictionOutput(values[order].numpy(), None, metrics)

    def null_ref_context(self) -> AbstractContextManager[object]:
        """Within it the policy's model is its own reference: adapters off, or the frozen adapter on.

        Raises ValueError where the reference is another model, or none.
        """
        reference = self.reference
        if not isinstance(reference, Reference) or reference.policy is not self.policy:
            raise ValueError(f"the reference is {reference.description}, not the policy's model in another state")
        return reference.without_policy()

    def compute_ref_log_probs(self, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
        """-> (P,), (P,) fp64: summed reference log-probs of the chosen and of the rejected responses."""
        logps = self.reference(batch.to(self.args.device))
        if logps is None:
            logps = torch.zeros(batch.num_pairs, 2, dtype=torch.float64, device=self.args.device)
        chosen, rejected = logps.unbind(1)
        return chosen, rejected

    compute_reference_log_probs = compute_ref_log_probs

    def dpo_loss(
        self,
        policy_chosen_logps: Tensor,  # (P,) summed over a response's tokens; ipo and sigmoid_norm: their means
        policy_rejected_logps: Tensor,  # (P,)
        reference_chosen_logps: Tensor,  # (P,)
        reference_rejected_logps: Tensor,  # (P,)
    ) -> tuple[Tensor, Tensor, Tensor]:
        """-> (P,) losses, (P,) chosen and (P,) rejected rewards: the run's loss on log-probs from elsewhere, with the
        gradient of the losses by the policy's. Raises ValueError for `use_weighting`, which needs each token's.
        """
        if self.loss.weighting:
            raise ValueError("use_weighting needs the log-probs of each token, and dpo_loss has sums: leave it out")
        logps = torch.stack([policy_chosen_logps, policy_rejected_logps], 1)
        ref_logps = torch.stack([reference_chosen_logps, reference_rejected_logps], 1).double()
        each_one = torch.arange(logps.numel() + 1, dtype=torch.int32, device=logps.device)
        mean = None if self.mean_reward is None else self.mean_reward.value
        given = ref_logps if build.needs_reference(self.args) else None
        result = pair_loss(logps.flatten(), each_one, given, self.loss, mean_reward=mean, tokens_per_pair=1.0)
        return result.losses, result.rewards[:, 0], result.rewards[:, 1]

    @staticmethod
    def get_batch_logps(
        logits: Tensor,  # (R, T, V)
        labels: Tensor,  # (R, T) int64
        label_pad_token_id: int = -100,
        is_encoder_decoder: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """-> (R,) log-probs summed over the labels that are not padding, and (R,) their number; the logits at a place
        predict the next label, for an encoder-decoder the one of that place.
        """
        if logits.shape[:-1] != labels.shape:
            raise ValueError(f"logits are {tuple(logits.shape)} and labels {tuple(labels.shape)}: expected a row each")
        if not is_encoder_decoder:
            logits, labels = logits[:, :-1], labels[:, 1:]
        scored = labels != label_pad_token_id
        targets = labels.where(scored, 0)
        logps = logits.float().log_softmax(-1).gather(2, targets[:, :, None])[:, :, 0]
        return (logps * scored).sum(1), scored.sum(1)
