"""The optimizer and its schedule, by the names that transformers has for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

from fastdpo.config import DPOConfig

STEPPED_BY_EVALUATION = ("reduce_lr_on_plateau", "greedy")  # schedules that look at metric_for_best_model
# Parameters without weight decay, as transformers' Trainer has them
NO_WEIGHT_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]


def build_optimizer(
    model: nn.Module, config: DPOConfig, steps: int, given: tuple[Any, Any] = (None, None)
) -> tuple[Any, Any]:
    """-> the given optimizer and schedule, or `optim` over everything that trains, with weight decay on all but norms
    and biases, and a schedule of `steps`. Raises ValueError for a given optimizer that leaves out what trains.
    """
    optimizer, scheduler = given
    if optimizer is None:
        optimizer = _build_optimizer(model, config)
    elif missing := _left_out(model, optimizer):
        raise ValueError(
            f"the given optimizer does not have {len(missing)} parameters that train, such as {missing[0]}: make it "
            "from the parameters of the model as it trains (adapters are added, and weights may be cast, by the "
            "trainer: give it a PeftModel), or take requires_grad from what is not to train"
        )
    return optimizer, scheduler or _build_schedule(optimizer, config, steps)


def _left_out(model: nn.Module, optimizer: Any) -> list[str]:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [name for name, value in model.named_parameters() if value.requires_grad and id(value) not in held]


def _build_optimizer(model: nn.Module, config: DPOConfig) -> Any:
    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(config, model)  # type: ignore[arg-type]
    decayed = set(get_parameter_names(model, [nn.LayerNorm], NO_WEIGHT_DECAY))
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for n, p in named if n in decayed], "weight_decay": config.weight_decay},
        {"params": [p for n, p in named if n not in decayed], "weight_decay": 0.0},
    ]
    return optimizer_class([group for group in groups if group["params"]], **options)


def _build_schedule(optimizer: Any, config: DPOConfig, steps: int) -> Any:
    return get_scheduler(
        config.lr_scheduler_type,
        optimizer,
        num_warmup_steps=config.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=config.lr_scheduler_kwargs,  # type: ignore[arg-type]
    )


def update_unless(skipped: Tensor, optimizer: Any) -> None:
    """The optimizer's step, or nothing of it where the 0-dim bool `skipped` is set.

    torch's fused Adam and AdamW look at the flag on the device. Others have no place for it, and gradients of 0 in its
    stead would let weight decay and momentum move weights (torch's fused SGD looks, but its momentum is uninitialised
    memory after a first step that is skipped), so the host waits for the flag.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # within accelerate's
    if type(inner) in (torch.optim.Adam, torch.optim.AdamW) and all(group["fused"] for group in inner.param_groups):
        inner.grad_scale, inner.found_inf = None, skipped.float()
        try:
            optimizer.step()
        finally:
            del inner.grad_scale, inner.found_inf
    elif not skipped.item():
        optimizer.step()


def allocate_states(optimizer: Any) -> None:
    """Adam's moments as its first update would make them, so that a run that lacks the memory for them finds out before
    its first batch. Other optimizers make their states at the first update.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # within accelerate's
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        return
    for group in optimizer.param_groups:
        moments = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]
        for parameter in group["params"]:
            device = parameter.device if group["fused"] or group["capturable"] else "cpu"
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=device),
                **{name: torch.zeros_like(parameter) for name in moments},
            }
