"""Rows of any supported shape become token pairs: one shared prompt, a chosen and a rejected answer.

A preference dataset comes as strings or as chat messages, with the prompt in a column of its own or only as the common
beginning of both answers. Every shape ends up as three lists of token ids with one guarantee: `prompt + chosen` and
`prompt + rejected` are token for token what the tokenizer makes of the two whole texts. The prompt is not tokenized
apart from the answers (tokens may merge across the seam, and a chat template may render a prompt alone differently):
it ends where it stops being a common token prefix of both.

BOS is there once if the tokenizer or the chat template writes one. EOS ends every answer that came as a string, once;
a chat ends as its template ends it. Rows with nothing to learn from are dropped and counted, never trained on.
"""

from __future__ import annotations

import json
import logging
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import datasets
import numpy as np
import tokenizers
import transformers
from datasets import Dataset, Features, IterableDataset, List, Value
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from fastdpo.rows import (
    ID_COLUMNS,
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

if TYPE_CHECKING:
    from fastdpo.config import DPOConfig

__all__ = [
    "ID_COLUMNS",
    "TokenPair",
    "check_vocabulary",
    "load_rows",
    "prepare_tokenizer",
    "row_key",
    "tokenize_pairs",
    "truncate",
]

logger = logging.getLogger(__name__)

KEPT, EMPTY, EQUAL = 0, 1, 2  # what becomes of a row
SHOWN_CHARACTERS = 400  # of each part of the example row


@dataclass(frozen=True, slots=True)
class TokenPair:
    """One row: the answers follow the same prompt tokens."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

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
    return digest.digest()


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
        batches = table.with_format("arrow").iter(batch_size=10_000)  # Arrow's flat values: no list per row
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
        encoded: dict[str, list] = {column: [] for column in (*ID_COLUMNS, "fate", "length", "truncated", "moved")}
        for whole, moved in pairs:
            pair = self._fit(whole)
            fate = self._fate(pair)
            kept = fate == KEPT
            values = (pair.prompt, pair.chosen, pair.rejected) if kept else ([], [], [])
            for column, value in zip(encoded, (*values, fate, pair.length, pair != whole, moved), strict=True):
                encoded[column].append(value)
        return encoded

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
        if self.tokenizer.chat_template is None:
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
            return self.tokenizer.apply_chat_template(messages, **options, **more, tokenize=False)  # type: ignore[return-value]
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
    rows: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, config: DPOConfig, name: str
) -> Dataset | IterableDataset:
    """Rows as columns of token ids (prompt_ids, chosen_ids, rejected_ids), without those that teach nothing.

    Says in the log how many rows were dropped and why, and shows one row with its scored part marked. Rows that come
    with these three columns are checked, truncated and dropped by the same rules. A stream stays a stream: its drops
    are logged whenever their number has doubled.
    """
    first = next(iter(rows.with_format(None)), None)
    if first is None:
        raise ValueError(f"The {name} dataset is empty: it has no rows.")
    columns = rows.column_names or list(first)  # a generator's are known by its first row only
    check_columns(columns, name)
    encoder = _encoder(tokenizer, config, name)
    encoder({column: [value] for column, value in first.items()}, [0])  # a wrong format fails here, not in a process
    if isinstance(rows, IterableDataset):
        options: dict[str, Any] = {"batched": True, "with_indices": True, "remove_columns": columns}
        counted = {"encoder": encoder, "tally": Counter()}
        return rows.with_format(None).map(_encode_and_count, fn_kwargs=counted, features=_id_features(), **options)
    return _tokenize_table(rows.with_format(None), encoder, config)


def _encoder(tokenizer: PreTrainedTokenizerBase, config: DPOConfig, name: str) -> _Encoder:
    answer = config.max_target_length or config.max_completion_length
    limits = Limits(config.max_length, config.max_prompt_length, answer, config.truncation_mode)
    around = _special_ids(tokenizer)
    if not config.is_encoder_decoder:
        return _Encoder(tokenizer, limits, name, around[0])  # what it writes after a text is replaced by EOS
    before, after = _special_ids(tokenizer, "text_target")
    if tokenizer.eos_token_id not in after:
        after = [*after, tokenizer.eos_token_id]  # type: ignore[list-item]
    return _SeparateEncoder(tokenizer, limits, name, [], around, (before, after))


def _tokenize_table(rows: Dataset, encoder: _Encoder, config: DPOConfig) -> Dataset:
    hide_bar = bool(config.disable_tqdm) and not datasets.are_progress_bars_disabled()
    if hide_bar:
        datasets.disable_progress_bars()
    try:
        table = rows.map(
            encoder,
            batched=True,
            with_indices=True,
            num_proc=config.dataset_num_proc,
            remove_columns=rows.column_names,
            features=_id_features(fate="int8", length="int32", truncated="bool", moved="bool"),
            new_fingerprint=_fingerprint(rows, encoder),
            desc=f"Tokenizing the {encoder.name} dataset",
        )
    finally:
        if hide_bar:
            datasets.enable_progress_bars()
    columns = table.select_columns(["fate", "length", "truncated", "moved"]).with_format("numpy")[:]
    kept = columns["fate"] == KEPT
    tally: Counter[Any] = Counter({fate: int((columns["fate"] == fate).sum()) for fate in (KEPT, EMPTY, EQUAL)})
    for column in ("truncated", "moved"):
        tally[column] = int(columns[column][kept].sum())
    summary = f"{encoder.name}: {_summary(tally)}"
    if not kept.any():
        raise ValueError(f"No row of the {encoder.name} dataset can be trained on. {summary}.")
    logger.info(f"{summary}; longest pair {columns['length'][kept].max()} tokens, {tally['truncated']} truncated")
    table = table.select_columns(list(ID_COLUMNS))
    table = table if kept.all() else table.select(np.flatnonzero(kept))
    logger.info(_example(TokenPair(*(table[0][column] for column in ID_COLUMNS)), encoder))
    return table


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
    total = tally[KEPT] + tally[EMPTY] + tally[EQUAL]
    text = (
        f"{total} rows, {tally[KEPT]} kept, dropped {tally[EMPTY]} with an empty completion, "
        f"{tally[EQUAL]} with chosen equal to rejected"
    )
    if tally["moved"]:
        text += f"; in {tally['moved']} the last prompt tokens count as answer, as they change when one follows"
    return text


def _example(pair: TokenPair, encoder: _Encoder) -> str:
    """A row as the model sees it. With an empty prompt, the first token of an answer stays outside of the marks."""
    unscored = 0 if pair.prompt else 1
    lines = [f"{encoder.name}: one row as the model sees it, scored between ⟦ and ⟧"]
    for label, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        context, scored = (
            str(encoder.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
            for ids in ([*pair.prompt, *answer[:unscored]], answer[unscored:])
        )
        context = context if len(context) <= SHOWN_CHARACTERS else "…" + context[-SHOWN_CHARACTERS:]
        scored = scored if len(scored) <= SHOWN_CHARACTERS else scored[:SHOWN_CHARACTERS] + "…"
        lines.append(f"  {label}: {context if label == 'chosen' else '(same prompt)'}⟦{scored}⟧")
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
    options = {name: value for name, value in vars(encoder).items() if name != "tokenizer"}
    state = (rows._fingerprint, type(tokenizer).__name__, words, template, tokenizer.eos_token_id)
    versions = (transformers.__version__, tokenizers.__version__, datasets.__version__)
    digest = blake2b(repr((state, versions, type(encoder).__name__, options)).encode(), digest_size=16)
    for source in ("data.py", "rows.py"):
        digest.update(Path(__file__).with_name(source).read_bytes())
    return digest.hexdigest()
