"""The trainer: build everything once, then a loop without branches on kinds.

    rows -> TokenPair -> PreferenceBatch -> token log-probs -> pair losses -> backward, optimizer step, log line

The optimizer sees exactly `per_device_train_batch_size * gradient_accumulation_steps` pairs a step and process. They
are computed in micro-batches, each loss normalised by the number of pairs of the whole step, so gradients do not depend
on the split. Accelerate connects processes and devices; transformers' callback handler, state and control decide when
to log, evaluate, save and stop.
"""

from __future__ import annotations

import copy
import gc
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerControl, TrainerState
from transformers.trainer_utils import SaveStrategy, TrainOutput, enable_full_determinism, set_seed

from fastdpo import build, checkpoint, checks, faults
from fastdpo.batch import OptimizerBatch, PreferenceBatch, Share
from fastdpo.compiled import compiled_blocks
from fastdpo.config import DPOConfig
from fastdpo.data import text_part
from fastdpo.describe import build_report, facts_of
from fastdpo.evaluation import check_best_metric
from fastdpo.generate import Sampler
from fastdpo.hub import Repository
from fastdpo.interrupts import Interrupts, end
from fastdpo.loader import epoch_batches, length_of_run, row_numbers
from fastdpo.losses import pairwise_loss
from fastdpo.memory import Plan
from fastdpo.messages import show_messages
from fastdpo.metrics import Running
from fastdpo.mixture import hub_names
from fastdpo.model import Policy, checkpointing, checkpoints_already, without_dropout
from fastdpo.noise import noisy_embeddings
from fastdpo.nonfinite import Computed, Guard, numbers_of_pairs
from fastdpo.optimizer import STEPPED_BY_EVALUATION, allocate_states, build_optimizer
from fastdpo.predictions import check_hooks
from fastdpo.ranks import FITS, GradientSum, find_ranks
from fastdpo.reference import NoReference
from fastdpo.resume import (
    Position,
    RunState,
    callback_states,
    restore_callbacks,
    run_in_words,
    set_random_state,
    write,
)
from fastdpo.retry import Retry, out_of_memory
from fastdpo.sharding import check_at_rest, check_optimizer, whole
from fastdpo.step import SUMS, PreferenceStep
from fastdpo.surface import Surface, refuse_overrides
from fastdpo_kernels.pair_loss import PairLoss

logger = logging.getLogger(__name__)

# Of a TrainerState: what the options of a run that goes on say, and not the checkpoint
OF_THIS_RUN = ("max_steps", "num_train_epochs", "logging_steps", "eval_steps", "save_steps", "train_batch_size")
OF_THIS_RUN += ("is_local_process_zero", "is_world_process_zero")
FLAGS = ("should_log", "should_evaluate", "should_save", "should_epoch_stop", "should_training_stop")


