"""What a run resolved to, in words: for the log, and for the report beside its curves."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset, IterableDataset

from fastdpo import last_block
from fastdpo.attention import backend_report
from fastdpo.checks import loss_names
from fastdpo.config import DPOConfig
from fastdpo.layout import Layout
from fastdpo.loader import token_budget
from fastdpo.memory import Plan
from fastdpo.model import Policy, base_model
from fastdpo.patching import PatchReport
from fastdpo.quantized import misread_layers, weights_report
from fastdpo.ranks import Ranks
from fastdpo.reference import NoReference, Reference
from fastdpo.report import HtmlReport
from fastdpo_kernels import linear_logps, pair_loss

logger = logging.getLogger(__name__)


def facts_of(
    policy: Policy,
    layout: Layout,
    reference: Reference | NoReference,
    fused: Sequence[PatchReport],
    config: DPOConfig,
    ranks: Ranks,
) -> Iterator[tuple[str, str]]:
    """(what, in words) of what the run resolved to."""
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    total = base_model(policy.model).num_parameters()  # which counts what is packed in one element of 4-bit weights
    device = torch.cuda.get_device_name(config.device) if config.device.type == "cuda" else str(config.device)
    products = str(policy.autocast or next(policy.parameters()).dtype).removeprefix("torch.")
    yield "model", f"{type(base_model(policy.model)).__name__}, {trained:,} of {total:,} parameters train"
    if quantized := weights_report(policy):
        yield "base weights", quantized
    yield "device", f"{device}, matrix products in {products}, dropout {_noise_in_words(policy, config)}"
    if not fused and (misread := misread_layers(policy)):
        logger.warning(
            "bitsandbytes reads the 4-bit weights of %d layers wrongly on this CPU, such as %s, as their rows end "
            "within a block of scales: set fused_kernels=True, which reads them right, or leave them in 16 bits "
            "(llm_int8_skip_modules of quantization_config)",
            len(misread),
            misread[0],
        )
    if ranks.count > 1:
        how = "the whole model; gradients are summed once a step"
        if ranks.fsdp is not None:
            how = "a share of each weight (FSDP2); gradients are summed with each micro-batch's backward"
        yield "processes", f"{ranks.count}, each with {how}"
    sharing = "prompts and other beginnings shared" if layout.shared else "prompts shared"
    yield "layout", f"{f'packed, {sharing}' if layout.packed else 'padded'} ({layout.reason})"
    yield "reference", reference.description
    if policy.router_coef:
        yield "routers", f"{policy.router_coef:g} times their auxiliary loss is added, of each micro-batch"
    if config.attn_implementation and layout.packed:
        where = "packed batches and" if policy.asked_attention else "what is not packed, such as"
        yield f"attention of {where} generation", f"{config.attn_implementation}, as asked for"
    for report in fused or ["off, blocks run as transformers has them"]:
        yield "fused kernels", str(report)
    if layout.packed and last_block.is_on(policy):
        yield "last block", "its MLP computes the rows that the head reads, and no others"
    kernels = linear_logps.method_report(config.device), pair_loss.method_report(config.device)
    yield from (*kernels[0], *kernels[1], *(backend_report(layout.attention) if layout.packed else []))
    budget = token_budget(config, layout)
    weights = config.loss_weights or [1] * len(config.loss_type)
    losses = " + ".join(f"{weight:g} {name}" for name, weight in zip(loss_names(config), weights, strict=True))
    pairs = config.per_device_train_batch_size * config.gradient_accumulation_steps * ranks.count
    size = f"{budget} tokens" if budget else f"{config.per_device_train_batch_size} pairs"
    yield (
        "loss",
        f"{losses}, beta {config.beta:g}, learning rate {config.learning_rate:g}, {pairs} pairs an optimizer step in "
        f"micro-batches of up to {size}",
    )


def _noise_in_words(policy: Policy, config: DPOConfig) -> str:
    configs: Any = getattr(policy.model, "peft_config", {})
    of_adapters = max((getattr(one, "lora_dropout", None) or 0.0 for one in configs.values()), default=0.0)
    embeddings = "" if config.neftune_noise_alpha is None else f", noise {config.neftune_noise_alpha:g} on embeddings"
    if not config.disable_dropout or not of_adapters:
        return ("off" if config.disable_dropout else "on") + embeddings
    off = f"off, lora_dropout={of_adapters:g} of the adapters included (disable_dropout=False turns it on)"
    return off + embeddings


def build_report(
    policy: Policy,
    tables: Mapping[str, Dataset | IterableDataset | None],
    reference: Reference | NoReference,
    facts: Sequence[tuple[str, str]],
    plan: Plan | None,
    config: DPOConfig,
    ranks: Ranks,
    since: float,
) -> HtmlReport:
    model = base_model(policy.model)
    data = ", ".join(
        f"{name}: {f'{len(table):,} pairs' if isinstance(table, Dataset) else 'a stream'}"
        for name, table in tables.items()
        if table is not None
    )
    pairs = config.per_device_train_batch_size * config.gradient_accumulation_steps * ranks.count
    title = model.config._name_or_path or type(model).__name__
    return HtmlReport(config, title, [("data", data), *facts], pairs, plan, reference, since)
