"""From what the user gave to the parts of a run: tokenizer, tables, policy, layout, reference, callbacks.

Cheap checks come first, so that bad input is refused before a model loads.
"""

from __future__ import annotations

import copy
import gc
import logging
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    DefaultFlowCallback,
    PreTrainedModel,
    PrinterCallback,
    ProcessorMixin,
    ProgressCallback,
)
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks

from fastdpo.attention import CannotPack
from fastdpo.batch import PreferenceBatch
from fastdpo.card import TAGS
from fastdpo.checks import check_models, choose_adapters, kind_of, needs_reference
from fastdpo.collator import Collator
from fastdpo.config import DPOConfig
from fastdpo.data import (
    ID_COLUMNS,
    TokenPair,
    check_vocabulary,
    list_lengths,
    load_rows,
    pair_of,
    prepare_tokenizer,
    text_part,
    tokenize_pairs,
)
from fastdpo.images import Processing
from fastdpo.last_block import scored_rows_alone
from fastdpo.layout import Layout, find_layout, probe_pairs
from fastdpo.loading import compute_dtype, load_model, model_kind, place
from fastdpo.losses import sees_mean_reward
from fastdpo.memory import PairLengths, Plan, plan_run, runs_fused
from fastdpo.metrics import RunFiles
from fastdpo.mixture import mixed, several_sets, training_sets
from fastdpo.model import (
    Policy,
    add_adapters,
    balances_routers,
    base_model,
    input_embedding,
    learned_positions,
    prepare_precision,
)
from fastdpo.patching import PatchReport, patched
from fastdpo.ranks import Ranks, find_ranks
from fastdpo.reference import NoReference, Reference, find_reference
from fastdpo.reference_cache import remember
from fastdpo.sharding import is_sharded, shapes_of, shard
from fastdpo.step import MeanReward
from fastdpo.trackers import Callbacks
from fastdpo_kernels import launch
from fastdpo_kernels.pair_loss import PairwiseLoss

logger = logging.getLogger(__name__)

Table = Dataset | IterableDataset
EVALUATING = {"eval_strategy": ("steps", "epoch"), "save_strategy": ("best",)}  # values that evaluate
Model = str | PreTrainedModel | PeftModel


def build_collator(data_collator: Any, policy: Policy, config: DPOConfig) -> Collator | None:
    if data_collator is None:
        return None
    return Collator(data_collator, config.label_pad_token_id, input_embedding(policy.model).weight.shape[0])


def find_tokenizer(processing_class: Any, model: Model, config: DPOConfig) -> Any:
    """The given tokenizer, or the one that comes with the model, with a pad token; the processor of a model that sees
    images. Raises ValueError where there is none.
    """
    sees_images = kind_of(model, config) == "vision-language"
    if processing_class is None:
        name = model if isinstance(model, str) else base_model(model).config._name_or_path
        if not name:
            raise ValueError(
                "processing_class is missing and the model was not loaded from a place that has a "
                f"{'processor' if sees_images else 'tokenizer'}: give one"
            )
        options = {"revision": config.model_revision} if isinstance(model, str) else {}
        source = AutoProcessor if sees_images else AutoTokenizer
        try:
            processing_class = source.from_pretrained(name, trust_remote_code=config.trust_remote_code, **options)
        except ImportError as error:
            error.add_note("fastdpo: for rows of text alone give the model's tokenizer as processing_class")
            raise
        except (OSError, ValueError) as error:
            what = "processor" if sees_images else "tokenizer"
            raise ValueError(
                f"processing_class is missing, and no {what} loads from {name} ({error}): give it as processing_class"
            ) from error
    tokenizer = text_part(processing_class)
    if tokenizer is not processing_class and not sees_images:
        raise ValueError(
            f"processing_class is a {type(processing_class).__name__} and the model takes no images: pass its "
            ".tokenizer to train on text, or give a vision-language model"
        )
    if config.pad_token is not None and hasattr(tokenizer, "get_vocab"):
        if config.pad_token not in tokenizer.get_vocab():
            raise ValueError(f"pad_token={config.pad_token!r} is not in the tokenizer's vocabulary: give one that is")
        tokenizer.pad_token = config.pad_token
    prepare_tokenizer(tokenizer)
    return processing_class


def build_table(source: Any, tokenizer: Any, config: DPOConfig, name: str, split: str) -> Table:
    """Any dataset that load_rows takes -> token id columns; the first process of a machine fills datasets' cache."""
    with config.main_process_first():
        table = tokenize_pairs(load_rows(source, split, name), tokenizer, config, name)
    if name.startswith("train") and isinstance(table, IterableDataset) and config.max_steps < 1:
        raise ValueError(
            "train_dataset is a stream, whose length is not known: set max_steps to the number of optimizer steps"
        )
    return table


