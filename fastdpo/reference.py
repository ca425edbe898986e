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
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from fastdpo.batch import PreferenceBatch
from fastdpo.model import Policy, evaluation_mode, noise_of, outside_adapters
from fastdpo.quantized import states_of_8_bits
from fastdpo.ranks import Ranks
from fastdpo.sharding import is_sharded, whole
from fastdpo_kernels.pair_loss import sequence_sums

logger = logging.getLogger(__name__)

FROZEN_ADAPTER = "_fastdpo_reference"
# How far two right computations of a sum of log-probs lie apart, relative to it, when rows are grouped otherwise or
# another kernel runs. bf16 lies 3e-4 from fp32 in a random Llama of 6 layers (300 tokens, CPU, 2026-11-22), and deeper
# models round more; another model is off by several percent.
ROUNDING = {"float64": 2e-5, "float32": 2e-5, "tf32": 1e-3, "float16": 1e-3, "bfloat16": 4e-3}
# Beside it where LLM.int8 sets outliers apart, which it finds in the whole batch: 4e-4 to 1e-2 in random Llamas of 8 to
# 12 layers with outliers of 20 times the others (120 to 250 tokens, CPU, 2026-11-22).
OUTLIERS = 2e-2


Switch = Callable[[], AbstractContextManager[object]]  # a model in another state within it


class Reference:
    """Summed reference log-probs of a batch's pairs. A batch without keys, of a stream, is not remembered."""

    def __init__(
        self,
        policy: Policy,
        without_policy: Switch,
        description: str,
        equals_policy: bool,
        ld_alpha: float | None = None,
        adapters: tuple[str, ...] = (),
    ) -> None:
        """`policy` computes them inside `without_policy()`, with `adapters` on; `equals_policy`: training starts from
        the reference.
        """
        self.policy: Policy | None = policy
        self.switch = without_policy
        self.description, self.equals_policy, self.ld_alpha = description, equals_policy, ld_alpha
        self.adapters = adapters
        self.frozen: Any = policy.model.peft_config[FROZEN_ADAPTER] if FROZEN_ADAPTER in adapters else None  # type: ignore[union-attr]
        self.noise = noise_of(policy)
        self.precision = precision(policy)
        self.outliers = any(state.threshold for state in states_of_8_bits(policy))
        self.memory = ReferenceMemory()
        self.ranks = Ranks()  # of a run, where they make each pass together
        self.follows: list[tuple[Tensor, Tensor]] = []  # its tensors, and those of the policy that `mix` takes from

    def __call__(self, batch: PreferenceBatch) -> Tensor:
        """-> (P, 2) fp64: chosen, rejected."""
        known = not batch.num_pairs or self.memory.knows(batch)
        logps = self.compute(batch) if self.ranks.makes_pass(not known) else None
        if not batch.num_pairs:
            return torch.empty(0, 2, dtype=torch.float64, device=batch.input_ids.device)
        if known or logps is None:
            return self.memory.recall(batch.keys)
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
        with self.without_policy(), evaluating(self.policy, self.noise):
            token_logps, _ = self.policy(batch)
        return sequence_sums(token_logps, batch.cu_seqlens, self.ld_alpha).view(-1, 2)

    def without_policy(self) -> AbstractContextManager[object]:
        """Within it the policy's model is the reference. Raises RuntimeError where its frozen adapter is gone."""
        if not self.runs:
            raise RuntimeError(
                "the reference, a frozen copy of the adapter that training started from, is no longer in the model: it "
                "was taken out after training, or a later DPOTrainer on this model put its own there. Build another "
                "DPOTrainer to evaluate rows that were not seen by then; give two that are used in turn a model each"
            )
        return self.switch()

    def rounding(self, logps: Tensor) -> Tensor:
        """How far right values of these log-probs may lie apart, when computed in other batches."""
        relative = max(ROUNDING[self.precision], OUTLIERS if self.outliers else 0.0)
        return relative * (1 + logps.abs())

    @property
    def known_rows(self) -> int:
        return len(self.memory.slots)

    @property
    def runs(self) -> bool:
        """Whether it is still there to be run: neither freed nor taken out of the model, by a later trainer's, too."""
        model: Any = self.policy and self.policy.model
        return model is not None and (self.frozen is None or model.peft_config.get(FROZEN_ADAPTER) is self.frozen)

    def share(self, ranks: Ranks, device: torch.device) -> None:
        """All ranks, at the same time: what one remembers, each does."""
        self.memory.share(ranks, device)

    @torch.no_grad()
    def mix(self, share: float) -> None:
        """Moves it towards the policy (TR-DPO, arXiv:2404.09656): (1 - share) of what it is, `share` of the policy.

        Of an adapter the factors are mixed, which is mixing their product for a share of 1 only.
        """
        for mine, trained in self.follows:
            values = trained if is_sharded(mine) else whole(trained)  # a frozen adapter's copy is not sharded
            mine.lerp_(values.to(mine.dtype), share)
        self.memory = ReferenceMemory()

    def free(self) -> None:
        """Lets go of a reference model: from here on there is what is remembered."""
        self.policy = None

    def release(self) -> None:
        """Takes the frozen adapter, if there is one, back out of the policy's model."""
        if self.policy is not None and self.frozen is not None and self.runs:
            cast(PeftModel, self.policy.model).delete_adapter(FROZEN_ADAPTER)


