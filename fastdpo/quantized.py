"""4- and 8-bit base weights, by bitsandbytes: which of them a run loads, and what keeps their arithmetic one.

A weight of a frozen base is read twice a layer and never written, so it can lie in memory as 4-bit codes (NF4, QLoRA,
arXiv:2305.14314) with a scale for 64 of them, the scales themselves in 8 bits (double quantisation): 4.13 bits a weight
in place of 16. Adapters in fp32 are what trains.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from fastdpo.config import DPOConfig

METHODS = ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit")
KINDS = ("Linear4bit", "Linear8bitLt")


def quantization(config: DPOConfig, products: torch.dtype) -> BitsAndBytesConfig | None:
    """What base weights are quantised to while they load; `products` is the dtype of matrix products."""
    given: Any = config.quantization_config
    if given is not None:
        return cast(BitsAndBytesConfig, BitsAndBytesConfig.from_dict(dict(given)))
    if config.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    if not config.load_in_4bit:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=config.use_bnb_nested_quant,
        bnb_4bit_quant_storage=config.bnb_4bit_quant_storage,
        bnb_4bit_compute_dtype=products,
    )


def quantized_by(source: Any) -> str:
    """The method by which a model, or what its config describes, is quantised: "" for none."""
    if isinstance(source, PeftModel):
        source = source.get_base_model()
    config = source.config if isinstance(source, PreTrainedModel) else source
    found = getattr(config, "quantization_config", None)
    if not found:
        return ""
    method = found.get("quant_method") if isinstance(found, Mapping) else found.quant_method
    return str(getattr(method, "value", method) or "bitsandbytes")


def check_quantized(source: Any, name: str) -> bool:
    """Whether a model comes quantised. Raises ValueError for what fastdpo does not train on."""
    method = quantized_by(source)
    if method in METHODS and find_spec("bitsandbytes") is None:
        raise ValueError(f"{name} is quantised by bitsandbytes, which is not installed: pip install bitsandbytes")
    if method and method not in METHODS:
        raise ValueError(
            f"{name} is quantised by {method}, and fastdpo trains on weights of bitsandbytes only: give the model "
            "before it was quantised, with load_in_4bit=True"
        )
    return bool(method)


def is_quantized(module: nn.Module) -> bool:
    """Whether it is a linear layer of bitsandbytes; told by name, as the package is not everywhere."""
    return any(one.__name__ in KINDS and one.__module__.startswith("bitsandbytes.") for one in type(module).__mro__)


def check_trained_whole(model: nn.Module, names: Iterable[str] | None) -> None:
    """Raises ValueError where a module that is to train in full, beside adapters, is quantised."""
    for name, module in model.named_modules():
        if is_quantized(module) and any(name == one or name.endswith(f".{one}") for one in names or ()):
            raise ValueError(
                f"modules_to_save names {name}, whose weights are quantised and cannot train: give it an adapter "
                "(target_modules), or list it in the llm_int8_skip_modules of quantization_config"
            )


@contextmanager
def returning_memory(device: torch.device) -> Iterator[None]:
    """Within it, the C library gives freed blocks of 1 MiB and more back at once.

    Quantising on a CPU makes some large temporaries a weight. glibc keeps such blocks in its heap, where the small
    tensors between them stop it from shrinking: a 180M model of 95 MiB in NF4 took 1230 MiB to load, and so takes 166
    (CPU, 2026-11-22).
    """
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        yield
        return
    libc, mmap_threshold = ctypes.CDLL(None), -3  # M_MMAP_THRESHOLD of malloc.h
    libc.mallopt(mmap_threshold, 1 << 20)
    try:
        yield
    finally:
        libc.mallopt(mmap_threshold, 32 << 20)  # where glibc's own adjustment ends


def weights_report(model: nn.Module) -> str:
    """What the base weights are quantised to, in words; "" where none are."""
    found = [module for module in model.modules() if is_quantized(module)]
    kinds = {type(module.weight).__name__: module for module in found}
    if not kinds:
        return ""
    words = []
    for module in kinds.values():
        state = getattr(module.weight, "quant_state", None)
        nested = ", double quantisation" if getattr(state, "nested", False) else ""
        words.append(f"4 bits ({state.quant_type}{nested})" if state is not None else "8 bits")
    return f"{' and '.join(words)}, {len(found)} layers"


def keep_unpacked(model: nn.Module) -> None:
    """Keeps bitsandbytes from packing 4-bit weights for a CPU's AVX512-bf16 products.

    It does so in an evaluation and leaves them packed, and a backward pass after that reads the packed bytes as if they
    were not: gradients are wrong, and nothing says so.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            state = getattr(module.weight, "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                module.state_dict()  # unpacks them in place, as it would to save them
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
