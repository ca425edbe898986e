"""Rows of any supported shape become token pairs: one shared prompt, a chosen and a rejected answer.

A preference dataset comes as strings or as chat messages, with the prompt in a column of its own or only as the common
beginning of both answers. Every shape ends up as three lists of token ids with one guarantee: `prompt + chosen` and
`prompt + rejected` are token for token what the tokenizer makes of the two whole texts. The prompt is not tokenized
apart from the answers (tokens may merge across the seam, and a chat template may render a prompt alone differently):
it ends where it stops being a common token prefix of both.

BOS is there once if the tokenizer or the chat template writes one. EOS ends every answer that came as a string, once;
a chat ends as its template ends it. Rows with nothing to learn from are dropped and counted, never trained on.

With a vision-language model's processor, prompts may show images (`images.py`). No image is ever cut: only answers are
shortened, and a row whose prompt leaves them no room is dropped and counted.
"""

from __future__ import annotations

import json
import logging
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import datasets
import numpy as np
import tokenizers
import transformers
from datasets import Dataset, Features, IterableDataset, List, Value
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from fastdpo.images import Images, Processing, files_of, stored_images, with_parts
from fastdpo.rows import (
    COMPLETION_COLUMNS,
    ID_COLUMNS,
    IMAGE_COLUMNS,
    OPTION_COLUMNS,
    check_columns,
    common_prefix_length,
    given_ids,
    says_nothing,
    split_row,
    type_name,
    without_none,
)
from fastdpo.sources import load_rows
from fastdpo.unpaired import FROM_COLUMNS, check_unpaired, is_unpaired, liked, pair_up

if TYPE_CHECKING:
    from fastdpo.config import DPOConfig

__all__ = [
    "ID_COLUMNS",
    "TokenPair",
    "check_vocabulary",
    "load_rows",
    "pair_of",
    "prepare_tokenizer",
    "row_key",
    "tokenize_pairs",
    "truncate",
]

logger = logging.getLogger(__name__)

KEPT, EMPTY, EQUAL, NO_ROOM = FATES = 0, 1, 2, 3  # what becomes of a row
IMAGE_ROWS = 16  # tokenized at a time where rows may have images, so that few of these are in memory
SHOWN_CHARACTERS = 400  # of each part of the example row


@dataclass(frozen=True, slots=True)
class TokenPair:
    """One row: the answers follow the same prompt tokens."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    # how many tokens at the beginning of a response are not scored, see unpaired.py
    chosen_from: int = field(default=0, kw_only=True)
    rejected_from: int = field(default=0, kw_only=True)
    images: Images | None = field(default=None, kw_only=True)  # what the prompt shows

    @property
    def length(self) -> int:
        """Tokens of the pair when its prompt is stored once."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)


@dataclass(frozen=True, slots=True)
class Limits:
    """The four options of DPOConfig that bound a row's length."""

    max_length: int | None = None
    max_prompt_length: int | None = None
    max_completion_length: int | None = None
    truncation_mode: str = "keep_end"


def row_key(pair: TokenPair) -> bytes:
    """Name a row by its tokens and where they are split, so that its reference log-probs are found again."""
    digest = blake2b(struct.pack("<3q", len(pair.prompt), len(pair.chosen), len(pair.rejected)), digest_size=16)
    for ids in (pair.prompt, pair.chosen, pair.rejected):
        digest.update(np.asarray(ids, dtype="<i4").tobytes())
    if pair.chosen_from or pair.rejected_from:
        digest.update(struct.pack("<2q", pair.chosen_from, pair.rejected_from))
    if pair.images is not None:
        digest.update(pair.images.key)
    return digest.digest()


def pair_of(row: Mapping[str, Any]) -> TokenPair:
    """Of a row of a tokenized table."""
    unscored = {column: row.get(column) or 0 for column in FROM_COLUMNS}
    key = row.get("images_key")
    images = Images(row["prompt_text"], files_of(row), key) if key else None
    return TokenPair(*(row[column] for column in ID_COLUMNS), **unscored, images=images)