def precision(policy: Policy) -> str:
    """The dtype of a policy's matrix products: float32, tf32, bfloat16, ..."""
    parameters = [parameter for parameter in policy.parameters() if parameter.is_floating_point()]
    dtype = policy.autocast or min((p.dtype for p in parameters), key=lambda dtype: dtype.itemsize)
    tf32 = dtype == torch.float32 and parameters[0].is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else str(dtype).removeprefix("torch.")


class NoReference:
    """Log-probs of 0, where a run is `reference_free` or its loss sees the policy alone: nothing is computed."""

    policy: Policy | None = None
    runs = False
    known_rows = 0
    description = "none, its log-probs count as 0"

    def __call__(self, batch: PreferenceBatch) -> None:
        return None

    def share(self, ranks: Ranks, device: torch.device) -> None:
        """Nothing is remembered."""

    def mix(self, share: float) -> None:
        """There is nothing that could move."""

    def release(self) -> None:
        """Nothing was added to the policy's model."""


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

    def forget_non_finite(self) -> None:
        """Such rows are computed anew when they come again. Their places stay taken, under names that no row has."""
        finite = self.values[: len(self.slots)].isfinite().all(1).tolist()
        named = zip(self.slots.items(), finite, strict=True)
        self.slots = {key if known else slot.to_bytes(16, "big"): slot for (key, slot), known in named}

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
    policy: Policy,
    ref_policy: Policy | None,
    probe: PreferenceBatch,
    ld_alpha: float | None = None,
    ref_adapter: str | None = None,
    synced: bool = False,
    copied: Policy | None = None,
) -> Reference:
    """The cheapest right reference for this policy, or the adapter of that name. `probe` is any batch on the policy's
    device; `synced`: the reference is to follow the policy; `copied`: a copy of a policy that trains in full, from
    before it was sharded. Raises ValueError where it cannot.
    """
    if ref_policy is not None:
        ref_policy.requires_grad_(False).eval()
        adapters = tuple(ref_policy.model.active_adapters) if isinstance(ref_policy.model, PeftModel) else ()
        given = Reference(ref_policy, nullcontext, "the given ref_model", False, ld_alpha, adapters)
        return _following(given, policy.model, ref_policy.model) if synced else given
    model = policy.model
    if not isinstance(model, PeftModel):
        frozen = copied or Policy(copy.deepcopy(model), policy.autocast)
        frozen.requires_grad_(False).eval()
        as_given = Reference(frozen, nullcontext, "a frozen copy of the policy as it was given", True, ld_alpha)
        return _following(as_given, model, frozen.model) if synced else as_given
    outside = OutsideAdapters(model)
    if ref_adapter is None and not synced and _adapters_change_nothing(policy, probe):
        off = outside.kept(adapter_switch(model, model.disable_adapter))
        return Reference(policy, off, f"the policy with its adapters off{outside}", True, ld_alpha)
    if ref_adapter is None:
        _freeze_adapter_copy(model)
        why = "the reference follows the policy" if synced else "with adapters off the model is another one"
        description = f"a frozen copy of the adapter that training starts from ({why}){outside}"
    else:
        _freeze_adapter(model, ref_adapter)
        description = f"the adapter {ref_adapter!r}{outside}"
    name = ref_adapter or FROZEN_ADAPTER
    named = outside.kept(adapter_switch(model, lambda: active_adapter(model, name)))
    equal = ref_adapter is None or _same_logps(policy, probe, named)
    reference = Reference(policy, named, description, equal, ld_alpha, (name,))
    if synced:
        reference.follows = [*_adapter_pairs(model, name), *outside.pairs()]
    return reference


