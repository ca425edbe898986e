"""The model: adapters, precision, and the one module that turns a PreferenceBatch into token log-probs.

Hidden states come from the backbone, the LM head's weight goes to `linear_logps`; CausalLM.forward is neither copied
nor patched. Whatever trains has fp32 master weights (at a learning rate of 1e-6 a bf16 weight hardly ever moves: its
neighbours are 0.4% away), frozen weights keep the dtype they came in.

Legend: P pairs, R rows, T tokens in a row, N scored tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from fastdpo.attention import asked_attention, attention_configs, checkpoint_contexts, packed_attention
from fastdpo.batch import PreferenceBatch
from fastdpo.config import DPOConfig
from fastdpo.head import check_plain, output_head
from fastdpo.offload import HostCopies
from fastdpo.quantized import check_trained_whole
from fastdpo_kernels.linear_logps import linear_logps

logger = logging.getLogger(__name__)

# Adapters that are more than modules of the model: they need a call between steps, or what PeftModel.forward sets.
CALLED_ADAPTERS = ("ADALORA", "POLY", "SHADOW", "XLORA")
OUTSIDE = "outside_adapters.safetensors"  # beside an adapter's own file: what peft does not save
CHECKPOINT = ("gradient_checkpointing", "_gradient_checkpointing_func")  # what transformers' blocks read and call


def refuse_adapters(peft_configs: Iterable[Any]) -> None:
    """Raises ValueError for adapters that are more than modules of the model: pairs go through its backbone and not
    through PeftModel.forward, so that some would silently not train.
    """
    for one in peft_configs:
        kind = str(getattr(getattr(one, "peft_type", None), "value", ""))
        if getattr(one, "is_prompt_learning", False):
            why = f"{type(one).__name__} adds virtual tokens, which have no place in packed pairs"
        elif getattr(one, "alora_invocation_tokens", None):
            why = "alora_invocation_tokens (aLoRA) turns adapters on in PeftModel.forward, which is not called"
        elif kind in CALLED_ADAPTERS:
            why = f"{type(one).__name__} needs calls beside those of the model's modules, which are not made"
        elif kind == "PVERA" or getattr(one, "monteclora_config", None):
            why = f"{type(one).__name__} draws other weights at each pass (PVeRA, MonteCLoRA), the reference's included"
        else:
            continue
        raise ValueError(f"{why}, so it is not supported: use plain LoRA")


def add_adapters(
    model: PreTrainedModel | PeftModel, peft_config: Any, config: DPOConfig
) -> PreTrainedModel | PeftModel:
    """The model with the adapters that `peft_config` or `use_peft` asks for, adapters in fp32; the model as it is
    without them.
    """
    if peft_config is None and not config.use_peft:
        _check_head_dropout(model, config)
        return model
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning
        )  # peft asks for it
        peft_config = peft_config or _lora_config(config, base_model(model))
        check_trained_whole(model, getattr(peft_config, "modules_to_save", None))
        unread = input_embedding(model).weight.is_meta
        adapted = get_peft_model(model, peft_config, low_cpu_mem_usage=unread)
    _check_head_dropout(adapted, config)
    return adapted  # type: ignore[return-value]


def _lora_config(config: DPOConfig, model: nn.Module) -> LoraConfig:
    targets = _target_modules(config.lora_target_modules)
    # a router that is a linear layer by its class gives several tensors, which LoRA cannot add to
    named = model.named_modules() if targets == "all-linear" else ()
    routers = [name for name, part in named if isinstance(part, nn.Linear) and "Router" in type(part).__name__]
    return LoraConfig(
        task_type="SEQ_2_SEQ_LM" if base_model(model).config.is_encoder_decoder else "CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        exclude_modules=routers or None,
        target_parameters=config.lora_target_parameters,
        modules_to_save=config.lora_modules_to_save,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
    )


def _target_modules(names: list[str] | None) -> list[str] | str:
    """Module names as a list; `all-linear` and a regular expression as peft wants them, as one string."""
    names = names or ["all-linear"]
    single = len(names) == 1 and (names[0] == "all-linear" or not re.fullmatch(r"[\w.]+", names[0]))
    return names[0] if single else names


def prepare_precision(model: nn.Module, autocast: torch.dtype | None) -> None:
    """fp32 master weights for everything that trains. Raises ValueError where nothing does, and where they do not go
    together with the dtype of weights that are frozen.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError(
            "no parameter of the model requires a gradient, so nothing would train: load the adapter with "
            "is_trainable=True, or set requires_grad on what is to train"
        )
    if isinstance(model, PeftModel):
        _check_outside(model, autocast)
    half = [parameter for parameter in trained if parameter.dtype in (torch.bfloat16, torch.float16)]
    if half:
        logger.info("%d parameters train in fp32: cast from %s", sum(p.numel() for p in half), half[0].dtype)
    for parameter in half:
        parameter.data = parameter.data.float()
    if half and autocast is None and not isinstance(model, PeftModel):
        model.float()  # without autocast a matrix product takes one dtype


