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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import tokenizers
import transformers
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from fastdpo.encoders import (
    EMPTY,
    EQUAL,
    FATES,
    KEPT,
    NO_ROOM,
    ImageEncoder,
    RowEncoder,
    TokenPair,
    find_encoder,
    truncate,
)
from fastdpo.images import Images, Processing, files_of, stored_images
from fastdpo.rows import (
    ID_COLUMNS,
    IMAGE_COLUMNS,
    PAIR_COLUMNS,
    check_columns,
)
from fastdpo.sources import load_rows
from fastdpo.unpaired import FROM_COLUMNS, check_unpaired, is_unpaired

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

IMAGE_ROWS = 16  # tokenized at a time where rows may have images, so that few of these are in memory
# What tables of TRL's trainers have where the reference's log-probs were computed ahead, 1.16's names and older ones
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps", "reference_chosen_logps", "reference_rejected_logps")
SHOWN_CHARACTERS = 400  # of each part of the example row


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
    named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if odd := [name for name in named if Path(name).name != name]:
        raise ValueError(
            f"The tokenizer has a chat template called {odd[0]!r}, and templates are saved as files of their names: "
            "rename or remove it in tokenizer_config.json, or set tokenizer.chat_template."
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
    if known := [column for column in columns if column in REFERENCE_COLUMNS]:
        logger.info(
            "%s: %s not used; precompute_ref_log_probs=True computes and keeps the reference's log-probs, by row",
            name,
            " and ".join(known) + (" is" if len(known) == 1 else " are"),
        )
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
    encoder = find_encoder(text_part(processing_class), config, name, unpaired, processing)
    encoder({column: [value] for column, value in first.items()}, [0])  # a wrong format fails here, not in a process
    if isinstance(rows, IterableDataset):
        if unpaired:
            raise ValueError(f"The {name} dataset is a stream of unpaired rows, which are paired all at once: load it.")
        options: dict[str, Any] = {"batched": True, "with_indices": True, "remove_columns": columns}
        counted = {"encoder": encoder, "tally": Counter(), "columns": columns}
        return rows.with_format(None).map(_encode_and_count, fn_kwargs=counted, features=_id_features(), **options)
    return _tokenize_table(rows.with_format(None), encoder, config)


def row_pair(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, config: DPOConfig) -> TokenPair:
    """One row as `tokenize_pairs` makes it. Raises ValueError for a row that it would drop."""
    check_columns(list(row), "given")
    encoded = find_encoder(text_part(tokenizer), config, "given")(
        {column: [value] for column, value in row.items()}, [0]
    )
    if encoded["fate"] != [KEPT]:
        raise ValueError("The row has nothing to learn from: a response is empty, or both are equal. Leave it out.")
    return TokenPair(*(encoded[column][0] for column in ID_COLUMNS))


def _tokenize_table(rows: Dataset, encoder: RowEncoder, config: DPOConfig) -> Dataset:
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
    batch: dict[str, list], indices: list[int], encoder: RowEncoder, tally: Counter[Any], columns: Sequence[str]
) -> dict[str, list]:
    """One batch of a stream, without its dropped rows; the tally lives as long as the stream. `columns` are those of
    its first row; a generator may come with others later.
    """
    if others := [column for column in batch if column in PAIR_COLUMNS and column not in columns]:
        raise ValueError(
            f"The {encoder.name} dataset, rows {indices[0]} to {indices[-1]}: the stream has the column {others[0]!r} "
            "there, and not in its first row: give all rows the same columns."
        )
    encoded = encoder({column: batch.get(column, [None] * len(indices)) for column in columns}, indices)
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


def _example(pair: TokenPair, encoder: RowEncoder) -> str:
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


def _fingerprint(rows: Dataset, encoder: RowEncoder) -> str:
    """Name of the tokenized table in the cache: everything it depends on, our own code included.

    The library's own would leave that out (functions of a package are hashed by name) and change with the state that
    a fast tokenizer keeps between calls.
    """
    tokenizer = encoder.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    template = json.dumps(tokenizer.chat_template) if tokenizer.chat_template is not None else ""
    options = {name: value for name, value in vars(encoder).items() if name not in ("tokenizer", "processing")}
    if isinstance(encoder, ImageEncoder):
        options["processing"] = encoder.renderer.chat_template, encoder.processing.settings
    state = (rows._fingerprint, type(tokenizer).__name__, words, template, tokenizer.eos_token_id)
    versions = (transformers.__version__, tokenizers.__version__, datasets.__version__)
    digest = blake2b(repr((state, versions, type(encoder).__name__, options)).encode(), digest_size=16)
    for source in ("data.py", "encoders.py", "rows.py", "images.py", "unpaired.py"):
        digest.update(Path(__file__).with_name(source).read_bytes())
    return digest.hexdigest()
