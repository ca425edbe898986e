"""token_logps(model, ...): differentiable token log-probs for people who write their own loop.

    logp[b, t] = log softmax(logits[b, t])[ids[b, t + 1]]

as the model's own logits have them, without those: hidden states come from the backbone, and `linear_logps` takes them
through the head, 2.1 GB less at 8192 tokens and a vocabulary of 128256. Rows whose label is ignored do not reach the
head at all.

Legend: B rows, T tokens, D hidden size.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from inspect import signature
from typing import Any
from weakref import WeakSet

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastdpo.first_use import rounding
from fastdpo.head import output_head
from fastdpo.model import backbone, base_model, input_embedding, refuse_adapters
from fastdpo.quantized import keep_unpacked
from fastdpo_kernels.linear_logps import linear_logps

IGNORED = -100
CHECKED_TOKENS = 8
CHECKED_ROWS = 64  # of the head

_checked: WeakSet[nn.Module] = WeakSet()


def token_logps(
    model: nn.Module,
    input_ids: Tensor,  # (B, T) int64
    attention_mask: Tensor | None = None,  # (B, T), 0 where padded
    labels: Tensor | None = None,  # (B, T) int64, -100 where not scored
) -> Tensor:  # (B, T - 1) fp32
    """Log-probs of each token given those before it, differentiable in whatever trains: adapters, weights, the head.

    Entry t is that of `input_ids[:, t + 1]`, or of `labels[:, t + 1]` where labels are given; 0 without gradient where
    that label is -100 or, without labels, where the token or the one before it is masked. Runs under the caller's
    autocast and gradient mode, on patched and unpatched models, with adapters as they are switched. A
    mixture-of-experts model's auxiliary loss is no part of it. Labels cost one wait for the device. Padding may be on
    either side: positions count the tokens that the mask has.

    A model's first call is compared with the model's own logits on a few tokens, in evaluation mode, and with what it
    makes of a part of its head in fp32. It also keeps bitsandbytes from packing 4-bit weights for the CPU, which makes
    later gradients wrong.

    Not supported: double backward, and torch.func transforms of patched models.

    Raises ValueError for a model that is no decoder-only language model with a dense head, is wrapped (DDP, FSDP,
    torch.compile) or has virtual tokens, for other types, shapes, dtypes or devices of arguments, and for tokens not in
    the vocabulary: those on a CPU, and with FASTDPO_DEBUG=1 in the environment everywhere (that waits for the device).
    RuntimeError where the model's own log-probs are others, or not finite.
    """
    _check_model(model)
    _check_inputs(base_model(model), input_ids, attention_mask, labels)
    if model not in _checked and not torch.compiler.is_compiling():
        keep_unpacked(model)
        if input_ids.shape[1] > 1:
            _compare_with_logits(model, input_ids[:1, :CHECKED_TOKENS])
            _checked.add(model)
    return _token_logps(model, input_ids, attention_mask, labels)


def _token_logps(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None) -> Tensor:
    base = base_model(model)
    head, targets = output_head(base), (input_ids if labels is None else labels)[:, 1:]
    if labels is not None:
        _check_tokens("labels", labels, len(head.weight))
    inner, inputs = backbone(base), {"input_ids": input_ids, "attention_mask": attention_mask}
    if attention_mask is not None and "position_ids" in signature(inner.forward).parameters:
        inputs["position_ids"] = (attention_mask != 0).long().cumsum(-1).sub(1).clamp(min=0)
    hidden = inner(**inputs, use_cache=False).last_hidden_state
    rows, wanted = hidden[:, :-1].flatten(0, 1), targets.flatten().long()
    scored = None
    if labels is not None:
        (scored,) = (wanted != IGNORED).nonzero(as_tuple=True)
        rows, wanted = rows.index_select(0, scored), wanted.index_select(0, scored)
    scale = {"logit_scale": head.logit_scale, "softcap": head.softcap}
    logps, _ = linear_logps(head.inputs(rows), head.weight, wanted, head.bias, **scale)
    if scored is not None:
        logps = logps.new_zeros(targets.numel()).index_copy(0, scored, logps)
    logps = logps.view(targets.shape).float()
    if labels is None and attention_mask is not None:
        return logps.where((attention_mask[:, 1:] != 0) & (attention_mask[:, :-1] != 0), 0.0)
    return logps


def _check_model(model: Any) -> None:
    if not isinstance(model, (PreTrainedModel, PeftModel)):
        inside = ""
        if hasattr(model, "_orig_mod"):
            inside = " Give model._orig_mod, the model before torch.compile."
        elif hasattr(model, "module"):
            inside = " Give the model inside, and know that its gradients are then those of one process."
        raise ValueError(f"model is a {type(model).__name__}, expected a PreTrainedModel or a PeftModel.{inside}")
    if isinstance(model, PeftModel):
        refuse_adapters([model.active_peft_config])
    base = base_model(model)
    if base.config.is_encoder_decoder:
        raise ValueError(f"{type(base).__name__} is an encoder-decoder: give a decoder-only language model")
    if base.get_output_embeddings() is None:
        raise ValueError(f"{type(base).__name__} has no language-model head: load it with AutoModelForCausalLM")


def _check_inputs(
    base: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None
) -> None:
    embeddings = input_embedding(base).weight
    moved = embeddings.is_meta or len(getattr(base, "hf_device_map", None) or ()) > 1  # by accelerate, as it comes
    device = input_ids.device if moved and isinstance(input_ids, Tensor) else embeddings.device
    for name, tensor in {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}.items():
        if tensor is None and name != "input_ids":
            continue
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is a {type(tensor).__name__}, expected a (B, T) tensor: torch.tensor({name})")
        came = f"{name} is {tuple(tensor.shape)}"
        if tensor.ndim != 2 or not tensor.numel():
            raise ValueError(f"{came}, expected (B, T), B and T above 0")
        if tensor.shape != input_ids.shape:
            raise ValueError(f"{came}, input_ids is {tuple(input_ids.shape)}: they must be alike")
        if name != "attention_mask" and tensor.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"{came} {tensor.dtype}, expected tokens as int64 or int32")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, expected it on {device}, where the model is")
    _check_tokens("input_ids", input_ids, len(embeddings))


def _check_tokens(name: str, tokens: Tensor, vocabulary: int) -> None:
    if torch.compiler.is_compiling() or tokens.device.type != "cpu" and os.environ.get("FASTDPO_DEBUG") != "1":
        return
    wrong = (tokens < 0) | (tokens >= vocabulary)
    if name == "labels":
        wrong &= tokens != IGNORED
        wrong[:, 0] = False  # which nothing comes before
    if wrong.any():
        row, place = wrong.nonzero()[0].tolist()
        expected = f"a token in [0, {vocabulary})" + f", or {IGNORED} where it is not scored" * (name == "labels")
        raise ValueError(f"{name}[{row}, {place}] is {int(tokens[row, place])}, expected {expected}")


def _compare_with_logits(model: nn.Module, input_ids: Tensor) -> None:
    """Raises RuntimeError where the head has a form that `output_head` does not know."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1].double()
            logps = _token_logps(model, input_ids, None, None).double()
            few = _logits_and_logps_of_few_rows(base_model(model), input_ids)
    finally:
        for module, training in modes.items():
            module.training = training
    expected = logits.log_softmax(-1).gather(-1, input_ids[:, 1:, None].long())[..., 0]
    if not expected.isfinite().all():
        raise RuntimeError(
            f"the log-probs of {type(base_model(model)).__name__}'s own logits are not finite: its weights hold NaN or "
            f"infinities, or what it computes overflows {next(model.parameters()).dtype}"
        )
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    device = input_ids.device.type
    _check_close(model, logps, expected, logits, rounding(device, dtypes))
    if few is not None:
        logits, logps, targets = few
        expected = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        with torch.autocast(device, enabled=False):
            _check_close(model, logps, expected, logits, rounding(device, {logits.dtype}))


