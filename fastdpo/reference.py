"""Where reference log-probs come from, and the memory that keeps them from being computed twice.

Chosen once, before the loop: the policy's own base with the adapters off, a frozen copy of the adapter that training
started from, a second model, or a frozen copy of the whole policy. The pass takes the same code path and arithmetic as
the policy's, so before the first update every margin is exactly 0. The reference does not change during a run, so its
log-probs are remembered by row: epochs after the first, and evaluations after the first, never run it again.

Legend: P pairs.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from fastdpo.batch import PreferenceBatch
from fastdpo.model import Policy
from fastdpo.ranks import Ranks
from fastdpo_kernels.pair_loss import sequence_sums

logger = logging.getLogger(__name__)

FROZEN_ADAPTER = "_fastdpo_reference"
# How far two right computations of a sum of log-probs lie apart, relative to it, when rows are grouped otherwise or
# another kernel runs. bf16 lies 3e-4 from fp32 in a random Llama of 6 layers (300 tokens, CPU, 2026-11-22), and deeper
# models round more; another model is off by several percent.
ROUNDING = {"float64": 2e-5, "float32": 2e-5, "tf32": 1e-3, "float16": 1e-3, "bfloat16": 4e-3}


class Reference:
    """Summed reference log-probs of a batch's pairs. A batch without keys, of a stream, is not remembered."""

    def __init__(
        self,
        policy: Policy,
        without_policy: Callable[[], AbstractContextManager[object]],
        description: str,
        equals_policy: bool,
        ld_alpha: float | None = None,
        adapters: tuple[str, ...] = (),
    ) -> None:
        """`policy` computes them inside `without_policy()`, with `adapters` on; `equals_policy`: training starts from
        the reference.
        """
        self.policy: Policy | None = policy
        self.without_policy = without_policy
        self.description, self.equals_policy, self.ld_alpha = description, equals_policy, ld_alpha
        self.adapters = adapters
        self.precision = precision(policy)
        self.memory = ReferenceMemory()

    def __call__(self, batch: PreferenceBatch) -> Tensor:
        """-> (P, 2) fp64: chosen, rejected."""
        if self.memory.knows(batch):
            return self.memory.recall(batch.keys)
        logps = self.compute(batch)
        if batch.keys:
            self.memory.store(batch.keys, logps)
        return logps

    @torch.no_grad()
    def compute(self, batch: PreferenceBatch) -> Tensor:
        """Runs the reference, without dropout."""
        if self.policy is None:
            raise RuntimeError(
                "the reference model was freed once its log-probs were known, and here are rows that it has not seen: "
                "give them as eval_dataset from the start, or leave out precompute_ref_log_probs and ref_log_probs"
            )
        with self.without_policy(), evaluating(self.policy):
            token_logps, _ = self.policy(batch)
        return sequence_sums(token_logps, batch.cu_seqlens, self.ld_alpha).view(-1, 2)

    def rounding(self, logps: Tensor) -> Tensor:
        """How far right values of these log-probs may lie apart, when computed in other batches."""
        return ROUNDING[self.precision] * (1 + logps.abs())

    @property
    def known_rows(self) -> int:
        return len(self.memory.slots)

    def share(self, ranks: Ranks, device: torch.device) -> None:
        """All ranks, at the same time: what one remembers, each does."""
        self.memory.share(ranks, device)

    def free(self) -> None:
        """Lets go of a reference model: from here on there is what is remembered."""
        self.policy = None

    def release(self) -> None:
        """Takes the frozen adapter, if there is one, back out of the policy's model."""
        model = self.policy.model if self.policy is not None else None
        if isinstance(model, PeftModel) and FROZEN_ADAPTER in model.peft_config:
            model.delete_adapter(FROZEN_ADAPTER)
            self.without_policy = _released


def precision(policy: Policy) -> str:
    """The dtype of a policy's matrix products: float32, tf32, bfloat16, ..."""
    parameters = [parameter for parameter in policy.parameters() if parameter.is_floating_point()]
    dtype = policy.autocast or min((p.dtype for p in parameters), key=lambda dtype: dtype.itemsize)
    tf32 = dtype == torch.float32 and parameters[0].is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else str(dtype).removeprefix("torch.")


