"""DPOConfig: every option of a run, each one honoured or refused.

The class is transformers' `TrainingArguments` plus the preference, data, adapter and memory options, under TRL's names,
so that `HfArgumentParser`, callbacks, reporters and scripts work with it. What becomes of each option stands in
`verdicts.py`; what is not honoured raises as soon as it has another value than its default, as does a value out of
range.
"""

import dataclasses
import functools
import json
import logging
import math
import os
import re
import tempfile
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from transformers import TrainingArguments, get_scheduler
from transformers.trainer_pt_utils import AcceleratorConfig

from fastdpo.sharding import FSDP_REFUSED, FSDP_SETTINGS, asked_plugin
from fastdpo.verdicts import (
    CHECKPOINT_KWARGS,
    CHOICES,
    ENUMS,
    OPTIMIZER_PACKAGES,
    RANGES,
    REFUSED_OPTIMIZERS,
    VERDICTS,
    brief,
    changes_nothing,
    nearest,
    present_names,
    refusal,
)

logger = logging.getLogger(__name__)

IGNORES_OPTIM_ARGS = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad")


_LISTS = ("train_dataset_weights", "loss_type", "loss_weights", "lora_target_modules")
_LISTS += ("lora_target_parameters", "lora_modules_to_save")
_DICTS = ("model_init_kwargs", "rope_scaling", "lr_scheduler_kwargs", "gradient_checkpointing_kwargs")
_DICTS += ("activation_checkpointing_kwargs", "quantization_config", "ref_model_init_kwargs")
# Of model_init_kwargs: arguments of from_pretrained -> the options that they are
_LOADING = {name: name for name in ("trust_remote_code", "attn_implementation", "rope_scaling")}
_LOADING |= {"revision": "model_revision"}
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list", dict: "a dict"}


@functools.cache
def _type_hints() -> dict[str, Any]:
    return get_type_hints(DPOConfig)