def _check_close(model: nn.Module, logps: Tensor, expected: Tensor, logits: Tensor, bound: float) -> None:
    """`bound` is relative to the largest logit."""
    error, allowed = float((logps - expected).abs().max()), bound * max(float(logits.abs().max()), 1.0)
    if not error <= allowed:
        raise RuntimeError(
            f"the log-probs of {type(base_model(model)).__name__}'s hidden states and head differ from those of its "
            f"own logits by {error:.1e}, more than rounding ({allowed:.0e}): its head has a form that is not supported"
        )


class _InPlaceOf:
    """What a module's parent sees in its place: another forward, and all else the module's."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self._module, self._forward = module, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _logits_and_logps_of_few_rows(base: PreTrainedModel, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """-> what the model's own code makes of hidden states and a few rows of its head in fp32, as logits (T, V'), what
    `linear_logps` does as log-probs (T,), and of which rows. A wrong scale or cap of a tenth hides in bf16's rounding.
    None where the model is not made of a backbone and a head.
    """
    head = output_head(base)
    inner: Any = backbone(base)
    layer: Any = base.get_output_embeddings()
    if not {inner, layer} <= {*base._modules.values()}:
        return None
    outputs = inner(input_ids=input_ids, use_cache=False)
    dtype = torch.promote_types(outputs.last_hidden_state.dtype, torch.float32)
    hidden = outputs.last_hidden_state = outputs.last_hidden_state.to(dtype)
    weight = head.weight[:CHECKED_ROWS].to(dtype)
    bias = None if head.bias is None else head.bias[:CHECKED_ROWS].to(dtype)
    product = lambda x: nn.functional.linear(head.inputs(x.to(dtype)), weight, bias)  # noqa: E731
    places = {inner: _InPlaceOf(inner, lambda *_, **__: outputs), layer: _InPlaceOf(layer, product)}
    twin: Any = object.__new__(type(base))
    vars(twin).update(vars(base), _modules={name: places.get(one, one) for name, one in base._modules.items()})
    targets = torch.arange(input_ids.shape[1], device=hidden.device) % len(weight)
    scale = {"logit_scale": head.logit_scale, "softcap": head.softcap}
    with torch.autocast(hidden.device.type, enabled=False):
        logits = type(base).forward(twin, input_ids=input_ids, use_cache=False).logits[0]
        logps, _ = linear_logps(head.inputs(hidden[0]), weight, targets, bias, **scale, method="torch")
    return logits.to(dtype), logps, targets
