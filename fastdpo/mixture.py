"""Several training sets as one: end to end, or drawn with weights.

Each set is read and tokenized by itself, so strings in one and chats in another go together. Without weights an epoch
has every row once. With weights, rows are drawn one by one from a set chosen by its weight, each set in its own order,
and an epoch ends when the first set has given all of its rows: a set's share of the epoch is its weight, and of the
sets that are not used up the same first rows are seen in each epoch.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, concatenate_datasets
from datasets import interleave_datasets as draw_from
from huggingface_hub.utils import HFValidationError, validate_repo_id

from fastdpo.rows import COMPLETION_COLUMNS

logger = logging.getLogger(__name__)

Table = Dataset | IterableDataset
COLUMNS = {"chosen", "chosen_ids", COMPLETION_COLUMNS[0]}  # a dict with one of them is a table, and not several
SPLITS = (DatasetDict, IterableDatasetDict)


def several_sets(source: Any) -> TypeGuard[Mapping[str, Any]]:
    """Whether a dict holds datasets by name and not columns, rows or splits."""
    return isinstance(source, Mapping) and not isinstance(source, SPLITS) and not COLUMNS & set(source)


Weights = Sequence[float] | Mapping[str, float]  # in the order of the sets, or by their names


def training_sets(source: Any, weights: Weights | None) -> dict[str, Any]:
    """The sets of a mixture by name, a list's by their place; of a single one its name is "". Raises ValueError for
    weights that do not fit.
    """
    named: dict[str, Any] = {"": source}
    if isinstance(source, (list, tuple)) and source and all(isinstance(item, _SOURCES) for item in source):
        named = {str(place) if len(source) > 1 else "": item for place, item in enumerate(source)}
    elif several_sets(source) and not all(_is_column(value) for value in source.values()):
        named = dict(source)
    if isinstance(weights, Mapping) and set(weights) != set(named):
        raise ValueError(
            f"train_dataset_weights names {', '.join(weights)}, and the datasets of train_dataset are "
            f"{', '.join(named) or 'one'}: give a weight to each of several, or leave it out"
        )
    if weights is not None and (len(weights) != len(named) or len(named) == 1):
        raise ValueError(
            f"train_dataset_weights={weights}, and the datasets of train_dataset are {len(named)}: give a weight to "
            "each of several, or leave it out"
        )
    return named


def hub_names(source: Any) -> tuple[str, ...]:
    """Of training sets that were loaded: the names of those that are not files here."""
    parts = () if source is None else training_sets(source, None).values()
    return tuple(part for part in parts if isinstance(part, str) and is_hub_name(part))


def is_hub_name(name: str) -> bool:
    """Whether what was loaded by this name came from the Hub, and not from a file or a directory."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


_SOURCES = (str, Path, Dataset, IterableDataset, *SPLITS, list, tuple)


def _is_column(value: Any) -> bool:
    """A list of cells, such as of a column with a misspelt name, and not of rows."""
    return isinstance(value, (list, tuple)) and not any(isinstance(item, dict) for item in value)


def mixed(tables: Mapping[str, Table], weights: Weights | None, seed: int) -> Table:
    """One table, or stream, of all. Raises ValueError where some are streams and some are not."""
    parts: list[Any] = list(tables.values())
    if isinstance(weights, Mapping):
        weights = [weights[name] for name in tables]
    if len({isinstance(part, IterableDataset) for part in parts}) > 1:
        raise ValueError("train_dataset mixes streams and tables, which do not go together: stream all of them or none")
    if weights is None:
        table = concatenate_datasets(parts)
        shares = ["" for _ in parts]
    else:
        total = sum(weights)
        probabilities = [weight / total for weight in weights]
        table = draw_from(parts, probabilities, seed=seed, stopping_strategy="first_exhausted")
        shares = [f", {probability:.3g} of the rows" for probability in probabilities]
    sizes = ["a stream" if isinstance(part, IterableDataset) else f"{len(part)} pairs" for part in parts]
    told = [f"{name} ({size}{share})" for name, size, share in zip(tables, sizes, shares, strict=True)]
    epoch = "" if isinstance(table, IterableDataset) else f"; an epoch has {len(table)} pairs"
    logger.info("train: %d datasets, %s%s", len(parts), ", ".join(told), epoch)
    return table
