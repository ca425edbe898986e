"""Where a run's memory goes, and what fits: the plan, from a model's config alone or from a loaded model.

Weights, gradients and optimizer states are counted exactly. What a micro-batch needs is a curve over its tokens, which
activations.py finds; the LM head's share follows from `linear_logps`. The rest, what CUDA itself takes and what torch's
allocator loses between blocks, is a reserve. The token budget of a micro-batch is the most tokens that the rest of the
card has room for.

It assumes that an optimizer batch is several micro-batches, the first of which has left its gradients; a single one may
need less. The reference's pass needs less than the policy's, so only the weights of a reference model count.

Legend: T tokens of a micro-batch, N of them scored, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn

from fastdpo.activations import Activations, Measured, measure_activations, takes_packed
from fastdpo.attention_backends import Facts, choose, device_facts
from fastdpo.config import DPOConfig
from fastdpo.data import ID_COLUMNS, TokenPair, list_lengths
from fastdpo.head import output_head
from fastdpo.loading import load_dtype, model_kind
from fastdpo.losses import pairwise_loss, sees_reference
from fastdpo.meta import meta_model, meta_policy
from fastdpo.model import Policy, base_model, checkpoints_already
from fastdpo.quantized import quantized_by, quantized_scales
from fastdpo.ranks import BUCKET_BYTES, Ranks
from fastdpo.rows import IMAGE_COLUMNS
from fastdpo.sharding import gathered_bytes, share_of
from fastdpo_kernels import launch

logger = logging.getLogger(__name__)

ALONE = Ranks()

GiB, MiB = 2**30, 2**20

CONTEXT = int(0.6 * GiB)  # CUDA's context and loaded kernels, outside of torch's allocator (public figures, unmeasured)
SLACK = 0.05  # of the card: what torch's allocator holds and cannot give out, by fragmentation (unmeasured)
# More make no product faster, and 65536 rows of the widest models stay below the 2^31 elements that some kernels index.
MOST_TOKENS = 65536
ASSUMED_LENGTH = 1024  # of each answer with its prompt, where neither a dataset nor max_length says

USEFUL_LENGTH = 128  # of an answer with its prompt, below which cutting answers is no advice

# Bytes of state a trained parameter. Those of bitsandbytes have a scale for each block of 256 beside them.
_ADAM, _SCALE = 8.0, 4 / 256
STATE_BYTES = {
    "adamw_torch": _ADAM,
    "adamw_torch_fused": _ADAM,
    "stable_adamw": _ADAM,
    "ademamix": 12.0,
    "adagrad": 4.0,
    "rmsprop": 4.0,
    "rmsprop_bnb": 4.0,
    "rmsprop_bnb_32bit": 4.0,
    "lion_32bit": 4.0,
    "adamw_8bit": 2 * (1 + _SCALE),
    "adamw_bnb_8bit": 2 * (1 + _SCALE),
    "ademamix_8bit": 3 * (1 + _SCALE),
    "lion_8bit": 1 + _SCALE,
    "rmsprop_bnb_8bit": 1 + _SCALE,
    "sgd": 0.0,
    "adafactor": 0.0,  # a row and a column of each matrix
}
# Settings that `memory="auto"` tries, fastest first: a block's second forward costs time, its input's way over the bus
# costs more only where the block is done sooner.
_CHECKPOINT = ("gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_offloading")
LADDER: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("no checkpointing", (False, None, False)),
    ("every 4th block checkpointed", (True, {"every_n_layers": 4}, False)),
    ("every 3rd block checkpointed", (True, {"every_n_layers": 3}, False)),
    ("every 2nd block checkpointed", (True, {"every_n_layers": 2}, False)),
    ("every block checkpointed", (True, None, False)),
    ("every block checkpointed, inputs on the host", (True, None, True)),
)
_IN_LISTS = ("adamw_torch", "rmsprop", "adagrad")  # updates that make a temporary copy of all they update


@dataclass(frozen=True)
class PairLengths:
    """Tokens of the longest pair that a run will see."""

    prompt: int
    chosen: int
    rejected: int
    known: bool = True  # no pair is longer

    @classmethod
    def of_config(cls, config: DPOConfig) -> PairLengths:
        """The worst that `max_length` allows: next to no prompt, and two answers that fill it."""
        length = config.max_length or ASSUMED_LENGTH
        return cls(1, length - 1, length - 1, known=config.max_length is not None)

    @classmethod
    def of_tables(cls, tables: Iterable[Any], config: DPOConfig, packed: bool = True) -> PairLengths:
        """The longest pair of tokenized tables; of streams, and without any, the longest that there may be."""
        longest = []
        for table in tables:
            if not isinstance(table, Dataset):
                return cls.of_config(config)
            prompts, chosen, rejected = (list_lengths(table, column) for column in ID_COLUMNS)
            sides = chosen + rejected if packed else np.maximum(chosen, rejected)
            at = int((prompts + sides).argmax())
            longest.append(cls(int(prompts[at]), int(chosen[at]), int(rejected[at])))
        return max(longest, key=lambda lengths: lengths.tokens(packed), default=cls.of_config(config))

    def tokens(self, packed: bool) -> int:
        """What a pair costs, as `Layout.tokens` has it: its prompt once, or two rows of its longer side."""
        if packed:
            return self.prompt + self.chosen + self.rejected
        return 2 * (self.prompt + max(self.chosen, self.rejected))

    @property
    def scored(self) -> int:
        return self.chosen + self.rejected

    @property
    def pair(self) -> TokenPair:
        return TokenPair([0] * self.prompt, [0] * self.chosen, [0] * self.rejected)


@dataclass(frozen=True)
class HeadMemory:
    """What `linear_logps` needs by its scored rows, in bytes: the allocations of head_streamed.py, but for statistics,
    which take 4 bytes a row each.
    """

    vocabulary: int
    hidden_size: int
    compute: torch.dtype
    given: torch.dtype  # of the hidden rows
    weight: torch.dtype
    trains: bool
    device: launch.Device

    @property
    def cast(self) -> int:
        """A copy of the weight in the dtype of its products, for as long as they are computed."""
        same = self.weight == self.compute
        return 0 if same else self.vocabulary * self.hidden_size * self.compute.itemsize

    def rows(self, scored: int) -> int:
        """(N, D) in the compute dtype."""
        return scored * self.hidden_size * self.compute.itemsize

    def workspace(self, scored: int) -> int:
        """Logits of a chunk, or all that the method may take."""
        limit = launch.default_workspace_bytes(self.device)
        method, _ = launch.head_method(self.vocabulary, self.compute, self.device, limit, scored)
        if method != "streamed":
            return limit
        size = self.compute.itemsize
        chunk = launch.streamed_rows(scored, self.vocabulary, self.hidden_size, size, self.device, limit)
        return chunk * launch.row_stride(self.vocabulary) * size

    def in_one_chunk(self, scored: int) -> bool:
        size = launch.row_stride(self.vocabulary) * self.compute.itemsize
        return scored * size <= self.workspace(scored)

    def numbers(self, scored: int) -> int:
        """Log-probs, and what a head that trains keeps of each row: peak, total and complement."""
        return 4 * scored * (4 if self.trains else 1)

    def forward(self, scored: int) -> int:
        """The copies that products need, a chunk's logits, and d logp / d h where the head is frozen."""
        copies = self.cast + (self.rows(scored) if self.given != self.compute else 0)
        jacobian = 0 if self.trains else self.rows(scored)
        return copies + self.workspace(scored) + jacobian + self.numbers(scored)

    def backward(self, scored: int) -> int:
        """Beside what is kept: a frozen head has d logp / d h and scales it; one that trains computes logits again, and
        the gradient of its weight beside the one that is there already.
        """
        if not self.trains:
            return 2 * self.rows(scored) + self.numbers(scored)
        weight, chunk = self.vocabulary * self.hidden_size, self.workspace(scored)
        result = self.rows(scored) + self.numbers(scored) + 4 * scored  # those that came in
        scaled = chunk // (launch.row_stride(self.vocabulary) * self.compute.itemsize) * self.rows(1)
        if not self.in_one_chunk(scored):
            return self.cast + chunk + 4 * weight + 2 * scaled + result  # this chunk's rows beside the last one's
        product = weight * self.compute.itemsize
        in_fp32 = 0 if self.compute == torch.float32 else 4 * weight  # made when the copy and the logits are gone
        return product + result + max(self.cast + chunk + scaled, in_fp32)


