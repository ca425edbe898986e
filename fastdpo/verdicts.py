"""What fastdpo does with every option that a DPO script may set: one table, `VERDICTS`.

It covers transformers' `TrainingArguments`, the options that transformers has dropped, and TRL's, old and new. An
option works, is known under a newer name, comes from the launcher, is not available yet, or is refused for a reason.
Whatever is not honoured raises as soon as it has another value than its default: nothing is ignored silently. The
values that working options may take stand below the table.
"""

import difflib
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verdict:
    """What fastdpo does with one option."""

    kind: Literal["works", "renamed", "launcher", "not_yet", "refused"]
    reason: str = ""  # why it does not work
    instead: str = ""  # what to do instead; for a renamed option its present name
    topic: str = ""  # the heading under which the command line lists an option that works
    default: Any = None  # the value that changes nothing, for a name that is no field of DPOConfig


# Topic -> options that work, ours before the inherited ones.
_WORKS = {
    "model": "model_revision trust_remote_code dtype attn_implementation model_init_kwargs rope_scaling "
    "is_encoder_decoder fused_kernels disable_dropout neftune_noise_alpha",
    "adapters": "use_peft lora_r lora_alpha lora_dropout lora_target_modules "
    "lora_target_parameters lora_modules_to_save use_rslora use_dora",
    "quantised weights": "load_in_4bit load_in_8bit bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage "
    "quantization_config",
    "data": "train_dataset_weights dataset_train_split dataset_test_split max_length max_prompt_length "
    "max_completion_length max_target_length truncation_mode "
    "dataset_num_proc remove_unused_columns label_pad_token_id padding_value pad_token",
    "preference loss": "loss_type loss_weights beta label_smoothing discopop_tau simpo_gamma cpo_alpha "
    "bco_running_mean rpo_alpha f_divergence_type f_alpha_divergence_coef ld_alpha use_weighting reference_free "
    "router_aux_loss_coef",
    "reference": "precompute_ref_log_probs precompute_ref_batch_size ref_log_probs sync_ref_model "
    "ref_model_mixup_alpha ref_model_sync_steps model_adapter_name ref_adapter_name force_use_ref_model "
    "ref_model_init_kwargs",
    "memory": "memory max_tokens_per_microbatch gradient_checkpointing gradient_checkpointing_kwargs "
    "activation_checkpointing activation_checkpointing_kwargs activation_offloading torch_empty_cache_steps",
    "batches and duration": "per_device_train_batch_size gradient_accumulation_steps num_train_epochs max_steps "
    "train_sampling_strategy dataloader_drop_last dataloader_num_workers "
    "dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor dataloader_in_order "
    "dataloader_multiprocessing_context",
    "optimizer and schedule": "learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_ratio warmup_steps optim "
    "optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm on_nonfinite",
    "precision and device": "bf16 fp16 tf32 use_cpu torch_compile torch_compile_backend torch_compile_mode",
    # parameters that no process has a gradient for are always found
    "several processes": "fsdp fsdp_config ddp_backend ddp_timeout ddp_find_unused_parameters",
    "reproducibility": "seed data_seed full_determinism",
    "evaluation": "eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size load_best_model_at_end "
    "metric_for_best_model greater_is_better eval_accumulation_steps batch_eval_metrics eval_do_concat_batches "
    "include_for_metrics generate_during_eval",
    "logging": "report_html logging_strategy logging_steps logging_first_step logging_nan_inf_filter logging_dir "
    "log_level log_level_replica log_on_each_node disable_tqdm report_to run_name project trackio_space_id "
    "trackio_bucket_id trackio_static_space_id",
    "saving": "output_dir overwrite_output_dir save_strategy save_steps save_total_limit save_on_each_node "
    "save_only_model resume_from_checkpoint push_to_hub hub_model_id hub_strategy hub_token hub_private_repo "
    "hub_always_push hub_revision",
    "read by your own script": "do_train do_eval do_predict",
}

# What these ask for is always so, whatever their value: understood by name, kept nowhere.
_ALWAYS = ("padding_free", "auto_find_batch_size", "include_tokens_per_second")
_ALWAYS += ("restore_callback_states_from_checkpoint", "enable_jit_checkpoint")  # SIGTERM saves