def outside_adapters(model: PeftModel) -> dict[str, nn.Parameter]:
    """What trains and no switch of peft's turns off: biases of bias="all", and what the user set to train."""
    inside = (getattr(model.base_model, "prefix", "adaption_"), ".modules_to_save.", "trainable_tokens_")
    named = model.named_parameters()
    return {name: p for name, p in named if p.requires_grad and not any(word in name for word in inside)}


def unsaved_by_peft(model: PeftModel) -> dict[str, nn.Parameter]:
    """What of it is not in an adapter's own file, either."""
    outside = outside_adapters(model)
    active = model.active_adapters[0]
    saved = outside and get_peft_model_state_dict(model, adapter_name=active, save_embedding_layers=False)
    return {name: parameter for name, parameter in outside.items() if name not in saved}


def _check_outside(model: PeftModel, autocast: torch.dtype | None) -> None:
    """Of weights that train in the place of frozen ones: says which peft does not save. Raises ValueError where no
    product takes them, fp32 masters, together with 16-bit weights.
    """
    replaced = (".modules_to_save.", ".ln_tuning_layers.")
    whole = [name for name, p in model.named_parameters() if p.requires_grad and any(word in name for word in replaced)]
    whole += outside_adapters(model)
    half = {p.dtype for p in model.parameters() if not p.requires_grad} & {torch.bfloat16, torch.float16}
    if whole and half and autocast is None:
        dtype = str(half.pop()).removeprefix("torch.")
        raise ValueError(
            f"the model is in {dtype}, and {whole[0]}, which trains beside its adapters, in fp32: products take both "
            f"under autocast only. Set {'bf16' if dtype == 'bfloat16' else 'fp16'}=True, or load the model with "
            "dtype='float32'"
        )
    if unsaved := unsaved_by_peft(model):
        logger.warning(
            "%d tensors train outside of adapters, such as %s, and peft does not save them: list their modules in "
            "modules_to_save, or load them from the file beside the adapter, once that is loaded, with "
            "model.load_state_dict(safetensors.torch.load_file('%s'), strict=False)",
            *(len(unsaved), next(iter(unsaved)), OUTSIDE),
        )


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside of a PeftModel, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model  # type: ignore[return-value]


def backbone(model: PreTrainedModel) -> nn.Module:
    """The model without its LM head. Raises ValueError where it cannot be told apart."""
    inner = model.base_model
    if inner is model:  # Llama-4's text model gives an attribute as its backbone that it does not have
        inner = getattr(model, "model", None)
    if inner is None:
        raise ValueError(
            f"{type(model).__name__} names no backbone without its LM head: load the model's plain text class"
        )
    return inner


def block_lists(model: PreTrainedModel) -> list[nn.ModuleList]:
    """Lists of as many modules as the text model has blocks: its own, and whatever else is as long."""
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    return [m for m in backbone(model).modules() if isinstance(m, nn.ModuleList) and len(m) == layers]


def input_embedding(model: nn.Module) -> nn.Embedding:
    """The token embedding, (V, D), without the adapter that may be around it."""
    layer: Any = base_model(model).get_input_embeddings()
    if isinstance(layer, ModulesToSaveWrapper):
        layer = layer.original_module
    found: Any = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    return found


def learned_positions(model: PreTrainedModel) -> int | None:
    """How many positions a learned table has room for; None for rotary, ALiBi and the like."""
    inputs = input_embedding(model)
    for name, module in model.named_modules():
        last = name.rsplit(".", 1)[-1]
        if "vision" in name:  # of patches
            continue
        if isinstance(module, nn.Embedding) and module is not inputs and (last == "wpe" or "position" in last):
            return module.num_embeddings - getattr(module, "offset", 0)
    return None