def build_train_table(source: Any, tokenizer: Any, config: DPOConfig) -> Table:
    """One training set, or several mixed by `train_dataset_weights`."""
    weights, split, tables = config.train_dataset_weights, config.dataset_train_split, {}
    for name, part in training_sets(source, weights).items():
        tables[name] = build_table(part, tokenizer, config, f"train_{name}" if name else "train", split)
        if config.neftune_noise_alpha and isinstance(tables[name], IterableDataset):
            raise ValueError(
                "neftune_noise_alpha draws noise by row, and the rows of a stream have no names: load the dataset, or "
                "leave the option out"
            )
    if len(tables) == 1:
        return next(iter(tables.values()))
    return mixed(tables, weights, config.seed if config.data_seed is None else config.data_seed)


def build_eval_tables(source: Any, tokenizer: Any, config: DPOConfig, prefix: str = "eval") -> dict[str, Table]:
    """One evaluation set under the name "eval", or several named ones ("eval_NAME")."""
    if source is None:
        wants = [name for name in ("eval_strategy", "save_strategy") if getattr(config, name) in EVALUATING[name]]
        wants += [name for name in ("load_best_model_at_end", "generate_during_eval") if getattr(config, name)]
        if wants:
            raise ValueError(
                f"{' and '.join(wants)} need{'s' if len(wants) == 1 else ''} an eval_dataset, and there is none: give "
                f"one, or leave {'it' if len(wants) == 1 else 'them'} out"
            )
        return {}
    several = several_sets(source)
    if several and not source:
        raise ValueError("eval_dataset is an empty dict: give at least one named dataset, or None")
    named = {f"{prefix}_{key}": value for key, value in source.items()} if several else {prefix: source}
    return {name: build_table(part, tokenizer, config, name, config.dataset_test_split) for name, part in named.items()}


def build_policy(model: Model, peft_config: Any, config: DPOConfig, ranks: Ranks) -> Policy:
    """The model on its device: adapters added, trained weights in fp32, the same in every process."""
    adapters = peft_config is not None or config.use_peft
    loaded: Any = load_model(model, config, adapters, reads=ranks.reads_weights)
    loaded = add_adapters(loaded, peft_config, config)
    if config.use_peft and (routers := loaded.active_peft_config.exclude_modules):
        logger.info("adapters: on all linear layers but %d routers, such as %s", len(routers), next(iter(routers)))
    if adapters and model_kind(base_model(loaded).config) == "vision-language":
        named = [name for name, part in loaded.named_modules() if isinstance(part, BaseTunerLayer)]
        seeing = sum("vision" in name or "visual" in name for name in named)
        logger.info("adapters: on %d layers, %d of them in the vision tower", len(named), seeing)
    if config.model_adapter_name:
        loaded.set_adapter(config.model_adapter_name)
    autocast = None if compute_dtype(config) == torch.float32 else compute_dtype(config)
    prepare_precision(loaded, autocast)
    _placed(loaded, config, ranks)
    noisy = not config.disable_dropout or config.neftune_noise_alpha is not None
    policy = Policy(loaded, autocast, noisy).train()
    policy.router_coef = _router_coef(base_model(loaded), config)
    base_model(loaded).add_model_tags(list(TAGS))
    return policy


def _router_coef(model: PreTrainedModel, config: DPOConfig) -> float:
    """As the option has it, else as the model's config asks for. Raises ValueError for a model without such a loss."""
    own: Any = model.config.get_text_config()
    asked, declared = getattr(own, "output_router_logits", False), getattr(own, "router_aux_loss_coef", 0.0) or 0.0
    chosen = config.router_aux_loss_coef
    if chosen is None and declared and not asked and balances_routers(model):
        logger.info("routers: no auxiliary loss; TRL 1.16 adds %g times it (router_aux_loss_coef)", declared)
    coef = (declared if asked else 0.0) if chosen is None else chosen
    if coef and not balances_routers(model):
        raise ValueError(
            f"router_aux_loss_coef={coef:g}, and {type(model).__name__} has no auxiliary loss of routers: leave it "
            "out, or set output_router_logits=False in the model's config"
        )
    return coef


