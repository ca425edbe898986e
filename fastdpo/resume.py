"""What a checkpoint holds beside the model, so that a run goes on as if it had never stopped.

`trained.safetensors` has every parameter that trains, by its name (the model's own files are for other programs, and
may have other names and dtypes); `run.pt` the rest: optimizer, schedule, loss scaling, random states of every process,
the place in the data, sums that were not logged yet, running means, and what is known of the reference. It is read
with `weights_only`, so that a file from elsewhere runs nothing.

A run that goes on is given the same model, data and options as at first. What cannot be told from the files is checked:
the rows by their number and lengths, the reference by its log-probs of two pairs.
"""

from __future__ import annotations

import logging
import pickle
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor, nn
from transformers.trainer_callback import ExportableState

from fastdpo.batch import PreferenceBatch
from fastdpo.checkpoint import RUN, Weights, load_trained, save_trained
from fastdpo.config import DPOConfig
from fastdpo.data import ID_COLUMNS, list_lengths
from fastdpo.identity import base_tensors, tensors_digest
from fastdpo.metrics import Running
from fastdpo.model import base_model
from fastdpo.ranks import Ranks
from fastdpo.reference import NoReference, Reference, ReferenceMemory
from fastdpo.retry import Retry
from fastdpo.sharding import shard_optimizer_state, share_like, whole_tree
from fastdpo.step import MeanReward
from fastdpo.verdicts import VERDICTS

logger = logging.getLogger(__name__)

OF_RUNNING = ("tokens", "pairs", "learning_rate", "window_loss", "mean_loss", "logged_steps", "counted_steps")
OF_RUNNING += ("skipped_steps",)
# Options that a run keeps to its end: the optimizer's state and the schedule go on with those that they were made with
KEPT = ("preference loss", "optimizer and schedule")
OF_METHOD = tuple(name for name, verdict in VERDICTS.items() if verdict.topic in KEPT)
# Options that say which rows a step sees: another value would go on with other rows than those that were left.
OF_ORDER = ("seed", "data_seed", "train_sampling_strategy", "dataloader_drop_last")
OF_REFERENCE = "weights of the reference, a digest"


@dataclass(frozen=True)
class Position:
    """Where a run is: `batches` optimizer batches of the epoch (from 0) are done."""

    epoch: int = 0
    batches: int = 0


@dataclass
class RunState:
    """The parts of a run that a checkpoint restores, in place."""

    model: nn.Module
    optimizer: Any
    scheduler: Any
    scaler: Any
    running: Running
    mean_reward: MeanReward | None
    reference: Reference | NoReference
    retry: Retry
    ranks: Ranks
    args: DPOConfig
    rows: dict[str, Any]  # of `run_in_words`
    probe: PreferenceBatch  # any pairs, always the same

    def gather(self, position: Position) -> dict[str, Any]:
        """What `write` writes; all processes call it."""
        self.reference.share(self.ranks, self.args.device)
        sums = self.running.sums.sums
        whole = None if sums is None else self.ranks.sum(sums.clone())
        states = gather_object([random_state(self.args.device)])
        return {
            "position": (position.epoch, position.batches),
            "rows": self.rows,
            "optimizer": whole_tree(self.optimizer.state_dict(), self.ranks.is_main),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": states,
            "running": {name: getattr(self.running, name) for name in OF_RUNNING},
            "sums": whole,
            "mean_reward": None if self.mean_reward is None else (self.mean_reward.value, self.mean_reward.pairs),
            "budget": self.retry.budget,
            "reference": _of_reference(self.reference, self.ranks.is_main),
            "probe": self._probed(),
        }

    def restore(self, directory: Path) -> tuple[Position, dict[str, Any]]:
        """-> the position, and the random state of this process, for when the loader has come to it.

        Raises ValueError for a checkpoint of another model, other rows or another order of rows.
        """
        try:
            shares = self.ranks.fsdp is not None  # of one mapped file, which a machine so has in memory once
            state = torch.load(directory / RUN, map_location="cpu", weights_only=True, mmap=shares)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{directory / RUN} cannot be read ({error}): resume from another checkpoint") from error
        if not isinstance(state, dict) or not {"rows", "optimizer", "running", "random", "position"} <= set(state):
            raise ValueError(f"{directory / RUN} holds no state of a run: resume from another checkpoint")
        _check_rows(state["rows"], self.rows, directory)
        load_trained(self.model, directory)
        try:
            self.optimizer.load_state_dict(shard_optimizer_state(state["optimizer"], self.optimizer))
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"the optimizer of {directory} is another one than optim={str(self.args.optim)!r} over what trains now "
                f"({error}): resume with the options that the run began with"
            ) from error
        self.scheduler.load_state_dict(state["scheduler"])
        for group, base, rate in zip(
            self.optimizer.param_groups,
            getattr(self.scheduler, "base_lrs", ()),
            getattr(self.scheduler, "lr_lambdas", ()),
            strict=False,
        ):
            group["lr"] = base * rate(self.scheduler.last_epoch)  # the run may be longer now
        self.scaler.load_state_dict(state["scaler"])
        vars(self.running).update({name: state["running"][name] for name in OF_RUNNING})
        if (sums := state["sums"]) is not None:  # of all processes: the first one has them
            sums = sums.to(self.args.device)
            self.running.sums.sums = sums if self.ranks.is_main else torch.zeros_like(sums)
        if self.mean_reward is not None and state["mean_reward"] is not None:
            value, pairs = state["mean_reward"]
            self.mean_reward.value, self.mean_reward.pairs = value.to(self.args.device), pairs.to(self.args.device)
        self.retry.budget = self.retry.told = state["budget"]
        _restore_reference(self.reference, state["reference"], self.args.device)
        self._check_reference(state["probe"])
        states = state["random"]
        if len(states) != self.ranks.count:
            draws = "" if self.args.disable_dropout else ": dropout draws other masks"
            logger.warning(
                "resuming a run of %d process%s with %d%s",
                *(len(states), "es" if len(states) > 1 else "", self.ranks.count, draws),
            )
        return Position(*state["position"]), states[self.ranks.rank % len(states)]

    def _probed(self) -> Tensor | None:
        """(2, 2) log-probs that the reference gives to the probe; None where it is not there to be run."""
        if isinstance(self.reference, NoReference) or not self.reference.runs:
            return None
        return self.reference.compute(self.probe).cpu()

    def _check_reference(self, saved: Tensor | None) -> None:
        now = self._probed()
        if saved is None or now is None or isinstance(self.reference, NoReference):
            return
        if not bool(((saved - now).abs() <= self.reference.rounding(saved)).all()):
            raise ValueError(
                "the reference gives other log-probs than when this run began, by "
                f"{float((saved - now).abs().max()):.1e}: give the model that training started from, not what a "
                "checkpoint holds, and resume_from_checkpoint beside it"
            )


