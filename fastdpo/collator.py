"""A `data_collator` of the user: what it is given, and how the padded batch that it returns becomes pairs again.

It is called with groups of rows, as a trainer that pads its batches would call it, and may change their tokens. What it
returns is read back into pairs, which then go the way of all pairs: packed, split into micro-batches, remembered by
their tokens. So the numbers of a run depend on the tokens that it chose and not on how it padded them.

Two forms are understood, on whichever side they are padded:

    TRL 1.16    input_ids, attention_mask, completion_mask: all chosen rows, then all rejected ones
    TRL 0.11    chosen_input_ids, chosen_attention_mask, chosen_labels, and the same of rejected; a label is its token
                where that is scored

Legend: P pairs, R = 2P rows, T tokens of a padded row.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastdpo.data import TokenPair

logger = logging.getLogger(__name__)

SIDES = ("chosen", "rejected")
JOINT_KEYS = ("input_ids", "attention_mask", "completion_mask")
SIDE_KEYS = {side: tuple(f"{side}_{part}" for part in ("input_ids", "attention_mask", "labels")) for side in SIDES}
# Parts of the names of what a forward would take, and the pairs made here would lose
TO_THE_MODEL = ("pixel", "image", "position_ids", "token_type_ids", "decoder")


@dataclass(frozen=True)
class Collator:
    """Rows of a tokenized table -> pairs, by way of the user's function."""

    collate: Callable[[list[dict[str, Any]]], Any]
    label_pad_token_id: int
    embedding_rows: int  # token ids lie below

    def __call__(self, rows: Sequence[Mapping[str, Any]], size: int) -> list[TokenPair]:
        """A pair a row, collated in groups of at most `size` rows. Raises ValueError for what is no batch of them."""
        pairs: list[TokenPair] = []
        for start in range(0, len(rows), size):
            group = [with_both_names(row, self.label_pad_token_id) for row in rows[start : start + size]]
            made = padded_pairs(self.collate(group), self.label_pad_token_id)
            if len(made) != len(group):
                raise ValueError(
                    f"data_collator was given {len(group)} rows and returned {len(made)} pairs: return each of them"
                )
            pairs += made
        ids = [token for pair in pairs for part in (pair.prompt, pair.chosen, pair.rejected) for token in part]
        if ids and not 0 <= min(ids) <= max(ids) < self.embedding_rows:
            raise ValueError(
                f"data_collator returned token ids from {min(ids)} to {max(ids)}, and the model's embedding has "
                f"{self.embedding_rows} rows: is padding among the tokens that attention_mask names?"
            )
        return pairs


