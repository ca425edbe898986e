"""The LM head as numbers, adapters on or off: what turns hidden states into log-probs without a forward of its own.

Legend: N rows, D hidden size, V vocabulary, R ranks of the adapters on the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Head:
    """The LM head as numbers: logits = softcap * tanh(scale * (W x + b) / softcap), x = inputs(h).

    An adapter is not added to W: bf16 keeps no change of a weight that is 0.4% of it or less. It is R columns more,
    x = [h, A h], and as many zeros in place of A h where it is off: one product either way, which sums in one order.
    """

    weight: Tensor  # (V, D), with adapters (V, D + R): [W, B]
    bias: Tensor | None  # (V,)
    logit_scale: float
    softcap: float | None
    down: Tensor | None  # (R, D): A of the adapters, scaled; zeros where they are off

    def inputs(self, hidden: Tensor) -> Tensor:
        """(N, D) -> what `weight` takes."""
        if self.down is None:
            return hidden
        return torch.cat([hidden, nn.functional.linear(hidden, self.down.to(hidden.dtype)).to(hidden.dtype)], -1)


def output_head(model: PreTrainedModel) -> Head:
    """The head as the model would apply it now, adapters on or off. Raises ValueError for adapters that have no such
    form.
    """
    layer: Any = model.get_output_embeddings()
    if isinstance(layer, ModulesToSaveWrapper):
        active = [] if layer.disable_adapters else layer.active_adapters
        whole = bool(active) and all(name in layer.modules_to_save for name in active)
        layer = layer.modules_to_save[active[0]] if whole else layer.original_module
    base: Any = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    weight: Tensor = base.weight
    if not weight.is_floating_point():
        raise ValueError(
            f"the LM head is quantised to {weight.dtype}, and log-probs need it whole: list it in the "
            "llm_int8_skip_modules of the quantization_config that the model was loaded with"
        )
    down = None
    if isinstance(layer, BaseTunerLayer) and (factors := _factors(layer)):
        downs, ups = zip(*factors, strict=True)
        down, weight = torch.cat(downs), torch.cat([weight, *(up.to(weight.dtype) for up in ups)], 1)
    text = model.config.get_text_config()
    scale = float(getattr(text, "logit_scale", None) or 1.0) / float(getattr(text, "logits_scaling", None) or 1.0)
    bias = getattr(base, "bias", None)
    if text.is_encoder_decoder:
        if getattr(text, "scale_decoder_outputs", text.model_type in ("umt5", "switch_transformers")):
            scale *= text.d_model**-0.5  # T5 and its kin, which scale what a tied head takes
        if (added := getattr(model, "final_logits_bias", None)) is not None:  # BART and its kin: (1, V), no parameter
            bias = added[0]
    return Head(weight, bias, scale, getattr(text, "final_logit_softcapping", None), down)


def _factors(tuner: BaseTunerLayer) -> list[tuple[Tensor, Tensor]]:
    """(scaling * A, B) of each active adapter on the head; none where they are merged into its weight."""
    layer: Any = tuner
    lora = type(tuner) is LoraLinear
    names = [name for name in tuner.active_adapters if not lora or name in layer.lora_A]
    if tuner.merged:
        if tuner.disable_adapters or set(tuner.merged_adapters) != set(names):
            raise ValueError(
                f"the LM head's weight has the adapters {tuner.merged_adapters} merged into it, and those to apply now "
                f"are {[] if tuner.disable_adapters else names}: call model.unmerge_adapter() first"
            )
        return []
    if tuner.disable_adapters and not lora:
        return []
    factors = []
    for name in names:
        down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
        if not tuner.disable_adapters:
            check_plain(tuner, name, dropout=layer.training)
        factors.append((torch.zeros_like(down) if tuner.disable_adapters else layer.scaling[name] * down, up))
    return factors


def check_plain(tuner: BaseTunerLayer, adapter: str, dropout: bool) -> None:
    """Raises ValueError where an adapter on the head is more than two factors; `dropout` says that its own is on."""
    layer: Any = tuner
    plain = type(tuner) is LoraLinear and not layer.use_dora.get(adapter) and not layer.lora_bias.get(adapter)
    if not plain or dropout and getattr(layer.lora_dropout[adapter], "p", 0) > 0:
        raise ValueError(
            f"the adapter {adapter!r} on the LM head ({type(layer).__name__}) is not a plain LoRA without "
            "dropout, DoRA or bias: leave the head out of target_modules, or list it in modules_to_save"
        )
