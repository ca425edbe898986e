"""Loading: a model by its name, path or as it came, with what the run's options change of it, or one clear error.

Its config is read first, and what is no model to train is refused by it, before any weight. Nothing that a directory
holds runs, unless `trust_remote_code` has it so.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate.utils import patch_environment
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from fastdpo.config import DPOConfig
from fastdpo.model import base_model
from fastdpo.quantized import check_quantized, keep_unpacked, quantization, quantized_by, returning_memory

OF_WEIGHTS = ("dtype", "quantization_config")  # arguments of from_pretrained, though fields of a config, too
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO_CLASSES: dict[str, Any] = {
    "decoder-only": AutoModelForCausalLM,
    "encoder-decoder": AutoModelForSeq2SeqLM,
    "vision-language": AutoModelForImageTextToText,
}  # by `model_kind`


def compute_dtype(config: DPOConfig) -> torch.dtype:
    """The dtype of matrix products: what bf16 and fp16 ask for."""
    return torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else torch.float32


def check_model(source: Any, name: str, config: DPOConfig) -> None:
    """Refuses what is no model that writes text, reading no more than its config; `name` is for errors."""
    if isinstance(source, str):
        model_config = _model_config(source, config, name == "ref_model")
        check_quantized(model_config, f"{name} {source}")
        if not model_kind(model_config):
            raise ValueError(
                f"{name} {source} ({model_config.model_type}) is no model that fastdpo trains: give a decoder-only, "
                "encoder-decoder or vision-language model that generates text"
            )
        return
    base = base_model(source) if isinstance(source, (PreTrainedModel, PeftModel)) else None
    if not isinstance(base, PreTrainedModel):
        raise ValueError(
            f"{name} is a {type(source).__name__}, expected a name, a path, a PreTrainedModel or a PeftModel"
        )
    check_quantized(base, name)
    merged = {one for part in source.modules() if isinstance(part, BaseTunerLayer) for one in part.merged_adapters}
    if merged and (name == "model" or config.sync_ref_model):
        raise ValueError(
            f"{name} has merged adapters ({', '.join(sorted(merged))}), which neither train, move nor turn off: call "
            "unmerge_adapter() to go on training them, or give what merge_and_unload() returns"
        )
    if base.get_output_embeddings() is None:
        raise ValueError(f"{type(base).__name__} has no language-model head: load it with AutoModelForCausalLM")


def load_model(
    source: Any, config: DPOConfig, adapters: bool, is_reference: bool = False, reads: bool = True
) -> PreTrainedModel | PeftModel:
    """A name or path -> the model, its weights fit for training adapters or all of it; a loaded one as it is. Where it
    `reads` none, weights are on the meta device.

    Quantised weights are quantised tensor by tensor on the way to the device, which so never holds them whole.
    """
    if not isinstance(source, str):
        keep_unpacked(source)
        return source
    model_config = load_model_config(source, config, is_reference)
    given = _load_options(config, is_reference)
    options = {name: given[name] for name in given if name in OF_WEIGHTS or not hasattr(model_config, name)}
    options["config"] = model_config
    if config.attn_implementation:
        options["attn_implementation"] = config.attn_implementation
    options.setdefault("dtype", load_dtype(config, adapters))
    quantized = bool(quantized_by(model_config))
    if config.quantizes and quantized and not is_reference:
        raise ValueError(f"{source} is quantised already: leave out load_in_4bit, load_in_8bit or quantization_config")
    if config.quantizes or quantized:
        options["device_map"] = {"": config.device}
    elif not reads:
        options["device_map"] = "meta"
    if config.quantizes and not quantized:
        options["quantization_config"] = quantization(config, compute_dtype(config))
    # transformers' own way to read them in one process fills others with zeros, or not, by its version
    ours = patch_environment(FSDP_CPU_RAM_EFFICIENT_LOADING="false")
    with returning_memory(config.device) if config.quantizes else nullcontext(), ours:
        model = _read_weights(source, model_config, options)
    keep_unpacked(model)
    return model


def _read_weights(source: str, model_config: Any, options: dict[str, Any]) -> PreTrainedModel:
    """Raises ValueError for weights that are not there, not whole, of other shapes than config.json says, or pickles of
    more than tensors.
    """
    try:
        load = AUTO_CLASSES[model_kind(model_config)].from_pretrained
        model, found = load(source, **options, output_loading_info=True)
    except (torch.OutOfMemoryError, ImportError):
        raise
    except (SafetensorError, OSError, RuntimeError, UnpicklingError) as error:
        reason = " ".join(str(error).split())[:600]
        if "ignore_mismatched_sizes" in reason:
            reason = "its config.json says other shapes than they have"
        raise ValueError(f"the weights of {source!r} cannot be loaded ({type(error).__name__}: {reason})") from error
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"{source} lacks {len(missing)} of its model's tensors, such as {missing[0]}, which would be random: give "
            "a whole model with a language-model head, or train that first"
        )
    return model


def place(model: Any, device: torch.device) -> Any:
    """The model on its device; quantised weights are there since they were loaded, or are moved as they are."""
    return model if all(parameter.device == device for parameter in model.parameters()) else model.to(device)


def load_dtype(config: DPOConfig, adapters: bool) -> torch.dtype:
    """What weights are loaded in: the dtype that computes where they are frozen under adapters, else fp32."""
    if config.dtype != "auto":
        return DTYPES[config.dtype]
    return compute_dtype(config) if adapters else torch.float32


def load_model_config(name: str, config: DPOConfig, is_reference: bool = False) -> Any:
    """The config of a model by its name or path, with what the run changes of it: `rope_scaling`, and fields of it
    among the model_init_kwargs.
    """
    model_config = _model_config(name, config, is_reference)
    _scale_rope(model_config, _load_options(config, is_reference).get("rope_scaling", config.rope_scaling))
    return model_config


def _load_options(config: DPOConfig, is_reference: bool) -> dict[str, Any]:
    """What from_pretrained would be given without a config: arguments of its own, and fields of the config."""
    more: Any = (is_reference and config.ref_model_init_kwargs) or config.model_init_kwargs or {}
    return {**_where(config), **more}


def _model_config(name: str, config: DPOConfig, is_reference: bool = False) -> Any:
    if (Path(name) / "adapter_config.json").exists() and not (Path(name) / "config.json").exists():
        raise ValueError(
            f"{name} holds an adapter and not a model: load it with "
            "AutoPeftModelForCausalLM.from_pretrained(..., is_trainable=True) and give that"
        )
    try:
        given = _load_options(config, is_reference)
        fields = {key: value for key, value in given.items() if key not in (*OF_WEIGHTS, "rope_scaling")}
        model_config = AutoConfig.from_pretrained(name, **fields)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{name!r} is neither a directory with a model nor one that the Hub gives "
            f"(revision {config.model_revision}): {reason}"
        ) from error
    except ImportError:
        raise
    except Exception as error:  # transformers, and the library that checks its configs, have many for a broken file
        raise ValueError(f"the config.json of {name!r} cannot be used: {' '.join(str(error).split())[:600]}") from error
    _refuse_hub_kernels(model_config, name)
    return model_config


def _refuse_hub_kernels(model_config: Any, name: str) -> None:
    """transformers downloads and runs an attention that config.json calls by the name of a repository; only the user
    may ask for that.
    """
    parts = [model_config, *(getattr(model_config, part, None) for part in getattr(model_config, "sub_configs", ()))]
    for part in parts:
        if "/" in str(asked := getattr(part, "_attn_implementation", None)):
            raise ValueError(
                f"the config.json of {name!r} asks for attention from the Hub ({asked}), which would run code from "
                f"there: remove it from config.json, or set attn_implementation={asked!r} if you trust it"
            )


def _scale_rope(model_config: Any, scaling: Any) -> None:
    """Puts `rope_scaling` into the model's config, where it has one set of rotary parameters."""
    if not scaling:
        return
    parameters = getattr(model_config, "rope_parameters", None)
    if not isinstance(parameters, dict) or any(isinstance(value, dict) for value in parameters.values()):
        raise ValueError(
            f"rope_scaling was given, but {model_config.model_type} has no rotary embedding, or one a kind of layer: "
            "leave it out, or set rope_parameters in the model's config.json"
        )
    scaling = {("rope_type" if name == "type" else name): value for name, value in scaling.items()}
    if scaling.get("rope_type") not in ROPE_INIT_FUNCTIONS:
        raise ValueError(
            f"rope_scaling={scaling} needs a rope_type out of {', '.join(sorted(ROPE_INIT_FUNCTIONS))}, and its "
            'numbers, such as {"rope_type": "linear", "factor": 4.0}'
        )
    model_config.rope_parameters = {**parameters, **scaling}


def _where(config: DPOConfig) -> dict[str, Any]:
    return {"revision": config.model_revision, "trust_remote_code": config.trust_remote_code}


def model_kind(model_config: Any) -> str:
    """The key of AUTO_CLASSES for a model's config, "" where there is none."""
    kind = model_config.model_type
    if model_config.is_encoder_decoder:
        return "encoder-decoder" if kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES else ""
    if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and getattr(model_config, "vision_config", None) is not None:
        return "vision-language"
    remote = "AutoModelForCausalLM" in (getattr(model_config, "auto_map", None) or {})
    return "decoder-only" if remote or kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else ""


def refuse_load_options(source: Any, config: DPOConfig) -> None:
    defaults = DPOConfig.__dataclass_fields__
    names = ("model_revision", "trust_remote_code", "dtype", "attn_implementation", "model_init_kwargs", "rope_scaling")
    names += ("load_in_4bit", "load_in_8bit", "quantization_config")
    if given := [name for name in names if getattr(config, name) != defaults[name].default]:
        raise ValueError(
            f"{', '.join(given)} apply while a model loads, but model is an already loaded {type(source).__name__}: "
            "give the model by name or path, or load it with them yourself"
        )
