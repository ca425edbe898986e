"""Optimizer batches from tokenized tables: which rows a step sees, and how they group into micro-batches.

One item of a loader is everything that one optimizer step computes, as a list of PreferenceBatches. Workers do the
collation.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any
from zlib import crc32

import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader, Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from fastdpo.batch import PreferenceBatch, Share, deal, microbatches, pairs_of
from fastdpo.collator import Collator
from fastdpo.config import DPOConfig
from fastdpo.data import ID_COLUMNS, TokenPair, list_lengths, pair_of, row_key
from fastdpo.layout import Layout
from fastdpo.ranks import Ranks
from fastdpo.unpaired import FROM_COLUMNS

# Tokens of a micro-batch on a CPU, where `max_tokens_per_microbatch` is unset. 16 pairs of a 20M-parameter Llama took
# 21 s with budgets of 512, 1024, 2048 and none, and 0.7, 1.0, 1.4 and 2.0 GiB (2-core Xeon, 1 thread, 2026-11-22).
CPU_TOKENS = 512


@dataclass(frozen=True)
class Collate:
    """Rows of one optimizer batch -> the micro-batches of this process's share."""

    layout: Layout
    max_pairs: int  # a micro-batch, without a token budget
    max_tokens: int | None
    rank: int = 0
    processes: int = 1
    keyed: bool = True  # rows are named, so that their reference log-probs are remembered
    collator: Collator | None = None  # the user's, of the rows of this process's share

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Share:
        pairs, whole = [pair_of(row) for row in rows], 0
        share: Sequence[int] = range(len(rows))
        if self.processes > 1:
            whole = crc32(b"".join(map(row_key, pairs)))
            share = deal([self.layout.tokens(pair) for pair in pairs], self.processes)[self.rank]
            pairs = [pairs[index] for index in share]
        if self.collator is not None:
            pairs = self.collator([rows[index] for index in share], self.max_pairs)
        keys = [row_key(pair) for pair in pairs] if self.keyed else []
        grouped = self._grouped(pairs, keys)
        grouped.whole, grouped.places = whole, list(zip(keys, share, strict=False))
        return grouped

    def regroup(self, share: Share, max_tokens: int) -> Share:
        """The same pairs, on the CPU, in micro-batches by another budget."""
        found = [pair for batch in share for pair in pairs_of(batch)]
        pairs = [pair if isinstance(pair, TokenPair) else TokenPair(**pair._asdict()) for pair in found]
        again = replace(self, max_tokens=max_tokens)._grouped(pairs, [key for batch in share for key in batch.keys])
        again.whole = share.whole
        return again

    def empty(self) -> PreferenceBatch:
        return self.layout.empty()

    def _grouped(self, pairs: Sequence[TokenPair], keys: Sequence[bytes]) -> Share:
        lengths = [self.layout.tokens(pair) for pair in pairs]
        return Share(
            self.layout.collate([pairs[i] for i in group], [keys[i] for i in group] if keys else [])
            for group in microbatches(lengths, self.max_pairs, self.max_tokens, padded=not self.layout.packed)
        )


class EpochSampler(Sampler[int]):
    """The rows of one epoch in the order that `train_sampling_strategy` asks for; the same for the same seed and
    epoch.
    """

    def __init__(self, table: Dataset, strategy: str, batch_pairs: int, seed: int) -> None:
        self.rows, self.strategy, self.batch_pairs, self.seed = len(table), strategy, batch_pairs, seed
        self.epoch = self.skipped = 0  # rows of the next epoch that were seen before the run was stopped
        self.lengths: list[int] = []
        if strategy == "group_by_length":
            self.lengths = sum(list_lengths(table, column) for column in ID_COLUMNS).tolist()  # type: ignore[union-attr]

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        skipped, self.skipped = self.skipped, 0
        return islice(self._order(), skipped, None)

    def _order(self) -> Iterator[int]:
        if self.strategy == "sequential":
            return iter(range(self.rows))
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        if self.strategy == "group_by_length":
            return iter(get_length_grouped_indices(self.lengths, self.batch_pairs, generator=generator))
        return iter(torch.randperm(self.rows, generator=generator).tolist())


def train_loader(
    table: Dataset | IterableDataset, layout: Layout, config: DPOConfig, ranks: Ranks, collator: Collator | None = None
) -> DataLoader:
    """Optimizer batches of per_device_train_batch_size * gradient_accumulation_steps pairs a process, which all
    processes read and take their share of; the last one may be smaller.
    """
    pairs = config.per_device_train_batch_size * config.gradient_accumulation_steps * ranks.count
    sampler = None
    if isinstance(table, Dataset):
        seed = config.seed if config.data_seed is None else config.data_seed
        sampler = EpochSampler(table, config.train_sampling_strategy, pairs, seed)
    keyed = isinstance(table, Dataset)  # a stream may never come back to a row
    size, budget = config.per_device_train_batch_size, token_budget(config, layout)
    collate = Collate(layout, size, budget, ranks.rank, ranks.count, keyed, collator)
    return _loader(table, sampler, pairs, collate, config, config.dataloader_drop_last, config.dataloader_in_order)


