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
from inspect import signature
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from fastdpo.config import DPOConfig
from fastdpo.verdicts import CHOICES, nearest
from fastdpo_kernels import nf4

METHODS = ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit")
KINDS = ("Linear4bit", "Linear8bitLt")
DECOMPOSING = ("pissa", "corda", "loftq", "orthogonal")  # of peft's init_lora_weights, also with more behind the name


def quantization(config: DPOConfig, products: torch.dtype) -> BitsAndBytesConfig | None:
    """What base weights are quantised to while they load; `products` is the dtype of matrix products.

    Raises ValueError for keys and values of `quantization_config` that transformers would drop or stumble over.
    """
    given: Any = config.quantization_config
    if given is not None:
        _check_keys(given)
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


def _check_keys(given: Mapping[str, Any]) -> None:
    known = {*signature(BitsAndBytesConfig).parameters, *BitsAndBytesConfig().to_dict()} - {"kwargs"}
    for name in given:
        if name not in known:
            raise ValueError(f"quantization_config has {name!r}, which is no setting of it{nearest(name, known)}")
    kinds = CHOICES["bnb_4bit_quant_type"]
    if (kind := given.get("bnb_4bit_quant_type", kinds[0])) not in kinds:
        raise ValueError(f"quantization_config: bnb_4bit_quant_type={kind!r} is none of {', '.join(kinds)}")


def refuse_initialisation(peft_config: Any) -> None:
    """Raises ValueError for initial values of adapters that are taken out of weights in full precision."""
    way = getattr(peft_config, "init_lora_weights", None)
    if isinstance(way, str) and way.lower().startswith(DECOMPOSING):
        raise ValueError(
            f"init_lora_weights={way!r} takes the base weights apart in full precision, and here they are quantised: "
            "leave it out, or take 'gaussian' or 'olora'"
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
    found: list[Any] = [module for module in model.modules() if is_quantized(module)]
    kinds = {type(module.weight).__name__: module for module in found}
    if not kinds:
        return ""
    words = []
    for module in kinds.values():
        state = getattr(module.weight, "quant_state", None)
        nested = ", double quantisation" if getattr(state, "nested", False) else ""
        words.append(f"4 bits ({state.quant_type}{nested})" if state is not None else f"8 bits{_outliers(module)}")
    frozen = [one for one in model.parameters() if one.is_floating_point() and not one.requires_grad]
    inside, outside = sum(one.in_features * one.out_features for one in found), sum(one.numel() for one in frozen)
    experts = [one for one in frozen if one.ndim == 3]
    rest = ""
    if experts:
        share, dtype = sum(one.numel() for one in experts) / (inside + outside), experts[0].dtype
        rest = f"; {share:.0%} are experts, which stay in {str(dtype).removeprefix('torch.')}"
    return f"{' and '.join(words)}, {len(found)} layers with {inside / (inside + outside):.0%} of the weights{rest}"


def _outliers(module: Any) -> str:
    """LLM.int8 (arXiv:2208.07339) takes the columns whose inputs exceed a threshold anywhere in the batch apart."""
    if not module.state.threshold:
        return ""
    return f" (columns with inputs above {module.state.threshold:g} apart: numbers depend a little on the batch)"


def states_of_8_bits(model: nn.Module) -> list[Any]:
    """bitsandbytes' states of the layers in 8 bits."""
    return [one.state for one in model.modules() if is_quantized(one) and hasattr(one, "state")]


@contextmanager
def without_outliers(model: nn.Module) -> Iterator[None]:
    """Within it 8-bit layers have outliers in 8 bits, too: no row's numbers depend on another row's then."""
    states = states_of_8_bits(model)
    before = [state.threshold for state in states]
    try:
        for state in states:
            state.threshold = 0.0
        yield
    finally:
        for state, threshold in zip(states, before, strict=True):
            state.threshold = threshold


def misread_layers(model: nn.Module) -> list[str]:
    """4-bit layers on a CPU whose weights bitsandbytes reads wrongly, found by reading one of each shape.

    On a CPU with AVX512 version 0.50 takes every row to start a new block of scales. With 96 columns and blocks of 64
    the mean error is 0.0075 for 0.0036.
    """
    wrong: dict[torch.Size, bool] = {}
    names = []
    for name, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None) if is_quantized(module) else None
        if state is None or weight.device.type != "cpu" or state.shape[1] % state.blocksize == 0:
            continue
        if state.shape not in wrong:
            wrong[state.shape] = _is_misread(weight, state)
        names += [name] if wrong[state.shape] else []
    return names


def _is_misread(weight: Any, state: Any) -> bool:
    from bitsandbytes.functional import dequantize_4bit  # it takes seconds to import

    right = nf4.dequantize(nf4.Packed.of(weight.data, state), torch.float32)
    error = (dequantize_4bit(weight.data, state).float() - right).abs().max()
    return bool(error > 0.02 * right.abs().max())  # rounding to bf16 is 0.004


def keep_unpacked(model: nn.Module) -> None:
    """Keeps bitsandbytes from packing 4-bit weights for a CPU's AVX512-bf16 products.

    It does so in an evaluation and leaves them packed, and a backward pass after that reads the packed bytes as if they
    were not: gradients are wrong, and nothing says so. Raises ValueError where it has packed some: that rounds scales
    to bf16, and unpacking gives double quantisation other scales and leaves plain ones transposed (0.50).
    """
    layers = {n: one for n, one in model.named_modules() if hasattr(one, "support_avx512bf16_for_cpu")}
    packed = [n for n, one in layers.items() if hasattr(getattr(one.weight, "quant_state", None), "original_nested")]
    if packed:
        raise ValueError(
            f"{len(packed)} 4-bit layers, such as {packed[0]}, are not what was loaded: the model was evaluated, for "
            "which bitsandbytes packed them for this CPU and rounded their scales. Load it anew, and evaluate it after "
            "fastdpo.patch(model), or set support_avx512bf16_for_cpu = False on its Linear4bit layers before"
        )
    for module in layers.values():
        module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def quantized_scales(module: nn.Module) -> list[torch.Tensor]:
    """What bitsandbytes keeps beside its weights: absmax, their own scales, code tables; each once."""
    found: list[Any] = []
    for layer in module.modules():
        if not is_quantized(layer):
            continue
        states = [getattr(layer.weight, "quant_state", None), getattr(layer, "state", None), layer.weight]
        states.append(getattr(states[0], "state2", None))
        found += [getattr(state, name, None) for state in states for name in ("absmax", "code", "offset", "SCB")]
    return list({id(tensor): tensor for tensor in found if isinstance(tensor, torch.Tensor)}.values())