class NoReference:
    """Log-probs of 0, where a run is `reference_free` or its loss sees the policy alone: nothing is computed."""

    policy: Policy | None = None
    known_rows = 0
    description = "none, its log-probs count as 0"

    def __call__(self, batch: PreferenceBatch) -> None:
        return None

    def share(self, ranks: Ranks, device: torch.device) -> None:
        """Nothing is remembered."""

    def release(self) -> None:
        """Nothing was added to the policy's model."""


def _released() -> AbstractContextManager[object]:
    raise RuntimeError(
        "the reference, a frozen copy of the adapter that training started from, was taken out of the model after "
        "training: build a DPOTrainer yourself to evaluate rows that were not seen by then"
    )


class ReferenceMemory:
    """Log-probs by row key, on the device that computed them: looking up a batch reads nothing back to the host."""

    def __init__(self) -> None:
        self.slots: dict[bytes, int] = {}
        self.values = torch.empty(0, 2)
        self.shared = 0  # slots that all ranks have

    def knows(self, batch: PreferenceBatch) -> bool:
        return bool(batch.keys) and all(key in self.slots for key in batch.keys)

    def recall(self, keys: Sequence[bytes]) -> Tensor:
        """-> (len(keys), 2) fp64."""
        return self.values.index_select(0, self._indices([self.slots[key] for key in keys]))

    def store(self, keys: Sequence[bytes], logps: Tensor) -> None:
        """`logps` is (len(keys), 2)."""
        new: dict[bytes, int] = {}
        for key in keys:
            if key not in self.slots:
                new.setdefault(key, len(self.slots) + len(new))
        rows = len(self.slots) + len(new)
        if rows > self.values.shape[0]:
            grown = logps.new_empty(max(1024, 2 * rows), 2)
            grown[: self.values.shape[0]] = self.values.to(grown)
            self.values = grown
        self.values.index_copy_(0, self._indices([self.slots.get(key, new.get(key, 0)) for key in keys]), logps)
        self.slots |= new  # last: out of memory on the way here, nothing is half known

    def share(self, ranks: Ranks, device: torch.device) -> None:
        """What one rank remembers all do from here on; `device` is where they keep it."""
        if ranks.count > 1:
            new = list(self.slots)[self.shared :]
            values = self.recall(new).cpu() if new else torch.empty(0, 2, dtype=torch.float64)
            keys, logps = gather_rows(ranks, new, values)
            if keys:
                self.store(keys, logps.to(device))
        self.shared = len(self.slots)

    def _indices(self, slots: Sequence[int]) -> Tensor:
        on_gpu = self.values.is_cuda  # pinned, so that the copy waits for nothing
        indices = torch.tensor(slots, dtype=torch.int64, pin_memory=on_gpu)
        return indices.to(self.values.device, non_blocking=True)


def gather_rows(ranks: Ranks, keys: Sequence[bytes], logps: Tensor) -> tuple[list[bytes], Tensor]:
    """-> row keys and (K, 2) log-probs of all ranks, on the CPU as they come."""
    mine = torch.frombuffer(bytearray(b"".join(keys)) or bytearray(16), dtype=torch.uint8).view(-1, 16)[: len(keys)]
    names = torch.cat(ranks.gather(mine)).numpy().tobytes()
    return [names[start : start + 16] for start in range(0, len(names), 16)], torch.cat(ranks.gather(logps))


def find_reference(
    policy: Policy, ref_policy: Policy | None, probe: PreferenceBatch, ld_alpha: float | None = None
) -> Reference:
    """The cheapest right reference for this policy. `probe` is any batch on the policy's device."""
    if ref_policy is not None:
        ref_policy.requires_grad_(False).eval()
        adapters = tuple(ref_policy.model.active_adapters) if isinstance(ref_policy.model, PeftModel) else ()
        return Reference(ref_policy, nullcontext, "the given ref_model", False, ld_alpha, adapters)
    model = policy.model
    if not isinstance(model, PeftModel):
        frozen = Policy(copy.deepcopy(model), policy.autocast).requires_grad_(False).eval()
        return Reference(frozen, nullcontext, "a frozen copy of the policy as it was given", True, ld_alpha)
    if _adapters_change_nothing(policy, probe):
        off = adapter_switch(model, model.disable_adapter)
        return Reference(policy, off, "the policy with its adapters off", True, ld_alpha)
    _freeze_adapter_copy(model)
    description = "a frozen copy of the adapter that training starts from (with adapters off the model is another one)"
    frozen_copy = adapter_switch(model, lambda: active_adapter(model, FROZEN_ADAPTER))
    return Reference(policy, frozen_copy, description, True, ld_alpha, (FROZEN_ADAPTER,))


