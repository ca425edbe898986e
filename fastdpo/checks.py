"""What can be told of models and options before anything loads: bad input is refused here, in one line each."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from torch import nn

from fastdpo.attention_backends import check_asked
from fastdpo.config import DPOConfig
from fastdpo.head import output_head
from fastdpo.loading import check_model, compute_dtype, load_model_config, model_kind, refuse_load_options
from fastdpo.losses import find_loss, pairwise_loss, sees_reference
from fastdpo.meta import add_meta_adapters, meta_model
from fastdpo.model import base_model, refuse_adapters
from fastdpo.quantized import quantization, quantized_by, refuse_initialisation

logger = logging.getLogger(__name__)


def check_models(model: Any, ref_model: Any, config: DPOConfig, peft_config: Any) -> None:
    """What can be told of the models before anything is loaded."""
    if model is None:
        raise ValueError("model is missing: give a name, a path or a loaded causal language model")
    if _share_parameters(model, ref_model):
        raise ValueError(
            "ref_model is the same object as model, or shares its parameters, so it would train along: leave "
            "ref_model out (the reference is then model as it is now), or give a copy"
        )
    check_asked(config.attn_implementation, config.device, compute_dtype(config))
    quantization(config, compute_dtype(config))
    check_model(model, "model", config)
    if ref_model is not None:
        if not needs_reference(config):
            why = "reference_free=True" if config.reference_free else f"loss_type={loss_names(config)}"
            raise ValueError(f"ref_model is given, but with {why} it would never be looked at: leave it out")
        check_model(ref_model, "ref_model", config)
    _settle_kind(model, ref_model, config)
    _check_reference_options(model, ref_model, config)
    if not isinstance(model, str):
        refuse_load_options(model, config)
    refuse_adapters([peft_config, *getattr(model, "peft_config", {}).values()])
    if odd := [name for name in getattr(model, "peft_config", {}) if Path(name).name != name]:
        raise ValueError(
            f"an adapter is called {odd[0]!r}, and is saved in a folder of its name: load it under another"
        )
    if peft_config is not None and not isinstance(peft_config, PeftConfig):
        raise ValueError(f"peft_config is a {type(peft_config).__name__}, expected a config of peft such as LoraConfig")
    of_lora = ["use_peft"] if config.use_peft else config.given_lora_options()
    if peft_config is not None and of_lora:
        raise ValueError(f"both peft_config and {of_lora[0]} are given: leave one out")
    if isinstance(model, PeftModel) and (peft_config is not None or config.use_peft):
        raise ValueError(
            "model already has adapters and peft_config (or use_peft) asks for more: leave it out to go on training "
            "the adapter that is there, or merge it first with model.merge_and_unload()"
        )


def _settle_kind(model: Any, ref_model: Any, config: DPOConfig) -> None:
    """Whether the models are encoder-decoders, into `is_encoder_decoder`."""
    kinds = {
        name: kind_of(source, config, name == "ref_model")
        for name, source in (("model", model), ("ref_model", ref_model))
        if source is not None
    }
    if len(set(kinds.values())) > 1:
        raise ValueError(f"model is {kinds['model']} and ref_model {kinds['ref_model']}: give two of one kind")
    encodes = kinds["model"] == "encoder-decoder"
    if config.is_encoder_decoder not in (None, encodes):
        raise ValueError(
            f"is_encoder_decoder={config.is_encoder_decoder}, and model is {kinds['model']}: leave it out, it is seen"
        )
    config.is_encoder_decoder = encodes
    if config.max_target_length and (not encodes or config.max_completion_length):
        why = f"{kinds['model']} models go by" if not encodes else "there is"
        raise ValueError(
            f"max_target_length={config.max_target_length} and {why} max_completion_length: leave the former out"
        )
    if encodes and config.neftune_noise_alpha is not None:
        raise ValueError("neftune_noise_alpha is for models of one sequence, and model is an encoder-decoder: drop it")
    if kinds["model"] != "decoder-only" and config.memory:
        raise ValueError(f"memory='auto' has no plan for {kinds['model']} models: leave it out")


def kind_of(source: Any, config: DPOConfig, is_reference: bool = False) -> str:
    """A key of AUTO_CLASSES."""
    if isinstance(source, str):
        return model_kind(load_model_config(source, config, is_reference))
    return model_kind(base_model(source).config) or "decoder-only"  # a class of somebody's own


def check_padded_rows(model: Any, hooks: Mapping[str, Any], config: DPOConfig) -> None:
    """`hooks` are the functions that see padded rows, by name; None where there is none. After `check_models`."""
    for name, hook in hooks.items():
        if hook is None:
            continue
        if not callable(hook):
            raise ValueError(f"{name} is a {type(hook).__name__}, expected a function")
        if (kind := kind_of(model, config)) != "decoder-only":
            raise ValueError(f"{name} sees rows of decoder-only models of text, and model is {kind}: leave it out")
    if hooks["data_collator"] is not None and (config.precompute_ref_log_probs or config.ref_log_probs):
        raise ValueError(
            "data_collator makes tokens anew in each epoch, whose reference log-probs cannot be known ahead: leave out "
            "either it or precompute_ref_log_probs and ref_log_probs"
        )


def _check_reference_options(model: Any, ref_model: Any, config: DPOConfig) -> None:
    if config.force_use_ref_model and ref_model is None:
        raise ValueError("force_use_ref_model=True, and there is no ref_model: give one, or leave the option out")
    if config.ref_model_init_kwargs and not isinstance(ref_model, str):
        raise ValueError("ref_model_init_kwargs apply while ref_model loads: give ref_model by name or path")
    if config.sync_ref_model and not needs_reference(config):
        raise ValueError("sync_ref_model moves a reference, and with these options there is none: leave it out")
    names = {name: getattr(config, name) for name in ("model_adapter_name", "ref_adapter_name")}
    there = list(getattr(model, "peft_config", {}))
    for option, name in names.items():
        if name is not None and name not in there:
            has = f"a PeftModel with the adapters {there}" if isinstance(model, PeftModel) else "no PeftModel"
            raise ValueError(
                f"{option}={name!r}, and model is {has}: load the adapter under that name (PeftModel.from_pretrained("
                f"base, path, adapter_name={name!r}, is_trainable=True), model.load_adapter for a second one)"
            )
    if config.ref_adapter_name and ref_model is not None:
        raise ValueError("ref_adapter_name and ref_model are two references: leave one out")
    trained = [config.model_adapter_name] if config.model_adapter_name else getattr(model, "active_adapters", [])
    if config.ref_adapter_name and config.ref_adapter_name in trained:
        raise ValueError(
            f"ref_adapter_name={config.ref_adapter_name!r} is the adapter that trains: load it a second time under "
            "another name"
        )


def choose_adapters(model: Any, peft_config: Any, config: DPOConfig) -> None:
    """LoRA on all linear layers where weights are quantised, which cannot train, and nothing else is asked for.

    Raises ValueError for LoRA that the model cannot have: of a model by its name before its weights load.
    """
    quantized = config.quantizes or quantized_by(load_model_config(model, config) if isinstance(model, str) else model)
    if quantized:
        refuse_initialisation(peft_config)
    if quantized and peft_config is None and not config.use_peft and not isinstance(model, PeftModel):
        config.use_peft = True
        logger.info(
            "adapters: LoRA, as quantised weights do not train (%slora_r, lora_target_modules and so on set it)",
            "" if config.quantizes else "use_peft=True with ",
        )
    if isinstance(model, str) and (config.use_peft or isinstance(peft_config, LoraConfig)):
        _try_lora(model, peft_config, config)


def _try_lora(name: str, peft_config: Any, config: DPOConfig) -> None:
    """Puts adapters on the model without weights and looks at its head: what does not fit raises ValueError."""
    try:
        without = meta_model(load_model_config(name, config), config, torch.float32)
        adapted = add_meta_adapters(without, peft_config, config)
    except ValueError:
        raise
    except Exception as error:  # code that needs data, of a model or of peft: the loaded model will tell
        logger.info("adapters: not tried before loading (%s: %s)", type(error).__name__, error)
        return
    output_head(base_model(adapted))


def _share_parameters(model: Any, ref_model: Any) -> bool:
    if isinstance(model, str) or not isinstance(ref_model, nn.Module):
        return False
    ours = {id(parameter) for parameter in model.parameters()} if isinstance(model, nn.Module) else set()
    return any(id(parameter) in ours for parameter in ref_model.parameters())


def needs_reference(config: DPOConfig) -> bool:
    return not config.reference_free and sees_reference(pairwise_loss(config))


def loss_names(config: DPOConfig) -> list[str]:
    return [given if isinstance(given, str) else find_loss(given).name for given in config.loss_type]