@dataclass(frozen=True)
class Plan:
    """What each part takes, in bytes, and what follows for a card of `memory`."""

    model: str  # in words
    memory: int  # that the run may use
    lengths: PairLengths
    weights: int  # of the base, whatever their dtype
    adapters: int
    reference: int  # a model of its own
    ahead: int  # a model of its own that is freed before training, when its log-probs are known
    gradients: int
    optimizer_states: int
    update: int  # beside them, while the optimizer steps
    gathered: int  # under FSDP2: weights that are whole for a while; the rest are this process's shares
    products: int  # cuBLAS workspaces
    context: int  # CUDA's own, outside of torch's allocator
    slack: int  # torch's allocator holds and cannot give out
    activations: Activations
    head: HeadMemory
    backend: str  # of attention, in words
    batch_pairs: int = 1  # of an optimizer batch
    given_budget: int | None = None  # max_tokens_per_microbatch
    notes: tuple[str, ...] = ()
    ladder: tuple[str, ...] = ()  # of memory="auto", a line a setting
    settings_to_change: tuple[str, ...] = ()  # where it does not fit

    @property
    def fixed(self) -> int:
        """What is there between micro-batches."""
        models = self.weights + self.adapters + self.reference
        return models + self.gradients + self.optimizer_states + self.gathered + self.products

    def scored(self, tokens: int) -> int:
        """Of so many tokens of a micro-batch, those of the head."""
        return math.ceil(tokens * self.lengths.scored / self.lengths.tokens(self.activations.packed))

    def peaks(self, tokens: int) -> dict[str, float]:
        """The most that a micro-batch needs beyond what is fixed, in each of its phases."""
        kept, scored = self.activations.kept(tokens), self.scored(tokens)
        return {
            "the blocks' forward": self.activations.forward(tokens),
            "the head's forward": self.activations.at_head(tokens) + self.head.forward(scored),
            "the head's backward": kept + self.head.backward(scored),
            "the blocks' backward": self.activations.backward(tokens),
            "the embedding's backward": self.activations.last(tokens),
        }

    def allocated(self, tokens: int) -> int:
        """What torch allocates at the most."""
        return self.fixed + round(max(*self.peaks(tokens).values(), self.update))

    def total(self, tokens: int) -> int:
        loading = self.weights + self.adapters + self.ahead + self.products + self.head.workspace(self.scored(tokens))
        return max(self.allocated(tokens), loading if self.ahead else 0) + self.context + self.slack

    @property
    def longest_pair(self) -> int:
        """Tokens of the longest pair, or of the largest micro-batch, that fits; 0 where none does."""
        low, high = 0, 1
        while high < 2**24 and self.total(high) <= self.memory:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.total(middle) <= self.memory else (low, middle)
        return low

    @property
    def token_budget(self) -> int:
        """Of a micro-batch: what `max_tokens_per_microbatch` is where it is unset."""
        return min(self.longest_pair, MOST_TOKENS)

    @property
    def wanted(self) -> int:
        """Tokens that have to fit: the longest pair's, or one where that is not known."""
        return self.lengths.tokens(self.activations.packed) if self.lengths.known else 1

    @property
    def largest(self) -> int:
        """Tokens of the run's largest micro-batch: a whole optimizer batch, or what the budget allows; a pair that is
        longer goes alone.
        """
        budget = self.token_budget if self.given_budget is None else self.given_budget
        return max(min(self.batch_pairs * self.wanted, budget) if self.lengths.known else budget, self.wanted)

    @property
    def fits(self) -> bool:
        return self.total(self.largest) <= self.memory

    def rows(self, tokens: int) -> list[tuple[str, float, str]]:
        """(part, bytes, about it) at a micro-batch of so many tokens; they add up to the total."""
        made, scored = self.activations, self.scored(tokens)
        peaks = self.peaks(tokens) | {"the optimizer's step": self.update}
        phase = max(peaks, key=lambda name: peaks[name])
        kept, attention = made.kept(tokens), made.attention(tokens)
        head = f"{self.head.workspace(scored) / MiB:.0f} MiB of them the head's workspace"
        return [
            ("weights", self.weights, ""),
            ("adapters", self.adapters, "fp32"),
            ("reference model", self.reference, "" if not self.ahead else "freed once its log-probs are known"),
            ("gradients", self.gradients, "fp32"),
            ("optimizer states", self.optimizer_states, ""),
            *([("gathered", self.gathered, "blocks in use; unmeasured")] if self.gathered else []),
            ("activations", kept - attention, f"{made.kept.per_token / 1024:.0f} KiB a token with attention's"),
            ("attention", attention, self.backend),
            ("temporaries", peaks[phase] - kept, f"in {phase}" + (f", {head}" if "head" in phase else "")),
            ("cuBLAS", self.products, "workspaces"),
            ("allocator", self.slack, f"reserve of {SLACK:.0%} of the card, unmeasured"),
            ("CUDA", self.context, "context, outside of torch; unmeasured"),
        ]

    def lines(self) -> list[str]:
        """The plan for people."""
        tokens = self.largest
        lines = [self.model, f"at micro-batches of {tokens} tokens:"]
        lines += [f"  {name:18}{size / GiB:8.2f} GiB  {about}".rstrip() for name, size, about in self.rows(tokens)]
        lines.append(f"  {'total':18}{self.total(tokens) / GiB:8.2f} GiB  of {self.memory / GiB:.2f}")
        wanted = (
            f"the longest has {self.wanted}" if self.lengths.known else "neither a dataset nor max_length limits them"
        )
        longest = f"{self.longest_pair} tokens" if self.longest_pair else "none"
        lines.append(f"longest pair that fits: {longest} ({wanted})")
        if self.fits and self.given_budget is None:
            lines.append(f"it fits, with max_tokens_per_microbatch={self.token_budget}")
        else:
            lines.append("it fits" if self.fits else "it does not fit:")
        return [*lines, *self.ladder] + [f"  {sentence}" for sentence in (*self.notes, *self.settings_to_change)]


