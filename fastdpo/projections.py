"""A linear layer as `fastdpo_kernels.lora` takes it, read off the module at each call.

Covered are frozen `nn.Linear` and GPT-2's `Conv1D`, frozen 4-bit layers of bitsandbytes, and peft's LoRA around one of
them with at most one active adapter and nothing more: no dropout, DoRA or other variant, bias of its own, or merged
weights. rsLoRA is another scaling. That goes for all adapters of a layer, switched on or not: a reference that is the
policy with its adapters off takes the policy's arithmetic. What is not covered runs its own forward, so adapters may be
added, switched, merged and switched off at any time after patching.

Legend: I input columns, O output columns, r rank.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers.pytorch_utils import Conv1D

from fastdpo_kernels.lora import Adapter, Projection
from fastdpo_kernels.nf4 import Packed

# Modules are asked through their dictionaries below: nn.Module's own attribute access costs 1 us each time, and these
# functions run for every projection at every call.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@cache
def _kind(cls: type) -> str:
    """ "dense", "4bit", "lora" or "", told by name: importing bitsandbytes or a modeling file takes seconds."""
    package, name = cls.__module__, cls.__name__
    if cls in (nn.Linear, Conv1D) or (package, name) == ("transformers.models.falcon.modeling_falcon", "FalconLinear"):
        return "dense"
    if package == "bitsandbytes.nn.modules" and name in ("Linear4bit", "LinearNF4", "LinearFP4"):
        return "4bit"
    return "lora" if cls is LoraLinear or (package, name) == ("peft.tuners.lora.bnb", "Linear4bit") else ""


def is_adapted(module: nn.Module) -> bool:
    """Any of peft's layers around another."""
    return "base_layer" in module._modules


def is_linear(module: nn.Module) -> bool:
    """Anything that multiplies with a weight matrix, covered or not."""
    return isinstance(module, (nn.Linear, Conv1D)) or is_adapted(module)


def worth_it(module: nn.Module) -> bool:
    """Whether the fused path saves anything for this layer alone: a frozen dense one without adapter keeps nothing."""
    return is_adapted(module) or _kind(type(module)) == "4bit"


def projection(module: nn.Module, x: Tensor) -> Projection | None:
    """The layer as it is now; None where it is to run its own forward on x."""
    if refusal(module, module.training) or not x.numel():
        return None
    base, device = _base(module), x.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    weight: Any = base._parameters["weight"]
    if _kind(type(base)) == "4bit":
        if base.compute_type_is_set and base.compute_dtype != dtype:
            return None  # its products are in another dtype than their input
        weight = Packed.of(weight.data, weight.quant_state)
    elif weight.dtype != dtype and not autocast:
        return None  # torch's own error says it better
    elif type(base) is Conv1D:
        weight = weight.t()
    return Projection(weight, base._parameters["bias"], _adapter(module))


def refusal(module: Any, training: bool) -> str:
    """Why the layer runs its own forward, "" where it does not; `training`: its mode, for dropout."""
    base = _base(module)
    if base is not module:
        if _kind(type(module)) != "lora":
            return f"{type(module).__name__} of {type(module).__module__} is not plain LoRA"
        if why := _lora_refusal(module, training):
            return why
    kind, weight, bias = _kind(type(base)), base._parameters.get("weight"), base._parameters.get("bias")
    state = getattr(weight, "quant_state", None) if kind == "4bit" else None
    if kind not in ("dense", "4bit") or weight is None or kind == "4bit" and state is None:
        return f"{type(base).__name__} computes in its own way"
    if weight.requires_grad or bias is not None and bias.requires_grad:
        return "weights that train" if base is not module else "weights that train: fused once frozen under adapters"
    if kind == "dense" and type(weight) is not nn.Parameter and type(weight.data) not in (Tensor, FakeTensor):
        return f"weights are {type(weight.data).__name__}"
    if getattr(state, "packing_format_for_cpu", False):
        return "bitsandbytes has repacked the 4-bit weights for CPU"
    return touched(base)


def wider(module: nn.Module, dtype: torch.dtype) -> str:
    """Why a 4-bit layer will run its own forward in a model of `dtype`, "" where it will not."""
    base = _base(module)
    if _kind(type(base)) != "4bit" or not base.compute_type_is_set or base.compute_dtype == dtype:
        return ""
    return f"4-bit products in {base.compute_dtype}, unless under autocast in it (set bnb_4bit_compute_dtype={dtype})"


def _base(module: Any) -> Any:
    return module._modules.get("base_layer", module)


def _adapter(module: Any) -> Adapter | None:
    if not (names := _active(module)):
        return None
    name, children = names[0], module._modules
    a, b = children["lora_A"]._modules[name], children["lora_B"]._modules[name]
    return Adapter(a._parameters["weight"], b._parameters["weight"], float(module.scaling[name]))


def _active(module: Any) -> list[str]:
    return [] if "base_layer" not in module._modules or module.disable_adapters else _chosen(module)


def _chosen(module: Any) -> list[str]:
    """The adapters that are active while adapters are on."""
    return [name for name in module.active_adapters if name in module._modules["lora_A"]._modules]


def _lora_refusal(module: Any, training: bool) -> str:
    children = module._modules
    if module.merged:
        return "merged adapters"
    if len(_chosen(module)) > 1:
        return "several active adapters"
    for name, a in children["lora_A"]._modules.items():
        b, dropout = children["lora_B"]._modules[name], children["lora_dropout"]._modules[name]
        if name in module.lora_variant:
            return "a variant of LoRA such as DoRA"
        if type(a) is not nn.Linear or type(b) is not nn.Linear:
            return f"LoRA of {type(a).__name__}"
        if module.lora_bias.get(name) or b._parameters["bias"] is not None:
            return "LoRA with a bias"
        if training and type(dropout) is not nn.Identity and getattr(dropout, "p", 1.0) > 0:
            return "LoRA dropout while training"
        if why := touched(a) or touched(b):
            return why
    return touched(module)


def bound_by_others(module: nn.Module) -> bool:
    """Whether the instance has another forward than its class; a pickled copy of a patched one has the class's."""
    forward = vars(module).get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def touched(module: nn.Module) -> str:
    """Why its own call has to run, "" where nothing was added to its class's forward."""
    if "forward" in vars(module) and bound_by_others(module):
        return "a forward bound by others"
    return "hooks" if has_hooks(module) else ""


def has_hooks(module: nn.Module) -> bool:
    own = vars(module)
    return bool(own[_HOOKS[0]] or own[_HOOKS[1]] or own[_HOOKS[2]] or own[_HOOKS[3]])