def with_both_names(row: Mapping[str, Any], label_pad_token_id: int) -> dict[str, Any]:
    """A row under the names that collators of TRL 1.16 read, its own, and under those of 0.11: whole sequences."""
    prompt = list(row["prompt_ids"])
    both = {**row, "prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
    for side in SIDES:
        response = list(row[f"{side}_ids"])
        whole = prompt + response
        values = whole, [1] * len(whole), [label_pad_token_id] * len(prompt) + response
        both |= dict(zip(SIDE_KEYS[side], values, strict=True))
    return both


def padded_pairs(batch: Any, label_pad_token_id: int) -> list[TokenPair]:
    """The pairs of a padded batch in either form: a prompt is what stands before the first scored token, a response
    what is scored. Raises ValueError where there is no such thing.
    """
    sides = zip(SIDES, _sides(batch, label_pad_token_id), strict=True)
    chosen, rejected = (_responses(side, *rows) for side, rows in sides)
    if len(chosen) != len(rejected):
        raise ValueError(f"a padded batch has {len(chosen)} chosen rows and {len(rejected)} rejected ones: pair them")
    pairs = []
    for row, ((prompt, good), (other, bad)) in enumerate(zip(chosen, rejected, strict=True)):
        if prompt != other:
            raise ValueError(
                f"row {row} of a padded batch has {len(prompt)} tokens before what is scored of chosen, and "
                f"{len(other)} others before what is scored of rejected: one prompt goes before both"
            )
        pairs.append(TokenPair(prompt, good, bad))
    return pairs


def padded_rows(pairs: Sequence[Any], pad_token_id: int) -> dict[str, Tensor]:
    """The other way, into the form of TRL 1.16: (R, T) each, padded on the right."""
    parts = [(pair.prompt, getattr(pair, side), getattr(pair, f"{side}_from")) for side in SIDES for pair in pairs]
    rows = {
        "input_ids": [[*prompt, *response] for prompt, response, _ in parts],
        "attention_mask": [[1] * (len(prompt) + len(response)) for prompt, response, _ in parts],
        "completion_mask": [
            [0] * (len(prompt) + unscored) + [1] * (len(response) - unscored) for prompt, response, unscored in parts
        ],
    }
    padding = {"input_ids": pad_token_id}
    return {
        name: pad_sequence([torch.tensor(row) for row in values], batch_first=True, padding_value=padding.get(name, 0))
        for name, values in rows.items()
    }


def _sides(batch: Any, label_pad_token_id: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(P, T) of the chosen rows and of the rejected ones: tokens, which of them are there, which are scored."""
    joint = isinstance(batch, Mapping) and "input_ids" in batch
    wanted = JOINT_KEYS if joint else (*SIDE_KEYS["chosen"], *SIDE_KEYS["rejected"])
    _check_keys(batch, wanted)
    found = {name: _tensor(name, batch[name]) for name in wanted}
    if joint:
        ids, seen, scored = found.values()
        _check_shapes(JOINT_KEYS, (ids, seen, scored))
        if len(ids) % 2:
            raise ValueError(f"input_ids has {len(ids)} rows: expected all chosen rows, then as many rejected ones")
        return list(zip(ids.chunk(2), seen.bool().chunk(2), scored.bool().chunk(2), strict=True))
    sides = []
    for names in SIDE_KEYS.values():
        ids, seen, labels = (found[name] for name in names)
        _check_shapes(names, (ids, seen, labels))
        scored = labels != label_pad_token_id
        if (labels != ids)[scored].any():
            raise ValueError(
                f"{names[2]} names other tokens than {names[0]}: a label is the token of its place where that is "
                f"scored, and label_pad_token_id={label_pad_token_id} elsewhere"
            )
        sides.append((ids, seen.bool(), scored))
    return sides


def _tensor(name: str, value: Any) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name} of a padded batch is a {type(value).__name__} that makes no tensor ({error}): expected (rows, "
            "tokens) whole numbers"
        ) from error


def _check_shapes(names: Sequence[str], values: Sequence[Tensor]) -> None:
    shapes = [tuple(value.shape) for value in values]
    if len(set(shapes)) > 1 or len(shapes[0]) != 2:
        raise ValueError(f"{', '.join(names)} of a padded batch have the shapes {shapes}: expected (rows, tokens)")


def _check_keys(batch: Any, wanted: Sequence[str]) -> None:
    if not isinstance(batch, Mapping):
        raise ValueError(f"a padded batch is a dict of tensors, got {type(batch).__name__}")
    if missing := [name for name in wanted if name not in batch]:
        raise ValueError(
            f"a padded batch lacks {', '.join(missing)}: expected {', '.join(JOINT_KEYS)} (all chosen rows, then all "
            "rejected ones), or chosen_ and rejected_ input_ids, attention_mask and labels"
        )
    others = [str(name) for name in batch if name not in wanted]
    for name in others:
        if name.startswith("ref"):
            raise ValueError(
                f"a padded batch has {name}, and reference log-probs do not come with batches: leave it out, they are "
                "computed once a row; without a data_collator precompute_ref_log_probs does it ahead"
            )
        if any(part in name for part in TO_THE_MODEL):
            raise ValueError(f"a padded batch has {name}, which the model would not be given: leave it out")
    if unknown := tuple(name for name in others if not name.startswith(("prompt", *SIDES))):
        _say_unread(unknown)


@cache
def _say_unread(names: tuple[str, ...]) -> None:
    logger.info("data_collator: %s of its batches is not looked at", ", ".join(names))


def _responses(side: str, ids: Tensor, seen: Tensor, scored: Tensor) -> list[tuple[list[int], list[int]]]:
    """Of each row: what stands before its scored tokens, and these. What comes after them changes nothing."""
    made = []
    for row, (tokens, there, marked) in enumerate(zip(ids, seen, scored, strict=True)):
        where = f"row {row} of {side} in a padded batch"
        if not marked.any():
            raise ValueError(f"{where} has no scored token: was its response cut off? Leave the row out of the dataset")
        if (marked & ~there).any():
            raise ValueError(f"{where} scores places where attention_mask is 0")
        for mask, name in ((there, "attention_mask"), (marked, "what is scored")):
            places = mask.nonzero()[:, 0]
            if len(places) != places[-1] - places[0] + 1:
                raise ValueError(f"{where}: {name} has holes, expected one run of tokens")
        first = int(marked.int().argmax())
        made.append((tokens[:first][there[:first]].tolist(), tokens[marked].tolist()))
    return made