def build_ref_policy(ref_model: Model | None, policy: Policy, config: DPOConfig, ranks: Ranks) -> Policy | None:
    """A reference model of its own, loaded as frozen weights are and computing as the policy does."""
    if ref_model is None:
        return None
    loaded = load_model(ref_model, config, adapters=True, is_reference=True, reads=ranks.reads_weights)
    return Policy(_placed(loaded, config, ranks), policy.autocast)


def frozen_copy(policy: Policy, ref_policy: Policy | None, config: DPOConfig, ranks: Ranks) -> Policy | None:
    """The reference of a policy that trains in full and is to be sharded, for what is cannot be copied."""
    if ranks.fsdp is None or ref_policy is not None or isinstance(policy.model, PeftModel):
        return None
    return Policy(copy.deepcopy(policy.model), policy.autocast) if needs_reference(config) else None


def shard_policies(
    policies: Sequence[Policy | None], tables: Mapping[str, Table], config: DPOConfig, ranks: Ranks
) -> Policy | None:
    """Under FSDP2: each process keeps a share of the weights from here on; -> what the first was, without them.

    Raises ValueError for rows with images: processes whose rows show none would not run the blocks of the vision tower.
    """
    if ranks.fsdp is None:
        return None
    if _pairs_with_images(tables.values()):
        raise ValueError(
            "rows with images are not trained under FSDP2 yet: configure accelerate for MULTI_GPU, where every process "
            "holds the whole model"
        )
    shapes = shapes_of(policies[0])
    for policy in policies:
        if policy is not None:
            shard(policy, ranks.fsdp, ranks.equalise, config.device)
    return shapes


def _placed(model: Any, config: DPOConfig, ranks: Ranks) -> Any:
    """On the run's device, and in all processes as in the first; what is to be sharded goes there unit by unit."""
    if ranks.fsdp is None:
        ranks.equalise(place(model, config.device))
    elif any(is_sharded(parameter) for parameter in model.parameters()):
        raise ValueError("the model was sharded by an earlier trainer, which holds on to it: load it again")
    return model


def common_layout(
    policy: Policy,
    ref_policy: Policy | None,
    processing_class: Any,
    config: DPOConfig,
    tables: Collection[Table | None] = (),
) -> Layout:
    """Packed where both models can, since they see the same batches; `tables` are those of the run.

    Pairs share what they begin alike with where they `may_share`.
    """
    rows, padding_value = input_embedding(policy.model).weight.shape[0], config.padding_value
    if padding_value is not None and padding_value >= rows:
        raise ValueError(f"padding_value={padding_value}, and the model's embedding has {rows} rows: give one of them")
    padding = text_part(processing_class).pad_token_id if padding_value is None else padding_value
    padding = padding if padding < rows else 0  # masked, so any token serves
    shown, processing = _pairs_with_images(tables), None
    if isinstance(processing_class, ProcessorMixin):
        processing = Processing(processing_class)
        if not shown and any(table is not None for table in tables) and not processing.prefixes:
            processing = None  # text alone, which may be packed
    layout = replace(find_layout(policy, padding, processing, shown), shared=may_share(config))
    if ref_policy is None or not layout.packed:
        return layout
    other = find_layout(ref_policy, padding)
    return layout if other.packed else replace(other, reason=f"ref_model: {other.reason}")


def may_share(config: DPOConfig) -> bool:
    """Not where dropout or noise is to be a pair's own."""
    return config.disable_dropout and config.neftune_noise_alpha is None


def _pairs_with_images(tables: Iterable[Table | None]) -> list[TokenPair]:
    """The first two."""
    given = (table for table in tables if isinstance(table, Dataset) and "images_key" in table.column_names)
    rows = (table[index] for table in given for index in range(len(table)))
    return list(islice((pair for row in rows if (pair := pair_of(row)).images is not None), 2))


def build_reference(
    policy: Policy,
    ref_policy: Policy | None,
    layout: Layout,
    config: DPOConfig,
    ranks: Ranks,
    copied: Policy | None = None,
) -> Reference | NoReference:
    """A given reference model, or what the policy starts as (`copied` is that, where it was made before); none where
    nothing depends on it.
    """
    if not needs_reference(config):
        return NoReference()
    probe, synced = probe_batch(policy, layout), config.sync_ref_model
    reference = find_reference(policy, ref_policy, probe, config.ld_alpha, config.ref_adapter_name, synced, copied)
    reference.ranks = ranks
    if synced:
        share, steps = config.ref_model_mixup_alpha, config.ref_model_sync_steps
        mixed_factors = ", the adapters' factors mixed" if reference.adapters and share < 1 else ""
        reference.description += f"; it follows the policy, by {share:g} every {steps} steps{mixed_factors}"
    return reference


