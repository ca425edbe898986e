"""Random models in NF4 that are never there in another dtype: one linear module after the other is drawn and quantised.

So an 8B model takes the 5.3 GiB of its result and one module's temporaries, on the device and on the host nothing. The
tensors stay apart from the modules: every model made of them starts as new, whatever was done to the last one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel


class QuantisedWeights:
    """All parameters of a model by their names, the same for the same seed, place and machine."""

    def __init__(self, config: PretrainedConfig, dtype: str, place: str, attention: str | None, seed: int = 0) -> None:
        import torch

        self._config, self._dtype, self._place = config, getattr(torch, dtype), place
        self._attention = attention
        torch.manual_seed(seed)
        skeleton = self._skeleton()
        self._parameters = {name: self._drawn(skeleton, name, old) for name, old in skeleton.named_parameters()}

    def model(self) -> PreTrainedModel:
        """A new one around these tensors. Use one at a time: they know whose they are."""
        model = self._skeleton()
        for name, parameter in self._parameters.items():
            module, last = _owner(model, name)
            module._parameters[last] = parameter
            if hasattr(parameter, "quant_state"):
                parameter.module, module.quant_state = module, parameter.quant_state
        model.tie_weights()
        return model.to(self._place)  # buffers; what is quantised is there

    def _skeleton(self) -> Any:
        """Linear modules of bitsandbytes, parameters without data, buffers with theirs."""
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig
        from transformers.quantizers import AutoHfQuantizer

        how = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=self._dtype,
        )
        quantizer: Any = AutoHfQuantizer.from_config(how, pre_quantized=False)
        with init_empty_weights(include_buffers=False):
            model: Any = AutoModelForCausalLM.from_config(
                self._config, dtype=self._dtype, attn_implementation=self._attention
            )
            quantizer.preprocess_model(model, device_map=None)
        quantizer._process_model_after_weight_loading(model)
        model.config.quantization_config, model.hf_quantizer = how, quantizer
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False  # it would pack weights in an evaluation, for good
        return model

    def _drawn(self, skeleton: Any, name: str, old: Tensor) -> Any:
        """As transformers draws it."""
        import torch
        from bitsandbytes.nn import Linear4bit, Params4bit

        module, last = _owner(skeleton, name)
        values = torch.empty(old.shape, dtype=self._dtype, device=self._place)
        if last == "bias":
            values.zero_()
        elif values.dim() == 1:
            values.fill_(1.0)
        else:
            values.normal_(std=skeleton.config.initializer_range)
        if not (isinstance(module, Linear4bit) and last == "weight"):
            return torch.nn.Parameter(values)
        options = {"quant_type": "nf4", "compress_statistics": True, "quant_storage": torch.uint8}
        return Params4bit(values, requires_grad=False, **options).to(self._place)  # which quantises


def _owner(model: nn.Module, name: str) -> tuple[Any, str]:
    """The module that has a parameter, and the parameter's name there."""
    path, _, last = name.rpartition(".")
    return model.get_submodule(path), last