def _following(reference: Reference, model: nn.Module, ref_model: nn.Module) -> Reference:
    """The reference, with each trained parameter of `model` beside its own."""
    own, trained = dict(ref_model.named_parameters()), {n: p for n, p in model.named_parameters() if p.requires_grad}
    other = [name for name, value in trained.items() if name not in own or own[name].shape != value.shape]
    if other:
        raise ValueError(
            f"sync_ref_model mixes the policy into the reference, and ref_model has no {other[0]} of that shape: leave "
            "ref_model out, or give one of the same kind, without adapters that the policy trains"
        )
    if isinstance(model, PeftModel):
        _check_alike(model, ref_model, reference.adapters)
    reference.follows = [(own[name], value) for name, value in trained.items()]
    return reference


def _adapter_pairs(model: PeftModel, name: str) -> list[tuple[Tensor, Tensor]]:
    """(of adapter `name`, of the one that trains), also where the user froze a part of that."""
    _check_alike(model, model, [name])
    active, tensors = model.active_adapters[0], dict(model.named_parameters())
    pairs = []
    for path, trained in tensors.items():
        other = ".".join(name if part == active else part for part in path.split("."))
        if other != path:
            pairs.append((tensors[other], trained))
    return pairs


def _check_alike(model: PeftModel, ref_model: nn.Module, adapters: Sequence[str]) -> None:
    """Raises ValueError where `adapters` of the reference have other tensors or scales than the policy's active ones:
    a mixture of the two would be neither.
    """
    mine, theirs = _adapter_numbers(model, model.active_adapters), _adapter_numbers(ref_model, adapters)
    for place in {**mine, **theirs}:
        if mine.get(place) != theirs.get(place):
            raise ValueError(
                f"sync_ref_model mixes the policy's adapter into the reference's, and they differ: {place} is "
                f"{mine.get(place, 'missing')} in the policy and {theirs.get(place, 'missing')} in the reference. Give "
                "two adapters of one config, or no reference: it is then a frozen copy of what trains"
            )


def _adapter_numbers(model: nn.Module, adapters: Sequence[str]) -> dict[str, Any]:
    """Shapes of these adapters' tensors and the scales of their layers, by places without the adapters' names."""
    found: dict[str, Any] = {path: tuple(parameter.shape) for path, parameter in model.named_parameters()}
    for path, layer in model.named_modules():
        scales = getattr(layer, "scaling", None) if isinstance(layer, BaseTunerLayer) else None
        if isinstance(scales, dict):
            found |= {f"{path}.scaling.{name}": value for name, value in scales.items()}
    names = {name: f"ADAPTER{number or ''}" for number, name in enumerate(adapters)}
    paths = {path: path.split(".") for path in found}
    return {
        ".".join(names.get(part, part) for part in parts): found[path]
        for path, parts in paths.items()
        if not names.keys().isdisjoint(parts)
    }


class OutsideAdapters:
    """What `outside_adapters` are, with the values that they had at first."""

    def __init__(self, model: PeftModel) -> None:
        self.parameters = list(outside_adapters(model).values())
        self.values = [parameter.detach().clone() for parameter in self.parameters]

    def __str__(self) -> str:
        return f", and {len(self.parameters)} trained tensors of its base as they were" if self.parameters else ""

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.values, self.parameters, strict=True))

    def kept(self, switch: Switch) -> Switch:
        """`switch`, and within it these parameters have those values."""
        if not self.parameters:
            return switch

        @contextmanager
        def switched() -> Iterator[None]:
            trained = [p.detach().clone() if is_sharded(p) else p.data for p in self.parameters]
            with switch():
                try:
                    _set_data(self.parameters, self.values)
                    yield
                finally:
                    _set_data(self.parameters, trained)

        return switched