def noise_of(model: nn.Module) -> list[tuple[Any, str]]:
    """Each module with a dropout, layerdrop or router jitter above 0, and the attribute that has it."""
    found: list[tuple[Any, str]] = []
    for module in model.modules():
        names = (
            ["p"] if isinstance(module, nn.modules.dropout._DropoutNd) else [n for n in vars(module) if _is_noise(n)]
        )
        found += [(module, n) for n in names if isinstance(v := getattr(module, n), float) and v > 0]
    return found


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[int]:
    """Within it, every dropout, layerdrop and router jitter of the model is 0, whatever its mode; yields how many
    were not.
    """
    changed = [(module, name, getattr(module, name)) for module, name in noise_of(model)]
    try:
        for module, name, _ in changed:
            setattr(module, name, 0.0)
        yield len(changed)
    finally:
        for module, name, value in changed:
            setattr(module, name, value)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Within it; on the way out each module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _is_noise(attribute: str) -> bool:
    return any(word in attribute for word in ("dropout", "layerdrop", "pdrop", "jitter"))


def _check_head_dropout(model: nn.Module, config: DPOConfig) -> None:
    """What `output_head` would refuse at the first step of a run with dropout."""
    layer: Any = base_model(model).get_output_embeddings()
    if type(layer) is LoraLinear and not config.disable_dropout:
        for name in layer.active_adapters if config.model_adapter_name is None else [config.model_adapter_name]:
            if name in layer.lora_A:
                check_plain(layer, name, dropout=True)


def balances_routers(model: PreTrainedModel) -> bool:
    """Whether transformers has an auxiliary loss for this model's routers (Switch Transformers, arXiv:2101.03961)."""
    known = hasattr(sys.modules[type(model).__module__], "load_balancing_loss_func") and hasattr(model, "num_experts")
    return known and not model.config.is_encoder_decoder  # whose encoder has routers, too


class Policy(nn.Module):
    """The one module that the engine wraps: a PreferenceBatch in, token log-probs out; backbone and head inside.

    `autocast` is the dtype of matrix products, None for the weights' own. `noisy` says that dropout is on in training
    mode. `asked_attention` is the attention implementation that the model came with, None for the automatic choice.
    """

    def __init__(self, model: nn.Module, autocast: torch.dtype | None = None, noisy: bool = False) -> None:
        super().__init__()
        self.model = model
        self.autocast = autocast
        self.noisy = noisy
        self.router_coef = 0.0  # of the routers' auxiliary loss, which is computed where it is not 0
        self.shares = 0  # parameters that FSDP2 shards
        self.checkpointed: list[Any] = []  # blocks that checkpoint, while `checkpointing` is on
        self.train(model.training)
        self.configs = attention_configs(model)
        self.asked_attention = asked_attention(base_model(model))

    def forward(
        self, batch: Any, stats: Sequence[str] = (), instead: Callable[[], Any] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """-> (N,) fp32 log-probs of batch.targets, and (N,) of each statistic that `linear_logps` knows.

        With statistics, and a `router_coef`, also "router_loss", 0-dim, with a gradient. `instead`: see `within`.
        """
        if instead is not None:
            return instead()
        device = batch.input_ids.device.type
        with torch.autocast(device, self.autocast) if self.autocast else nullcontext():
            head = output_head(base_model(self.model))
            routers = bool(stats and self.router_coef)
            outputs = self._outputs(batch, {"output_router_logits": True} if routers else {})
            logps, found = linear_logps(
                head.inputs(_scored_rows(outputs, batch)),
                head.weight,
                batch.targets,
                head.bias,
                logit_scale=head.logit_scale,
                softcap=head.softcap,
                stats=stats,
            )
            return logps, {**found, "router_loss": self._router_loss(outputs, batch)} if routers else found

    def within(self, function: Callable[[], Any]) -> Any:
        """What a function gives that runs the model by itself: all of its weights are there, under FSDP2, too."""
        return self(None, instead=function)

    def hidden_rows(self, batch: PreferenceBatch) -> Tensor:
        """(N, D): final hidden states of the rows that predict a response token, and of no others."""
        return _scored_rows(self._outputs(batch, {}), batch)

    def _router_loss(self, outputs: Any, batch: PreferenceBatch) -> Tensor:
        """transformers' own for the padded batch: a shared prompt's tokens count twice."""
        model: Any = base_model(self.model)
        weights = batch.attention_mask
        if batch.segments is not None:
            index = batch.segments.key_index
            ones = torch.ones(index.shape, device=index.device)
            weights = ones.new_zeros(batch.input_ids.numel()).index_add_(0, index, ones).view(batch.input_ids.shape)
        loss = sys.modules[type(model).__module__].load_balancing_loss_func  # type: ignore[attr-defined]
        return loss(outputs.router_logits, model.num_experts, model.num_experts_per_tok, weights)

    def _outputs(self, batch: PreferenceBatch, more: Mapping[str, Any]) -> Any:
        """The backbone's."""
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False, **batch.media, **more}
        attention: AbstractContextManager[None] = nullcontext()
        if batch.segments is None:
            inputs["attention_mask"] = batch.attention_mask
        else:
            inputs |= {"position_ids": batch.position_ids, "segments": batch.segments}
            inputs["asked_attention"] = self.asked_attention
            attention = packed_attention(self.configs)
        checkpointed = self.checkpointed if torch.is_grad_enabled() else []
        set_checkpointing(checkpointed, True)
        try:
            if batch.decoder_input_ids is not None:
                return _decoded(base_model(self.model), batch)
            with attention:
                return backbone(base_model(self.model))(**inputs)
        finally:
            set_checkpointing(checkpointed, False)


