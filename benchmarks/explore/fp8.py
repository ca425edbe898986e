"""Frozen weights in FP8: what that does to a DPO run, held against what bf16 does, and what it can save.

The same adapters are trained on the same pairs in the same order in fp32, in bf16, and in bf16 with the products of
frozen layers in FP8 (`float8.py`): forward and backward, policy and reference. Adapters, head, embedding, norms and
attention are as in bf16. Everything is compared with fp32. Without pairs (`--data`) nothing is trained, and what it can
save is all there is.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from functools import partial
from random import Random
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from benchmarks.device import DEVICES, Device
from benchmarks.explore import small
from benchmarks.explore.float8 import E4M3, E5M2, attach, detached, saved, timed
from benchmarks.explore.stepping import Stepping
from benchmarks.models import MODELS
from benchmarks.workload import build_model
from fastdpo.data import TokenPair
from fastdpo.step import SUMS

BATCH, EPOCHS, HELD_OUT, LEARNING_RATE, SEEDS = 8, 8, 32, 3e-4, 3  # of 88 pairs 56 train: 56 steps
PROFILES_SHOWN = "hh-rlhf", "ultrafeedback"


@dataclass(frozen=True)
class Kind:
    name: str
    dtype: str
    gradients: torch.dtype | None = None  # of FP8; None multiplies in `dtype`
    reference_too: bool = True


FP32 = Kind("fp32", "float32")
KINDS = (
    Kind("bf16", "bfloat16"),
    Kind("FP8, gradients e4m3", "bfloat16", E4M3),
    Kind("FP8, gradients e5m2", "bfloat16", E5M2),
    Kind("FP8, reference in bf16", "bfloat16", E4M3, reference_too=False),
)


class Run(Stepping):
    """The small model, trained in one way."""

    def __init__(self, kind: Kind, weights: dict[str, Tensor], device: Device, seed: int) -> None:
        model: Any = build_model(small.SHAPE, 4 * small.LONGEST, kind.dtype, device.place)
        model.load_state_dict(weights)
        torch.manual_seed(seed)
        super().__init__(model)
        layers = attach(self.policy, kind.gradients) if kind.gradients else []
        if not kind.reference_too:
            self.around_reference = partial(detached, layers)

    def means(self, pairs: list[TokenPair]) -> dict[str, float]:
        """Gradients of the mean loss. -> means over the pairs."""
        sums = self.backward(self.batch(pairs)).sums / len(pairs)
        return dict(zip(SUMS, sums.tolist(), strict=True))

    def train(self, pairs: list[TokenPair], order: Random) -> list[dict[str, float]]:
        """Half of the epochs. -> what each step had."""
        optimizer, history = torch.optim.AdamW(self.trained.values(), LEARNING_RATE), []
        for _ in range(EPOCHS // 2):
            shuffled = order.sample(pairs, len(pairs))
            for start in range(0, len(pairs), BATCH):
                history.append(self.means(shuffled[start : start + BATCH]))
                optimizer.step()
                optimizer.zero_grad()
        return history

    def state(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.trained.items()}

    @torch.no_grad()
    def put(self, state: dict[str, Tensor]) -> None:
        for name, parameter in self.trained.items():
            parameter.copy_(state[name])

    def seen(self, pairs: list[TokenPair]) -> tuple[Tensor, Tensor, Tensor]:
        """-> token log-probs, margins and the gradient of all that trains, as one vector."""
        batch = self.batch(pairs)
        with torch.no_grad():
            logps, _ = self.policy(batch.microbatches[0])
        rewards = self.backward(batch).pairs.rewards
        gradient = torch.cat([parameter.grad.flatten() for parameter in self.trained.values()])  # type: ignore[union-attr]
        for parameter in self.trained.values():
            parameter.grad = None
        return logps, (rewards[:, 0] - rewards[:, 1]).detach(), gradient


@dataclass(frozen=True)
class Truth:
    """In fp32: a whole run's steps, its adapters when it is half done, and what they give on held-out pairs."""

    history: list[dict[str, float]]
    halfway: dict[str, Tensor]
    logps: Tensor
    margins: Tensor
    gradient: Tensor


def truth_of(weights: dict[str, Tensor], pairs: list[TokenPair], device: Device, seed: int) -> Truth:
    run, order = Run(FP32, weights, device, seed), Random(seed)
    history = run.train(pairs[HELD_OUT:], order)
    halfway = run.state(), *run.seen(pairs[:HELD_OUT])
    return Truth(history + run.train(pairs[HELD_OUT:], order), *halfway)


def compared(
    kind: Kind, weights: dict[str, Tensor], pairs: list[TokenPair], device: Device, seed: int, truth: Truth
) -> dict[str, Any]:
    """One run beside the one in fp32."""
    run, order, held_out = Run(kind, weights, device, seed), Random(seed), pairs[:HELD_OUT]
    begin, (_, first_margins, _) = run.state(), run.seen(held_out)
    run.put(truth.halfway)
    logps, margins, gradient = run.seen(held_out)
    run.put(begin)
    history = [step for _ in range(2) for step in run.train(pairs[HELD_OUT:], order)]
    apart = [abs(one["loss"] - other["loss"]) for one, other in zip(history, truth.history, strict=True)]
    last, end = history[-((len(pairs) - HELD_OUT) // BATCH) :], run.means(held_out)
    return {
        "run": kind.name,
        "first margins, largest": first_margins.abs().max().item(),
        "log-prob error, rms": _rms(logps - truth.logps),
        "margin error, rms": _rms(margins - truth.margins),
        "gradient, 1 - cosine": 1 - torch.cosine_similarity(gradient.double(), truth.gradient.double(), 0).item(),
        "loss from fp32's, mean": mean(apart),
        "loss from fp32's, most": max(apart),
        "last epoch's loss": mean(step["loss"] for step in last),
        "last epoch's accuracy": mean(step["rewards/accuracies"] for step in last),
        "held-out loss": end["loss"],
        "held-out accuracy": end["rewards/accuracies"],
    }


def _rms(values: Tensor) -> float:
    return values.double().square().mean().sqrt().item()


def measure(options: Namespace) -> dict[str, list[dict[str, Any]]]:
    device = DEVICES[options.device]
    costs = [saved(MODELS[name], profile) for name in ("llama-3.1-8b", "llama-3.2-1b") for profile in PROFILES_SHOWN]
    trained = trained_runs(small.encode(small.texts(options.data)), device) if options.data else {}
    return {**trained, "cost": costs, "a product": [timed(device)]}


def trained_runs(pairs: list[TokenPair], device: Device) -> dict[str, list[dict[str, Any]]]:
    plain, last_loss = small.learned(pairs, device)
    runs = []
    outliers = small.with_outliers(plain), "with outliers", 1, KINDS[:2]
    for weights, what, seeds, kinds in ((plain, "as trained", SEEDS, KINDS), outliers):
        for seed in range(seeds):
            truth = truth_of(weights, pairs, device, seed)
            for kind in kinds:
                found = compared(kind, weights, pairs, device, seed, truth)
                runs.append({"weights": what, "seed": seed, **found})
    model = [{"parameters": sum(value.numel() for value in plain.values()), "loss as a language model": last_loss}]
    return {"the model": model, "runs": runs}