# Old name -> (its value that changes nothing, the present name, old value -> present value or None: the value stays).
_RENAMED: dict[str, tuple[Any, str, Mapping[Any, Any] | None]] = {
    "per_gpu_train_batch_size": (None, "per_device_train_batch_size", None),
    "per_gpu_eval_batch_size": (None, "per_device_eval_batch_size", None),
    "no_cuda": (False, "use_cpu", None),
    "adafactor": (False, "optim", {True: "adafactor"}),
    "group_by_length": (False, "train_sampling_strategy", {True: "group_by_length"}),
    "evaluation_strategy": (None, "eval_strategy", None),
    "push_to_hub_model_id": (None, "hub_model_id", None),
    "push_to_hub_organization": (None, "hub_model_id", None),
    "push_to_hub_token": (None, "hub_token", None),
    "include_inputs_for_metrics": (False, "include_for_metrics", {True: ["inputs"]}),
    "torchdynamo": (None, "torch_compile_backend", None),
    "torch_dtype": (None, "dtype", None),
}

# (what is missing, what to do until then) -> options. Every value but the default raises.
_NOT_YET = {
    ("a report of memory", "read the GPU's own counters"): "skip_memory_metrics",
}

# Option -> (why not, what instead). Every value but the default raises.
_REFUSED = {
    "ignore_data_skip": ("a resumed run goes on with the rows that are left of its epoch", "leave it out"),
    "optim_target_modules": ("it belongs to optimizers like GaLore, which are refused", "take optim='adamw_8bit'"),
    "accelerator_config": ("every process reads its own rows, and no loader is accelerate's", "leave it out"),
    "ddp_bucket_cap_mb": ("gradients are summed once they are all there", "leave it out"),
    "deepspeed": (
        "FSDP2 shards weights, gradients and optimizer states as ZeRO-3 does",
        "take fsdp=True, or a config of accelerate's for FSDP with fsdp_version 2",
    ),
    "parallelism_config": ("processes share pairs, and weights by FSDP2, in no other way", "take fsdp=True"),
    "fsdp_min_num_params": ("units are transformer blocks", "leave it out"),
    "fsdp_transformer_layer_cls_to_wrap": ("fsdp_config has it", "set its transformer_layer_cls_to_wrap"),
    "ddp_static_graph": ("gradients are summed once they are all there", "leave it out"),
    "ddp_broadcast_buffers": ("all processes start from the first one's buffers", "leave it out"),
    "prediction_loss_only": ("predictions are kept for compute_metrics alone", "leave that out"),
    "bf16_full_eval": (
        "it rounds the model's weights for good",
        "set bf16=True, which evaluation follows, or call trainer.model.bfloat16() before evaluate()",
    ),
    "fp16_full_eval": (
        "it rounds the model's weights for good",
        "set fp16=True, which evaluation follows, or call trainer.model.half() before evaluate()",
    ),
    "label_smoothing_factor": ("it smooths class labels, and a preference has none", "use label_smoothing"),
    "use_liger_kernel": ("fastdpo has kernels of its own", "leave it out"),
    "liger_kernel_config": ("fastdpo has kernels of its own", "leave it out"),
    "use_cache": ("a training step reads no key-value cache, and generation has its own setting", "leave it out"),
    "include_num_input_tokens_seen": ("the tokens seen are on every log line, as num_tokens", "leave it out"),
    "eval_use_gather_object": ("an evaluation gathers sums, never objects", "leave it out"),
    "label_names": ("a batch of pairs has no label columns", "leave it out"),
    "length_column_name": ("lengths are known after tokenization", "leave it out"),
    "debug": ("it belongs to transformers' Trainer", "use torch.autograd.set_detect_anomaly"),
    "average_tokens_across_devices": ("a step is always normalised by all of its pairs", "leave it out"),
    "pad_to_multiple_of": ("batches are packed, not padded", "leave it out"),
    "lora_task_type": ("preferences train a causal language model", "leave it out"),
    "save_safetensors": ("models are always saved as safetensors", "leave it out"),
    "use_mps_device": ("the device is found", "leave it out, or set use_cpu=True"),
    "jit_mode_eval": ("evaluation runs the model as it is", "leave it out"),
    "use_ipex": ("transformers dropped it", "leave it out"),
    "fp16_opt_level": ("it belonged to apex, which transformers dropped", "use fp16=True"),
    "half_precision_backend": ("there is one backend, PyTorch's", "use fp16=True or bf16=True"),
    "fp16_backend": ("there is one backend, PyTorch's", "use fp16=True or bf16=True"),
    "tpu_num_cores": ("fastdpo does not run on TPUs", "leave it out"),
    "tpu_metrics_debug": ("fastdpo does not run on TPUs", "leave it out"),
    "past_index": ("a training step reads no key-value cache", "leave it out"),
    "use_legacy_prediction_loop": ("there is one evaluation loop", "leave it out"),
    "mp_parameters": ("fastdpo does not run on SageMaker's model parallelism", "leave it out"),
    "ray_scope": ("hyper-parameter search belongs to transformers' Trainer", "start a run for each trial"),
    "dispatch_batches": ("every process reads its own rows", "leave it out"),
    "split_batches": ("every process reads its own rows", "leave it out"),
}