def probe_batch(policy: Policy, layout: Layout) -> PreferenceBatch:
    """Two small pairs, always the same, on the policy's device."""
    weight = input_embedding(policy.model).weight
    return layout.collate(probe_pairs(weight.shape[0])).to(weight.device)


def plan_batches(
    policy: Policy,
    reference: Reference | NoReference,
    tables: Mapping[str, Table | None],
    layout: Layout,
    config: DPOConfig,
    ranks: Ranks,
    shapes: Policy | None = None,
) -> Plan | None:
    """On a CUDA device: the memory plan, where there is one, and from it `max_tokens_per_microbatch` where it is unset,
    and checkpointing with memory="auto". Raises ValueError where that is asked for and there is no plan.
    """
    if layout.make is not None:
        logger.info("memory: no plan for this kind of model: micro-batches go by pairs")
        return None
    if config.device.type != "cuda":
        if config.memory:
            raise ValueError("memory='auto' plans for an NVIDIA GPU, and the run has none: leave it out")
        return None
    lengths = PairLengths.of_tables([table for table in tables.values() if table is not None], config, layout.packed)
    budget, plan = 0, None
    try:
        plan = plan_run(policy, reference.policy, config, lengths, layout.packed, shapes, ranks)
        budget = max(1, plan.token_budget)
        for line in plan.lines():
            logger.log(logging.INFO if plan.fits else logging.WARNING, "memory: %s", line)
    except (ValueError, CannotPack) as reason:
        if config.memory:
            raise ValueError(f"memory='auto' finds no plan ({reason}): leave it out") from reason
        without = "" if config.max_tokens_per_microbatch else "; until then micro-batches go by pairs"
        logger.warning("memory: %s%s", reason, without)
    budget = min(theirs[0] for theirs in ranks.exchange("plan", [budget]))  # of the card with least room
    if config.max_tokens_per_microbatch is None:
        config.max_tokens_per_microbatch = budget or None
    return plan


def remember_reference(
    reference: Reference | NoReference,
    tables: Mapping[str, Table | None],
    policy: Policy,
    layout: Layout,
    config: DPOConfig,
    model: Model | None,
    ref_model: Model | None,
    ranks: Ranks,
) -> bool:
    """With `precompute_ref_log_probs` or `ref_log_probs`: log-probs of all rows, after which a reference model of its
    own is freed; -> whether one was.
    """
    if isinstance(reference, NoReference) or not (config.precompute_ref_log_probs or config.ref_log_probs):
        return False
    source = model if ref_model is None else ref_model
    given = {name: table for name, table in tables.items() if table is not None}
    complete = remember(reference, given, layout, config, source if isinstance(source, str) else None, ranks)
    if not complete or reference.policy is policy:
        return False
    reference.free()
    if isinstance(ref_model, nn.Module) and config.device.type != "cpu":
        ref_model.to("cpu")  # type: ignore[arg-type] # whoever gave it may hold on to it
    gc.collect()
    torch.cuda.empty_cache()
    logger.info("reference: freed, as all of its log-probs are known")
    return True


def compute_reference(
    model: str, ref_model: str | None, train_dataset: Any, eval_dataset: Any, config: DPOConfig
) -> int:
    """`fastdpo reference`: one frozen model, as a run with this config would have its reference, and nothing that
    trains; -> rows whose log-probs are in `config.ref_log_probs`.
    """
    check_models(model, ref_model, config, None)
    choose_adapters(model, None, config)
    tokenizer = find_tokenizer(None, model, config)
    tables = build_eval_tables(eval_dataset, tokenizer, config)
    tables["train"] = build_train_table(train_dataset, tokenizer, config)
    source = model if ref_model is None else ref_model
    frozen = config.use_peft or ref_model is not None
    ranks = find_ranks(config)
    loaded: Any = load_model(source, config, frozen, ref_model is not None, ranks.reads_weights)
    if not frozen:
        loaded.float()  # as what trains in full is
    autocast = None if compute_dtype(config) == torch.float32 else compute_dtype(config)
    policy = Policy(_placed(loaded, config, ranks), autocast).requires_grad_(False).eval()
    shard_policies([policy], tables, config, ranks)
    tables = check_fit(policy, None, tables, tokenizer, config)
    with fused_blocks([policy], config):
        layout = common_layout(policy, None, tokenizer, config, tables.values())
        reference = Reference(policy, nullcontext, f"{source} alone", True, config.ld_alpha)
        reference.ranks = ranks
        remember(reference, tables, layout, config, source, ranks)
    return reference.known_rows