# ---- the plan of a run


def plan_memory(
    model_config: Any,
    config: DPOConfig,
    *,
    memory: int,  # bytes of the card
    device: launch.Device,
    peft_config: Any = None,
    ref_config: Any = None,  # the model config of a given reference model
    tables: Iterable[Any] = (),  # tokenized pairs, whose longest counts
    lengths: PairLengths | None = None,  # in place of tables
) -> Plan:
    """The plan from the model's config alone: no weights are loaded, and no GPU is needed.

    Raises ValueError for a model that does not run on tensors without data, or takes too long to, for an
    encoder-decoder, and for rows with images.
    """
    config, tables = copy.copy(config), list(tables)
    of_text = tables and not any(set(IMAGE_COLUMNS) & set(table.column_names or ()) for table in tables)
    if (kind := model_kind(model_config)) == "encoder-decoder" or (kind == "vision-language" and not of_text):
        raise ValueError(
            f"there is no plan for {kind} models{' but of rows of text' if kind == 'vision-language' else ''}: their "
            "micro-batches go by pairs, so start with per_device_train_batch_size=1, and gradient_checkpointing=True "
            "if that does not fit"
        )
    if peft_config is None and (config.quantizes or quantized_by(model_config)):
        config.use_peft = True  # as a run sees to it

    def plan_of(config: DPOConfig) -> tuple[Plan, DPOConfig]:
        policy = meta_policy(model_config, config, peft_config)
        facts = _facts_of_card(device, _products(policy))
        packed = takes_packed(policy, facts)
        longest = lengths or PairLengths.of_tables(tables, config, packed)
        reference = _reference_bytes(policy, ref_config, config)
        freed = bool(config.precompute_ref_log_probs or config.ref_log_probs)
        stays, ahead = (0, reference) if freed else (reference, 0)
        of_card = {"memory": memory, "reference": stays, "ahead": ahead, "context": CONTEXT, "known": {}}
        return climb(
            lambda config: _plan(policy, config, longest, packed, facts, device, **of_card), config, to_the_end=True
        )

    plan, config = plan_of(config)
    if plan.fits:
        return plan
    return replace(plan, settings_to_change=tuple(_advice(plan, config, lambda config: plan_of(config)[0])))


