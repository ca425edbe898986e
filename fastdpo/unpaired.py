"""Unpaired rows, a completion and whether it was liked, become pairs for the losses that need no pairs.

Such a loss (aot_unpaired) sorts the chosen and the rejected log-ratios of a whole optimizer batch and compares them
rank by rank, so any liked completion may stand beside any disliked one. Rows of one prompt are put together first, as
they share its computation; the others as they come. A pair of two prompts shares the tokens that both begin with, and
each response starts with the rest of its own, which is not scored. Where one kind has more rows, rows of the other are
used again in turn: every row is in a pair, and the sorted values stay samples of their two distributions.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Sequence
from hashlib import blake2b
from itertools import chain, cycle
from typing import TYPE_CHECKING, Any

from datasets import Dataset, Features, List, Value

from fastdpo.rows import COMPLETION_COLUMNS, ID_COLUMNS, common_prefix_length

if TYPE_CHECKING:
    from fastdpo.config import DPOConfig

logger = logging.getLogger(__name__)

LOSSES = ("aot_unpaired", "aot_pair")  # two names of one loss
FROM_COLUMNS = ("chosen_from", "rejected_from")  # how many tokens at the beginning of a response are not scored


def is_unpaired(columns: Sequence[str]) -> bool:
    return set(COMPLETION_COLUMNS) <= set(columns) and "chosen" not in columns


def check_unpaired(columns: Sequence[str], config: DPOConfig, name: str) -> None:
    """Raises ValueError for a run that unpaired rows cannot train."""
    found = f"The {name} dataset has unpaired rows (prompt, completion, label)"
    if "prompt" not in columns:
        raise ValueError(f"{found} without the column 'prompt': add it.")
    others = [loss for loss in config.loss_type if loss not in LOSSES]
    if others and len(others) < len(config.loss_type):
        raise ValueError(
            f"{found}, which aot_unpaired trains alone, and loss_type has {others} beside it: leave that out, or pair "
            "them first."
        )
    if others:
        raise ValueError(
            f"{found}, and loss_type={config.loss_type} compares two answers to one prompt: pair them first, or set "
            "loss_type='aot_unpaired'."
        )
    if config.ld_alpha is not None or config.is_encoder_decoder:
        why = "an encoder-decoder" if config.is_encoder_decoder else "ld_alpha, which looks at the shorter answer"
        raise ValueError(f"{found}, which do not go with {why}: pair them first.")


def liked(label: Any, where: str) -> bool:
    if label in (True, False) and not isinstance(label, float):
        return bool(label)
    raise ValueError(f"{where}: column 'label' is {label!r}, expected true (liked) or false.")


def pair_up(table: Dataset, name: str) -> Dataset:
    """Rows whose completion is in chosen_ids (liked) or rejected_ids -> rows of pairs, with FROM_COLUMNS."""
    rows: Any = table
    prompts = [_digest(row["prompt_ids"]) for row in rows.select_columns(["prompt_ids"])]
    likes = [bool(row["chosen_ids"]) for row in rows.select_columns(["chosen_ids"])]
    if len(set(likes)) < 2:
        raise ValueError(
            f"All completions of the {name} dataset are {'liked' if likes[0] else 'disliked'}: a preference needs both."
        )
    pairs = matches(prompts, likes)
    same = sum(prompts[one] == prompts[other] for one, other in pairs)
    most = max(max(Counter(side).values()) for side in zip(*pairs, strict=True))
    logger.info(
        "%s: %d unpaired rows, %d liked and %d disliked: %d pairs, %d of them of one prompt; a row is in up to %d",
        *(name, len(likes), sum(likes), len(likes) - sum(likes), len(pairs), same, most),
    )
    columns = {**dict.fromkeys(ID_COLUMNS, List(Value("int32"))), **dict.fromkeys(FROM_COLUMNS, Value("int32"))}
    index = Dataset.from_dict({"pair": pairs})
    return index.map(
        lambda row: _joined(*(table[place] for place in row["pair"])),
        remove_columns=["pair"],
        features=Features(columns),
        new_fingerprint=_digest(table._fingerprint.encode()).hex(),
    )


def matches(prompts: Sequence[bytes], likes: Sequence[bool]) -> list[tuple[int, int]]:
    """Which liked row stands beside which disliked one, by their places."""
    waiting: dict[tuple[bytes, bool], list[int]] = defaultdict(list)
    pairs = []
    for place, (prompt, like) in enumerate(zip(prompts, likes, strict=True)):
        if others := waiting[prompt, not like]:
            pairs.append((place, others.pop(0)))
        else:
            waiting[prompt, like].append(place)
    rest = {like: sorted(chain(*(left for (_, kind), left in waiting.items() if kind == like))) for like in set(likes)}
    fewer = len(rest[True]) < len(rest[False])  # the kind, liked or not, that runs out first
    every = [place for place, like in enumerate(likes) if like == fewer]
    pairs += zip(rest[not fewer], chain(rest[fewer], cycle(every)), strict=False)
    return sorted((one, other) if likes[one] else (other, one) for one, other in pairs)


def _joined(chosen: dict[str, Any], rejected: dict[str, Any]) -> dict[str, Any]:
    prompts = chosen["prompt_ids"], rejected["prompt_ids"]
    shared = common_prefix_length(*prompts)
    return {
        "prompt_ids": prompts[0][:shared],
        "chosen_ids": prompts[0][shared:] + chosen["chosen_ids"],
        "rejected_ids": prompts[1][shared:] + rejected["rejected_ids"],
        "chosen_from": len(prompts[0]) - shared,
        "rejected_from": len(prompts[1]) - shared,
    }


def _digest(value: Any) -> bytes:
    return blake2b(value if isinstance(value, bytes) else repr(value).encode(), digest_size=16).digest()
