"""Encoders: what becomes of a batch of rows, once its shape is known.

One for text, which prompt and answers share token for token; one for a processor, whose prompts may show images; one
for encoder-decoders, which take prompt and answer apart; one for rows of one answer each. All give token ids, what
became of each row, and what the summary of a table needs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from datasets import Dataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from fastdpo.images import Images, Processing, files_of, with_parts
from fastdpo.rows import (
    COMPLETION_COLUMNS,
    ID_COLUMNS,
    OPTION_COLUMNS,
    common_prefix_length,
    given_ids,
    says_nothing,
    split_row,
    type_name,
    without_none,
)
from fastdpo.unpaired import liked, pair_up

if TYPE_CHECKING:
    from fastdpo.config import DPOConfig

KEPT, EMPTY, EQUAL, NO_ROOM = FATES = 0, 1, 2, 3  # what becomes of a row


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


class _Row(NamedTuple):
    """A row as the texts to tokenize; `messages` and `options` are those of its prompt, for chats."""

    prompt: str
    chosen: str  # prompt and answer
    rejected: str
    is_empty: bool  # an answer says nothing
    messages: list[dict] | None = None
    options: dict[str, Any] = {}
    images: Images | None = None


def _whole(row: _Row, where: str) -> _Row:
    """The row. Raises ValueError for halves of characters, which a stream may bring: no tokenizer takes them."""
    try:
        for text in (row.prompt, row.chosen, row.rejected):
            text.encode()
    except UnicodeEncodeError as error:
        half, near = error.object[error.start], error.object[max(error.start - 20, 0) : error.start]
        raise ValueError(
            f"{where} has {ascii(half)} after {ascii(near)}, half of a character (a lone surrogate), which is no text: "
            "remove it, or read the rows with errors='replace'."
        ) from error
    return row


@dataclass(frozen=True)
class RowEncoder:
    """Turns a batch of rows into token pairs; sent whole to the processes of `Dataset.map`.

    Beside the ids it returns what the summary needs, so that a cached table is summed up like a fresh one.
    """

    tokenizer: PreTrainedTokenizerBase
    limits: Limits
    name: str
    prefix: list[int]  # what the tokenizer puts before every text: BOS, or nothing

    def __call__(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        try:
            rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        except (ValueError, OverflowError) as error:  # numbers that a table keeps as text, and does not read again
            raise ValueError(
                f"The {self.name} dataset, rows {indices[0]} to {indices[-1]}, cannot be read from its table: {error}."
            ) from error
        places = [f"The {self.name} dataset, row {index}" for index in indices]
        if set(ID_COLUMNS) <= set(batch):
            pairs = [(TokenPair(*given_ids(row, where)), False) for row, where in zip(rows, places, strict=True)]
        else:
            texts = [_whole(self._texts(row, where), where) for row, where in zip(rows, places, strict=True)]
            pairs = self._tokenize(texts, places)
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
        except Exception as error:  # a template is a program: it may divide by zero, or look for what is not there
            roles, why = ", ".join(message["role"] for message in messages), error
            if not isinstance(error, (TemplateError, TypeError)):
                why = f"{type(error).__name__}: {error}"
            raise ValueError(f"{where}: the chat template refuses the messages ({roles[:200]}): {why}") from error

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


class UnpairedEncoder(RowEncoder):
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
class SeparateEncoder(RowEncoder):
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
class ImageEncoder(RowEncoder):
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


def find_encoder(
    tokenizer: PreTrainedTokenizerBase,
    config: DPOConfig,
    name: str,
    unpaired: bool = False,
    processing: Processing | None = None,
) -> RowEncoder:
    answer = config.max_target_length or config.max_completion_length
    limits = Limits(config.max_length, config.max_prompt_length, answer, config.truncation_mode)
    around = _special_ids(tokenizer)
    if processing is not None and not unpaired:
        return ImageEncoder(tokenizer, limits, name, around[0], processing)
    if not config.is_encoder_decoder:
        kind = UnpairedEncoder if unpaired else RowEncoder
        return kind(tokenizer, limits, name, around[0])  # what it writes after a text is replaced by EOS
    before, after = _special_ids(tokenizer, "text_target")
    if tokenizer.eos_token_id not in after:
        after = [*after, tokenizer.eos_token_id]  # type: ignore[list-item]
    return SeparateEncoder(tokenizer, limits, name, [], around, (before, after))