def _decoded(model: PreTrainedModel, batch: PreferenceBatch) -> Any:
    """An encoder-decoder's decoder over both responses of each pair, whose prompt is encoded once."""
    encoded = model.get_encoder()(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    seen: Any = batch.attention_mask
    return model.get_decoder()(
        input_ids=batch.decoder_input_ids,
        encoder_hidden_states=encoded.repeat_interleave(2, 0),
        encoder_attention_mask=seen.repeat_interleave(2, 0),
        use_cache=False,
    )


def _scored_rows(outputs: Any, batch: PreferenceBatch) -> Tensor:
    hidden = outputs.last_hidden_state.flatten(0, 1)
    if batch.segments is not None and batch.segments.crowded:
        return hidden[batch.logit_rows]  # sorts in the backward, so that sums of more than two repeat
    return hidden.index_select(0, batch.logit_rows)


@contextmanager
def checkpointing(policy: Policy, kwargs: Mapping[str, Any] | None) -> Iterator[None]:
    """Within it, `policy` checkpoints its blocks (non-reentrant); a second run sees the attention of the first.

    kwargs: torch's checkpoint's, and two by the names of transformers: every_n_layers (1), offload (False: block inputs
    stay on the device).

    Only inside the policy's own forward: a model with checkpointing on generates without its key-value cache, and
    transformers then gives wrong tokens. Raises ValueError where the model does not support it.
    """
    base = base_model(policy.model)
    if not base.supports_gradient_checkpointing:
        raise ValueError(
            f"{type(base).__name__} does not support gradient checkpointing: set gradient_checkpointing=False"
        )
    modules: list[Any] = [module for module in base.modules() if hasattr(module, "gradient_checkpointing")]
    before = [{key: vars(module)[key] for key in CHECKPOINT if key in vars(module)} for module in modules]
    options = {**(kwargs or {}), "use_reentrant": False, "context_fn": checkpoint_contexts(policy.configs)}
    every, offload = options.pop("every_n_layers", 1), options.pop("offload", False)
    chosen = _every_nth(modules, every, base)
    function: Any = partial(checkpoint, **options)
    function = HostCopies(function) if offload else function
    if offload and not any(isinstance(module, GradientCheckpointingLayer) for module in chosen):
        raise ValueError(f"{type(base).__name__} has no blocks whose inputs could be moved: set offload=False")
    # not by the model's own method: that also makes the embeddings' output require a gradient, for good
    for module in modules:
        module._gradient_checkpointing_func = function
    policy.checkpointed = chosen
    set_checkpointing(modules, False)
    try:
        yield
    finally:
        policy.checkpointed = []
        for module, own in zip(modules, before, strict=True):
            for key in CHECKPOINT:
                vars(module).pop(key, None)
            vars(module).update(own)


def _every_nth(modules: list[Any], every: int, model: PreTrainedModel) -> list[Any]:
    """The first block of every `every`, and what is no part of a block: T5's attentions look at a flag of their own,
    and take another way in the second run, where it is off. Raises ValueError where blocks cannot be told apart.
    """
    blocks = [module for module in modules if isinstance(module, GradientCheckpointingLayer)]
    if every > 1 and not blocks:
        raise ValueError(f"{type(model).__name__} checkpoints all of its blocks or none: leave every_n_layers out")
    if every > max(1, len(blocks)):
        raise ValueError(
            f"every_n_layers={every} of {type(model).__name__}, which has {len(blocks)} blocks: give a number of at "
            f"most {len(blocks)}"
        )
    left_out = {id(part) for block in blocks for part in block.modules() if part is not block}
    left_out |= {id(block) for place, block in enumerate(blocks) if place % every}
    return [module for module in modules if id(module) not in left_out]


def checkpoints_already(model: nn.Module) -> bool:
    """Whether the model came with gradient checkpointing switched on."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def set_checkpointing(modules: Sequence[Any], on: bool) -> None:
    """The flag that transformers' blocks read."""
    for module in modules:
        module.gradient_checkpointing = on