def truncate(pair: TokenPair, limits: Limits | DPOConfig) -> TokenPair:
    """Fit a pair into the configured lengths; both answers keep the same prompt tokens.

    Answers are cut at their ends, to max_completion_length first. A pair that is still longer than max_length gives up
    prompt tokens: down to max_prompt_length where that is set; else none (keep_start) or as many as needed at its
    start, but never below max_length // 4 (keep_end). What is too long after that comes off the answers' ends.
    """
    prompt = pair.prompt
    answers = [ids[: limits.max_completion_length] for ids in (pair.chosen, pair.rejected)]
    longest = max(map(len, answers))
    limit, prompt_limit = limits.max_length, limits.max_prompt_length
    if limit is None or len(prompt) + longest > limit:
        if prompt_limit is None and limit is not None and limits.truncation_mode == "keep_end":
            prompt_limit = max(limit - longest, limit // 4)
        if prompt_limit is not None:
            start = 0 if limits.truncation_mode == "keep_start" else max(len(prompt) - prompt_limit, 0)
            prompt = prompt[start : start + prompt_limit]
        if limit is not None:
            answers = [ids[: max(limit - len(prompt), 0)] for ids in answers]
    return TokenPair(prompt, *answers)


def text_part(processing_class: Any) -> Any:
    """The tokenizer of a processor, or what was given."""
    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class


def prepare_tokenizer(tokenizer: Any) -> None:
    """Check that the object can tokenize text, and give it a pad token if it has none (said in the log)."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        inner = " Pass its .tokenizer to train on text." if hasattr(tokenizer, "tokenizer") else ""
        raise ValueError(
            f"processing_class is of type {type(tokenizer).__name__}, expected a transformers tokenizer.{inner}"
        )
    if tokenizer.pad_token_id is not None:
        return
    for token, kind in ((tokenizer.eos_token, "end-of-sequence"), (tokenizer.unk_token, "unknown")):
        if token is not None:
            tokenizer.pad_token = token
            logger.info(f"The tokenizer has no pad token: using its {kind} token {token!r} (padding is always masked).")
            return
    raise ValueError(
        "The tokenizer has no pad token, and no end-of-sequence or unknown token to use in its place. "
        "Set one before training, for example tokenizer.pad_token = '<a token of its vocabulary>'."
    )


def check_vocabulary(
    table: Dataset | IterableDataset | int,  # tokenized rows, or the largest token id
    embedding_rows: int,
    tokenizer: PreTrainedTokenizerBase,
) -> Any:
    """Raise if a token id has no row in the embedding. Returns the table; a stream is checked as its rows come."""
    if isinstance(table, IterableDataset):
        checked = {"embedding_rows": embedding_rows, "tokenizer": tokenizer}
        return table.map(_check_batch_vocabulary, batched=True, fn_kwargs=checked, features=_id_features())
    if isinstance(table, Dataset):
        ids = table.select_columns(list(ID_COLUMNS))
        batches = ids.with_format("arrow").iter(batch_size=10_000)  # Arrow's flat values: no list per row
        columns = (column.combine_chunks().flatten().to_numpy() for batch in batches for column in batch.columns)  # type: ignore[union-attr]
        largest = int(max((column.max() for column in columns if len(column)), default=-1))
    else:
        largest = table
    if largest >= embedding_rows:
        raise ValueError(
            f"The tokenizer made token id {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), but the model's "
            f"embedding has {embedding_rows} rows: tokenizer and model do not belong together, or tokens were added. "
            f"Use the model's own tokenizer, or call model.resize_token_embeddings({max(len(tokenizer), largest + 1)})."
        )
    return table


def list_lengths(table: Dataset, column: str) -> np.ndarray:
    """(rows,) lengths of the lists in a column, from Arrow's offsets: no list per row."""
    batches: Any = table.select_columns([column]).with_format("arrow").iter(batch_size=10_000)
    return np.concatenate([np.diff(batch[column].combine_chunks().offsets.to_numpy()) for batch in batches])


def _check_batch_vocabulary(
    batch: dict[str, list], embedding_rows: int, tokenizer: PreTrainedTokenizerBase
) -> dict[str, list]:
    largest = max((max(ids) for column in ID_COLUMNS for ids in batch[column] if ids), default=-1)
    check_vocabulary(largest, embedding_rows, tokenizer)
    return {column: batch[column] for column in ID_COLUMNS}


class _Row(NamedTuple):
    """A row as the texts to tokenize; `messages` and `options` are those of its prompt, for chats."""

    prompt: str
    chosen: str  # prompt and answer
    rejected: str
    is_empty: bool  # an answer says nothing
    messages: list[dict] | None = None
    options: dict[str, Any] = {}
    images: Images | None = None


@dataclass(frozen=True)
class _Encoder:
    """Turns a batch of rows into token pairs; sent whole to the processes of `Dataset.map`.

    Beside the ids it returns what the summary needs, so that a cached table is summed up like a fresh one.
    """

    tokenizer: PreTrainedTokenizerBase
    limits: Limits
    name: str
    prefix: list[int]  # what the tokenizer puts before every text: BOS, or nothing

    def __call__(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        places = [f"The {self.name} dataset, row {index}" for index in indices]
        if set(ID_COLUMNS) <= set(batch):
            pairs = [(TokenPair(*given_ids(row, where)), False) for row, where in zip(rows, places, strict=True)]
        else:
            pairs = self._tokenize([self._texts(row, where) for row, where in zip(rows, places, strict=True)], places)
        columns = (*ID_COLUMNS, "fate", "length", "truncated", "moved", *self.image_columns)
        encoded: dict[str, list] = {column: [] for column in columns}
        for whole, moved in pairs:
            pair = self._fit(whole)
            fate = self._fate(pair)
            kept = fate == KEPT
            values = (pair.prompt, pair.chosen, pair.rejected) if kept else ([], [], [])
            values += (fate, pair.length, pair != whole, moved)
            if self.image_columns:
                values += ("", b"") if pair.images is None else (pair.images.text, pair.images.key)
            for column, value in zip(encoded, values, strict=True):
                encoded[column].append(value)
        return encoded

    @property
    def image_columns(self) -> tuple[str, ...]:
        """What the table has beside images."""
        return ()

    @property
    def renderer(self) -> Any:
        """What renders chat messages."""
        return self.tokenizer

    def finish(self, table: Dataset) -> Dataset:
        """What is trained on, of the rows that are kept."""
        return table

    def _fit(self, pair: TokenPair) -> TokenPair:
        return truncate(pair, self.limits)

    def _fate(self, pair: TokenPair) -> int:
        unscored = 0 if pair.prompt else 1  # nothing predicts the first token of all
        return _fate(pair, unscored)

    def _texts(self, row: dict[str, Any], where: str) -> _Row:
        prompt, chosen, rejected = split_row(row, where)
        # an implicit prompt may leave one side nothing but its end: "welcome" against "welcome!"
        if (isinstance(prompt, list) or "prompt" in row) and (says_nothing(chosen) or says_nothing(rejected)):
            return _Row("", "", "", is_empty=True)
        if isinstance(prompt, str):
            if self.tokenizer.eos_token is None:
                raise ValueError(
                    f"{where}: answers given as strings end with the tokenizer's end-of-sequence token, and it has "
                    "none. Set tokenizer.eos_token, or give the rows as chat messages."
                )
            return _Row(prompt, *(prompt + self._without_eos(text) for text in (chosen, rejected)), is_empty=False)
        if not prompt:
            raise ValueError(f"{where}: the prompt has no messages; a chat needs at least one before its answers.")
        options = self._template_options(row, where)
        texts = [self._render(prompt, options, where, add_generation_prompt=True)]
        texts += [self._render(prompt + answer, options, where) for answer in (chosen, rejected)]
        return _Row(*texts, is_empty=False, messages=prompt, options=options)

    def _template_options(self, row: dict[str, Any], where: str) -> dict[str, Any]:
        if self.renderer.chat_template is None:
            raise ValueError(
                f"{where} holds chat messages, but the tokenizer has no chat template. Use the instruction-tuned "
                "model's tokenizer, set tokenizer.chat_template, or give prompt, chosen and rejected as strings."
            )
        values = {}
        for column, expected in zip(OPTION_COLUMNS, (list, dict), strict=True):
            value = row.get(column)
            try:
                value = json.loads(value) if isinstance(value, str) and value.strip() else value or None
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: column {column!r} is not valid json: {error}.") from error
            if value is not None and not isinstance(value, expected):
                raise ValueError(f"{where}: column {column!r} is {type_name(value)}, expected a {expected.__name__}.")
            values[column] = without_none(value)
        return {"tools": values["tools"], **(values["chat_template_kwargs"] or {})}

    def _render(self, messages: list[dict], options: dict[str, Any], where: str, **more: bool) -> str:
        try:
            return self.renderer.apply_chat_template(messages, **options, **more, tokenize=False)  # type: ignore[return-value]
        except (TemplateError, TypeError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(f"{where}: the chat template refuses the messages ({roles}): {error}") from error

    def _ids(self, texts: list[str]) -> list[list[int]]:
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        return self.tokenizer(texts, **options)["input_ids"]  # type: ignore[return-value]

    def _tokenize(self, rows: list[_Row], places: list[str]) -> Iterator[tuple[TokenPair, bool]]:
        """Each row's pair, and whether its answers begin before the end of the prompt as tokenized alone."""
        ids = self._ids([text for row in rows for text in (row.prompt, row.chosen, row.rejected)])
        for number, (row, where) in enumerate(zip(rows, places, strict=True)):
            prompt, *joint = ids[3 * number : 3 * number + 3]
            if row.is_empty:
                yield TokenPair([], [], []), False
                continue
            if row.messages is None:
                prompt, *joint = (self._with_bos(tokens) for tokens in (prompt, *joint))
                joint = [[*tokens, self.tokenizer.eos_token_id] for tokens in joint]
            split = min(common_prefix_length(prompt, tokens) for tokens in joint)
            if split < len(prompt) and row.messages is not None:
                self._check_template(row, prompt, joint, split, where)
            yield TokenPair(prompt[:split], *(tokens[split:] for tokens in joint)), split < len(prompt)

    def _without_eos(self, text: str) -> str:
        while text.endswith(eos := str(self.tokenizer.eos_token)):
            text = text.removesuffix(eos)
        return text

    def _with_bos(self, ids: list[int]) -> list[int]:
        return ids if ids[: len(self.prefix)] == self.prefix else self.prefix + ids

    def _check_template(self, row: _Row, prompt: list[int], joint: list[list[int]], split: int, where: str) -> None:
        """The generation prompt may differ from how an answer begins; the conversation before it may not."""
        history = self._ids([self._render(row.messages or [], row.options, where)])[0]
        if 2 * split >= common_prefix_length(history, prompt):
            return
        other = min(joint, key=lambda tokens: common_prefix_length(prompt, tokens))
        before, after = (self.tokenizer.decode(tokens[split : split + 20]) for tokens in (prompt, other))
        raise ValueError(
            f"{where}: the prompt is not a prefix of prompt and answer. The chat template renders it differently once "
            f"an answer follows, from token {split} of {len(prompt)} on: {before!r} becomes {after!r}. "
            "Use a template that leaves earlier messages as they are."
        )


class _UnpairedEncoder(_Encoder):
    """Of rows with one completion: its tokens go to the side that its label says, and the other side stays empty."""

    def __call__(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        likes = [
            liked(label, f"The {self.name} dataset, row {i}") for label, i in zip(batch["label"], indices, strict=True)
        ]
        kept = {column: values for column, values in batch.items() if column not in COMPLETION_COLUMNS}
        encoded = super().__call__({**kept, **dict.fromkeys(("chosen", "rejected"), batch["completion"])}, indices)
        for column, side in (("chosen_ids", True), ("rejected_ids", False)):
            encoded[column] = [ids if like == side else [] for like, ids in zip(likes, encoded[column], strict=True)]
        parts = [encoded[column] for column in ID_COLUMNS]
        encoded["length"] = [sum(map(len, ids)) for ids in zip(*parts, strict=True)]
        return encoded

    def _fate(self, pair: TokenPair) -> int:
        return KEPT if super()._fate(pair) == EQUAL else EMPTY

    def finish(self, table: Dataset) -> Dataset:
        return pair_up(table, self.name)


@dataclass(frozen=True)
class _SeparateEncoder(_Encoder):
    """Of an encoder-decoder: prompt and answers are tokenized apart, each with what the tokenizer writes around it."""

    around_prompt: tuple[list[int], list[int]] = ([], [])
    around_answer: tuple[list[int], list[int]] = ([], [])

    def _tokenize(self, rows: list[_Row], places: list[str]) -> Iterator[tuple[TokenPair, bool]]:
        for row, where in zip(rows, places, strict=True):
            if row.is_empty:
                yield TokenPair([], [], []), False
                continue
            if not (row.chosen.startswith(row.prompt) and row.rejected.startswith(row.prompt)):
                raise ValueError(
                    f"{where}: the chat template renders the prompt differently once an answer follows, and an "
                    "encoder-decoder takes the two apart. Give prompt, chosen and rejected as strings."
                )
            answers = [text[len(row.prompt) :] for text in (row.chosen, row.rejected)]
            prompt, *bare = self._ids([row.prompt, *answers])
            yield TokenPair(_within(prompt, self.around_prompt), *(_within(b, self.around_answer) for b in bare)), False

    def _fit(self, pair: TokenPair) -> TokenPair:
        """max_length bounds prompt and answer each, where they have no limit of their own."""
        limits = self.limits
        prompt_limit = limits.max_prompt_length or limits.max_length
        limit = limits.max_completion_length or limits.max_length
        from_end = limits.truncation_mode == "keep_end"
        answers = (_cut(ids, self.around_answer, limit, False) for ids in (pair.chosen, pair.rejected))
        return TokenPair(_cut(pair.prompt, self.around_prompt, prompt_limit, from_end), *answers)

    def _fate(self, pair: TokenPair) -> int:
        if not pair.prompt and (pair.chosen or pair.rejected):
            raise ValueError(
                f"The {self.name} dataset has a row whose prompt is no token at all, and an encoder needs one: leave "
                "such rows out, or give each the end-of-sequence token."
            )
        return _fate(pair, sum(map(len, self.around_answer)))


@dataclass(frozen=True)
class _ImageEncoder(_Encoder):
    """Of a processor: prompts may show images, whose tokens it writes."""

    processing: Processing

    @property
    def image_columns(self) -> tuple[str, ...]:
        return ("prompt_text", "images_key")

    @property
    def renderer(self) -> Any:
        return self.processing.processor

    def _texts(self, row: dict[str, Any], where: str) -> _Row:
        files = files_of(row)
        parts = split_row(row, where)
        if isinstance(parts[0], list):
            counts = {"the prompt": len(files), "chosen": 0, "rejected": 0}
            given = zip(parts, counts.items(), strict=True)
            parts = [with_parts(messages, images, name, where) for messages, (name, images) in given]
        texts = super()._texts({**row, **dict(zip(("prompt", "chosen", "rejected"), parts, strict=True))}, where)
        return texts if texts.is_empty else texts._replace(images=self.processing.images(texts.prompt, files, where))

    def _tokenize(self, rows: list[_Row], places: list[str]) -> Iterator[tuple[TokenPair, bool]]:
        for (pair, moved), row, where in zip(super()._tokenize(rows, places), rows, places, strict=True):
            pair = pair if row.images is None else self._shown(pair, row, where)
            stray = [*pair.chosen, *pair.rejected, *([] if row.images else pair.prompt)]
            if not self.processing.image_tokens.isdisjoint(stray):
                raise ValueError(
                    f"{where} has a placeholder for an image where there is none: only the prompt shows images, those "
                    "of the columns 'image' or 'images'. Remove it from the text."
                )
            yield pair, moved

    def _shown(self, pair: TokenPair, row: _Row, where: str) -> TokenPair:
        """The same with the prompt's tokens as the processor writes them, placeholders replaced by images' tokens.

        Both end alike, so that what the answers took of the prompt's end is known; or else the processor ends a prompt
        in its own way (PaliGemma: with a line break), and answers are tokenized apart from it.
        """
        assert row.images is not None
        made = self.processing.prompt_ids(row.images, where)
        if row.messages is None and not set(self.prefix) & set(made):
            made = self.prefix + made
        plain = self._ids([row.prompt])[0]
        taken = len(self._with_bos(plain) if row.messages is None else plain) - len(pair.prompt)
        if common_prefix_length(plain[::-1], made[::-1]) > taken:
            return TokenPair(made[: len(made) - taken], pair.chosen, pair.rejected, images=row.images)
        if not (row.chosen.startswith(row.prompt) and row.rejected.startswith(row.prompt)):
            raise ValueError(
                f"{where}: the chat template renders the prompt differently once an answer follows, and the processor "
                "ends it in its own way. Give prompt, chosen and rejected as strings."
            )
        end: list[Any] = [] if row.messages else [self.tokenizer.eos_token_id]
        chosen, rejected = self._ids([text[len(row.prompt) :] for text in (row.chosen, row.rejected)])
        return TokenPair(made, chosen + end, rejected + end, images=row.images)

    def _fit(self, pair: TokenPair) -> TokenPair:
        """Cuts no prompt that shows images; where it would have to be cut, nothing is left of the answers."""
        if pair.images is None:
            return super()._fit(pair)
        limits = self.limits
        chosen, rejected = (ids[: limits.max_completion_length] for ids in (pair.chosen, pair.rejected))
        limit, prompt_limit = limits.max_length, limits.max_prompt_length
        if limit is None or len(pair.prompt) + max(len(chosen), len(rejected)) > limit:
            room = None if limit is None else max(limit - len(pair.prompt), 0)
            if prompt_limit is not None and len(pair.prompt) > prompt_limit:
                room = 0
            chosen, rejected = chosen[:room], rejected[:room]
        return TokenPair(pair.prompt, chosen, rejected, images=pair.images)

    def _fate(self, pair: TokenPair) -> int:
        return NO_ROOM if pair.images is not None and not (pair.chosen and pair.rejected) else super()._fate(pair)


def _within(ids: list[int], around: tuple[list[int], list[int]]) -> list[int]:
    return [*around[0], *ids, *around[1]]


def _cut(ids: list[int], around: tuple[list[int], list[int]], limit: int | None, from_end: bool) -> list[int]:
    """At most `limit` tokens, of which those that stand around a text stay."""
    if limit is None or len(ids) <= limit:
        return ids
    before, after = map(len, around)
    if _within(ids[before : len(ids) - after], around) != ids:  # given as ids, without them
        around, before, after = ([], []), 0, 0
    body, room = ids[before : len(ids) - after], max(limit - before - after, 0)
    return _within(body[max(len(body) - room, 0) :] if from_end else body[:room], around)


def _fate(pair: TokenPair, unscored: int) -> int:
    if min(len(pair.chosen), len(pair.rejected)) <= unscored:
        return EMPTY
    return EQUAL if pair.chosen == pair.rejected else KEPT


def _special_ids(tokenizer: PreTrainedTokenizerBase, argument: str = "text") -> tuple[list[int], list[int]]:
    """What the tokenizer writes before and after a text of its own accord; `argument` may be text_target."""
    given: dict[str, Any] = {argument: "a"}
    bare: list[int] = tokenizer(**given, add_special_tokens=False)["input_ids"]  # type: ignore[assignment]
    full: list[int] = tokenizer(**given)["input_ids"]  # type: ignore[assignment]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    raise ValueError(
        f"The tokenizer writes 'a' as {bare} alone and as {full} with special tokens: cannot tell its BOS."
    )


def tokenize_pairs(
    rows: Dataset | IterableDataset,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    config: DPOConfig,
    name: str,
) -> Dataset | IterableDataset:
    """Rows as columns of token ids (prompt_ids, chosen_ids, rejected_ids), without those that teach nothing. Rows with
    images keep them, beside the prompt's text and a digest (prompt_text, images_key).

    Says in the log how many rows were dropped and why, and shows one row with its scored part marked. Rows that come
    with these three columns are checked, truncated and dropped by the same rules. A stream stays a stream: its drops
    are logged whenever their number has doubled.
    """
    first = next(iter(rows.with_format(None)), None)
    if first is None:
        raise ValueError(f"The {name} dataset is empty: it has no rows.")
    columns = rows.column_names or list(first)  # a generator's are known by its first row only
    processing = Processing(processing_class) if isinstance(processing_class, ProcessorMixin) else None
    if unpaired := is_unpaired(columns):
        check_unpaired(columns, config, name)
    else:
        check_columns(columns, name, images=processing is not None)
    if shown := [column for column in IMAGE_COLUMNS if column in columns]:
        if unpaired or isinstance(rows, IterableDataset):
            what = "unpaired rows" if unpaired else "a stream"
            raise ValueError(f"The {name} dataset is {what}, with images: give pairs in a table, or drop {shown[0]!r}.")
        with _progress_bars(config):
            rows = stored_images(rows, shown[0], name)
        first = rows.with_format(None)[0]
    encoder = _encoder(text_part(processing_class), config, name, unpaired, processing)
    encoder({column: [value] for column, value in first.items()}, [0])  # a wrong format fails here, not in a process
    if isinstance(rows, IterableDataset):
        if unpaired:
            raise ValueError(f"The {name} dataset is a stream of unpaired rows, which are paired all at once: load it.")
        options: dict[str, Any] = {"batched": True, "with_indices": True, "remove_columns": columns}
        counted = {"encoder": encoder, "tally": Counter()}
        return rows.with_format(None).map(_encode_and_count, fn_kwargs=counted, features=_id_features(), **options)
    return _tokenize_table(rows.with_format(None), encoder, config)


def row_pair(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, config: DPOConfig) -> TokenPair:
    """One row as `tokenize_pairs` makes it. Raises ValueError for a row that it would drop."""
    check_columns(list(row), "given")
    encoded = _encoder(text_part(tokenizer), config, "given")({column: [value] for column, value in row.items()}, [0])
    if encoded["fate"] != [KEPT]:
        raise ValueError("The row has nothing to learn from: a response is empty, or both are equal. Leave it out.")
    return TokenPair(*(encoded[column][0] for column in ID_COLUMNS))


def _encoder(
    tokenizer: PreTrainedTokenizerBase,
    config: DPOConfig,
    name: str,
    unpaired: bool = False,
    processing: Processing | None = None,
) -> _Encoder:
    answer = config.max_target_length or config.max_completion_length
    limits = Limits(config.max_length, config.max_prompt_length, answer, config.truncation_mode)
    around = _special_ids(tokenizer)
    if processing is not None and not unpaired:
        return _ImageEncoder(tokenizer, limits, name, around[0], processing)
    if not config.is_encoder_decoder:
        kind = _UnpairedEncoder if unpaired else _Encoder
        return kind(tokenizer, limits, name, around[0])  # what it writes after a text is replaced by EOS
    before, after = _special_ids(tokenizer, "text_target")
    if tokenizer.eos_token_id not in after:
        after = [*after, tokenizer.eos_token_id]  # type: ignore[list-item]
    return _SeparateEncoder(tokenizer, limits, name, [], around, (before, after))


def _tokenize_table(rows: Dataset, encoder: _Encoder, config: DPOConfig) -> Dataset:
    with _progress_bars(config):
        table = rows.map(
            encoder,
            batched=True,
            batch_size=IMAGE_ROWS if encoder.image_columns else 1000,
            with_indices=True,
            num_proc=config.dataset_num_proc,
            remove_columns=rows.column_names,
            features=_id_features(
                **{"fate": "int8", "length": "int32", "truncated": "bool", "moved": "bool"},
                **dict(zip(encoder.image_columns, ("string", "binary"), strict=False)),
            ),
            new_fingerprint=_fingerprint(rows, encoder),
            desc=f"Tokenizing the {encoder.name} dataset",
        )
    columns = table.select_columns(["fate", "length", "truncated", "moved"]).with_format("numpy")[:]
    kept = columns["fate"] == KEPT
    tally: Counter[Any] = Counter({fate: int((columns["fate"] == fate).sum()) for fate in FATES})
    for column in ("truncated", "moved"):
        tally[column] = int(columns[column][kept].sum())
    summary = f"{encoder.name}: {_summary(tally)}"
    if not kept.any():
        raise ValueError(f"No row of the {encoder.name} dataset can be trained on. {summary}.")
    logger.info(f"{summary}; longest pair {columns['length'][kept].max()} tokens, {tally['truncated']} truncated")
    shown = set(IMAGE_COLUMNS) & set(rows.column_names)
    table = table.select_columns([*ID_COLUMNS, *(encoder.image_columns if shown else ())])
    others = [column for column in rows.column_names if column not in table.column_names]
    if config.remove_unused_columns:  # else a data_collator is given all of them
        others = [column for column in others if column in IMAGE_COLUMNS]
    if others:
        table = datasets.concatenate_datasets([table, rows.select_columns(others)], axis=1)
    with _progress_bars(config):
        table = encoder.finish(table if kept.all() else table.select(np.flatnonzero(kept)))
    logger.info(_example(pair_of(table[0]), encoder))
    return table


@contextmanager
def _progress_bars(config: DPOConfig) -> Iterator[None]:
    """Within it datasets shows none, where `disable_tqdm` has it so."""
    hidden = bool(config.disable_tqdm) and not datasets.are_progress_bars_disabled()
    if hidden:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if hidden:
            datasets.enable_progress_bars()


def _encode_and_count(
    batch: dict[str, list], indices: list[int], encoder: _Encoder, tally: Counter[Any]
) -> dict[str, list]:
    """One batch of a stream, without its dropped rows; the tally lives as long as the stream."""
    encoded = encoder(batch, indices)
    dropped = tally[EMPTY] + tally[EQUAL]
    tally.update(encoded["fate"])
    kept = [number for number, fate in enumerate(encoded["fate"]) if fate == KEPT]
    for column in ("truncated", "moved"):
        tally[column] += sum(encoded[column][number] for number in kept)
    pairs = {column: [encoded[column][number] for number in kept] for column in ID_COLUMNS}
    if kept and tally[KEPT] == len(kept):
        logger.info(_example(TokenPair(*(pairs[column][0] for column in ID_COLUMNS)), encoder))
    if (tally[EMPTY] + tally[EQUAL]).bit_length() > dropped.bit_length():
        logger.info(f"{encoder.name}, so far: {_summary(tally)}, {tally['truncated']} truncated")
    return pairs


def _summary(tally: Counter[Any]) -> str:
    total = sum(tally[fate] for fate in FATES)
    text = (
        f"{total} rows, {tally[KEPT]} kept, dropped {tally[EMPTY]} with an empty completion, "
        f"{tally[EQUAL]} with chosen equal to rejected"
    )
    if tally[NO_ROOM]:
        text += f", {tally[NO_ROOM]} whose prompt with its images leaves no room within max_length or max_prompt_length"
    if tally["moved"]:
        text += f"; in {tally['moved']} the last prompt tokens count as answer, as they change when one follows"
    return text


def _example(pair: TokenPair, encoder: _Encoder) -> str:
    """A row as the model sees it. With an empty prompt, the first token of an answer stays outside of the marks."""
    lines = [f"{encoder.name}: one row as the model sees it, scored between ⟦ and ⟧"]
    sides = (("chosen", pair.chosen, pair.chosen_from), ("rejected", pair.rejected, pair.rejected_from))
    for label, answer, first in sides:
        unscored = first if pair.prompt else max(first, 1)
        context, scored = (
            str(encoder.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
            for ids in ([*pair.prompt, *answer[:unscored]], answer[unscored:])
        )
        context = context if len(context) <= SHOWN_CHARACTERS else "…" + context[-SHOWN_CHARACTERS:]
        scored = scored if len(scored) <= SHOWN_CHARACTERS else scored[:SHOWN_CHARACTERS] + "…"
        lines.append(f"  {label}: {context if label == 'chosen' or first else '(same prompt)'}⟦{scored}⟧")
    return "\n".join(lines)


def _id_features(**more: str) -> Features:
    columns = {column: List(Value("int32")) for column in ID_COLUMNS}
    return Features({**columns, **{column: Value(kind) for column, kind in more.items()}})


def _fingerprint(rows: Dataset, encoder: _Encoder) -> str:
    """Name of the tokenized table in the cache: everything it depends on, our own code included.

    The library's own would leave that out (functions of a package are hashed by name) and change with the state that
    a fast tokenizer keeps between calls.
    """
    tokenizer = encoder.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    template = json.dumps(tokenizer.chat_template) if tokenizer.chat_template is not None else ""
    options = {name: value for name, value in vars(encoder).items() if name not in ("tokenizer", "processing")}
    if isinstance(encoder, _ImageEncoder):
        options["processing"] = encoder.renderer.chat_template, encoder.processing.settings
    state = (rows._fingerprint, type(tokenizer).__name__, words, template, tokenizer.eos_token_id)
    versions = (transformers.__version__, tokenizers.__version__, datasets.__version__)
    digest = blake2b(repr((state, versions, type(encoder).__name__, options)).encode(), digest_size=16)
    for source in ("data.py", "rows.py", "images.py"):
        digest.update(Path(__file__).with_name(source).read_bytes())
    return digest.hexdigest()
