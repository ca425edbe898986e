"""DPOConfig: every option is honoured, renamed or refused, and every bad value is one clear error."""

import dataclasses
import enum
import json
import logging
import math
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from fastdpo import verdicts
from fastdpo.config import DPOConfig
from fastdpo.losses import LOSSES
from fastdpo.verdicts import VERDICTS

# Every option of the DPOConfig that TRL 0.11 documents, with its default there.
_FALSE = """overwrite_output_dir do_train do_eval do_predict prediction_loss_only logging_first_step save_on_each_node
save_only_model restore_callback_states_from_checkpoint no_cuda use_cpu use_mps_device jit_mode_eval use_ipex fp16 bf16
bf16_full_eval fp16_full_eval tpu_metrics_debug dataloader_drop_last load_best_model_at_end ignore_data_skip adafactor
group_by_length dataloader_persistent_workers use_legacy_prediction_loop push_to_hub hub_private_repo hub_always_push
gradient_checkpointing include_inputs_for_metrics auto_find_batch_size full_determinism torch_compile eval_on_start
include_tokens_per_second include_num_input_tokens_seen batch_eval_metrics eval_use_gather_object generate_during_eval
precompute_ref_log_probs reference_free force_use_ref_model sync_ref_model"""
_TRUE = """logging_nan_inf_filter save_safetensors log_on_each_node remove_unused_columns dataloader_pin_memory
skip_memory_metrics disable_dropout eval_do_concat_batches"""
_NONE = """per_gpu_train_batch_size per_gpu_eval_batch_size eval_accumulation_steps torch_empty_cache_steps logging_dir
save_total_limit data_seed tf32 ddp_backend tpu_num_cores eval_steps dataloader_prefetch_factor run_name disable_tqdm
label_names metric_for_best_model greater_is_better fsdp_config fsdp_transformer_layer_cls_to_wrap accelerator_config
deepspeed optim_args report_to ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers resume_from_checkpoint
hub_model_id hub_token gradient_checkpointing_kwargs evaluation_strategy push_to_hub_model_id push_to_hub_organization
push_to_hub_token torchdynamo torch_compile_backend torch_compile_mode dispatch_batches split_batches rpo_alpha
neftune_noise_alpha optim_target_modules padding_value max_length max_prompt_length max_target_length
is_encoder_decoder dataset_num_proc model_init_kwargs ref_model_init_kwargs model_adapter_name ref_adapter_name"""
DOCUMENTED = {
    **dict.fromkeys(_FALSE.split(), False),
    **dict.fromkeys(_TRUE.split(), True),
    **dict.fromkeys(_NONE.split()),
    **{"output_dir": "out", "eval_strategy": "no", "per_device_train_batch_size": 8, "eval_delay": 0, "max_steps": -1},
    **{"per_device_eval_batch_size": 8, "gradient_accumulation_steps": 1, "learning_rate": 5e-05, "weight_decay": 0.0},
    **{"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-08, "max_grad_norm": 1.0, "num_train_epochs": 3.0},
    **{"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {}, "warmup_ratio": 0.0, "warmup_steps": 0, "seed": 42},
    **{"log_level": "passive", "log_level_replica": "warning", "logging_strategy": "steps", "logging_steps": 500},
    **{"save_strategy": "steps", "save_steps": 500, "fp16_opt_level": "O1", "half_precision_backend": "auto"},
    **{
        "local_rank": -1,
        "debug": "",
        "dataloader_num_workers": 0,
        "past_index": -1,
        "fsdp": "",
        "fsdp_min_num_params": 0,
    },
    **{"label_smoothing_factor": 0.0, "optim": "adamw_torch", "length_column_name": "length", "fp16_backend": "auto"},
    **{"hub_strategy": "every_save", "mp_parameters": "", "ray_scope": "last", "ddp_timeout": 1800, "beta": 0.1},
    **{"label_smoothing": 0, "loss_type": "sigmoid", "label_pad_token_id": -100, "truncation_mode": "keep_end"},
    **{"f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 1.0, "ref_model_mixup_alpha": 0.9},
    **{"ref_model_sync_steps": 64},
}


def other_value(default: object) -> object:
    """A value that is not the default, of its type where it has one."""
    if isinstance(default, bool):
        return not default
    return (
        default + 1
        if isinstance(default, (int, float))
        else ["something"]
        if isinstance(default, list)
        else "something"
    )


def fields_of(cls: type) -> dict[str, object]:
    return {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(cls)
    }


def config(tmp_path, **options) -> DPOConfig:
    return DPOConfig(str(tmp_path), **options)


UNSUPPORTED_FIELDS = sorted(name for name in fields_of(DPOConfig) if VERDICTS[name].kind != "works")
UNSUPPORTED_NAMES = sorted(
    name
    for name, verdict in VERDICTS.items()
    if verdict.kind in ("refused", "not_yet") and name not in fields_of(DPOConfig)
)


def test_every_field_of_the_installed_training_arguments_and_of_dpoconfig_has_a_verdict():
    assert sorted((set(fields_of(TrainingArguments)) | set(fields_of(DPOConfig))) - set(VERDICTS)) == []


def test_every_documented_option_has_a_verdict_and_is_accepted_at_its_documented_default(tmp_path):
    assert sorted(set(DOCUMENTED) - set(VERDICTS)) == []
    DPOConfig(**{**DOCUMENTED, "output_dir": str(tmp_path)})


def test_every_field_and_setting_of_trl_has_a_verdict():
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    names = set(fields_of(trl.DPOConfig)) | set(fields_of(trl.ModelConfig)) - {"model_name_or_path"}
    assert sorted(names - set(VERDICTS)) == []


@pytest.mark.parametrize("name", UNSUPPORTED_FIELDS)
def test_a_field_that_is_not_supported_raises_one_line_when_set(name, tmp_path):
    value = other_value(fields_of(DPOConfig)[name])
    with pytest.raises(ValueError, match=f"{name}=.*(not supported|not available yet)") as caught:
        config(tmp_path, **{name: value})
    assert "\n" not in str(caught.value)
    assigned = config(tmp_path)
    setattr(assigned, name, value)
    with pytest.raises(ValueError, match=f"{name}="):
        assigned.validate()


@pytest.mark.parametrize("name", UNSUPPORTED_NAMES)
def test_a_dropped_option_is_refused_by_name(name, tmp_path):
    with pytest.raises(ValueError, match=f"{name}=.*(not supported|not available yet)"):
        config(tmp_path, **{name: other_value(VERDICTS[name].default)})


@pytest.mark.parametrize(
    "old, value, new, expected",
    [
        ("per_gpu_train_batch_size", 3, "per_device_train_batch_size", 3),
        ("per_gpu_eval_batch_size", 3, "per_device_eval_batch_size", 3),
        ("no_cuda", True, "use_cpu", True),
        ("adafactor", True, "optim", "adafactor"),
        ("group_by_length", True, "train_sampling_strategy", "group_by_length"),
        ("evaluation_strategy", "epoch", "eval_strategy", "epoch"),
        ("torch_dtype", torch.bfloat16, "dtype", "bfloat16"),
    ],
)
def test_a_renamed_option_is_accepted_under_its_old_name_with_a_notice(old, value, new, expected, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "fastdpo.verdicts"):
        made = config(tmp_path, **{old: value})
    assert getattr(made, new) == expected
    assert f"{old} is the old name of {new}" in caplog.text
    assigned = config(tmp_path)
    setattr(assigned, old, value)
    assigned.validate()
    assert getattr(assigned, new) == expected


def test_an_old_and_a_new_name_together_are_refused(tmp_path):
    with pytest.raises(ValueError, match="per_gpu_train_batch_size is the old name of per_device_train_batch_size"):
        config(tmp_path, per_gpu_train_batch_size=2, per_device_train_batch_size=4)


def test_an_unknown_option_is_an_error_with_the_nearest_name(tmp_path):
    with pytest.raises(ValueError, match="unknown option 'lerning_rate'; did you mean 'learning_rate'"):
        config(tmp_path, lerning_rate=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"beta": 0}, "beta must be above 0, got 0"),
        ({"beta": 10**400}, r"beta must be at most 10\*\*38, got 1000"),
        ({"seed": 2**32}, "seed must be below 4294967296, got 4294967296"),
        ({"ddp_backend": "cpu:gloo,cuda:nccll"}, "ddp_backend='nccll' is none of .* did you mean 'nccl'"),
        ({"beta": -0.1}, "beta must be above 0"),
        ({"beta": math.nan}, "beta must be finite"),
        ({"beta": "0.1"}, "beta must be a number, got '0.1'"),
        ({"use_peft": "false"}, "use_peft must be true or false"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"learning_rate": math.inf}, "learning_rate must be finite"),
        ({"max_length": 0}, "max_length must be at least 1"),
        ({"max_length": -5}, "max_length must be at least 1"),
        ({"max_prompt_length": -1}, "max_prompt_length must be at least 1"),
        ({"max_completion_length": 0}, "max_completion_length must be at least 1"),
        ({"max_prompt_length": 64, "max_length": 64}, "max_prompt_length=64 leaves no room"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1"),
        ({"per_device_train_batch_size": 2.5}, "per_device_train_batch_size must be a whole number"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1"),
        ({"max_tokens_per_microbatch": 0}, "max_tokens_per_microbatch must be at least 1"),
        ({"optim_args": "eps=1e-6"}, "optim_args='eps=1e-6' has no effect on optim='adamw_torch_fused'"),
        ({"max_steps": 0}, "max_steps must be -1"),
        ({"num_train_epochs": 0}, "num_train_epochs must be above 0"),
        ({"adam_beta1": 1.0}, "adam_beta1 must be at least 0 and below 1"),
        ({"warmup_ratio": 1.5}, "warmup_ratio must be between 0 and 1"),
        ({"warmup_ratio": 0.1, "warmup_steps": 5}, "exclude each other"),
        ({"label_smoothing": 0.5}, "label_smoothing must be at least 0 and below 0.5"),
        ({"label_smoothing": 0.1, "loss_type": "hinge"}, "label_smoothing=0.1 has no effect on hinge"),
        ({"label_smoothing": 0.1, "loss_type": "ipo"}, "label_smoothing=0.1 has no effect on ipo"),
        ({"label_smoothing": 0.1, "loss_type": "bco_pair"}, r"no effect on bco_pair: .*sigmoid, robust, exo_pair, aot"),
        ({"discopop_tau": 0.0, "loss_type": "discopop"}, "discopop_tau must be above 0"),
        ({"discopop_tau": 0.1}, "discopop_tau=0.1 has no effect on sigmoid: leave it at 0.05, or add .*discopop"),
        ({"simpo_gamma": -0.1, "loss_type": "simpo"}, "simpo_gamma must be 0 or above"),
        ({"simpo_gamma": 1.0}, "simpo_gamma=1.0 has no effect on sigmoid"),
        ({"cpo_alpha": 0.5, "loss_type": ["orpo"]}, "cpo_alpha=0.5 has no effect on orpo"),
        ({"bco_running_mean": False}, "bco_running_mean=False has no effect on sigmoid"),
        ({"rpo_alpha": -1.0}, "rpo_alpha must be 0 or above"),
        ({"ld_alpha": 1.5}, "ld_alpha must be between 0 and 1"),
        ({"f_divergence_type": "kl"}, "f_divergence_type='kl' is none of reverse_kl, forward_kl"),
        (
            {"f_divergence_type": "js_divergence", "loss_type": ["sigmoid", "sppo_hard"]},
            "'js_divergence' does not apply to sppo_hard",
        ),
        (
            {"f_divergence_type": "forward_kl", "loss_type": "sft"},
            "f_divergence_type='forward_kl' has no effect on sft",
        ),
        (
            {"f_alpha_divergence_coef": 0.5},
            "f_alpha_divergence_coef=0.5 has no effect on f_divergence_type='reverse_kl'",
        ),
        ({"use_weighting": True, "loss_type": ["sigmoid", "aot"]}, "use_weighting=True does not go with aot"),
        ({"use_weighting": True, "loss_type": "aot_unpaired"}, "use_weighting=True does not go with aot_pair"),
        ({"loss_type": [3]}, r"loss_type must be a list, got \[3\]"),
        ({"loss_type": lambda m, chosen, rejected: torch.relu(chosen)}, "the formula <lambda> cannot be traced"),
        ({"loss_type": "hnge"}, "unknown loss 'hnge', there are .*; did you mean 'hinge'"),
        ({"loss_type": []}, "loss_type is empty"),
        ({"loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0]}, "loss_weights has 1 numbers, loss_type 2 names"),
        ({"loss_type": ["sigmoid"], "loss_weights": [math.nan]}, "loss_weights must be finite"),
        ({"loss_type": ["sigmoid"], "loss_weights": [0.0]}, "leaves nothing to learn"),
        ({"truncation_mode": "keep_middle"}, "truncation_mode='keep_middle' is none of keep_end, keep_start"),
        ({"dtype": "float8"}, "dtype='float8' is none of"),
        ({"eval_strategy": "stps"}, "eval_strategy='stps' is none of .* did you mean 'steps'"),
        ({"optim": "galore_adamw"}, "optim='galore_adamw' is not supported"),
        ({"lr_scheduler_kwargs": "{num_cycles: 2}"}, "lr_scheduler_kwargs must be a dict or its JSON"),
        ({"lr_scheduler_kwargs": {"num_cycles": 2}}, "does not go with lr_scheduler_type='linear': .*'num_cycles'"),
        (
            {"lr_scheduler_kwargs": {"num_cycles": 2}, "lr_scheduler_type": "constant_with_warmup"},
            "lr_scheduler_kwargs=.*has no effect on lr_scheduler_type='constant_with_warmup': leave it out",
        ),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "does not go with .*cosine_with_min_lr': One of min_lr or"),
        ({"loss_type": "kto_pair"}, "'kto_pair' is KTO on pairs.*: take bco_pair"),
        ({"ref_model_sync_steps": 3}, "has no effect without sync_ref_model=True: set that, or leave it out"),
        ({"torch_compile_mode": "default"}, "has no effect without torch_compile=True: set that, or leave it out"),
        ({"skip_memory_metrics": False}, "a report of memory comes later"),
        ({"rope_scaling": "[1]"}, "rope_scaling must be a dict or its JSON"),
        ({"lora_r": 8}, "lora_r=8 has no effect without adapters: set use_peft=True"),
        ({"use_dora": True}, "use_dora=True has no effect without adapters"),
        ({"use_peft": True, "lora_dropout": 0.05}, "lora_dropout=0.05 needs disable_dropout=False"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant=True is not supported"),
        ({"gradient_checkpointing": True, "activation_checkpointing": False}, "name one option"),
        ({"fp16": True, "use_cpu": True}, "fp16=True needs a GPU"),
        ({"logging_dir": "logs"}, "logging_dir is where TensorBoard writes"),
        ({"average_tokens_across_devices": False}, "average_tokens_across_devices=False is not supported"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_bad_value_is_one_clear_error_in_the_constructor_and_when_assigned(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)
    assigned = config(tmp_path)
    for name, value in options.items():
        setattr(assigned, name, value)
    with pytest.raises(ValueError, match="use_cpu was set after|" + message):
        assigned.validate()


@pytest.mark.parametrize(
    "optim, package",
    [
        ("adamw_torch_4bit", "torchao"),
        ("adamw_torch_8bit", "torchao"),
        ("stable_adamw", "torch-optimi"),
        ("grokadamw", "grokadamw"),
        ("adamw_anyprecision", "torchdistx"),
        ("paged_lion_8bit", "bitsandbytes"),
    ],
)
def test_an_optimizer_whose_package_is_missing_is_refused_before_the_model_is_read(
    optim, package, tmp_path, monkeypatch
):
    monkeypatch.setattr("fastdpo.config.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"optim={optim!r} needs {package}, which is not installed: pip install"):
        config(tmp_path, optim=optim).validate()


def test_an_optimizer_of_torch_needs_no_package(tmp_path, monkeypatch):
    monkeypatch.setattr("fastdpo.config.find_spec", lambda name: None)
    for optim in ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"):
        config(tmp_path, optim=optim).validate()


def test_a_function_in_loss_type_is_taken_and_written_by_its_name(tmp_path):
    def mine(m, chosen, rejected, beta):
        return m.relu(beta * (rejected - chosen))

    made = config(tmp_path, loss_type=mine)
    assert made.loss_type == [mine] and made.to_dict()["loss_type"] == ["mine"]
    assert '"mine"' in made.to_json_string() and "mine" in repr(made)
    made.loss_type = ["sigmoid", mine]
    made.loss_weights = [1.0, 0.5]
    made.validate()
    assert made.to_dict()["loss_type"] == ["sigmoid", "mine"]


def test_the_help_of_loss_type_names_every_loss():
    text = DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    assert text == f"One loss or several: {', '.join(LOSSES)}."


def test_single_names_become_lists_and_json_becomes_a_dict(tmp_path):
    made = config(
        tmp_path,
        loss_type="ipo",
        loss_weights=0.5,
        use_peft=True,
        lora_target_modules="all-linear",
        rope_scaling='{"rope_type": "linear", "factor": 2.0}',
        report_to="none",
    )
    assert made.loss_type == ["ipo"] and made.loss_weights == [0.5] and made.lora_target_modules == ["all-linear"]
    assert made.rope_scaling == {"rope_type": "linear", "factor": 2.0} and made.report_to == []
    made.loss_type = "hinge"
    made.validate()
    assert made.loss_type == ["hinge"]


def test_several_losses_share_label_smoothing_if_one_of_them_uses_it(tmp_path):
    assert (
        config(tmp_path, loss_type=["sigmoid", "ipo"], loss_weights=[1, 0.2], label_smoothing=0.1).label_smoothing
        == 0.1
    )


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_either_name_of_checkpointing_sets_the_one_option_without_a_warning(name, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = config(tmp_path, **{name: True, f"{name}_kwargs": {"use_reentrant": False}})
        assert made.gradient_checkpointing and made.gradient_checkpointing_kwargs == {"use_reentrant": False}
        made.gradient_checkpointing = False
        made.validate()
    assert made.gradient_checkpointing is False


def test_the_precision_of_accelerate_launch_is_taken_or_contradicted_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert config(tmp_path, use_cpu=True).bf16 is True
    assert DPOConfig.from_arguments(TrainingArguments(str(tmp_path), use_cpu=True)).bf16 is True
    with pytest.raises(ValueError, match="mixed_precision='bf16', and the options are bf16=False"):
        config(tmp_path, use_cpu=True, bf16=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match="fp16=True needs a GPU"):
        config(tmp_path, use_cpu=True)
    with pytest.raises(ValueError, match="mixed_precision='fp16', and the options are bf16=True"):
        config(tmp_path, use_cpu=True, bf16=True)


@pytest.mark.parametrize(
    "given",
    [
        {"max_length": 10**30, "max_prompt_length": None},  # model_max_length of many tokenizers
        {"save_steps": 10**10, "eval_steps": 10**10, "logging_steps": sys.maxsize},  # never
        {"ddp_backend": "cpu:gloo,cuda:nccl"},
    ],
    ids=",".join,
)
def test_numbers_that_mean_no_limit_or_never_and_backends_by_device_are_taken(given, tmp_path):
    made = config(tmp_path)
    vars(made).update(given)  # a constructor would connect the processes of a backend
    made.validate()
    assert {name: getattr(made, name) for name in given} == given


def test_bf16_is_decided_in_the_constructor_and_off_on_a_cpu_unless_asked_for(tmp_path):
    assert config(tmp_path, use_cpu=True).bf16 is False
    assert config(tmp_path, use_cpu=True, bf16=True).bf16 is True
    if not torch.accelerator.is_available():
        assert config(tmp_path).bf16 is False
        asked = config(tmp_path, bf16=True)
        assert asked.bf16 and asked.device.type == "cpu"


@pytest.mark.parametrize(
    "options, steps", [({"warmup_ratio": 0.1}, 11), ({"warmup_steps": 7}, 7), ({"warmup_steps": 0.1}, 11)]
)
def test_warmup_is_counted_in_steps_or_as_a_share_of_them(options, steps, tmp_path):
    assert config(tmp_path, **options).get_warmup_steps(101) == steps


def test_the_argument_parser_gives_the_defaults_of_the_class(tmp_path):
    parsed = HfArgumentParser(DPOConfig).parse_args_into_dataclasses(["--output_dir", str(tmp_path)])[0]
    made = config(tmp_path)
    different = [name for name in fields_of(DPOConfig) if getattr(parsed, name) != getattr(made, name)]
    assert different == []


def test_the_config_survives_json_replace_and_repr_without_showing_tokens(tmp_path):
    made = config(tmp_path, loss_type=["sigmoid", "ipo"], rope_scaling={"factor": 2.0}, dtype=torch.float32)
    assert '"loss_type": [\n    "sigmoid",' in made.to_json_string()
    changed = dataclasses.replace(made, beta=0.3)
    assert changed.beta == 0.3 and changed.loss_type == made.loss_type
    assert "<HUB_TOKEN>" in repr(made)


def test_a_config_comes_back_from_its_json(tmp_path):
    made = config(tmp_path, loss_type=["sigmoid", "ipo"], sync_ref_model=True, lr_scheduler_type="cosine")
    again = DPOConfig(**json.loads(made.to_json_string()))
    assert again.to_dict() == made.to_dict()


@pytest.mark.parametrize(
    "form", [dict, json.dumps, lambda given: AcceleratorConfig(**given)], ids=["dict", "JSON", "own"]
)
def test_accelerators_config_may_say_what_it_says_by_default_and_nothing_else(form, tmp_path):
    for given in ({}, {"split_batches": False}, AcceleratorConfig().to_dict()):
        assert config(tmp_path, accelerator_config=form(given)).accelerator_config == AcceleratorConfig()
    with pytest.raises(ValueError, match="split_batches=True.*not supported: every process reads its own rows"):
        config(tmp_path, accelerator_config=form({"split_batches": True}))


def test_a_misspelt_part_of_accelerators_config_is_named(tmp_path):
    with pytest.raises(
        ValueError, match="accelerator_config has an unknown 'split_batch'; did you mean 'split_batches'"
    ):
        config(tmp_path, accelerator_config={"split_batch": False})


@pytest.mark.parametrize("given", [False, "false"])
def test_not_to_resume_may_be_said(given, tmp_path):
    assert config(tmp_path, resume_from_checkpoint=given).resume_from_checkpoint is None


def test_a_dpoconfig_is_taken_as_it_is(tmp_path):
    made = config(tmp_path)
    assert DPOConfig.from_arguments(made) is made
    with pytest.raises(ValueError, match="args is a dict, expected a DPOConfig, TRL's DPOConfig or .*Arguments.$"):
        DPOConfig.from_arguments({"beta": 0.1})


def test_plain_training_arguments_are_taken_value_by_value(tmp_path):
    made = DPOConfig.from_arguments(
        TrainingArguments(str(tmp_path), eval_strategy="steps", learning_rate=3e-6, use_cpu=True, report_to="none")
    )
    assert (made.learning_rate, made.logging_steps, made.eval_steps, made.beta) == (3e-6, 500, 500, 0.1)
    assert made.eval_strategy == "steps" and made.use_cpu
    with pytest.raises(ValueError, match="label_smoothing_factor=0.1 is not supported"):
        DPOConfig.from_arguments(TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, use_cpu=True))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_trl_arguments_keep_their_values_and_raise_for_what_is_not_there_yet(tmp_path, caplog):
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    theirs = trl.DPOConfig(str(tmp_path), use_cpu=True, beta=0.3, loss_type=["ipo"], padding_free=True)
    with caplog.at_level(logging.INFO, "fastdpo.config"):
        made = DPOConfig.from_arguments(theirs)
    assert (made.beta, made.loss_type, made.learning_rate, made.max_length) == (0.3, ["ipo"], 1e-6, 1024)
    assert (made.truncation_mode, made.gradient_checkpointing, made.bf16) == ("keep_start", True, True)
    assert made.ref_model_sync_steps == 64 and "TRL 1.16" not in caplog.text
    synced = DPOConfig.from_arguments(trl.DPOConfig(str(tmp_path), use_cpu=True, sync_ref_model=True))
    assert (synced.ref_model_mixup_alpha, synced.ref_model_sync_steps) == (0.6, 512)
    for options in ({"label_smoothing_factor": 0.1}, {"pad_to_multiple_of": 8}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}="):
            DPOConfig.from_arguments(trl.DPOConfig(str(tmp_path), use_cpu=True, **options))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_alpha_of_trl_1_16_is_turned_around(tmp_path, caplog):
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    theirs = trl.DPOConfig(
        str(tmp_path), use_cpu=True, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.25
    )
    with caplog.at_level(logging.INFO, "fastdpo.config"):
        assert DPOConfig.from_arguments(theirs).f_alpha_divergence_coef == 0.75
    assert "f_alpha_divergence_coef=0.75 is alpha as in TRL 0.11 (0.25 in TRL 1.16)" in caplog.text
    idle = trl.DPOConfig(str(tmp_path), use_cpu=True, f_alpha_divergence_coef=0.25)  # TRL does not look at it either
    assert DPOConfig.from_arguments(idle).f_alpha_divergence_coef == 1.0


def test_an_f_divergence_is_taken_as_the_enum_of_trl_0_11_too(tmp_path):
    kind = enum.Enum("FDivergenceType", {"JS_DIVERGENCE": "js_divergence"}).JS_DIVERGENCE
    assert config(tmp_path, f_divergence_type=kind).f_divergence_type == "js_divergence"


@pytest.mark.parametrize(
    "options, line",
    [
        ({"loss_type": "exo_pair"}, "label_smoothing of 0 for 0.001"),
        ({"loss_type": "bco_pair"}, "their mean so far"),
        ({"loss_type": "aot_unpaired"}, "pairs up the whole optimizer batch"),
        ({"rpo_alpha": 1.0}, "chosen tokens of the optimizer batch"),
        ({"loss_type": ["sigmoid", "sft"]}, "chosen tokens of the optimizer batch"),
        ({"loss_type": "orpo"}, "scores responses only"),
    ],
    ids=str,
)
def test_a_loss_that_differs_from_trl_s_is_named(options, line, tmp_path):
    told = {"learning_rate": 1e-6, "truncation_mode": "keep_start", "gradient_checkpointing": True}
    assert line in "\n".join(config(tmp_path, **told, **options).differences_from_trl())
    quiet = {"loss_type": "bco_pair", "bco_running_mean": False}
    assert config(tmp_path, **told, **quiet).differences_from_trl() == []


def test_options_that_differ_from_trl_are_named(tmp_path):
    text = "\n".join(config(tmp_path, label_smoothing=0.1, use_peft=True).differences_from_trl())
    synced = {"sync_ref_model": True}
    assert (
        "ref_model_mixup_alpha=0.9 every 64 steps (TRL 1.16: 0.6, 512)"
        in config(tmp_path, **synced).differences_from_trl()
    )
    synced |= {"ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": 512}
    assert "ref_model" not in "".join(config(tmp_path, **synced).differences_from_trl())
    assert "TRL 1.16 ignores it" in text and "2e-5 for adapters" in text and "keep_start" in text
    told = config(tmp_path, learning_rate=1e-6, truncation_mode="keep_start", gradient_checkpointing=True)
    assert told.differences_from_trl() == []


def test_an_output_dir_that_cannot_be_written_is_one_clear_error(tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    for directory in (blocked, blocked / "below"):
        with pytest.raises(ValueError, match="output_dir=.* cannot be written"):
            DPOConfig(str(directory)).check_output_dir()
    DPOConfig(str(tmp_path / "new" / "deep")).check_output_dir()
    assert (tmp_path / "new" / "deep").is_dir()
    with caplog.at_level(logging.INFO, "fastdpo.config"):
        DPOConfig(str(tmp_path)).check_output_dir()
    assert "has files already" in caplog.text


def test_the_table_of_the_docs_is_that_of_the_verdicts():
    """`python -m fastdpo.verdicts` prints what belongs between the marks."""
    page = (Path(__file__).parent.parent / "docs/migrate.md").read_text()
    (found,) = re.findall(r"<!-- begin generated: python -m fastdpo.verdicts -->\n(.*)<!-- end gen", page, re.DOTALL)
    assert found == verdicts.table()


def test_the_table_of_the_docs_has_every_option_of_the_installed_trl():
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    table = verdicts.table()
    assert [f.name for f in dataclasses.fields(trl.DPOConfig) if f"| `{f.name}` |" not in table] == []


@pytest.mark.parametrize("name", ["output_dir", "resume_from_checkpoint", "ref_log_probs"])
def test_an_empty_path_is_refused(name: str, tmp_path) -> None:
    with pytest.raises(ValueError, match=f"{name} is empty"):
        DPOConfig(**{"output_dir": str(tmp_path), name: ""})