def adapter_switch(
    model: PeftModel, switch: Callable[[], AbstractContextManager[object]]
) -> Callable[[], AbstractContextManager[object]]:
    """peft's `switch`, tried once: from then on the flags that it set on modules, and no parameter's requires_grad,
    which a pass without gradients does not look at.

    peft walks all modules several times, and wakes and freezes each parameter: with 224 LoRA modules it takes 69 ms to
    switch adapters off and on and 85 ms to another adapter and back, the flags alone 0.1 ms (2-core Xeon, peft 0.21,
    2026-11-22).
    """
    before = [(module, dict(vars(module)), tuple(module.children())) for module in model.modules()]
    with _same_trained(model), switch():
        moved = any(tuple(module.children()) != children for module, _, children in before)
        set_by_peft = [
            (module, changed)
            for module, attributes, _ in before
            if (changed := {name: now for name, now in vars(module).items() if attributes.get(name, before) is not now})
        ]

    @contextmanager
    def as_peft_does() -> Iterator[None]:
        with _same_trained(model), switch():
            yield

    @contextmanager
    def switched() -> Iterator[None]:
        kept = [{name: getattr(module, name) for name in changed} for module, changed in set_by_peft]
        try:
            for module, changed in set_by_peft:
                vars(module).update(changed)
            yield
        finally:
            for (module, _), attributes in zip(set_by_peft, kept, strict=True):
                vars(module).update(attributes)

    return as_peft_does if moved else switched  # adaption prompts put other modules into the model


@contextmanager
def evaluating(policy: Policy) -> Iterator[None]:
    """The policy's modules in evaluation mode, where training mode would still make a difference."""
    if not policy.noisy or not policy.training:
        yield
        return
    policy.eval()
    try:
        yield
    finally:
        policy.train()


@contextmanager
def active_adapter(model: PeftModel, name: str) -> Iterator[None]:
    """`name` in place of the adapter that is active."""
    before = model.active_adapters[0]
    model.set_adapter(name)
    try:
        yield
    finally:
        model.set_adapter(before)


@torch.no_grad()
def _adapters_change_nothing(policy: Policy, probe: PreferenceBatch) -> bool:
    """Fresh LoRA adds exactly 0. A trained adapter, or an initialisation that moves weights into it (PiSSA, OLoRA),
    does not.
    """
    training = policy.training
    policy.eval()
    try:
        with_adapters, _ = policy(probe)
        with _same_trained(policy.model), cast(PeftModel, policy.model).disable_adapter():
            without, _ = policy(probe)
    finally:
        policy.train(training)
    return torch.equal(with_adapters, without)


def _freeze_adapter_copy(model: PeftModel) -> None:
    if len(model.active_adapters) != 1:
        raise ValueError(f"adapters {model.active_adapters} are active at once: set one with model.set_adapter(name)")
    active = model.active_adapters[0]
    config: Any = copy.deepcopy(model.peft_config[active])
    config.inference_mode = True
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # PiSSA and its like would change the base weights again
    state = {name: value.clone() for name, value in get_peft_model_state_dict(model, adapter_name=active).items()}
    with _same_trained(model):
        if FROZEN_ADAPTER in model.peft_config:  # of an earlier trainer
            model.delete_adapter(FROZEN_ADAPTER)
        model.add_adapter(FROZEN_ADAPTER, config)
        set_peft_model_state_dict(model, state, adapter_name=FROZEN_ADAPTER)
        model.set_adapter(active)
    for name, parameter in model.named_parameters():
        if f".{FROZEN_ADAPTER}." in name:
            parameter.data = parameter.data.float()


@contextmanager
def _same_trained(model: nn.Module) -> Iterator[None]:
    """What trains is the same on the way out: peft makes all of an adapter train when it becomes active."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad != (name in trained):
                parameter.requires_grad_(name in trained)