def plan_run(
    policy: Policy,
    reference: nn.Module | None,  # the policy that the reference runs by, which may be this one
    config: DPOConfig,
    lengths: PairLengths,
    packed: bool,
    shapes: Policy | None = None,
    ranks: Ranks = ALONE,
) -> Plan:
    """The plan of a run whose models are loaded on a CUDA device: of its own memory and what is free on the card.

    With memory="auto" it sets the config's checkpointing. `shapes`: what a policy was before `ranks` shared it out.
    """
    device = config.device
    free, _ = torch.cuda.mem_get_info(device)
    separate = 0 if reference is None or reference is policy else tensor_bytes(reference)
    others = max(0, torch.cuda.memory_allocated(device) - tensor_bytes(policy) - separate)  # of this process
    memory = free + torch.cuda.memory_reserved(device) - others
    facts, card = device_facts(device, policy.autocast or torch.float32), launch.device_of(device)

    known: dict[Any, Measured] = {}

    def plan_of(config: DPOConfig) -> Plan:
        given = {"memory": memory, "reference": separate, "known": known, "ranks": ranks}
        return _plan(shapes or policy, config, lengths, packed, facts, card, **given)

    plan, chosen = climb(plan_of, config)
    for name in ("memory", *_CHECKPOINT):
        setattr(config, name, getattr(chosen, name))
    return plan