def eval_loader(
    table: Dataset | IterableDataset, layout: Layout, config: DPOConfig, ranks: Ranks, collator: Collator | None = None
) -> DataLoader:
    """Batches of per_device_eval_batch_size pairs a process, in order."""
    pairs = config.per_device_eval_batch_size
    collate = Collate(layout, pairs, token_budget(config, layout), ranks.rank, ranks.count, collator=collator)
    return _loader(table, None, pairs * ranks.count, collate, config, False, in_order=True)


def token_budget(config: DPOConfig, layout: Layout) -> int | None:
    """Tokens of a micro-batch; None where it goes by pairs, as where tokens say little of what a pair takes."""
    by_tokens = config.device.type == "cpu" and layout.make is None
    return config.max_tokens_per_microbatch or (CPU_TOKENS if by_tokens else None)


def _loader(
    table: Dataset | IterableDataset,
    sampler: EpochSampler | None,
    pairs: int,
    collate: Collate,
    config: DPOConfig,
    drop: bool,
    in_order: bool,
) -> DataLoader:
    if collate.collator is not None:
        _check_collated(table, config)
    return DataLoader(
        table,  # type: ignore[arg-type]
        generator=torch.Generator(),  # of the workers' seeds, which would come from the random state of dropout
        batch_size=pairs,
        sampler=sampler,
        collate_fn=collate,
        drop_last=drop,
        num_workers=config.dataloader_num_workers,
        pin_memory=config.dataloader_pin_memory and config.device.type == "cuda",
        persistent_workers=config.dataloader_persistent_workers,
        prefetch_factor=config.dataloader_prefetch_factor,
        in_order=in_order,
        multiprocessing_context=config.dataloader_multiprocessing_context,
    )


def _check_collated(table: Dataset | IterableDataset, config: DPOConfig) -> None:
    if isinstance(table, IterableDataset) and not config.remove_unused_columns:
        raise ValueError(
            "remove_unused_columns=False keeps the columns of tables for the data_collator, and the dataset is a "
            "stream: give it as a table, or leave the option out"
        )
    if set(FROM_COLUMNS) & set(table.column_names or ()):
        raise ValueError("a data_collator is given pairs of one prompt, and the rows are unpaired: leave it out")


def length_of_run(loader: DataLoader, args: DPOConfig) -> tuple[int, float]:
    """-> optimizer steps and epochs of a run over a train loader."""
    if isinstance(loader.dataset, IterableDataset):
        return args.max_steps, 1
    if not len(loader):
        raise ValueError(
            "train_dataset is smaller than one batch, and dataloader_drop_last=True drops it: set it to False"
        )
    if args.max_steps > 0:
        return args.max_steps, args.max_steps / len(loader)
    return math.ceil(args.num_train_epochs * len(loader)), args.num_train_epochs


def row_numbers(loader: DataLoader, epoch: int, batches: int, share: Share) -> dict[bytes, list[int]]:
    """-> a key, and its rows' numbers in the table, of each pair of a share of the optimizer batch that comes after
    `batches` ones of an epoch. Nothing where pairs have no keys (streams), or workers may change the order of batches.
    """
    if not (share.places and loader.in_order):
        return {}
    sampler: Any = copy.copy(loader.sampler)
    size = loader.batch_size or 1
    sampler.epoch, sampler.skipped = epoch, batches * size
    dealt = list(islice(sampler, size))
    numbers: dict[bytes, list[int]] = {}  # equal rows have one key
    for key, place in share.places:
        numbers.setdefault(key, []).append(dealt[place])
    return numbers


def epoch_batches(loader: DataLoader, epoch: int, done: int = 0) -> Iterator[Share]:
    """An epoch's batches, whose rows come in another order each time, without the first `done` ones."""
    loader.generator.manual_seed(epoch)  # type: ignore[union-attr]
    if isinstance(loader.dataset, IterableDataset):
        loader.dataset.set_epoch(epoch)
        batches = iter(loader)
        for _ in range(done):
            next(batches, None)
        return batches
    sampler: Any = loader.sampler
    sampler.epoch, sampler.skipped = epoch, done * (loader.batch_size or 1)
    return iter(loader)
