"""Models that have shapes and no weights: what a plan counts, and what adapters are tried on before anything loads."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.quantizers import AutoHfQuantizer

from fastdpo.config import DPOConfig
from fastdpo.loading import AUTO_CLASSES, compute_dtype, load_dtype, model_kind
from fastdpo.model import Policy, add_adapters, prepare_precision
from fastdpo.quantized import is_quantized, quantization


def meta_policy(model_config: Any, config: DPOConfig, peft_config: Any = None) -> Policy:
    """The policy as `build_policy` makes it, without a byte of weights."""
    adapters = peft_config is not None or config.use_peft
    compute = compute_dtype(config)
    model: Any = add_meta_adapters(meta_model(model_config, config, load_dtype(config, adapters)), peft_config, config)
    autocast = None if compute == torch.float32 else compute
    prepare_precision(model, autocast)
    return Policy(model, autocast, noisy=not config.disable_dropout).train()


def meta_model(model_config: Any, config: DPOConfig, dtype: torch.dtype) -> nn.Module:
    """A model that has shapes and no weights."""
    more: Any = config.model_init_kwargs or {}
    options = {"trust_remote_code": config.trust_remote_code, "dtype": more.get("dtype", dtype)}
    if config.attn_implementation == "eager":  # which is another backend; what others keep is alike
        options["attn_implementation"] = "eager"
    model_config = copy.deepcopy(model_config)
    asked = quantization(config, compute_dtype(config))
    with torch.device("meta"):
        model = AUTO_CLASSES[model_kind(model_config)].from_config(model_config, **options)
        if given := asked or getattr(model_config, "quantization_config", None):
            _quantize(model, AutoHfQuantizer.from_config(given, pre_quantized=False))
    return model


def add_meta_adapters(model: Any, peft_config: Any, config: DPOConfig) -> Any:
    """As `add_adapters`, on a model without weights and in evaluation mode; `peft_config` stays as it is."""
    peft_config = copy.copy(peft_config)
    if hasattr(peft_config, "init_lora_weights"):  # PiSSA and its like decompose weights, which are not there
        peft_config.init_lora_weights = True
    with torch.device("meta"):
        return add_adapters(model, peft_config, config).eval()


def _quantize(model: Any, quantizer: Any) -> None:
    """What loading with this quantizer makes of the model's linear layers, on the meta device."""
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Int8Params, Linear4bit, Params4bit  # it takes seconds to import

    make: Any = Params4bit  # whose arguments are those of __new__

    quantizer.preprocess_model(model, device_map=None)
    quantizer._process_model_after_weight_loading(model)
    for module in model.modules():
        if not is_quantized(module):
            continue
        module.requires_grad_(False)
        shape = module.out_features, module.in_features
        numbers = partial(torch.empty, dtype=torch.float32)
        if not isinstance(module, Linear4bit):
            module.weight = Int8Params(torch.empty(shape, dtype=torch.int8), requires_grad=False)
            module.state.SCB = numbers(shape[0])
            continue
        old: Any = module.weight
        blocks = -(-math.prod(shape) // old.blocksize)
        code, dtype = numbers(16), module.compute_dtype or torch.float32  # a dtype that DoRA's initial norms ask for
        state = QuantState(numbers(blocks), torch.Size(shape), code, old.blocksize, old.quant_type, dtype)
        if old.compress_statistics:
            state.state2 = QuantState(numbers(-(-blocks // 256)), code=numbers(256), blocksize=256)
            state.absmax, state.offset, state.nested = torch.empty(blocks, dtype=torch.uint8), numbers(()), True
        packed = torch.empty((math.prod(shape) + 1) // (2 * old.quant_storage.itemsize), 1, dtype=old.quant_storage)
        module.weight = make(
            packed,
            requires_grad=False,
            quant_state=state,
            blocksize=old.blocksize,
            compress_statistics=old.compress_statistics,
            quant_type=old.quant_type,
            quant_storage=old.quant_storage,
            module=module,
            bnb_quantized=True,
        )
