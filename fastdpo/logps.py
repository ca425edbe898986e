"""token_logps(model, ...): differentiable token log-probs for people who write their own loop.

    logp[b, t] = log softmax(logits[b, t])[ids[b, t + 1]]

as the model's own logits have them, without those: hidden states come from the backbone, and `linear_logps` takes them
through the head, 2.1 GB less at 8192 tokens and a vocabulary of 128256. Rows whose label is ignored do not reach the
head at all.

Legend: B rows, T tokens, D hidden size.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastdpo.model import backbone, base_model, output_head
from fastdpo.patching import rounding
from fastdpo.quantized import keep_unpacked
from fastdpo_kernels.linear_logps import linear_logps

IGNORED = -100
CHECKED_TOKENS = 8

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
    mixture-of-experts model's auxiliary loss is no part of it. Labels cost one wait for the device.

    A model's first call is compared with the model's own logits on a few tokens, in evaluation mode. It also keeps
    bitsandbytes from packing 4-bit weights for the CPU, which makes later gradients wrong.

    Not supported: double backward, and torch.func transforms of patched models.

    Raises ValueError for a model that is no decoder-only language model with a dense head, is wrapped (DDP, FSDP,
    torch.compile) or has virtual tokens, and for shapes that do not fit; RuntimeError where the model's own log-probs
    are others, or not finite.
    """
    _check_model(model)
    _check_inputs(input_ids, attention_mask, labels)
    if model not in _checked and not torch.compiler.is_compiling():
        keep_unpacked(model)
        if len(few := input_ids[:1, :CHECKED_TOKENS]) and few.shape[1] > 1:
            _compare_with_logits(model, few)
            _checked.add(model)
    return _token_logps(model, input_ids, attention_mask, labels)


def _token_logps(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None) -> Tensor:
    base = base_model(model)
    hidden = backbone(base)(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    head, targets = output_head(base), (input_ids if labels is None else labels)[:, 1:]
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
    if getattr(model, "peft_type", None) is not None and getattr(model.active_peft_config, "is_prompt_learning", False):  # type: ignore[union-attr]
        raise ValueError(
            f"{type(model.active_peft_config).__name__} adds virtual tokens, which are not supported: use LoRA"  # type: ignore[union-attr]
        )
    base = base_model(model)
    if base.config.is_encoder_decoder:
        raise ValueError(f"{type(base).__name__} is an encoder-decoder: give a decoder-only language model")
    if base.get_output_embeddings() is None:
        raise ValueError(f"{type(base).__name__} has no language-model head: load it with AutoModelForCausalLM")


def _check_inputs(input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None) -> None:
    if input_ids.ndim != 2 or input_ids.shape[1] < 1 or input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"input_ids is {tuple(input_ids.shape)} {input_ids.dtype}, expected (B, T) integers, T above 0"
        )
    for name, tensor in (("attention_mask", attention_mask), ("labels", labels)):
        if tensor is not None and tensor.shape != input_ids.shape:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)}, input_ids is {tuple(input_ids.shape)}: they must be alike"
            )


def _compare_with_logits(model: nn.Module, input_ids: Tensor) -> None:
    """Raises RuntimeError where the head has a form that `output_head` does not know."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1].double()
            logps = _token_logps(model, input_ids, None, None).double()
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
    bound = rounding(input_ids.device.type, dtypes)  # relative to the largest logit
    error, allowed = float((logps - expected).abs().max()), bound * max(float(logits.abs().max()), 1.0)
    if not error <= allowed:
        raise RuntimeError(
            f"the log-probs of {type(base_model(model)).__name__}'s hidden states and head differ from those of its "
            f"own logits by {error:.1e}, more than rounding ({allowed:.0e}): its head has a form that is not supported"
        )