def build_mean_reward(loss: PairwiseLoss, config: DPOConfig) -> MeanReward | None:
    """The running mean, where the loss compares rewards with one."""
    if not config.bco_running_mean or not sees_mean_reward(loss):
        return None
    zero = torch.zeros((), dtype=torch.float64, device=config.device)
    return MeanReward(zero, zero)


def check_fit(
    policy: Policy, ref_policy: Policy | None, tables: Mapping[str, Table], tokenizer: Any, config: DPOConfig
) -> dict[str, Table]:
    """The tables, after checking that the models have an embedding for every token and a position for every place."""
    model = base_model(policy.model)
    rows = min(input_embedding(part.model).weight.shape[0] for part in (policy, ref_policy) if part is not None)
    checked = {name: check_vocabulary(table, rows, text_part(tokenizer)) for name, table in tables.items()}
    for table in tables.values():
        _check_positions(model, _longest(table, config), config)
    return checked


def _check_positions(model: PreTrainedModel, longest: float, config: DPOConfig) -> None:
    """`longest` is the longest sequence in tokens. Learned positions are a limit, rotary ones a range."""
    limit = learned_positions(model)
    wanted = max(longest, 0 if config.max_length in (None, DPOConfig.max_length) else config.max_length)
    if limit is not None and wanted > limit:
        raise ValueError(
            f"sequences of up to {wanted} tokens (max_length={config.max_length}), but {type(model).__name__} has "
            f"learned positions for {limit}: set max_length={limit} or less"
        )
    text = model.config.get_text_config()
    reach = getattr(text, "max_position_embeddings", None)
    if limit is not None or reach is None:
        return
    rope = getattr(text, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings") or reach
    if rope.get("rope_type") in ("dynamic", "longrope") and wanted > original:
        raise ValueError(
            f"rope_type={rope['rope_type']!r} computes all sequences of a batch by its longest once that is beyond "
            f"{original} tokens, and there may be {wanted} here: set max_length={original} or less"
        )
    if reach == original:  # a scaled config may name the reach before scaling, or after it
        reach = int(reach * rope.get("factor", 1))
    if wanted > reach:
        logger.warning(
            "sequences may have %s tokens, the model was trained on %d: quality beyond that is not known; rope_scaling "
            "or a smaller max_length help",
            wanted,
            reach,
        )


def _longest(table: Table, config: DPOConfig) -> float:
    """Tokens of the longest sequence; of a stream, the longest that there may be."""
    if isinstance(table, IterableDataset):
        return math.inf if config.max_length is None else config.max_length
    lengths = [list_lengths(table, column) for column in ID_COLUMNS]
    if config.is_encoder_decoder:
        return int(np.max(lengths))
    return int((lengths[0] + np.maximum(lengths[1], lengths[2])).max())


def find_reporters(config: DPOConfig) -> list[Any]:
    """What `report_to` names, ready. Raises ValueError where the package of one is not installed."""
    try:
        return [reporter() for reporter in get_reporting_integration_callbacks(config.report_to)]
    except (RuntimeError, ImportError) as error:
        raise ValueError(f"report_to={config.report_to}: {error}") from error


def build_callbacks(callbacks: list[Any], policy: Policy, tokenizer: Any, config: DPOConfig) -> Callbacks:
    """transformers' own flow and progress, the run's files, then the reporters' and the user's."""
    shown = PrinterCallback if config.disable_tqdm else ProgressCallback
    every = [DefaultFlowCallback, shown, RunFiles, *callbacks]
    handler = Callbacks(every, policy.model, tokenizer, None, None)
    for callback in handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and config.logging_dir:
            callback.logging_dir = config.logging_dir
    return handler


@contextmanager
def fused_blocks(policies: Sequence[Policy | None], config: DPOConfig) -> Iterator[list[PatchReport]]:
    """Within it the blocks of these policies' models run on our kernels, where `fused_kernels` has it so, and the last
    one without rows that nobody reads, unless that is False or torch.compile takes the blocks; -> what was patched,
    nothing where that is off.
    """
    known = {id(one.model): one for one in policies if one is not None}
    models = [one.model for one in known.values()] if use_fused_kernels(config) else []
    lean = [] if config.torch_compile or config.fused_kernels is False else [*known.values()]
    with patched(models) as reports, scored_rows_alone(lean):
        del policies, known, models, lean  # a reference may be freed within it
        yield reports


def use_fused_kernels(config: DPOConfig) -> bool:
    return runs_fused(config, launch.device_of(config.device))