def _fits(value: Any, hint: Any) -> bool:
    """Whether `value` is of the declared type; whole numbers pass for numbers, truth values for neither."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, member) for member in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, get_args(hint)[0]) for item in value)
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


def _in_words(hint: Any) -> str:
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    kinds = [get_origin(member) or member for member in members]
    return " or ".join(_WORDS.get(kind, "None" if kind is type(None) else str(kind)) for kind in kinds)


@functools.cache
def _defaults(cls: type) -> dict[str, Any]:
    return {
        option.name: option.default if option.default_factory is dataclasses.MISSING else option.default_factory()
        for option in dataclasses.fields(cls)
    }


_Config = TypeVar("_Config", bound=type)


def _takes_old_names(cls: _Config) -> _Config:
    """Puts `present_names` before the `__init__` that dataclass wrote, so that an old name is understood or refused."""
    written_by_dataclass = cls.__init__

    @functools.wraps(written_by_dataclass)
    def __init__(self: Any, *args: Any, **options: Any) -> None:
        written_by_dataclass(self, *args, **present_names(options, _defaults(cls)))

    cls.__init__ = __init__
    return cls


def _option(default: Any, help: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@_takes_old_names
@dataclass(repr=False)  # the inherited text hides tokens
class DPOConfig(TrainingArguments):
    """The options of one run. A script may assign to them until training starts, when `validate` reads them again."""

    # Model
    model_revision: str = _option("main", "Branch, tag or commit of the model to load.")
    trust_remote_code: bool = _option(False, "Run code that comes with the model or its tokenizer.")
    dtype: str = _option("auto", "Dtype of weights that do not train; auto is the one that computes")
    attn_implementation: str | None = _option(
        None, "Attention: sdpa is torch's, chosen by the facts; eager, flash_attention_2; others run on padded batches"
    )
    model_init_kwargs: dict | str | None = _option(None, "More arguments for from_pretrained, as JSON.")
    rope_scaling: dict | str | None = _option(None, "RoPE scaling for lengths beyond the learned ones, as JSON.")
    fused_kernels: bool | None = _option(
        None, "Run the model's blocks on fastdpo's kernels, as fastdpo.patch does; unset: on a GPU, uncompiled."
    )
    disable_dropout: bool = _option(True, "Train without dropout, LoRA's included.")

    # Adapters, under the names of TRL's ModelConfig
    use_peft: bool = _option(False, "Train LoRA adapters instead of all weights.")
    lora_r: int = _option(16, "Rank of the adapters.")
    lora_alpha: int = _option(32, "Scale of the adapters, divided by lora_r.")
    lora_dropout: float = _option(0.0, "Dropout before the adapters; needs disable_dropout=False.")
    lora_target_modules: list[str] | None = _option(None, "Modules that get an adapter; unset: all linear ones.")
    lora_target_parameters: list[str] | None = _option(
        None, "Parameters that get an adapter, such as the 3-D weights of experts (mlp.experts.gate_up_proj)."
    )
    lora_modules_to_save: list[str] | None = _option(None, "Modules trained in full beside the adapters.")
    use_rslora: bool = _option(False, "Scale adapters by the square root of lora_r.")
    use_dora: bool = _option(False, "Train magnitude and direction apart (DoRA).")

    # Quantised weights under adapters, by bitsandbytes; the names are those of TRL's ModelConfig
    load_in_4bit: bool = _option(False, "Load the frozen weights in 4 bits; adapters train (QLoRA).")
    load_in_8bit: bool = _option(False, "Load the frozen weights in 8 bits; adapters train.")
    bnb_4bit_quant_type: str = _option("nf4", "Code of 4-bit weights")
    use_bnb_nested_quant: bool = _option(True, "Quantise the scales of 4-bit weights, too (double quantisation).")
    bnb_4bit_quant_storage: str = _option("uint8", "Dtype that 4-bit weights are stored as")
    quantization_config: dict | str | None = _option(None, "A BitsAndBytesConfig in place of these, as JSON.")

    # Data
    train_dataset_weights: list[float] | None = _option(
        None,
        "Weight of each of several training sets, or a dict by their names; unset: all rows once an epoch.",
    )
    dataset_train_split: str = _option("train", "Split to train on.")
    dataset_test_split: str = _option("test", "Split to evaluate on.")
    max_length: int | None = _option(1024, "Longest prompt plus response, in tokens; none: no limit.")
    max_prompt_length: int | None = _option(None, "Longest prompt, in tokens.")
    max_completion_length: int | None = _option(None, "Longest response, in tokens.")
    truncation_mode: str = _option("keep_end", "Which end is kept of a prompt that is too long")
    dataset_num_proc: int | None = _option(None, "Processes that tokenize.")

    # Preference loss; docs/losses.md has the formulas. A function in loss_type is a loss, too.
    loss_type: list[str] = _option(
        ["sigmoid"],
        "One loss or several: sigmoid, hinge, ipo, robust, exo_pair, bco_pair, sppo_hard, nca_pair, aot, aot_pair, "
        "aot_unpaired, apo_zero, apo_down, discopop, sigmoid_norm, sft, simpo, orpo, cpo.",
    )
    loss_weights: list[float] | None = _option(None, "Weight of each loss in loss_type; unset: 1 each.")
    beta: float = _option(0.1, "Strength of the pull to the reference; for ipo the paper's tau.")
    label_smoothing: float = _option(0.0, "Share of labels taken to be flipped (sigmoid: conservative DPO).")
    discopop_tau: float = _option(0.05, "Temperature of discopop's change from logistic to exponential.")
    simpo_gamma: float = _option(0.5, "Margin that simpo asks for.")
    cpo_alpha: float = _option(1.0, "Weight of the sft loss in cpo.")
    bco_running_mean: bool = _option(True, "Compare bco_pair's rewards with their mean so far; false: with 0.")
    rpo_alpha: float | None = _option(None, "Weight of an sft loss added to the others.")
    f_divergence_type: str = _option("reverse_kl", "Divergence from the reference")
    f_alpha_divergence_coef: float = _option(1.0, "alpha of alpha_divergence: 0 is reverse_kl, 1 forward_kl.")
    ld_alpha: float | None = _option(None, "Weight of tokens beyond the shorter response's length (LD-DPO).")
    use_weighting: bool = _option(False, "Weight pairs by how likely the policy would write them (WPO).")
    reference_free: bool = _option(False, "Count the reference's log-probs as 0; it never runs.")

    # Reference
    precompute_ref_log_probs: bool = _option(
        False, "Run the reference over all rows before training, once for all runs that share it, and free its model."
    )
    precompute_ref_batch_size: int | None = _option(None, "Pairs a pass of it; unset: by tokens, as in training.")
    ref_log_probs: str | None = _option(
        None, "File that keeps reference log-probs; unset: one in the cache. Alone, it must have all rows."
    )

    # Memory
    memory: str | None = _option(
        None, "auto: as little gradient checkpointing as lets the longest pair fit on the GPU, with offloading at last."
    )
    max_tokens_per_microbatch: int | None = _option(
        None,
        "Tokens of a micro-batch; changes no result. Unset: per_device_train_batch_size pairs, on a CPU 512 tokens.",
    )

    # Numbers that go wrong
    on_nonfinite: str = _option(
        "raise", "End the run at a loss or gradient that is not finite, or skip its step; it never reaches the weights"
    )

    # Inherited options with a default of ours, or that transformers dropped or has in some versions only
    learning_rate: float | None = _option(None, "Peak learning rate; unset: 1e-6 for full training, 2e-5 for adapters.")
    train_sampling_strategy: str = _option("random", "Order of the rows")
    warmup_ratio: float = _option(0.0, "Share of the steps over which the learning rate rises.")
    bf16: bool | None = _option(None, "Compute in bfloat16; unset: where the GPU has it.")
    logging_steps: float = _option(10, "Steps between two log lines; below 1 a share of all steps.")
    logging_dir: str | None = _option(None, "Directory of TensorBoard's files.")
    overwrite_output_dir: bool = _option(
        False, "Accepted for old scripts: a directory with files is named, never refused."
    )
    gradient_checkpointing: bool = _option(False, "Recompute activations in the backward pass, to save memory.")
    gradient_checkpointing_kwargs: dict | str | None = _option(
        None, "Arguments of torch's checkpoint, as JSON; every_n_layers: 2 recomputes every second block only."
    )
    activation_offloading: bool = _option(
        False, "Checkpoint, and keep the blocks' inputs in the host's memory until the backward pass."
    )
    activation_checkpointing: bool | None = _option(None, "Newer name of gradient_checkpointing.")
    activation_checkpointing_kwargs: dict | str | None = _option(None, "Newer name of gradient_checkpointing_kwargs.")

    # More that TRL's trainers have had
    sync_ref_model: bool = _option(False, "TR-DPO: move the reference towards the policy while training.")
    ref_model_mixup_alpha: float = _option(0.9, "Share of the policy in the reference at each move; 1 replaces it.")
    ref_model_sync_steps: int = _option(64, "Optimizer steps between moves of the reference.")
    model_adapter_name: str | None = _option(None, "Of a PeftModel with several adapters, the one that trains.")
    ref_adapter_name: str | None = _option(None, "Of a PeftModel with several adapters, the one that is the reference.")
    force_use_ref_model: bool = _option(False, "Insist on ref_model beside adapters; a given one is always used.")
    ref_model_init_kwargs: dict | str | None = _option(
        None, "Arguments of from_pretrained for ref_model, in place of model_init_kwargs."
    )
    report_html: bool = _option(True, "Write output_dir/report.html: curves, options, memory and samples on one page.")
    router_aux_loss_coef: float | None = _option(
        None, "Weight of the routers' auxiliary loss of a mixture of experts. Unset: as the model's config asks for."
    )
    generate_during_eval: bool = _option(
        False, "At each evaluation, sample answers of policy and reference to a few of its prompts."
    )
    is_encoder_decoder: bool | None = _option(None, "Seen from the model; a value that it contradicts is refused.")
    max_target_length: int | None = _option(None, "Of encoder-decoders: longest response, in tokens.")
    label_pad_token_id: int = _option(-100, "What labels of a data_collator have where nothing is scored.")
    padding_value: int | None = _option(None, "Token id that fills padded rows, and is masked; unset: the pad token's.")
    pad_token: str | None = _option(None, "The tokenizer's pad token, one of its vocabulary; unset: its own.")

    def __post_init__(self) -> None:
        self._normalise()
        self._check()
        self._check_launcher()
        # 5.23 calls the older name deprecated, which is no news to whoever sets either; one name is kept from here on.
        self.activation_checkpointing = self.gradient_checkpointing
        self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs
        super().__post_init__()
        self.activation_checkpointing = self.activation_checkpointing_kwargs = None
        self._check_devices()

    def validate(self) -> None:
        """Reads every option again, as a script may have assigned to them; raises as the constructor does."""
        assigned = {
            name: value for name, value in vars(self).items() if name not in _defaults(type(self)) and name in VERDICTS
        }
        for name in assigned:
            delattr(self, name)
        for name, value in present_names(assigned, _defaults(type(self))).items():
            setattr(self, name, value)
        self._normalise()
        self._check()
        self._check_packages()
        self._validate_args()  # transformers' own, of strategies and steps
        self._check_devices()

    def take(self, options: Mapping[str, Any]) -> None:
        """Sets options by name, old names included; `validate` reads them. Raises ValueError for unknown names."""
        for name, value in present_names(options, _defaults(type(self))).items():
            setattr(self, name, value)

    def _normalise(self) -> None:
        """One form for each option: a list for one name, a dict for JSON, one name for checkpointing, bf16 decided."""
        for name in _defaults(type(self)):
            dimensions = getattr(value := getattr(self, name), "ndim", None)
            if dimensions:
                raise ValueError(f"{name} must be one value or a list, got an array: {brief(value)}.")
            if dimensions == 0:
                setattr(self, name, value.item())  # numpy's numbers
        for name in _LISTS:
            value = getattr(self, name)
            single = isinstance(value, (str, Real)) and not isinstance(value, bool) or callable(value)
            setattr(self, name, [value] if single else list(value) if isinstance(value, tuple) else value)
        for name in _DICTS:
            setattr(self, name, _dict_of(name, getattr(self, name)))
        if self.resume_from_checkpoint is True:
            self.resume_from_checkpoint = "true"
        if str(self.resume_from_checkpoint).lower() == "false":  # a shell gives the word
            self.resume_from_checkpoint = None
        if str(self.fsdp).lower() in ("true", "false"):
            self.fsdp = str(self.fsdp).lower() == "true"  # type: ignore[assignment]
        for name in ("output_dir", "logging_dir", "ref_log_probs", "resume_from_checkpoint"):
            value = getattr(self, name)
            setattr(self, name, os.fspath(value) if isinstance(value, Path) else value)
            if isinstance(value, str) and not value.strip():
                raise ValueError(f"{name} is empty, as of a variable that is not set: give a path, or leave it out.")
        self._join_quantization()
        self._join_loading()
        self._read_accelerator_config()
        if isinstance(self.dtype, torch.dtype):
            self.dtype = str(self.dtype).removeprefix("torch.")
        self.f_divergence_type = getattr(self.f_divergence_type, "value", self.f_divergence_type)  # TRL 0.11's enum
        self.report_to = [] if self.report_to in (None, "none", ["none"]) else self.report_to
        self.report_to = [self.report_to] if isinstance(self.report_to, str) else self.report_to
        self._join_checkpointing()
        self._join_launched_precision()
        if self.bf16 is None:
            self.bf16 = not (self.fp16 or self.use_cpu) and _gpu_has_bf16()
        if self.bf16 and not torch.accelerator.is_available():
            self.use_cpu = True  # transformers wants it said; the machine has nothing else
        if self.eval_strategy == "steps" and not self.eval_steps:
            self.eval_steps = self.logging_steps

    def _join_quantization(self) -> None:
        """A BitsAndBytesConfig as the dict that it stands for, wherever scripts give one."""
        more = self.model_init_kwargs
        if isinstance(more, dict) and more.get("quantization_config") is not None:
            if self.quantization_config is not None:
                raise ValueError("quantization_config is given, and in model_init_kwargs another: give one of them.")
            self.model_init_kwargs = {name: value for name, value in more.items() if name != "quantization_config"}
            self.quantization_config = more["quantization_config"]
        if hasattr(self.quantization_config, "to_dict"):
            self.quantization_config = self.quantization_config.to_dict()  # type: ignore[union-attr]

    def _read_accelerator_config(self) -> None:
        """In whichever form transformers takes it, to compare with its defaults, which it writes into JSON."""
        given: Any = self.accelerator_config
        if isinstance(given, (str, Path)) and Path(given).is_file():
            given = Path(given).read_text(encoding="utf-8")
        if isinstance(given, str) and given.lstrip().startswith("{"):
            given = _dict_of("accelerator_config", given)
        if isinstance(given, dict):
            known = [option.name for option in dataclasses.fields(AcceleratorConfig)]
            if unknown := [name for name in given if name not in known]:
                raise ValueError(f"accelerator_config has an unknown {unknown[0]!r}{nearest(str(unknown[0]), known)}")
            self.accelerator_config = AcceleratorConfig(**given)  # type: ignore[assignment]
        elif given is not None and not isinstance(given, AcceleratorConfig):
            raise ValueError(
                f"accelerator_config={brief(given)} is not supported: expected a dict, its JSON or a file that has it."
            )

    def _join_loading(self) -> None:
        """What model_init_kwargs says of options that have a field goes there, for the tokenizer heeds them, too; and
        dtype has one name, as from_pretrained would ignore the old one beside it.
        """
        for name in ("model_init_kwargs", "ref_model_init_kwargs"):
            given = getattr(self, name)
            if isinstance(given, dict):
                setattr(self, name, present_names(given, {*given, "dtype"} - {"torch_dtype"}))
        more: Any = self.model_init_kwargs
        for name, option in _LOADING.items() if isinstance(more, dict) else ():
            value, field = more.pop(name, None), getattr(self, option)
            if value not in (None, field) and field != _defaults(DPOConfig)[option]:
                raise ValueError(f"{option}={field!r}, and model_init_kwargs has {name}={value!r}: give one of them.")
            setattr(self, option, field if value is None else value)

    def _join_launched_precision(self) -> None:
        """What `accelerate launch --mixed_precision` says, where no option does; "no" is also its default."""
        launched = _launched_precision()
        if launched == "no":
            return
        asked = launched == "bf16", launched == "fp16"
        if self.bf16 is None and not self.fp16:
            self.bf16, self.fp16 = asked
        if (bool(self.bf16), self.fp16) != asked or not any(asked):
            raise ValueError(
                f"accelerate was launched with mixed_precision={launched!r}, and the options are bf16={self.bf16}, "
                f"fp16={self.fp16}: launch it with bf16, fp16 or no, and leave the options out, or give the same."
            )

    @property
    def quantizes(self) -> bool:
        """Whether base weights are quantised while they load."""
        return bool(self.load_in_4bit or self.load_in_8bit or self.quantization_config)

    def _join_checkpointing(self) -> None:
        for name in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
            newer = name.replace("gradient", "activation")
            value, newer_value = getattr(self, name), getattr(self, newer)
            if value and newer_value is not None and value != newer_value:
                raise ValueError(f"{name}={value!r} and {newer}={newer_value!r} name one option: give one of them.")
            setattr(self, name, value if newer_value is None else newer_value)
            setattr(self, newer, None)
        kwargs = self.gradient_checkpointing_kwargs
        if isinstance(kwargs, dict) and kwargs.get("offload"):  # transformers' name for it
            self.activation_offloading = True
        self.gradient_checkpointing = bool(self.gradient_checkpointing or self.activation_offloading)

    @property
    def checkpoint_options(self) -> dict[str, Any]:
        """What `checkpointing` takes: gradient_checkpointing_kwargs with activation_offloading among them."""
        given: Any = self.gradient_checkpointing_kwargs or {}
        return {**given, "offload": self.activation_offloading}

    def _check(self) -> None:
        self._check_supported()
        self._check_types()
        self._check_choices()
        self._check_ranges()
        self._check_losses()
        self._check_reference()
        self._check_schedule()
        self._check_combinations()

    def _check_supported(self) -> None:
        for name, default in _defaults(type(self)).items():
            verdict = VERDICTS.get(name)  # a subclass may have fields of its own
            if verdict and verdict.kind != "works" and not changes_nothing(getattr(self, name), default):
                raise refusal(name, getattr(self, name))

    def _check_types(self) -> None:
        for name, hint in _type_hints().items():
            if name not in VERDICTS or VERDICTS[name].kind != "works" or name in ENUMS:
                continue
            value = getattr(self, name)
            if name == "fsdp" and isinstance(value, bool):  # its hint is of an older form, which names strategies
                continue
            if name == "loss_type" and isinstance(value, list):
                value = [given for given in value if not callable(given)]
            if name == "train_dataset_weights" and isinstance(value, dict):  # by the names of the datasets
                value = list(value.values())
            if not _fits(value, hint):
                raise ValueError(f"{name} must be {_in_words(hint)}, got {brief(value)} ({type(value).__name__}).")
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, float) and not math.isfinite(item) and name != "max_grad_norm":
                    raise ValueError(f"{name} must be finite, got {brief(value)}.")
                if isinstance(item, Integral) and abs(item) > 10**38:  # no number in fp32
                    raise ValueError(f"{name} must be at most 10**38, got {brief(value)}.")
                if isinstance(item, str) and re.search("[\0\ud800-\udfff]", item):
                    raise ValueError(f"{name} must be text without zeros or halves of characters, got {brief(value)}.")

    def _check_choices(self) -> None:
        optimizer = getattr(self.optim, "value", self.optim)
        if isinstance(optimizer, str) and optimizer.startswith(REFUSED_OPTIMIZERS):
            raise ValueError(
                f"optim={optimizer!r} is not supported: it needs more than parameters and gradients; take "
                "adamw_torch_fused, adamw_8bit, paged_adamw_8bit, adafactor or another that needs no more."
            )
        asked = [(name, getattr(self, name), choices) for name, choices in CHOICES.items()]
        if self.ddp_backend is not None:  # gloo, or cpu:gloo,cuda:nccl
            backends = [part.rpartition(":")[2] for part in self.ddp_backend.split(",")]
            asked += [("ddp_backend", backend, torch.distributed.Backend.backend_list) for backend in backends]
        for name, value, choices in asked:
            if value not in choices:
                raise ValueError(f"{name}={brief(value)} is none of {', '.join(choices)}{nearest(str(value), choices)}")
        for name, enum in ENUMS.items():
            setattr(self, name, enum(getattr(self, name)))

    def _check_ranges(self) -> None:
        for names, words, holds in RANGES:
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not holds(value):
                    raise ValueError(f"{name} must be {words}, got {brief(value)}.")

    def _check_losses(self) -> None:
        from fastdpo.losses import LOSSES, check_idle_options, pairwise_loss  # not for whoever only reads a config

        if not self.loss_type:
            raise ValueError(f"loss_type is empty; give one of {', '.join(LOSSES)}.")
        for given in self.loss_type:
            if given == "kto_pair":
                raise ValueError(
                    "loss_type='kto_pair' is KTO on pairs, which TRL's DPO dropped as well: take bco_pair, the nearest "
                    "here, or TRL's KTOTrainer."
                )
            if not callable(given) and given not in LOSSES:
                raise ValueError(f"unknown loss {brief(given)}, there are {', '.join(LOSSES)}{nearest(given, LOSSES)}")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise ValueError(
                f"loss_weights has {len(self.loss_weights)} numbers, loss_type {len(self.loss_type)} names: give one "
                "weight a loss."
            )
        if self.loss_weights is not None and not any(self.loss_weights):
            raise ValueError(f"loss_weights={self.loss_weights} leaves nothing to learn: give one that is not 0.")
        check_idle_options(self, _defaults(DPOConfig))
        pairwise_loss(self)

    def _check_reference(self) -> None:
        from fastdpo.losses import pairwise_loss, sees_reference

        ahead = self.ref_log_probs or self.precompute_ref_log_probs
        if ahead and (self.reference_free or not sees_reference(pairwise_loss(self))):
            name = "ref_log_probs" if self.ref_log_probs else "precompute_ref_log_probs"
            why = "reference_free=True" if self.reference_free else "a loss_type that sees the policy alone"
            raise ValueError(f"{name}={ahead!r} has no effect with {why}: leave it out.")
        if self.precompute_ref_batch_size and not self.precompute_ref_log_probs:
            raise ValueError(
                f"precompute_ref_batch_size={self.precompute_ref_batch_size} has no effect without "
                "precompute_ref_log_probs=True: set that, or leave it out."
            )
        if ahead and self.sync_ref_model:
            raise ValueError(
                "sync_ref_model moves the reference, so its log-probs cannot be known ahead: leave one out."
            )
        for name in ("ref_model_mixup_alpha", "ref_model_sync_steps"):
            if not self.sync_ref_model and getattr(self, name) != _defaults(DPOConfig)[name]:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no effect without sync_ref_model=True: set that, or leave it "
                    "out."
                )

    def _check_schedule(self) -> None:
        """That the schedule takes its arguments, by making one of an optimizer that is never stepped."""
        optimizer = torch.optim.SGD([torch.zeros(())], lr=1.0)
        name, given = getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type), self.lr_scheduler_kwargs
        steps = {"num_warmup_steps": 0, "num_training_steps": 1000}
        if given and name.startswith("constant"):  # get_scheduler drops them
            raise ValueError(f"lr_scheduler_kwargs={given} has no effect on lr_scheduler_type={name!r}: leave it out.")
        try:
            get_scheduler(name, optimizer, **steps, scheduler_specific_kwargs=dict(given or {}))  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"lr_scheduler_kwargs={given} does not go with lr_scheduler_type={name!r}: {error}."
            ) from error

    def _check_combinations(self) -> None:
        if self.max_length is not None and (self.max_prompt_length or 0) >= self.max_length:
            raise ValueError(
                f"max_prompt_length={self.max_prompt_length} leaves no room for a response in "
                f"max_length={self.max_length}: lower it."
            )
        if not (self.use_peft or self.quantizes):
            for name in self.given_lora_options():
                raise ValueError(
                    f"{name}={brief(getattr(self, name))} has no effect without adapters: set use_peft=True, or leave "
                    "it out."
                )
        self._check_quantization()
        weights: Any = self.train_dataset_weights
        if weights and min(weights.values() if isinstance(weights, dict) else weights) <= 0:
            raise ValueError(f"train_dataset_weights must be above 0, got {weights}.")
        if self.lora_dropout and self.disable_dropout:
            raise ValueError(
                f"lora_dropout={self.lora_dropout!r} needs disable_dropout=False, which trains with dropout."
            )
        if self.warmup_ratio and self.warmup_steps:
            raise ValueError(
                f"warmup_ratio={self.warmup_ratio!r} and warmup_steps={self.warmup_steps!r} exclude each other: give "
                "one of them."
            )
        optimizer = str(getattr(self.optim, "value", self.optim))
        if self.optim_args and optimizer in IGNORES_OPTIM_ARGS:
            raise ValueError(
                f"optim_args={self.optim_args!r} has no effect on optim={optimizer!r}: set adam_beta1, adam_beta2, "
                "adam_epsilon and weight_decay instead."
            )
        self.check_checkpointing()
        if self.activation_offloading and (self.use_cpu or not torch.cuda.is_available()):
            raise ValueError(
                "activation_offloading=True moves activations from a GPU to the host, and there is none: leave it out."
            )
        if self.memory and (self.use_cpu or not torch.cuda.is_available()):
            raise ValueError("memory='auto' plans for an NVIDIA GPU, and there is none: leave it out.")
        for name in ("dataloader_multiprocessing_context", "dataloader_in_order"):
            if getattr(self, name) != _defaults(DPOConfig)[name] and not self.dataloader_num_workers:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no effect without dataloader_num_workers: set that, or leave "
                    "it out."
                )
        if not self.dataloader_in_order and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("dataloader_in_order=False would give each process other rows: leave it out.")
        compiles = [name for name in ("torch_compile_backend", "torch_compile_mode") if getattr(self, name)]
        if compiles and not self.torch_compile:
            raise ValueError(
                f"{compiles[0]}={brief(getattr(self, compiles[0]))} has no effect without torch_compile=True: set "
                "that, or leave it out."
            )
        if self.fused_kernels and self.torch_compile:
            raise ValueError(
                "fused_kernels=True and torch_compile=True exclude each other: the compiler takes the model's own "
                "blocks. Set one of them."
            )
        if self.logging_dir and not {"tensorboard", "all"} & set(self.report_to or ()):
            raise ValueError("logging_dir is where TensorBoard writes: add report_to='tensorboard', or leave it out.")
        if self.fp16 and (self.use_cpu or not torch.accelerator.is_available()):
            raise ValueError(
                "fp16=True needs a GPU, as its loss scaling is for GPU arithmetic: leave it out, or set bf16=True."
            )

    def check_checkpointing(self) -> None:
        """What `memory` and the options of gradient checkpointing ask for, on whatever device."""
        if self.memory not in (None, "auto"):
            raise ValueError(f"memory={brief(self.memory)} is not known: leave it out, or set it to 'auto'.")
        chosen = "gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_offloading"
        if self.memory and (given := [name for name in chosen if getattr(self, name)]):
            raise ValueError(f"memory='auto' chooses {given[-1]}, which is given, too: leave one of them out.")
        kwargs: Any = self.gradient_checkpointing_kwargs or {}
        for name in kwargs:
            if name not in CHECKPOINT_KWARGS:
                raise ValueError(
                    f"gradient_checkpointing_kwargs has an unknown {name!r}, there are {', '.join(CHECKPOINT_KWARGS)}"
                    f"{nearest(str(name), CHECKPOINT_KWARGS)}"
                )
        if kwargs.get("use_reentrant"):
            raise ValueError(
                "gradient_checkpointing_kwargs use_reentrant=True is not supported: packed attention needs the other "
                "kind; set it to False."
            )
        every = kwargs.get("every_n_layers", 1)
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(
                f"gradient_checkpointing_kwargs every_n_layers must be a whole number of at least 1, got {every!r}."
            )
        if every > 1 and not self.gradient_checkpointing:
            raise ValueError(
                f"gradient_checkpointing_kwargs every_n_layers={every} has no effect without "
                "gradient_checkpointing=True: set that, too."
            )

    def _check_packages(self) -> None:
        """That the optimizer can be made, which is otherwise seen only when the model is there."""
        optimizer = str(getattr(self.optim, "value", self.optim))
        for names, module, package in OPTIMIZER_PACKAGES:
            if any(name in optimizer for name in names) and find_spec(module) is None:
                raise ValueError(
                    f"optim={optimizer!r} needs {package}, which is not installed: pip install {package}, or take "
                    "another optim."
                )

    def given_lora_options(self) -> list[str]:
        """The options of new LoRA adapters that are not at their default."""
        defaults = _defaults(DPOConfig)
        names = [name for name in defaults if name.startswith("lora_") or name in ("use_rslora", "use_dora")]
        return [name for name in names if getattr(self, name) != defaults[name]]

    def _check_quantization(self) -> None:
        ways = [name for name in ("load_in_4bit", "load_in_8bit", "quantization_config") if getattr(self, name)]
        if ways and find_spec("bitsandbytes") is None:
            raise ValueError(f"{ways[0]} needs bitsandbytes, which is not installed: pip install bitsandbytes")
        if len(ways) > 1:
            raise ValueError(f"{' and '.join(ways)} exclude each other: give one of them.")
        for name in ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"):
            if not self.load_in_4bit and getattr(self, name) != _defaults(DPOConfig)[name]:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no effect without load_in_4bit=True: set that, or leave it "
                    "out."
                )
        given = self.quantization_config
        if isinstance(given, dict) and given and not (given.get("load_in_4bit") or given.get("load_in_8bit")):
            raise ValueError(
                f"quantization_config={given} asks for neither load_in_4bit nor load_in_8bit of bitsandbytes, the "
                "only quantisation that fastdpo loads: set one of them to true."
            )

    def _check_devices(self) -> None:
        launched = int(os.environ.get("WORLD_SIZE", 1))
        if launched != self.world_size:
            raise ValueError(
                f"{launched} processes were launched, and this one trains on its own ({self.device}): set use_cpu=True "
                "if they are to train together on CPUs, or start one."
            )
        there = torch.cuda.device_count() if self.device.type == "cuda" else 0
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if there and local > there:
            raise ValueError(f"{local} processes were launched on {there} GPUs: start one a GPU.")
        if self.fsdp_config and not self.fsdp:
            raise ValueError("fsdp_config was given without fsdp=True: set that, or leave it out.")
        settings: Any = self.fsdp_config or {}
        if idle := [name for name, value in settings.items() if value and name not in (*FSDP_SETTINGS, *FSDP_REFUSED)]:
            raise ValueError(
                f"fsdp_config has {idle[0]!r}, which does nothing here{nearest(idle[0], FSDP_SETTINGS)}: leave it out; "
                f"what it may have is {', '.join(FSDP_SETTINGS)}."
            )
        if asked_plugin(self.fsdp_plugin_args) is not None:
            self._check_sharded()
            if self.world_size == 1:
                logger.info("fsdp: one process holds all of the model, as there is none to share it with")
        if self.use_cpu and self.device.type != "cpu":
            raise ValueError(
                f"use_cpu was set after {self.device} had been chosen: give use_cpu=True when the config is made."
            )
        if self.n_gpu > 1:
            logger.info("one process trains on one GPU: %s of %d is used", self.device, self.n_gpu)
            self._n_gpu = 1

    def _check_launcher(self) -> None:
        if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("1", "true"):
            raise ValueError(
                "accelerate was configured for DEEPSPEED: configure it for FSDP with fsdp_version 2, which shards "
                "weights, gradients and optimizer states as ZeRO-3 does, or for MULTI_GPU, where every process holds "
                "the whole model."
            )

    def _check_sharded(self) -> None:
        """What does not go together with FSDP2."""
        reasons = {
            "fp16": (self.fp16, "its loss scaling is not known to shares of gradients: set bf16=True"),
            "torch_compile": (self.torch_compile, "compiled blocks and gathered weights were not tried: leave it out"),
            "load_in_4bit": (self.quantizes, "quantised weights are not sharded: configure accelerate for MULTI_GPU"),
            "save_only_model": (
                self.save_only_model and self.load_best_model_at_end,
                "load_best_model_at_end takes what save_only_model leaves out: leave one out",
            ),
        }
        for name, (given, why) in reasons.items():
            if given:
                raise ValueError(f"{name}={getattr(self, name)!r} under FSDP2: {why}.")

    def to_dict(self) -> dict[str, Any]:
        """As transformers writes it for reporters, with a function in `loss_type` by its name."""
        from fastdpo.losses import formula_name

        options = super().to_dict()
        losses = [formula_name(given) if callable(given) else given for given in self.loss_type]
        return options | {"loss_type": losses}

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Steps over which the learning rate rises; a `warmup_ratio` rounds up, as it did in transformers 4."""
        if self.warmup_ratio:
            return math.ceil(num_training_steps * self.warmup_ratio)
        return super().get_warmup_steps(num_training_steps)

    def check_output_dir(self) -> None:
        """Makes `output_dir` and writes to it once, so that a run does not find out at its end."""
        directory = Path(self.output_dir or "trainer_output")
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory) as probe:
                probe.write(b"x")
        except OSError as error:
            raise ValueError(
                f"output_dir={str(directory)!r} cannot be written ({error.strerror}): give a directory that can."
            ) from error
        if any(directory.iterdir()):
            logger.info("output_dir %s has files already; those of the same name are written over", directory)

    def differences_from_trl(self) -> list[str]:
        """A line for each option in use whose meaning or default is not that of TRL 1.16."""
        from fastdpo.losses import loss_differences

        lines = loss_differences(self)
        if self.learning_rate is None and (self.use_peft or self.quantizes):
            lines.append("learning_rate is 2e-5 for adapters (TRL 1.16: 1e-6 for all)")
        if self.truncation_mode == "keep_end" and self.max_length is not None:
            lines.append("truncation_mode='keep_end' keeps the end of a prompt that is too long (TRL 1.16: keep_start)")
        if not self.gradient_checkpointing:
            lines.append("gradient_checkpointing is off (TRL 1.16: on)")
        share, steps = self.ref_model_mixup_alpha, self.ref_model_sync_steps
        defaults = _defaults(DPOConfig)
        if self.sync_ref_model and (
            share == defaults["ref_model_mixup_alpha"] or steps == defaults["ref_model_sync_steps"]
        ):
            lines.append(f"ref_model_mixup_alpha={share:g} every {steps} steps (TRL 1.16: 0.6, 512)")
        return lines

    @classmethod
    def from_arguments(cls, arguments: TrainingArguments) -> "DPOConfig":
        """The config of a run: a DPOConfig as it is, or TRL's or transformers' arguments with each value as given."""
        if not isinstance(arguments, TrainingArguments):
            kind = type(arguments).__name__
            beta = f"; 0.11's third argument, beta, is a keyword: beta={arguments}" if _fits(arguments, float) else ""
            raise ValueError(
                f"args is a {kind}, expected a DPOConfig, TRL's DPOConfig or transformers' TrainingArguments{beta}."
            )
        config = arguments if isinstance(arguments, cls) else cls(**_given_options(arguments, _defaults(cls)))
        for line in config.differences_from_trl():
            logger.info(line)
        return config


def _given_options(arguments: TrainingArguments, ours: Mapping[str, Any]) -> dict[str, Any]:
    """What another class's options ask for: all that work here, and any other that is not at that class's default."""
    options = {}
    for name, default in _defaults(type(arguments)).items():
        value = getattr(arguments, name)
        works = name in ours and VERDICTS[name].kind == "works"
        if works or not changes_nothing(value, default):
            options[name] = value
    if not (options["bf16"] or options["fp16"]) and _launched_precision() != "no":
        options["bf16"] = None  # False is the default there
    if not options.get("sync_ref_model"):
        options = {name: value for name, value in options.items() if not name.startswith("ref_model_")}
    # TRL 1.16's alpha, told by its default of 0.5, counts from the other end
    if _defaults(type(arguments)).get("f_alpha_divergence_coef") == 0.5:
        alpha = options.pop("f_alpha_divergence_coef")
        if options["f_divergence_type"] == "alpha_divergence":
            options["f_alpha_divergence_coef"] = 1 - alpha
    return options


def _dict_of(name: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} must be a dict or its JSON, got {brief(value)} ({error}).") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{name} must be a dict or its JSON, got {brief(value)}.")
    return parsed


def _launched_precision() -> str:
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()


def _gpu_has_bf16() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
