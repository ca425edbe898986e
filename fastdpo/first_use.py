"""What a patched module computes, held against the unpatched one at its first call.

On a few rows of its input, without a gradient and without drawing a random number, on copies: nothing of the model
changes meanwhile, and no hook sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from fastdpo.projections import has_hooks
from fastdpo.quantized import misread_layers

# How far two right computations may be apart, relative to the largest entry.
BOUNDS = {torch.float64: 2e-5, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}
TF32_BOUND = 4e-3  # of fp32 products in TF32
CHECKED_ROWS = 16


def few_rows(x: Tensor) -> Tensor:
    """(..., T, D) -> (1, ..., 16 at most, D)."""
    for dim in range(x.ndim - 2):
        x = x.narrow(dim, 0, 1)
    return x[..., :CHECKED_ROWS, :] if x.ndim > 1 else x


@dataclass
class Checks:
    """What has been compared with the unpatched module: kinds, and the class with what changes its arithmetic (`what`).
    One a patched model, shared by its copies.
    """

    done: set[tuple[str, tuple[Any, ...]]] = field(default_factory=set)

    def due(self, kind: str, what: tuple[Any, ...], x: Tensor, module: nn.Module | None) -> bool:
        if (kind, what) in self.done:
            return False
        inside = [] if module is None else [one for one in module.modules() if one is not module]
        if any(has_hooks(one) for one in inside):  # the user's, and peft's while a batch mixes adapters
            return False
        if type(x) not in (Tensor, nn.Parameter) or x.device.type == "meta" or not x.numel():  # fake tensors
            return False
        if module is not None and misread_layers(module):  # theirs would be wrong
            self.done.add((kind, what))
            return False
        return True

    def compare(
        self, kind: str, what: tuple[Any, ...], ours: Callable, theirs: Callable, module: Any, x: Tensor
    ) -> None:
        """Raises RuntimeError where ours(module, x) is not theirs(module, x).

        Both are given a copy of the module in which no LoRA factor B is zero, as a new one is: its product would be
        compared with nothing. Nor is a factor of lower precision than x, in which peft would multiply and we do not.
        """
        device = x.device.type
        autocast = torch.autocast(  # without its cache, which would keep the factors that are there for the comparison
            device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device), cache_enabled=False
        )
        with torch.no_grad(), autocast:
            module = None if module is None else _twin(module, x.dtype)
            with _same_random_numbers(x.device):
                actual = ours(module, x)
            with _same_random_numbers(x.device):
                expected = theirs(module, x)
        outputs = (actual, expected) if isinstance(actual, tuple) else ((actual,), (expected,))
        for one, other in zip(*outputs, strict=True):
            _check_close(kind, what[0], x, one, other)
        self.done.add((kind, what))


def rounding(device: str, dtypes: Iterable[torch.dtype]) -> float:
    """How far two right computations in these dtypes may be apart on a device, under autocast as it is."""
    dtypes = {*dtypes, *([torch.get_autocast_dtype(device)] if torch.is_autocast_enabled(device) else [])}
    bound = max(BOUNDS.get(dtype, TF32_BOUND) for dtype in dtypes)
    # torch.get_float32_matmul_precision() raises once TF32 was set the newer way, as by transformers' tf32=True.
    tf32 = device == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return max(bound, TF32_BOUND) if tf32 else bound


def _check_close(kind: str, what: Any, x: Tensor, actual: Tensor, expected: Tensor) -> None:
    name = getattr(what, "__name__", str(what))
    if actual.shape != expected.shape:
        raise RuntimeError(
            f"the patched {name} ({kind}) gives {tuple(actual.shape)}, the unpatched one {tuple(expected.shape)}: "
            "call fastdpo.unpatch(model) and report it"
        )
    bound = rounding(x.device.type, {x.dtype, expected.dtype})
    actual, expected = actual.double(), expected.double()
    known = expected.isfinite()
    largest = expected[known].abs().max() if known.any() else expected.new_zeros(())
    error = torch.where(known, actual - expected, 0).abs().max()
    if not error <= bound * largest:
        raise RuntimeError(
            f"the patched {name} ({kind}) differs from the unpatched one by {float(error / largest):.1e} of its "
            f"largest entry, more than rounding ({bound:.0e}): this "
            "version of transformers or peft may compute something else; call fastdpo.unpatch(model) and report it"
        )


def _twin(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy, with what is inside, that shares all tensors but LoRA factors B, and factors narrower than `dtype`. The
    model itself stays as it is: other threads may be in it.
    """
    twin = object.__new__(type(module))
    own = vars(twin)
    own.update(vars(module))
    if getattr(own.get("forward"), "__self__", None) is module:
        own["forward"] = MethodType(own["forward"].__func__, twin)
    own["_parameters"] = dict(module._parameters)
    own["_modules"] = {name: None if one is None else _twin(one, dtype) for name, one in module._modules.items()}
    for name in ("lora_A", "lora_B") if own["_modules"].get("lora_B") is not None else ():
        for factor in twin._modules[name].children():  # type: ignore[union-attr]
            if type(factor) is nn.Linear:
                values, wide = factor.weight.detach(), torch.promote_types(factor.weight.dtype, dtype)
                if name == "lora_B":
                    values = torch.linspace(-0.5, 0.5, values.numel(), device=values.device).view(values.shape)
                factor._parameters["weight"] = nn.Parameter(values.to(wide), requires_grad=False)
    return twin


@contextmanager
def _same_random_numbers(device: torch.device) -> Iterator[None]:
    """Within it random numbers are drawn as if nothing were drawn before or after."""
    states = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        if states[1] is not None:
            torch.cuda.set_rng_state(states[1], device)