class DPOTrainer(Surface):
    """Trains `model` from preference pairs.

    model, ref_model: a name, a path, or a loaded PreTrainedModel or PeftModel. Without ref_model the reference is the
        model as it is given: its base with the adapters off, or a frozen copy. ref_model is frozen and stays so.
    args: a DPOConfig (TRL's DPOConfig and TrainingArguments are converted).
    train_dataset, eval_dataset: whatever `fastdpo.data.load_rows` takes; eval_dataset may also map names to such.
    processing_class: the tokenizer, also accepted as `tokenizer`, or the processor of a vision-language model; by
        default the one that comes with the model.
    data_collator: makes padded batches of rows in TRL's form, of 0.11 or 1.16, which are read back into pairs.
    compute_metrics, preprocess_logits_for_metrics: what an evaluation says beside its own metrics, from logits, which
        are computed for them alone.
    optimizers: an optimizer over all that trains, and a schedule for it; None where args makes it.
    quantization_config, peft_config: of a model that loads, and for new adapters; fields of args do the same.
    model_init: gives the model in place of `model`.
    options: fields of args, which take precedence over args, as TRL's trainer took them before 0.12 (beta, ...).

    The order is TRL 1.16's. `surface.py` has what scripts call besides `train`, `evaluate` and `save_model`.

    Raises ValueError for input that cannot train, before a model loads wherever it can be told by then.
    """

    def __init__(
        self,
        model: build.Model | None = None,
        ref_model: build.Model | None = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        *,
        tokenizer: Any = None,
        model_init: Callable[[], build.Model] | None = None,
        preprocess_logits_for_metrics: Any = None,
        **options: Any,
    ) -> None:
        if tokenizer is not None and processing_class is not None:
            raise ValueError("processing_class and tokenizer are two names for one argument: give one of them")
        if model is not None and model_init is not None:
            raise ValueError("both model and model_init are given: leave one out")
        refuse_overrides(type(self))
        began = time.time()
        show_messages(args)
        # a copy: what the run resolves, such as the learning rate, is not written into a config that others may share
        self.args = args = copy.copy(DPOConfig.from_arguments(DPOConfig() if args is None else args))
        args.take(options if quantization_config is None else options | {"quantization_config": quantization_config})
        args.validate()
        check_hooks(compute_metrics, preprocess_logits_for_metrics, args)
        if model_init is not None:
            set_seed(args.seed)
            model = model_init()
        checks.check_models(model, ref_model, args, peft_config)
        checks.check_padded_rows(model, {"data_collator": data_collator, "compute_metrics": compute_metrics}, args)
        checks.choose_adapters(model, peft_config, args)
        reporters = self._find_its_place()

        self.processing_class = build.find_tokenizer(processing_class or tokenizer, model, args)  # type: ignore[arg-type]
        tables = build.build_eval_tables(eval_dataset, self.processing_class, args)
        check_best_metric(args, tables, pairwise_loss(args), compute_metrics)
        if train_dataset is not None:
            tables["train"] = build.build_train_table(train_dataset, self.processing_class, args)
        self._dataset_names = hub_names(train_dataset)

        self.policy = build.build_policy(model, peft_config, args, self.ranks)  # type: ignore[arg-type]
        if args.learning_rate is None:
            args.learning_rate = 2e-5 if hasattr(self.policy.model, "peft_config") else 1e-6
        ref_policy = build.build_ref_policy(ref_model, self.policy, args, self.ranks)
        copied = build.frozen_copy(self.policy, ref_policy, args, self.ranks)
        shapes = build.shard_policies([self.policy, ref_policy, copied], tables, args, self.ranks)
        with build.fused_blocks([self.policy, ref_policy], args) as fused:
            tables = build.check_fit(self.policy, ref_policy, tables, self.processing_class, args)
            self.train_dataset = tables.pop("train", None)
            self._eval_tables = tables
            self.data_collator, self.collator = data_collator, build.build_collator(data_collator, self.policy, args)
            self.compute_metrics, self.preprocess_logits_for_metrics = compute_metrics, preprocess_logits_for_metrics
            every = [self.train_dataset, *tables.values()]
            self.layout = build.common_layout(self.policy, ref_policy, self.processing_class, args, every)
            self.reference = build.build_reference(self.policy, ref_policy, self.layout, args, self.ranks, copied)
            self.loss = pairwise_loss(args)
            self.mean_reward = build.build_mean_reward(self.loss, args)

            self._begin_state(reporters, callbacks, optimizers)
            del ref_policy, copied  # the reference alone holds it from here on, and may let go of it
            tables = {"train": self.train_dataset, **self._eval_tables}
            plan = self._plan_and_remember(tables, shapes, model, ref_model)
            facts = list(facts_of(self.policy, self.layout, self.reference, fused, args, self.ranks))
            for fact in facts:
                logger.info("%s: %s", *fact)
        if args.report_html and self.ranks.is_main:
            run = self.policy, tables, self.reference, facts, plan, args, self.ranks, began
            self.callback_handler.add_callback(build_report(*run))
        self.sampler = Sampler(self.policy, self.reference, text_part(self.processing_class), args)
        if args.generate_during_eval:
            self.sampler.check(self._eval_tables)
        self.control = self.callback_handler.on_init_end(args, self.state, self.control)

    def _find_its_place(self) -> list[Any]:
        """Folder, checkpoint, processes, repository and seed, before any data or model is read; -> the trackers."""
        args = self.args
        reporters = build.find_reporters(args)
        args.check_output_dir()
        self._checked_checkpoint = args.resume_from_checkpoint, self._find_checkpoint(args.resume_from_checkpoint)
        self.ranks = find_ranks(args)
        args.disable_tqdm = args.disable_tqdm or not self.ranks.is_main
        self.hub = Repository(args)
        if args.push_to_hub and self.ranks.is_main:
            self.hub.open()
        (enable_full_determinism if args.full_determinism else set_seed)(args.seed)
        return reporters

    def _begin_state(self, reporters: list[Any], callbacks: Any, optimizers: tuple[Any, Any]) -> None:
        """What a run keeps of its own, and who is told of it."""
        self._margins_checked = self._evaluate_at_end = False
        self._interrupts = Interrupts()
        self._stored: dict[str, dict[str, list[float]]] = {"train": {}, "eval": {}}
        self._retry = Retry(self.ranks, dropout=not self.args.disable_dropout)
        self._start_engine()
        self.optimizer, self.lr_scheduler = self._given_optimizers = optimizers
        self.state, self.control = self._new_state(), TrainerControl()
        given = callbacks if isinstance(callbacks, (list, tuple)) else [] if callbacks is None else [callbacks]
        self.callback_handler = build.build_callbacks(
            [*reporters, *given], self.policy, self.processing_class, self.args
        )

    def _plan_and_remember(
        self, tables: dict[str, Any], shapes: Policy | None, model: build.Model | None, ref_model: build.Model | None
    ) -> Plan | None:
        """Fills the reference's memory; micro-batches are planned before it, and again where it freed a model."""
        run = self.policy, self.reference, tables, self.layout, self.args, self.ranks, shapes
        given_budget = self.args.max_tokens_per_microbatch
        plan = build.plan_batches(*run)
        if build.remember_reference(
            self.reference, tables, self.policy, self.layout, self.args, model, ref_model, self.ranks
        ):
            self.args.max_tokens_per_microbatch = given_budget  # the freed model left room for larger ones
            plan = build.plan_batches(*run)
        return plan

    @property
    def model(self) -> Any:
        """The model that trains, a PeftModel where adapters do."""
        return self.policy.model

    @property
    def ref_model(self) -> Any:
        """The reference's own model; None where it is the policy with its adapters switched."""
        policy = self.reference.policy
        return None if policy is None or policy is self.policy else policy.model

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: None = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Trains; -> transformers' TrainOutput (global_step, training_loss, metrics).

        resume_from_checkpoint: a checkpoint to go on from, True for the newest whole one of output_dir; by default that
            of args. The trainer is then built from the same model, data and options as at first.
        ignore_keys_for_eval: changes nothing, as for `evaluate`.

        Raises ValueError for a `trial` of a hyper-parameter search, and for a checkpoint that is not whole, or of
        another run.
        """
        if trial is not None:
            raise ValueError("trial is of transformers' hyper-parameter search: start a run for each trial")
        args = self.args
        resume_from = args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        asked, found = self._checked_checkpoint  # whose files were all read by now
        resumed = found if resume_from == asked else self._find_checkpoint(resume_from)
        self._checked_checkpoint = "", None
        if self.train_dataset is None:
            raise ValueError("train_dataset is missing: the trainer was built without one")
        args.validate()
        if self.layout.shared and not build.may_share(args):
            raise ValueError(
                f"disable_dropout={args.disable_dropout}, neftune_noise_alpha={args.neftune_noise_alpha}: one of them "
                "was changed after the trainer was made, whose pairs share what they begin alike with: set it in the "
                "config"
            )
        check_best_metric(args, self._eval_tables, self.loss, self.compute_metrics)
        started = time.time()
        self._start_engine()
        loader = self.get_train_dataloader()
        steps, epochs = length_of_run(loader, args)
        self.optimizer, self.lr_scheduler = build_optimizer(self.model, args, steps, self._given_optimizers)
        if self.ranks.fsdp is not None:
            check_at_rest(self.policy)
            check_optimizer(self.optimizer)
        allocate_states(self.optimizer)
        self.scaler = torch.amp.GradScaler(args.device.type, enabled=args.fp16)
        self.state = self._new_state(
            max_steps=steps, num_train_epochs=math.ceil(epochs), train_batch_size=args.train_batch_size
        )
        self.state.compute_steps(args, steps)
        self.control = TrainerControl()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.mean_reward = build.build_mean_reward(self.loss, args)
        self._running = Running(self._preference_step(training=True), trained)
        self._sum_gradients = GradientSum(self.ranks, trained)
        self._guard = Guard(args.on_nonfinite == "raise", self._running, args.device)
        if self.ranks.count > 1 and self.policy.noisy:
            torch.manual_seed(args.seed + self.ranks.rank)  # each draws dropout masks of its own
        handler: Any = self.callback_handler
        handler.optimizer, handler.lr_scheduler, handler.train_dataloader = self.optimizer, self.lr_scheduler, loader

        self._position, self._random_state = Position(), None
        self._in_words = run_in_words(self.train_dataset, self.reference, args, self.ranks)
        self._ended_by, self._saved_step = 0, -1
        if resumed is not None:
            self._resume(resumed)
        elif others := checkpoint.checkpoints(Path(str(args.output_dir))):
            logger.warning(
                "output_dir has checkpoints of an earlier run, up to %s: resume_from_checkpoint=True takes the one of "
                "most steps, so give this run another directory",
                others[-1].name,
            )
        self._check_room(steps, math.ceil(epochs))
        before = self._running.pairs, self.state.global_step, self._running.tokens

        explained = faults.explained(Path(str(args.output_dir)))
        with self._fused_blocks(), self._training_mode(), self._garbage_waits(), self._interrupts.noted(), explained:
            self.policy.train()
            self.control = handler.on_train_begin(args, self.state, self.control)
            if args.eval_on_start and resumed is None:
                self.evaluate()
            self._run_epochs(loader, steps)
            self._report_faults()
            self._end_if_told()
            if self._evaluate_at_end:
                self.evaluate()
                self._end_if_told()
            if args.load_best_model_at_end and self.state.best_model_checkpoint:
                logger.info("loading the best model, from %s", self.state.best_model_checkpoint)
                best = Path(self.state.best_model_checkpoint)  # which the first wrote, perhaps where others cannot read
                if self.ranks.fsdp is not None:
                    checkpoint.load_shares(self.model, best, self.ranks.is_main)
                elif self.ranks.is_main:
                    checkpoint.load_weights(self.model, best)
                self.ranks.equalise(self.policy)
        return self._finish(time.time() - started, before)

    def _find_checkpoint(self, resume_from: str | bool | None) -> Path | None:
        return checkpoint.find(resume_from, Path(str(self.args.output_dir))) if resume_from else None

    def _check_room(self, steps: int, epochs: int) -> None:
        """Of the disk, for checkpoints; raises ValueError where there is none."""
        args, output_dir = self.args, Path(str(self.args.output_dir))
        if args.save_strategy == SaveStrategy.NO or self.state.global_step >= steps:  # nothing comes to be saved
            return
        if args.should_save:
            checkpoint.tidy(output_dir)
        free = checkpoint.free_bytes(output_dir) if args.should_save else FITS
        free = min(theirs[0] for theirs in self.ranks.exchange("sizes", [free]))
        left = steps - self.state.global_step
        counts = {SaveStrategy.STEPS: -(-left // (self.state.save_steps or steps)), SaveStrategy.EPOCH: epochs}
        saves = counts.get(args.save_strategy, 1)  # type: ignore[call-overload]
        kept = min(saves, args.save_total_limit + 1) if args.save_total_limit else saves
        size = checkpoint.size_of(self.model, self.optimizer, args.save_only_model)
        checkpoint.check_room(output_dir, free, size, kept)

    def _resume(self, directory: Path) -> None:
        """Everything as it was when the checkpoint was written, but for what the options say of the run's length."""
        logger.info("resuming from %s", directory)
        self._position, self._random_state = self._run_state().restore(directory)
        state: Any = checkpoint.load_state(directory)
        fresh, self.state = self.state, state
        for name in OF_THIS_RUN:
            setattr(state, name, getattr(fresh, name))
        best = Path(str(self.args.output_dir)) / f"checkpoint-{state.best_global_step}"
        if best.is_dir():  # output_dir may be called otherwise by now
            state.best_model_checkpoint = str(best)
        restore_callbacks(self.callback_handler.callbacks, state.stateful_callbacks)
        if state.global_step >= state.max_steps:
            left = directory.name, state.global_step, state.max_steps
            logger.warning("%s is of step %d: nothing is left of %d steps", *left)
        self._margins_checked = True

    def _run_state(self) -> RunState:
        return RunState(
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.lr_scheduler,
            scaler=self.scaler,
            running=self._running,
            mean_reward=self.mean_reward,
            reference=self.reference,
            retry=self._retry,
            ranks=self.ranks,
            args=self.args,
            rows=self._in_words,
            probe=build.probe_batch(self.policy, self.layout),
        )

    def _batches(self, loader: DataLoader) -> Iterator[Share]:
        """What is left of an epoch; the random state of a run that goes on is that of its next step."""
        batches = epoch_batches(loader, self._position.epoch, self._position.batches)
        if self._random_state is not None:
            set_random_state(self._random_state, self.args.device)
            self._random_state = None
        return batches

    def _run_epochs(self, loader: DataLoader, steps: int) -> None:
        args, handler = self.args, self.callback_handler
        length = len(loader) if isinstance(self.train_dataset, Dataset) else steps
        while self.state.global_step < steps:
            epoch, count = self._position.epoch, self._position.batches
            self.control = handler.on_epoch_begin(args, self.state, self.control)
            for count, batches in enumerate(self._batches(loader), count + 1):  # noqa: B007, B020
                self.control = handler.on_step_begin(args, self.state, self.control)
                self._optimizer_step(batches)
                self.state.global_step += 1
                self.state.epoch = epoch + count / length
                if args.sync_ref_model and self.state.global_step % args.ref_model_sync_steps == 0:
                    self.reference.mix(args.ref_model_mixup_alpha)
                self._position = Position(epoch, count)
                self.control = handler.on_step_end(args, self.state, self.control)
                self._guard.poll()
                self.control.should_log |= self._guard.ends_run
                self._agree_on_control()
                self._log_evaluate_save()
                if self._ended_by:
                    return
                if self.control.should_epoch_stop or self.control.should_training_stop:
                    break
            if count == 0:
                raise ValueError(
                    "train_dataset gave no batch: it is empty, or smaller than one batch with dataloader_drop_last=True"
                )
            if not self.control.should_training_stop or isinstance(self.train_dataset, Dataset) and count == length:
                self._position = Position(epoch + 1)
            self.control = handler.on_epoch_end(args, self.state, self.control)
            self._agree_on_control()
            self._log_evaluate_save()
            self.reference.share(self.ranks, args.device)  # the next epoch deals rows otherwise
            if self.control.should_training_stop:  # also where asked for before the first step, which all take
                return

    def _optimizer_step(self, batches: Share) -> None:
        """All micro-batches of one step, their gradients those of the mean over its pairs; then one update."""
        args, running = self.args, self._running
        handler: Any = self.callback_handler
        self._substeps, mean_reward = 0, copy.copy(self.mean_reward)
        rows = partial(row_numbers, handler.train_dataloader, self._position.epoch, self._position.batches, batches)
        self._retry(self._backward, batches, handler.train_dataloader, self._undo_step())
        self.control = handler.on_pre_optimizer_step(args, self.state, self.control)
        try:
            skipped = self._guard.update(self.optimizer, self.scaler, self.state.global_step + 1, rows)
        except RuntimeError as error:
            if out_of_memory(error):  # some weights may have moved: this cannot be done again
                error.add_note("fastdpo: the optimizer's update does not fit: take optim='adamw_8bit', or a paged one")
            raise
        if self.mean_reward is not None and mean_reward is not None:
            self.mean_reward.undo(skipped, mean_reward)
        self.control = handler.on_optimizer_step(args, self.state, self.control)
        running.learning_rate = self.optimizer.param_groups[0]["lr"]
        if args.lr_scheduler_type not in STEPPED_BY_EVALUATION:
            self.lr_scheduler.step()
        self.optimizer.zero_grad()
        if args.torch_empty_cache_steps and (self.state.global_step + 1) % args.torch_empty_cache_steps == 0:
            torch.cuda.empty_cache()

    def _backward(self, on_host: OptimizerBatch) -> None:
        """The gradients of an optimizer batch, clipped; what is counted of it counts once all of it is through."""
        args, running = self.args, self._running
        on_device = on_host.to(args.device, non_blocking=True)
        vectors, pairs = [], []
        for index, (loss, result, sums) in enumerate(running.step(on_device)):
            batch = on_device.microbatches[index]
            if not self._margins_checked and (batch.num_pairs or self.ranks.fsdp is not None):
                self._check_first_margins(result, batch)
                self._margins_checked = True
            vectors.append(sums)
            pairs.append(numbers_of_pairs(result))
            self.accelerator.backward(self.scaler.scale(loss))
            if self._substeps <= index < len(on_host.microbatches) - 1:
                self._substeps += 1  # done again in smaller parts, none is told of twice
                self.control = self.callback_handler.on_substep_end(args, self.state, self.control)
        mean_loss = torch.stack(vectors)[:, SUMS.index("loss")].sum() / on_host.num_pairs
        self._sum_gradients(mean_loss)
        self.scaler.unscale_(self.optimizer)
        limit = args.max_grad_norm or math.inf  # without one it is measured alone
        norm = running.grad_norm = whole(self.accelerator.clip_grad_norm_(running.trained, limit))
        window = copy.copy(running.sums)
        for sums in vectors:
            window.add(sums, skip_non_finite=args.logging_nan_inf_filter)
        computed = Computed(on_host, mean_loss, norm, torch.cat(pairs))
        self.ranks.agree()
        self._guard.computed, running.sums = computed, window
        running.tokens += on_host.num_tokens
        running.pairs += on_host.num_pairs

    def _undo_step(self) -> Callable[[], None]:
        """-> what puts back all that `_backward` changes."""
        mean_reward, device = copy.copy(self.mean_reward), self.args.device
        random = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None

        def undo() -> None:
            if mean_reward is not None:
                vars(self.mean_reward).update(vars(mean_reward))
            torch.set_rng_state(random[0])
            if random[1] is not None:
                torch.cuda.set_rng_state(random[1], device)
            self.optimizer.zero_grad()
            if self.scaler.is_enabled():  # it may have unscaled; told its scale anew, it forgets that
                self.scaler.scale(torch.zeros((), device=device))
                self.scaler.update(self.scaler.get_scale())

        return undo

    def _check_first_margins(self, result: PairLoss, batch: PreferenceBatch) -> None:
        """Policy and reference start equal, so every log-ratio of the first micro-batch must be 0: the one check that
        catches a wrong reference, a wrong mask and a wrong mode at once.
        """
        reference = self.reference
        if isinstance(reference, NoReference) or not reference.equals_policy or self.policy.noisy:
            return
        largest = _largest(result.log_ratios)
        if not self.ranks.makes_pass(largest != 0):
            logger.info("first margins: all exactly 0, the policy starts from its reference")
            return
        # What is remembered may come from another micro-batch, so the reference runs again beside this one. What is
        # left can only be excused by what it varies by from run to run: 0 where kernels are deterministic.
        rounding = _largest(reference.rounding(result.logps))
        if reference.policy is None:  # freed: what it remembers may be off by rounding, and by no more
            difference, allowed = largest, rounding
        else:
            online = reference.compute(batch)
            allowed = 4 * _largest(online - reference.compute(batch))
            difference = _largest(result.logps - online)
            # with a gradient and without, it is two programs; of T5, two backends, as its position bias is trained
            if self.args.torch_compile or self.args.is_encoder_decoder:
                allowed += rounding
        if not difference <= allowed:
            raise RuntimeError(
                f"before the first update a log-ratio of policy to its own reference is {difference:.2e}, must be 0 "
                f"(rounding and repeated runs explain {allowed:.0e}): something changed the model, or changes it "
                "between two forward passes (a hook, a cache, noise): find it first"
            )
        if not largest <= allowed + rounding:
            raise RuntimeError(
                f"before the first update a log-ratio of policy to its own reference is {largest:.2e}, though both "
                "compute the same: what is remembered of the reference is of another state of the model (a row was "
                "scored before its weights or modes changed): build the trainer anew"
            )
        logger.warning("first log-ratios: up to %.1e instead of 0, rounding of other batches or kernels", largest)

    def _agree_on_control(self) -> None:
        """What a callback asks for in one process, such as one that looks at the clock, all do."""
        asked = [*(getattr(self.control, flag) for flag in FLAGS), self._interrupts.seen]
        *flags, signals = zip(*self.ranks.exchange("flags", asked), strict=True)
        for flag, theirs in zip(FLAGS, flags, strict=True):
            setattr(self.control, flag, any(theirs))
        if any(signals) and not self._ended_by:
            self._ended_by = max(signals)
            self.control.should_save = self.control.should_training_stop = True

    def _log_evaluate_save(self) -> None:
        if self.control.should_log or self.state.global_step % 100 == 0:
            gc.collect()  # see _garbage_waits
        if self.control.should_log and self._running.sums.sums is not None:
            self.log(self._read_metrics())
            self._report_faults()
            self._agree_on_control()
        if self.control.should_evaluate:
            self.evaluate()
            self._agree_on_control()
        if self.control.should_save or self._ended_by:
            self._write_checkpoint()
            self._agree_on_control()

    def _report_faults(self) -> None:
        """Tells of steps whose numbers were not finite, or ends the run at them."""
        self._guard.poll(wait=True)
        if self._guard.found and not isinstance(self.reference, NoReference):
            self.reference.memory.forget_non_finite()
        tokenizer, output_dir = text_part(self.processing_class), Path(str(self.args.output_dir))
        self._guard.report(self.model, tokenizer, output_dir, self.ranks)

    def _end_if_told(self) -> None:
        """Saves and ends where a signal came, also since the last step."""
        self._agree_on_control()
        if not self._ended_by:
            return
        if self._saved_step != self.state.global_step:
            self._write_checkpoint()
        more = "" if self.args.save_only_model else "; train(resume_from_checkpoint=True) goes on from here"
        logger.warning("saved after step %d%s", self.state.global_step, more)
        end(self._ended_by)

    def _write_checkpoint(self) -> None:
        self._report_faults()
        args, output_dir, state = self.args, Path(str(self.args.output_dir)), self.state
        directory = checkpoint.path_of(output_dir, state)
        if state.best_global_step == state.global_step:
            state.best_model_checkpoint = str(directory)
        self._saved_step = state.global_step
        parts = None if args.save_only_model else self._run_state().gather(self._position)
        weights = checkpoint.whole_weights(self.model, args.should_save)
        if args.should_save:
            self._write_files(directory, parts, weights)
        self.control = self.callback_handler.on_save(args, state, self.control)

    def _write_files(self, directory: Path, parts: dict[str, Any] | None, weights: checkpoint.Weights) -> None:
        args, state = self.args, self.state
        state.stateful_callbacks = callback_states(self.callback_handler.callbacks)  # type: ignore[assignment]
        self.hub.before_checkpoint()
        with checkpoint.written_whole(directory) as draft:
            checkpoint.save_model(self.model, self.processing_class, draft, weights)
            state.save_to_json(str(draft / checkpoint.STATE))
            if parts is not None:
                write(self.model, parts, draft, weights)
        checkpoint.remove_old(directory.parent, directory, state, args.save_total_limit)
        self._push_checkpoint(directory, weights)

    def _read_metrics(self) -> dict[str, float]:
        running = self._running
        norm = [] if running.grad_norm is None else [running.grad_norm]
        metrics, extra = running.sums.read(self.ranks, *norm)
        first = running.logged_steps == 0
        self._guard.poll(wait=True)
        running.logged(metrics.pop("loss"), self.state.global_step, self.args.logging_nan_inf_filter)
        if extra == [0.0] and first:
            logger.warning("the gradient norm is exactly 0: what is to train has no part in the log-probs")
        row = {
            "loss": running.window_loss,
            **dict(zip(["grad_norm"], extra, strict=False)),
            "learning_rate": running.learning_rate,
        }
        skipped = {} if self._guard.stops else {"skipped_steps": running.skipped_steps}
        return {**row, **metrics, "num_tokens": running.tokens, **skipped}

    def _finish(self, seconds: float, before: tuple[int, int, int]) -> TrainOutput:
        """The last row of the log; its speeds are of what came since pairs, steps and tokens were as `before`, as by a
        checkpoint.
        """
        args, state = self.args, self.state
        if self._running.sums.sums is not None:
            self._read_metrics()  # steps since the last line still count in train_loss
        now = self._running.pairs, state.global_step, self._running.tokens
        pairs, steps, tokens = (round((after - count) / seconds, 3) for after, count in zip(now, before, strict=True))
        metrics = {
            "train_runtime": round(seconds, 4),
            "train_samples_per_second": pairs,
            "train_steps_per_second": steps,
            "train_tokens_per_second": tokens,
            "train_loss": self._running.mean_loss,
        }
        if not self._guard.stops:
            metrics["train_skipped_steps"] = self._running.skipped_steps
        self.log(metrics)
        self.hub.finish()
        self.control = self.callback_handler.on_train_end(args, state, self.control)
        return TrainOutput(state.global_step, metrics["train_loss"], state.log_history[-1])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds a row, with what `store_metrics` was given, to the history and hands it to the callbacks. `start_time`,
        which scripts that override this pass on, changes nothing: speeds are in the rows that have one.
        """
        self._retry.report()
        self._take_stored(logs)
        epoch = {} if self.state.epoch is None else {"epoch": self.state.epoch}
        row = {**logs, **epoch, "step": self.state.global_step}
        self.state.log_history.append(row)
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, {**logs, **epoch})

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes what AutoModelForCausalLM.from_pretrained (adapters: PeftModel.from_pretrained) loads, tokenizer and
        model card included; with `push_to_hub` output_dir is uploaded, too. `_internal_call`, which scripts that
        override this pass on, changes nothing.
        """
        directory = Path(str(output_dir or self.args.output_dir))
        weights = checkpoint.whole_weights(self.model, self.args.should_save)
        if self.args.should_save:
            self._write_model(directory, weights)
        if self.args.push_to_hub and self.ranks.is_main and directory == Path(str(self.args.output_dir)):
            self.hub.push("Model save")

    def _fused_blocks(self) -> AbstractContextManager[object]:
        return build.fused_blocks([self.policy, self.reference.policy], self.args)

    @contextmanager
    def _training_mode(self) -> Iterator[None]:
        """Dropout off and checkpointing on as the options say, and the model as it was on the way out."""
        args: Any = self.args
        with ExitStack() as stack:
            if args.disable_dropout:
                stack.enter_context(without_dropout(self.model))
            stack.enter_context(
                noisy_embeddings(self.policy, args.neftune_noise_alpha, args.seed, lambda: self.state.global_step)
            )
            if args.gradient_checkpointing or checkpoints_already(self.model):
                stack.enter_context(checkpointing(self.policy, args.checkpoint_options))
            if args.torch_compile:
                policies = {id(policy): policy for policy in (self.policy, self.reference.policy) if policy is not None}
                options = args.torch_compile_backend, args.torch_compile_mode
                stack.enter_context(compiled_blocks(list(policies.values()), *options))
            yield

    @contextmanager
    def _garbage_waits(self) -> Iterator[None]:
        """Within it, Python looks for reference cycles at log lines and not in the middle of a step."""
        collects = gc.isenabled()
        gc.collect()
        gc.freeze()  # what there is by now is not looked through again
        gc.disable()
        try:
            yield
        finally:
            gc.unfreeze()
            if collects:
                gc.enable()

    def _preference_step(self, training: bool) -> PreferenceStep:
        chosen = self.loss, self.mean_reward, training, self.ranks, self.policy.router_coef
        return PreferenceStep(self.policy, self.reference, *chosen)

    def _new_state(self, **fields: Any) -> TrainerState:
        main, local_main = self.accelerator.is_main_process, self.accelerator.is_local_main_process
        return TrainerState(is_world_process_zero=main, is_local_process_zero=local_main, **fields)

    def _start_engine(self) -> None:
        """Accelerate's state is one a process, and another trainer may have reset it: each run takes hold of it anew.

        Autocast and loss scaling are ours, not Accelerate's: its precision is fixed once a process.
        """
        self.accelerator = Accelerator(mixed_precision="no", cpu=self.args.use_cpu)
        self.accelerator.gradient_accumulation_steps = 1  # which the environment may have set: losses are divided here