def write(model: nn.Module, state: dict[str, Any], directory: Path, weights: Weights = None) -> None:
    """`weights`: see `checkpoint.whole_weights`."""
    save_trained(model, directory, weights)
    torch.save(state, directory / RUN)


def run_in_words(table: Any, reference: Reference | NoReference, args: DPOConfig, ranks: Ranks) -> dict[str, Any]:
    """What tells one run from another: its options, its data, and the weights of a reference model of its own."""
    pairs = args.per_device_train_batch_size * args.gradient_accumulation_steps * ranks.count
    options = args.to_dict()
    words = {"pairs a step": pairs, **{name: str(options[name]) for name in (*OF_ORDER, *OF_METHOD)}}
    if isinstance(table, Dataset):
        lengths = b"".join(list_lengths(table, column).astype("<i8").tobytes() for column in ID_COLUMNS)
        words |= {"rows": len(table), "lengths of the rows, a digest": crc32(lengths)}
    policy = None if isinstance(reference, NoReference) or reference.follows else reference.policy
    if policy is not None and not any(parameter.requires_grad for parameter in policy.parameters()):
        words[OF_REFERENCE] = tensors_digest(base_tensors(base_model(policy.model)))
    return words


def _check_rows(saved: dict[str, Any], ours: dict[str, Any], directory: Path) -> None:
    if OF_REFERENCE in saved and saved[OF_REFERENCE] != ours.get(OF_REFERENCE, saved[OF_REFERENCE]):
        raise ValueError(
            f"the reference has other weights than when the run of {directory} began: give the model that training "
            "started from, not what a checkpoint holds, and resume_from_checkpoint beside it"
        )
    for name in {**saved, **ours}:
        if saved.get(name) != ours.get(name) and name != OF_REFERENCE:
            raise ValueError(
                f"{directory} is of a run with another loss, optimizer, data or order of it: {name} was "
                f"{saved.get(name)}, and is {ours.get(name)}. Resume with what the run began with, or start anew with "
                "the saved model"
            )


def _of_reference(reference: Reference | NoReference, keep: bool) -> dict[str, Any]:
    if isinstance(reference, NoReference):
        return {}
    memory = reference.memory
    keys = torch.frombuffer(bytearray(b"".join(memory.slots)) or bytearray(1), dtype=torch.uint8)
    return {
        "keys": keys[: 16 * len(memory.slots)].view(-1, 16).clone(),
        "logps": memory.values[: len(memory.slots)].clone(),
        "moved": [whole_tree(mine.detach(), keep) for mine, _ in reference.follows],
    }


@torch.no_grad()
def _restore_reference(reference: Reference | NoReference, saved: dict[str, Any], device: torch.device) -> None:
    if isinstance(reference, NoReference) or not saved:
        return
    for (mine, _), value in zip(reference.follows, saved["moved"], strict=True):
        mine.copy_(share_like(value, mine))
    if reference.follows:
        reference.memory = ReferenceMemory()  # what was computed by now was another reference's
    names = saved["keys"].numpy().tobytes()
    keys = [names[start : start + 16] for start in range(0, len(names), 16)]
    if keys:
        reference.memory.store(keys, saved["logps"].to(device))


def random_state(device: torch.device) -> dict[str, Any]:
    """Of Python, numpy, torch and the run's GPU."""
    name, keys, *rest = np.random.get_state()
    state = {"python": random.getstate(), "numpy": (name, torch.tensor(keys.astype(np.int64)), *rest)}  # type: ignore[union-attr]
    state["torch"] = torch.get_rng_state()
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def callback_states(callbacks: Sequence[Any]) -> dict[str, list[Any]]:
    """Of callbacks that have a state of their own, such as EarlyStoppingCallback, by class."""
    states: dict[str, list[Any]] = {}
    for callback in callbacks:
        if isinstance(callback, ExportableState):
            states.setdefault(type(callback).__name__, []).append(callback.state())
    return states


def restore_callbacks(callbacks: Sequence[Any], states: Mapping[str, Sequence[Any]]) -> None:
    left = {name: list(found) for name, found in states.items()}
    for callback in callbacks:
        if isinstance(callback, ExportableState) and (found := left.get(type(callback).__name__)):
            saved = found.pop(0)["attributes"]  # which the callback may not have yet: it may make them as a run begins
            vars(callback).update({k: value for k, value in saved.items() if not callable(getattr(callback, k, None))})
