"""What scripts of TRL's trainer call besides `train`: files of metrics, loaders, the loss and the reference alone.

Names and meanings are TRL's, 0.11's where 1.16 has none. Each is a few lines around the parts of `train.py`.

Legend: P pairs, R rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import IterableDataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import trainer_pt_utils
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput

from fastdpo import build, card, checkpoint
from fastdpo.checks import needs_reference
from fastdpo.evaluation import Evaluation
from fastdpo.generate import prompts_of
from fastdpo.hub import Repository
from fastdpo.loader import Collate, eval_loader, train_loader
from fastdpo.model import base_model
from fastdpo.reference import Reference
from fastdpo_kernels.pair_loss import pair_loss

logger = logging.getLogger(__name__)


def _listed(given: str | Iterable[str] | None) -> list[str]:
    return [given] if isinstance(given, str) else list(given or ())


# What TRL's or transformers' loop calls and this one does not, by what to do in place of overriding it.
NOT_CALLED = {
    "give a function as loss_type": "compute_loss get_batch_loss_metrics dpo_loss get_batch_logps concatenated_forward "
    "training_step _compute_loss",
    "override evaluate, or give compute_metrics": "prediction_step evaluation_loop get_batch_samples",
    "give a data_collator, or rows with prompt_ids, chosen_ids and rejected_ids": "concatenated_inputs tokenize_row "
    "_prepare_dataset _prepare_inputs",
    "order the rows of train_dataset and set train_sampling_strategy='sequential', or give a data_collator": (
        "get_train_dataloader get_eval_dataloader get_test_dataloader _get_train_sampler"
    ),
    "give optimizers": "create_optimizer create_scheduler create_optimizer_and_scheduler",
    "give a TrainerCallback": "_inner_training_loop _maybe_log_save_evaluate _save_checkpoint _save",
    "give ref_model": "compute_ref_log_probs compute_reference_log_probs null_ref_context",
}


def refuse_overrides(cls: type) -> None:
    """Raises ValueError for a subclass of a trainer here that overrides what would never be called."""
    own = list(takewhile(lambda base: not base.__module__.startswith("fastdpo."), cls.__mro__))
    for instead, names in NOT_CALLED.items():
        for name in names.split():
            if overriding := [base for base in own if name in vars(base)]:
                raise ValueError(
                    f"{overriding[0].__name__} overrides {name}, which training here never calls: {instead}, and call "
                    "the method from a callback if you need it"
                )


class Surface(Evaluation):
    """The part of DPOTrainer that a run itself does not need, with what it takes of the rest."""

    accelerator: Accelerator
    hub: Repository
    optimizer: Any
    train_dataset: build.Table | None
    _dataset_names: tuple[str, ...]
    _stored: dict[str, dict[str, list[float]]]

    log_metrics = trainer_pt_utils.log_metrics
    metrics_format = staticmethod(trainer_pt_utils.metrics_format)
    save_metrics = trainer_pt_utils.save_metrics
    save_state = trainer_pt_utils.save_state

    @property
    def eval_dataset(self) -> build.Table | dict[str, build.Table] | None:
        """Token id columns, in a dict by name where several sets were given, None where none was."""
        named = {name.removeprefix("eval_"): table for name, table in self._eval_tables.items()}
        return self._eval_tables.get("eval", named or None)

    @property
    def tokenizer(self) -> Any:
        """The older name of `processing_class`."""
        return self.processing_class

    def store_metrics(self, metrics: Mapping[str, Any], train_eval: str = "train") -> None:
        """Their means over the calls by then join the next log line of training, or with train_eval="eval" of
        evaluation, under the names given.
        """
        for name, value in metrics.items():
            self._stored[train_eval].setdefault(name, []).append(float(value))

    def _take_stored(self, logs: dict[str, Any]) -> None:
        """Into `logs`, a line of training by its loss."""
        stored = self._stored["train" if {"loss", "train_loss"} & set(logs) else "eval"]
        logs |= {name: sum(values) / len(values) for name, values in stored.items()}
        stored.clear()

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

    def end(self) -> None:
        """The last call of a script: trackers finish, and the processes of a run leave each other."""
        self.accelerator.end_training()

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
        return train_loader(self.train_dataset, self.layout, self.args, self.ranks, self.collator)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """The same for evaluation, of a dataset, of one of several evaluation sets by its name, or of the only one."""
        return eval_loader(self._eval_table(eval_dataset), self.layout, self.args, self.ranks, self.collator)

    def _eval_table(self, eval_dataset: Any) -> build.Table:
        named = {name.removeprefix("eval_"): table for name, table in self._eval_tables.items()}
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

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """-> metrics of what `get_eval_dataloader` gave, and unless `prediction_loss_only` the logits and labels that
        compute_metrics is given, see `predictions.py`. Nothing is logged but `description`; `ignore_keys` changes
        nothing.
        """
        if not isinstance(getattr(dataloader, "collate_fn", None), Collate):
            raise ValueError("evaluation_loop takes a loader of this trainer: give get_eval_dataloader(eval_dataset)")
        logger.info("%s", description)
        kept = None if prediction_loss_only else self._predictions()
        with self._fused_blocks():
            metrics, pairs = self._evaluate_loader(metric_key_prefix, dataloader, None, kept)
        predictions, labels, *_ = [None] * 2 if kept is None else kept.arrays()
        return EvalLoopOutput(predictions, labels, metrics, pairs)  # type: ignore[arg-type]

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """-> `predictions`: (N, 2) fp64 array of implicit rewards, chosen and rejected, a row of the dataset each as
        far as its rows can be scored; `metrics`: those of an evaluation. Raises ValueError for a stream. `ignore_keys`
        changes nothing.
        """
        tables = build.build_eval_tables(test_dataset, self.processing_class, self.args, metric_key_prefix)
        if len(tables) != 1 or isinstance(tables.get(metric_key_prefix), IterableDataset):
            raise ValueError("predict takes one table of rows, not several and no stream: call it for each")
        (table,) = build.check_fit(self.policy, None, tables, self.processing_class, self.args).values()
        rows: list[Tensor] = []
        with self._fused_blocks():
            metrics = self._evaluate_table(metric_key_prefix, table, rows)
        values = torch.cat(self.ranks.gather(torch.cat([part.cpu() for part in rows])))
        values = values[values[:, 0].argsort()]
        self.log(metrics)
        self.control = self.callback_handler.on_predict(self.args, self.state, self.control, metrics)
        return PredictionOutput(values[:, 1:3].numpy(), None, metrics)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        *,
        language: str | list[str] | None = None,
        license: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Writes README.md into output_dir, unless somebody else has written one: what the run is and has come to.

        What follows `tags` is TRL 0.11's: `finetuned_from` is the base model, `tasks` are more tags, `dataset_tags`
        more names on the Hub; `dataset` and `dataset_args` are words for the card's table.
        """
        if not self.ranks.is_main:
            return
        more: dict[str, Any] = {"model_name": model_name} if model_name else {}
        if names := [*_listed(dataset_name), *_listed(dataset_tags)]:
            more["dataset_names"] = names
        data = ", ".join([*_listed(dataset), *_listed(dataset_args)])
        more |= {"language": language, "license": license, "finetuned_from": finetuned_from, "data": data}
        given = [*_listed(tags), *_listed(tasks)]
        directory = Path(str(self.args.output_dir))
        if not card.may_write(directory):
            logger.info("model card: %s stays as it is, somebody else wrote it", directory / "README.md")
            return
        run = self._run_facts()
        card.write_card(replace(run, **more, tags=[*run.tags, *given]), directory)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card_options: Any,
    ) -> Any:
        """Saves the model with its card (`card_options` are `create_model_card`'s) and uploads output_dir; -> the
        commit, or with blocking=False its Future; None in other processes than the first.
        """
        weights = checkpoint.whole_weights(self.policy.model, self.ranks.is_main)  # type: ignore[arg-type]
        if not self.ranks.is_main:
            return None
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub.repo_id is None:
            self.hub.open(token, private)
        self._write_model(Path(str(self.args.output_dir)), weights)
        self.create_model_card(**card_options)
        return self.hub.push(commit_message, blocking, token, revision)

    def _write_model(self, directory: Path, weights: checkpoint.Weights) -> None:
        free = card.may_write(directory)  # peft writes a card of its own
        checkpoint.save_model(self.policy.model, self.processing_class, directory, weights)  # type: ignore[arg-type]
        if free:
            card.write_card(self._run_facts(), directory)

    def _push_checkpoint(self, directory: Path, weights: checkpoint.Weights) -> None:
        if not self.ranks.is_main:
            return
        write = partial(self._write_model, Path(str(self.args.output_dir)), weights)
        if self.hub.push_checkpoint(directory, self.state, write):
            self.callback_handler.on_push_begin(self.args, self.state, self.control)

    def _run_facts(self) -> card.Run:
        args, table = self.args, self.train_dataset
        return card.Run(
            self.policy,
            self.processing_class,
            args,
            self.state,
            self.reference.description,
            None if table is None or isinstance(table, IterableDataset) else len(table),
            args.per_device_train_batch_size * args.gradient_accumulation_steps * self.ranks.count,
            self._dataset_names,
            getattr(base_model(self.policy.model), "model_tags", None) or (),
        )

    def get_batch_samples(self, model: Any, batch: Any) -> tuple[list[str], list[str] | None]:
        """-> texts with their prompts, sampled by the policy and by the reference (None where it does not run), for
        the pairs of one or several PreferenceBatches, or of a padded dict in TRL's form, or for prompt_input_ids and
        prompt_attention_mask of a dict.

        Raises ValueError for another model than the one that trains.
        """
        if model is not None and model is not self.policy.model:
            raise ValueError("get_batch_samples samples from the trainer's own model: give trainer.model, or None")
        prompts = prompts_of(batch, self.args.label_pad_token_id)
        texts = [self.sampler.texts(prompts, answers) for answers in self.sampler.answers(prompts) if answers]
        return texts[0], texts[1] if len(texts) > 1 else None

    def null_ref_context(self) -> AbstractContextManager[object]:
        """Within it the policy's model is its own reference: adapters off, or the frozen adapter on.

        Raises ValueError where the reference is another model, or none.
        """
        reference = self.reference
        if not isinstance(reference, Reference) or reference.policy is not self.policy:
            raise ValueError(f"the reference is {reference.description}, not the policy's model in another state")
        return reference.without_policy()

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
        given = ref_logps if needs_reference(self.args) else None
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