def _largest(values: Tensor) -> float:
    """By its size, of those that are finite (of the others nonfinite.py tells); 0 where there are none."""
    return float(values.nan_to_num(0.0, 0.0, 0.0).abs().max()) if values.numel() else 0.0


@dataclass(frozen=True)
class TrainResult:
    """What `train` returns."""

    model: Any  # the trained model, in evaluation mode
    metrics: dict[str, float]  # of the whole run, and of the last evaluation
    history: list[dict[str, Any]]  # one row a log line
    trainer: DPOTrainer


def train(
    model: build.Model,
    train_dataset: Any,
    eval_dataset: Any = None,
    ref_model: build.Model | None = None,
    processing_class: Any = None,
    peft_config: Any = None,
    callbacks: list[Any] | None = None,
    args: Any = None,
    *,
    tokenizer: Any = None,
    **options: Any,
) -> TrainResult:
    """Trains `model` from preference pairs and saves it into `output_dir`; arguments as DPOTrainer's, options any
    DPOConfig field.

        out = fastdpo.train("Qwen/Qwen2.5-0.5B-Instruct", "pairs.jsonl", use_peft=True, output_dir="better")
        out.model; out.metrics; out.history

    Raises ValueError for input that cannot train.
    """
    if args is not None and options:
        raise ValueError(f"both args and options ({', '.join(options)}) are given: put them all into args")
    trainer = DPOTrainer(
        model,
        ref_model,
        DPOConfig(**options) if args is None else args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processing_class,
        peft_config=peft_config,
        callbacks=callbacks,
        tokenizer=tokenizer,
    )
    trainer._evaluate_at_end = bool(trainer._eval_tables) and trainer.args.eval_strategy == "no"
    metrics = dict(trainer.train().metrics)
    history = trainer.state.log_history
    evaluated = [row for row in history if any(key.startswith("eval_") for key in row)]
    metrics |= {key: value for row in evaluated[-1:] for key, value in row.items() if key.startswith("eval_")}
    trainer.reference.release()
    with faults.explained(Path(str(trainer.args.output_dir))):
        trainer.save_model()
    trainer.ranks.wait()  # until the first process has written
    logger.info("saved to %s", trainer.args.output_dir)
    return TrainResult(trainer.model.eval(), metrics, history, trainer)