def _set_data(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        if is_sharded(parameter):  # of which FSDP2 holds the storage
            parameter.detach().copy_(value)
        else:
            parameter.data = value


def adapter_switch(model: PeftModel, switch: Switch) -> Switch:
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
def evaluating(policy: Policy, noise: Sequence[tuple[Any, str]]) -> Iterator[None]:
    """The policy's modules in evaluation mode, where training mode would still make a difference: its `noise`
    (`noise_of`, a walk over all modules) may be switched off by now.
    """
    if not policy.training or not (policy.noisy or any(getattr(module, name) for module, name in noise)):
        yield
        return
    with evaluation_mode(policy):
        yield


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
    if _changes_some_tokens(cast(PeftModel, policy.model)):
        return False
    training = policy.training
    policy.eval()
    try:
        with_adapters, _ = policy(probe)
        with _same_trained(policy.model), cast(PeftModel, policy.model).disable_adapter():
            without, _ = policy(probe)
    finally:
        policy.train(training)
    return torch.equal(with_adapters, without)


def _changes_some_tokens(model: PeftModel) -> bool:
    """Whether an adapter may change embeddings of tokens that a probe does not have."""
    for module in model.modules():
        if isinstance(module, (TrainableTokensLayer, TrainableTokensWrapper)) and module.active_adapters:
            return True
        if isinstance(module, ModulesToSaveWrapper) and isinstance(module.original_module, nn.Embedding):
            embeddings: Any = module.modules_to_save
            active = [embeddings[name].weight for name in module.active_adapters if name in embeddings]
            if any(bool(weight.ne(module.original_module.weight).any()) for weight in active):
                return True
    return False


@torch.no_grad()
def _same_logps(policy: Policy, probe: PreferenceBatch, switch: Switch) -> bool:
    """Whether the policy gives the same bits within `switch`."""
    with evaluating(policy, noise_of(policy)):
        ours, _ = policy(probe)
        with switch():
            theirs, _ = policy(probe)
    return torch.equal(ours, theirs)


def _freeze_adapter(model: PeftModel, name: str) -> None:
    """An adapter that the user loaded beside the one that trains, in the precision that masters train in."""
    active = _only_active(model)
    if name not in model.peft_config or name == active:
        others = [other for other in model.peft_config if other != active]
        raise ValueError(
            f"ref_adapter_name={name!r}, and beside {active!r}, which trains, the model has the adapters {others}: "
            f"load the reference's with model.load_adapter(path, adapter_name={name!r})"
        )
    for path, parameter in model.named_parameters():
        if name in path.split("."):
            parameter.requires_grad_(False)
            if not is_sharded(parameter):
                parameter.data = parameter.data.float()
            elif parameter.dtype != torch.float32:
                raise ValueError(
                    f"ref_adapter_name={name!r} is in {parameter.dtype}, which is not cast under FSDP2: load it with "
                    "peft's autocast_adapter_dtype=True, as by default, or float() its parameters"
                )


def _only_active(model: PeftModel) -> str:
    if len(model.active_adapters) != 1:
        raise ValueError(f"adapters {model.active_adapters} are active at once: set one with model.set_adapter(name)")
    return model.active_adapters[0]


def _freeze_adapter_copy(model: PeftModel) -> None:
    active = _only_active(model)
    config: Any = copy.deepcopy(model.peft_config[active])
    kept = [name for name in ("modules_to_save", "use_dora") if getattr(config, name, None)]
    if kept and any(is_sharded(parameter) for parameter in model.parameters()):
        raise ValueError(
            f"the reference is a frozen copy of the adapter, and one with {kept[0]} cannot be copied under FSDP2: "
            "merge the adapter first (`fastdpo merge`) and train a new one, leave sync_ref_model out, or configure "
            "accelerate for MULTI_GPU"
        )
    config.inference_mode = True
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # PiSSA and its like would change the base weights again
    if hasattr(config, "layer_replication"):
        config.layer_replication = None  # the layers are there; peft would replicate them again
    if hasattr(config, "bias"):
        config.bias = "none"  # peft trains biases of the base with one adapter only; their copies are OutsideAdapters'
    trained = get_peft_model_state_dict(model, adapter_name=active)
    state = {name: whole(value).clone() for name, value in trained.items()}
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