def climb(plan_of: Callable[[DPOConfig], Plan], config: DPOConfig, to_the_end: bool = False) -> tuple[Plan, DPOConfig]:
    """-> the plan, and the config that it is of: with memory="auto" the first of LADDER by which the longest pair fits,
    or the last, now chosen; otherwise `config` itself. `to_the_end`: what comes after it is planned, too, to be shown.
    """
    if config.memory != "auto":
        return plan_of(config), config
    found: tuple[Plan, DPOConfig] | None = None
    lines, enough, reason = [], False, None
    for words, values in LADDER:
        tried = copy.copy(config)
        tried.memory = None
        for name, value in zip(_CHECKPOINT, values, strict=True):
            setattr(tried, name, value)
        logger.info("memory='auto' plans with %s", words)
        try:
            plan = plan_of(tried)
        except ValueError as failure:  # this model's blocks cannot be told apart, or not be checkpointed
            lines.append(f"  {words}: {failure}")
            reason = failure
            continue
        tokens = plan.lengths.tokens(plan.activations.packed)
        first = not enough and plan.longest_pair >= tokens
        chosen = ", taken" if first else ""
        lines.append(
            f"  {words}: {plan.total(tokens) / GiB:.2f} GiB for a pair of {tokens} tokens, pairs of up to "
            f"{plan.longest_pair} fit{chosen}"
        )
        found = found if enough else (plan, tried)
        enough = enough or first
        if enough and not to_the_end:
            break
    if found is None:
        raise ValueError(str(reason)) from reason
    lines = ["memory='auto', of these settings the first by which the longest pair fits:", *lines]
    return replace(found[0], ladder=tuple(lines)), found[1]


def tensor_bytes(module: nn.Module, trained: bool | None = None) -> int:
    """Of parameters and buffers, each once, and the scales of quantised weights; `trained` takes only those that train,
    or only those that do not.
    """
    tensors = [*module.parameters(), *module.buffers(), *quantized_scales(module)]
    return sum(share_of(tensor).nbytes for tensor in tensors if trained is None or tensor.requires_grad == trained)