# Values that change nothing, of unsupported names that are no fields here and whose default is not empty.
_OTHER_DEFAULTS = {"fp16_opt_level": "O1", "half_precision_backend": "auto", "fp16_backend": "auto", "past_index": -1}
_OTHER_DEFAULTS |= {"ray_scope": "last", "pad_to_multiple_of": "auto", "lora_task_type": "CAUSAL_LM"}
_OTHER_DEFAULTS |= {"save_safetensors": True}


def _verdicts() -> dict[str, Verdict]:
    table = {name: Verdict("works", topic=topic) for topic, names in _WORKS.items() for name in names.split()}
    table |= {name: Verdict("works") for name in _ALWAYS}
    table |= {old: Verdict("renamed", instead=new, default=default) for old, (default, new, _) in _RENAMED.items()}
    table["local_rank"] = Verdict("launcher", "the launcher sets it for each process", "leave it out")
    for (what, instead), names in _NOT_YET.items():
        table |= {name: Verdict("not_yet", what, instead) for name in names.split()}
    for name, (reason, instead) in _REFUSED.items():
        table[name] = Verdict("refused", reason, instead, default=_OTHER_DEFAULTS.get(name))
    return table


VERDICTS: dict[str, Verdict] = _verdicts()

ENUMS = {
    "eval_strategy": IntervalStrategy,
    "logging_strategy": IntervalStrategy,
    "save_strategy": SaveStrategy,
    "hub_strategy": HubStrategy,
    "lr_scheduler_type": SchedulerType,
    "optim": OptimizerNames,
}
CHOICES = {
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "truncation_mode": ("keep_end", "keep_start"),
    "bnb_4bit_quant_type": ("nf4", "fp4"),
    "bnb_4bit_quant_storage": ("uint8", "float16", "bfloat16", "float32"),
    "f_divergence_type": ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
    "train_sampling_strategy": ("random", "sequential", "group_by_length"),
    "on_nonfinite": ("raise", "skip"),
    "log_level": ("detail", "debug", "info", "warning", "error", "critical", "passive"),
    "log_level_replica": ("detail", "debug", "info", "warning", "error", "critical", "passive"),
} | {name: tuple(member.value for member in enum) for name, enum in ENUMS.items()}

# Optimizers that need the model's modules, their own step or another device: the loop drives a plain torch optimizer.
REFUSED_OPTIMIZERS = ("galore", "apollo", "lomo", "adalomo", "schedule_free", "adamw_torch_xla", "adamw_torch_npu")
CHOICES["optim"] = tuple(name for name in CHOICES["optim"] if not name.startswith(REFUSED_OPTIMIZERS))

# (parts of names, the module that these optimizers are in, its package)
OPTIMIZER_PACKAGES = (
    (("bnb", "paged", "lion", "ademamix", "adamw_8bit"), "bitsandbytes", "bitsandbytes"),
    (("adamw_torch_4bit", "adamw_torch_8bit"), "torchao", "torchao"),
    (("stable_adamw",), "optimi", "torch-optimi"),
    (("grokadamw",), "grokadamw", "grokadamw"),
    (("anyprecision",), "torchdistx", "torchdistx"),
)

# Of gradient_checkpointing_kwargs: torch's, and two that go by transformers' names for them
CHECKPOINT_KWARGS = ("use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop")
CHECKPOINT_KWARGS += ("every_n_layers", "offload")

