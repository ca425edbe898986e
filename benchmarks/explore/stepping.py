"""A LoRA policy, the reference that it has with its adapters off, and the step over both, without a trainer around."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor

from benchmarks.run import lora
from fastdpo.batch import OptimizerBatch, PreferenceBatch, pack
from fastdpo.config import DPOConfig
from fastdpo.data import TokenPair
from fastdpo.losses import pairwise_loss
from fastdpo.model import Policy, prepare_precision
from fastdpo.reference import Reference, adapter_switch
from fastdpo.step import Computed, PreferenceStep


class Stepping:
    """Adapters are drawn from torch's generator; those of a bf16 model are in fp32 under autocast, as in training."""

    def __init__(self, model: Any) -> None:
        adapted: Any = get_peft_model(model, lora())
        autocast = None if model.dtype == torch.float32 else model.dtype
        prepare_precision(adapted, autocast)
        self.policy, self.place = Policy(adapted, autocast).train(), str(model.device)
        self.reference = Reference(self.policy, adapter_switch(adapted, adapted.disable_adapter), "adapters off", True)
        self.around_reference: Callable[[], AbstractContextManager[object]] = nullcontext
        options = DPOConfig(output_dir="unused", use_cpu=self.place == "cpu", bf16=False, report_to="none")
        self.step = PreferenceStep(self.policy, self._refer, pairwise_loss(options))
        self.trained = {name: p for name, p in self.policy.named_parameters() if p.requires_grad}

    def batch(self, pairs: Sequence[TokenPair]) -> OptimizerBatch:
        """One micro-batch of all pairs."""
        one = pack(pairs).to(self.place)
        return OptimizerBatch([one], one.num_pairs, one.num_chosen_tokens, one.num_tokens, [one.num_pairs])

    def backward(self, batch: OptimizerBatch) -> Computed:
        [computed] = self.step(batch)
        computed.loss.backward()
        return computed

    def _refer(self, batch: PreferenceBatch) -> Tensor:
        with self.around_reference():
            return self.reference.compute(batch)