def _reference_bytes(policy: Policy, ref_config: Any, config: DPOConfig) -> int:
    """A given reference model's, frozen; a copy of the policy that trains in full; none with adapters."""
    if config.reference_free or not sees_reference(pairwise_loss(config)):
        return 0
    if ref_config is not None:
        return tensor_bytes(meta_model(ref_config, config, load_dtype(config, adapters=True)))
    return 0 if isinstance(policy.model, PeftModel) else tensor_bytes(policy)


def _products(policy: Policy) -> torch.dtype:
    return policy.autocast or next(p.dtype for p in policy.parameters() if p.is_floating_point())


def _plan(
    policy: Policy,
    config: DPOConfig,
    lengths: PairLengths,
    packed: bool,
    facts: Facts,
    device: launch.Device,
    *,
    memory: int,
    reference: int,
    known: dict[Any, Measured],
    ahead: int = 0,
    context: int = 0,
    ranks: Ranks = ALONE,
) -> Plan:
    compute = _products(policy)
    checkpoint = bool(config.gradient_checkpointing) or checkpoints_already(policy.model)
    options = config.checkpoint_options if checkpoint else None
    fused = runs_fused(config, device)
    activations = measure_activations(policy, lengths.pair, facts, packed, options, fused, known=known)
    shares = 1 if ranks.fsdp is None else ranks.count
    trained = -(-tensor_bytes(policy, trained=True) // shares)
    numbers = -(-sum(p.numel() for p in policy.parameters() if p.requires_grad) // shares)
    adapters = trained if isinstance(policy.model, PeftModel) else 0
    states, note = optimizer_bytes(config, numbers)
    return Plan(
        model=_in_words(policy, numbers, compute, options, config),
        memory=memory,
        lengths=lengths,
        weights=-(-tensor_bytes(policy) // shares) - adapters,
        adapters=adapters,
        reference=reference,
        ahead=ahead,
        gradients=trained + (min(BUCKET_BYTES, trained) if config.world_size > shares else 0),  # summed in a buffer
        gathered=0 if shares == 1 else gathered_bytes(policy, ranks.fsdp),
        optimizer_states=states,
        update=4 * numbers if str(getattr(config.optim, "value", config.optim)) in _IN_LISTS else 0,
        products=_cublas_workspaces(device),
        context=context,
        slack=round(SLACK * memory),
        activations=activations,
        head=_head_memory(policy, activations.hidden_dtype, compute, device),
        backend=choose(facts)[0],
        batch_pairs=config.per_device_train_batch_size * config.gradient_accumulation_steps,
        given_budget=config.max_tokens_per_microbatch,
        notes=tuple(_notes(activations, note)),
    )


def runs_fused(config: DPOConfig, device: launch.Device) -> bool:
    """Whether blocks train on our kernels there. On a CPU only where asked for: plain torch under autograd is as fast
    there, and its compiler is on no device.
    """
    if config.fused_kernels is None:
        return device.compiles and not config.torch_compile
    return config.fused_kernels


def _facts_of_card(device: launch.Device, compute: torch.dtype) -> Facts:
    """What attention on that card goes by."""
    if device.kind != "cuda":
        return Facts("hip" if device.kind == "hip" else "cpu", dtype=compute)
    arch = int(device.arch)
    return Facts("cuda", (arch // 10, arch % 10), compute, flash_built=True)


def _cublas_workspaces(device: launch.Device) -> int:
    """torch's defaults for the handles of the forward's and the backward's thread: 32 MiB on sm_90 and newer."""
    if not device.compiles:
        return 0
    return 2 * (32 * MiB if isinstance(device.arch, int) and device.arch >= 90 else 4096 * 2048 + 16 * 8 * 1024)


def optimizer_bytes(config: DPOConfig, trained: int) -> tuple[int, str]:
    """-> bytes of state on the device for so many trained numbers, and what to say about it."""
    name = str(getattr(config.optim, "value", config.optim))
    if name.startswith("paged_"):
        return 0, f"optim={name} keeps its states on the host where the card is full: counted there"
    if name not in STATE_BYTES:
        return round(_ADAM * trained), f"the states of optim={name} are not known: counted as AdamW's, 8 bytes a number"
    return round(STATE_BYTES[name] * trained), ""


def _head_memory(policy: Policy, hidden: torch.dtype, compute: torch.dtype, device: launch.Device) -> HeadMemory:
    model: Any = base_model(policy.model)
    with torch.no_grad():
        weight = output_head(model).weight
    trains = any(parameter.requires_grad for parameter in model.get_output_embeddings().parameters())
    vocabulary, hidden_size = weight.shape
    return HeadMemory(vocabulary, hidden_size, compute, hidden, weight.dtype, trains, device)


def _in_words(
    policy: Policy, trained: int, compute: torch.dtype, options: Mapping[str, Any] | None, config: DPOConfig
) -> str:
    model = base_model(policy.model)
    every = model.num_parameters()  # which counts what is packed in one element of 4-bit weights
    checkpoint = "off"
    if options is not None:
        of = {1: "on", 2: "every 2nd block", 3: "every 3rd block"}
        number = options.get("every_n_layers", 1)
        checkpoint = of.get(number, f"every {number}th block") + (", inputs on the host" if options["offload"] else "")
    return (
        f"{type(model).__name__}: {every / 1e9:.2f}B parameters, {trained / 1e6:.1f}M train; products in "
        f"{str(compute).removeprefix('torch.')}, gradient checkpointing {checkpoint}, optim "
        f"{getattr(config.optim, 'value', config.optim)}"
    )


def _notes(activations: Activations, optimizer: str) -> list[str]:
    notes = [] if activations.packed else ["padded batches: the model's attention does not take packed pairs"]
    return notes + ([optimizer] if optimizer else [])


# ---- what to change


def _advice(plan: Plan, config: DPOConfig, plan_of: Callable[[DPOConfig], Plan]) -> Iterator[str]:
    """Settings, each on top of those before, until the plan fits; those that change the results least come first."""
    for name, value, cost in _changes(plan, config):
        config = copy.copy(config)
        setattr(config, name, value)
        plan = plan_of(config)
        longest = f"pairs of up to {plan.longest_pair} tokens fit" if plan.longest_pair else "still no pair fits"
        yield f"{name}={value} ({cost}): {longest}"
        if plan.fits:
            return
    if plan.longest_pair >= 2 * USEFUL_LENGTH:
        yield f"max_length={plan.token_budget // 2}: longer answers are cut, then every pair fits"
        return
    least = (plan.allocated(plan.wanted) + plan.context) / (1 - SLACK)
    yield (
        f"all this takes a card of {least / GiB:.0f} GiB, {plan.weights / GiB:.1f} GiB of it for weights: take a "
        "smaller model or a larger card"
    )


def _changes(plan: Plan, config: DPOConfig) -> Iterator[tuple[str, Any, str]]:
    """(setting, value, what it costs)"""
    if not config.gradient_checkpointing:
        yield "gradient_checkpointing", True, "the same results, a second forward of every block"
    if plan.given_budget is not None and plan.longest_pair >= plan.wanted:
        yield "max_tokens_per_microbatch", plan.token_budget, "the same results"
        return
    if not config.activation_offloading:
        yield "activation_offloading", True, "the same results, block inputs go over the bus"
    if plan.reference:
        yield "precompute_ref_log_probs", True, "the same results, the reference model leaves before training"
    if plan.head.compute == torch.float32 and plan.head.device.compiles and plan.head.device.arch != 75:
        yield "bf16", True, "products with fewer digits"
    if plan.optimizer_states > SLACK * plan.memory:
        yield "optim", "adamw_8bit", "states with fewer digits; needs bitsandbytes"
    if not plan.adapters:
        yield "use_peft", True, "trains adapters instead of all weights"
    if not (config.quantizes or config.activation_offloading):
        yield "load_in_4bit", True, "frozen weights with fewer digits; needs bitsandbytes"