RANGES: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    (
        "beta discopop_tau learning_rate adam_epsilon num_train_epochs lora_alpha neftune_noise_alpha",
        "above 0",
        lambda value: value > 0,
    ),
    (
        "max_length max_prompt_length max_completion_length max_target_length dataset_num_proc "
        "max_tokens_per_microbatch lora_r precompute_ref_batch_size ref_model_sync_steps "
        "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps save_total_limit "
        "torch_empty_cache_steps dataloader_prefetch_factor eval_accumulation_steps",
        "at least 1",
        lambda value: value >= 1,
    ),
    (
        "weight_decay max_grad_norm warmup_steps eval_delay dataloader_num_workers seed data_seed logging_steps "
        "eval_steps save_steps rpo_alpha simpo_gamma cpo_alpha router_aux_loss_coef padding_value",
        "0 or above",
        lambda value: value >= 0,
    ),
    ("adam_beta1 adam_beta2 lora_dropout", "at least 0 and below 1", lambda value: 0 <= value < 1),
    ("label_smoothing", "at least 0 and below 0.5", lambda value: 0 <= value < 0.5),
    ("warmup_ratio ld_alpha", "between 0 and 1", lambda value: 0 <= value <= 1),
    ("ref_model_mixup_alpha", "above 0 and at most 1", lambda value: 0 < value <= 1),
    ("max_steps", "-1 (unset) or at least 1", lambda value: value == -1 or value >= 1),
    (
        "seed data_seed per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps lora_r "
        "dataloader_num_workers",
        "below 4294967296",
        lambda value: value < 2**32,
    ),
)


def brief(value: Any) -> str:
    """What came, in a message."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'beta'?` where a known name is like this one, else nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def changes_nothing(value: Any, default: Any) -> bool:
    """Whether `value` asks for what `default` does; one empty value is as good as another."""
    if isinstance(value, AcceleratorConfig):  # what transformers makes of None
        return value == AcceleratorConfig()
    if getattr(value, "ndim", 0):  # an array has no one truth value
        return False
    return value == default or (not value and (not default or default in ("no", "auto")))


def refusal(name: str, value: Any) -> ValueError:
    verdict = VERDICTS[name]
    if verdict.kind == "not_yet":
        return ValueError(
            f"{name}={brief(value)} is not available yet in this version: {verdict.reason} comes later; "
            f"{verdict.instead}."
        )
    return ValueError(f"{name}={brief(value)} is not supported: {verdict.reason}; {verdict.instead}.")


def present_names(options: Mapping[str, Any], fields: Iterable[str]) -> dict[str, Any]:
    """The same options under the names of `fields`; raises for unknown names and for what is not supported."""
    known = set(fields)
    present = {name: value for name, value in options.items() if name in known}
    for name, value in options.items():
        if name in known:
            continue
        if name not in VERDICTS:
            raise ValueError(f"unknown option {name!r}{nearest(name, known | set(VERDICTS))}")
        verdict = VERDICTS[name]
        if changes_nothing(value, verdict.default) or verdict.kind == "works":
            continue
        if verdict.kind != "renamed":
            raise refusal(name, value)
        _, new, values = _RENAMED[name]
        if new in present:
            raise ValueError(f"{name} is the old name of {new}, and both are given: keep {new}.")
        if values and value is not True:
            raise ValueError(f"{name} is the old name of {new}, and must be true or false, got {brief(value)}.")
        present[new] = values[value] if values else value
        logger.warning("%s is the old name of %s: %s=%r is used", name, new, new, present[new])
    return present


def table() -> str:
    """Every option and what becomes of it, in Markdown: the table of docs/migrate.md."""
    lines = ["| option | here |", "|---|---|"]
    for name, verdict in sorted(VERDICTS.items()):
        words = {
            "works": f"same name{f' ({verdict.topic})' if verdict.topic else ', always so'}",
            "renamed": f"the old name of `{verdict.instead}`",
            "launcher": f"{verdict.reason}: {verdict.instead}",
            "not_yet": f"not available yet: {verdict.instead}",
            "refused": f"refused: {verdict.reason}; {verdict.instead}",
        }
        lines.append(f"| `{name}` | {words[verdict.kind]} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
