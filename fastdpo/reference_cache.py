"""Reference log-probs computed ahead and kept on disk: a sweep over beta, losses or seeds runs the reference once.

One file a reference, named by its identity (`identity.py`), holds log-probs by row key. Rows are keyed by their tokens,
so a subset or a superset of rows, other options of the loss or another order find what is there and add what is not;
a changed row, template or truncation is another key, a changed model another file. The files lie under FASTDPO_CACHE
(default: $XDG_CACHE_HOME/fastdpo, else ~/.cache/fastdpo), 32 bytes a row, or where `ref_log_probs` says.

What was read is not trusted blindly: at the start of a run a few of its rows are computed again, and a difference that
is no rounding stops the run.

Legend: K rows.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from fastdpo.config import DPOConfig
from fastdpo.data import ID_COLUMNS, TokenPair, pair_of, row_key
from fastdpo.identity import WRITTEN, identity_key, model_identity
from fastdpo.images import Images
from fastdpo.layout import Layout
from fastdpo.loader import token_budget
from fastdpo.ranks import Ranks
from fastdpo.reference import Reference, gather_rows
from fastdpo.retry import collect_memory, out_of_memory
from fastdpo.unpaired import FROM_COLUMNS

logger = logging.getLogger(__name__)

CHECKED_ROWS = 4  # of what was read from disk
AHEAD_TOKENS = 16384  # of a batch on a GPU: products of more rows are no faster (unmeasured)


class Unreadable(ValueError):
    """A file that holds no reference log-probs, or not those that were written."""


@dataclass(frozen=True)
class Row:
    """One of the rows that share their tokens."""

    key: bytes
    name: str  # of its table
    table: Dataset
    index: int
    tokens: int  # what it costs in the layout

    def pair(self) -> TokenPair:
        return pair_of(self.table[self.index])


def remember(
    reference: Reference,
    tables: Mapping[str, Dataset | IterableDataset],
    layout: Layout,
    config: DPOConfig,
    name: str | None,
    ranks: Ranks,
) -> bool:
    """Fills the reference's memory with all rows of the tables: read from disk as far as they are there, and computed
    (`precompute_ref_log_probs`), each process a share of them; the first alone reads and writes the disk. -> whether
    training and evaluation can do without the reference from here on.

    `name` is what the reference's model was loaded from, None where it came loaded. Raises ValueError for a file that
    is broken or belongs to another reference, for rows that it lacks where none are computed, and for rows that it has
    wrong.
    """
    streams = [table for table, rows in tables.items() if isinstance(rows, IterableDataset)]
    if streams and config.ref_log_probs:
        raise ValueError(
            f"ref_log_probs is looked up by row, and the {streams[0]} dataset is a stream: give it as a table, or "
            "leave ref_log_probs out"
        )
    if streams:
        logger.info("the %s dataset is a stream: its reference log-probs are computed as rows come", streams[0])
    rows = distinct_rows({table: rows for table, rows in tables.items() if isinstance(rows, Dataset)}, layout)
    if rows:
        _fill(reference, rows, layout, config, reference_identity(reference, name, config), ranks)
    return bool(rows) and not streams


def _fill(
    reference: Reference,
    rows: Sequence[Row],
    layout: Layout,
    config: DPOConfig,
    identity: dict[str, str],
    ranks: Ranks,
) -> None:
    path = Path(config.ref_log_probs).expanduser() if config.ref_log_probs else cache_path(identity)
    known: dict[bytes, tuple[float, float]] = {}
    if ranks.is_main and (path.exists() or not config.precompute_ref_log_probs):
        known = load(path, identity) if config.ref_log_probs else _load_own(path, identity)
    if ranks.count > 1:
        values = torch.tensor(list(known.values()), dtype=torch.float64).view(-1, 2)
        keys, values = gather_rows(ranks, list(known), values)
        known = dict(zip(keys, map(tuple, values.tolist()), strict=True))
    found = [row for row in rows if row.key in known]
    missing = [row for row in rows if row.key not in known]
    if missing and not config.precompute_ref_log_probs:
        raise ValueError(
            f"{path} has {len(found)} of {len(rows)} rows, and {len(missing)} are missing, such as row "
            f"{missing[0].index} of the {missing[0].name} dataset: set precompute_ref_log_probs=True, which computes "
            "them and adds them to the file, or make it with these datasets and options of data"
        )
    if missing and ranks.is_main:
        check_directory(path.parent)
    if found:
        values = torch.tensor([known[row.key] for row in found], dtype=torch.float64, device=config.device)
        reference.memory.store([row.key for row in found], values)
        check_rows(reference, found, layout, config, path)
    started = time.time()
    done: list[Row] = []
    try:
        for group in computed(reference, missing[ranks.rank :: ranks.count], layout, config):
            done += group
    except BaseException as error:  # an interrupted run goes on where it was, as far as this process had come
        try:
            _keep(path, identity, reference, done, write=True)
        except Exception as failure:  # whatever it is, what interrupted the run is what to tell
            error.add_note(f"fastdpo: the {len(done)} rows computed by then could not be written: {failure}")
        raise
    reference.share(ranks, config.device)
    _check_finite(_keep(path, identity, reference, missing, write=ranks.is_main), len(rows), path)
    logger.info(
        "reference log-probs: %d rows read from %s, %d computed in %.1f s and written there",
        *(len(found), path, len(missing), time.time() - started),
    )


def _keep(path: Path, identity: Mapping[str, str], reference: Reference, rows: Sequence[Row], write: bool) -> list[Row]:
    """Writes what was computed of the rows, as far as they are numbers; -> those that are not."""
    if not rows:
        return []
    logps = reference.memory.recall([row.key for row in rows]).cpu()
    finite = logps.isfinite().all(1)
    if write and finite.any():
        kept = [row.key for row, whole in zip(rows, finite.tolist(), strict=True) if whole]
        save(path, identity, logps[finite], kept)
    return [row for row, whole in zip(rows, finite.tolist(), strict=True) if not whole]


def _check_finite(broken: Sequence[Row], count: int, path: Path) -> None:
    if not broken:
        return
    named = [f"row {row.index} of the {row.name} dataset" for row in sorted(broken, key=lambda row: row.index)[:8]]
    more = f" and {len(broken) - len(named)} more" if len(broken) > len(named) else ""
    raise ValueError(
        f"{len(broken)} of {count} rows have reference log-probs that are not finite: {', '.join(named)}{more}; are "
        f"the reference's weights whole, and does its dtype hold its numbers? The other rows are kept in {path}"
    )


def reference_identity(reference: Reference, name: str | None, config: DPOConfig) -> dict[str, str]:
    """What the log-probs depend on beside a row's tokens, in words."""
    policy = reference.policy
    assert policy is not None
    # with arguments of from_pretrained, or an initialisation that moves weights into an adapter, the files are not all
    plain = not (config.model_init_kwargs or config.ref_model_init_kwargs or reference.adapters)
    return model_identity(
        policy.model,
        reference.adapters,
        name if plain else None,
        config.model_revision,
        reference.precision,
        reference.ld_alpha,
    )


def distinct_rows(tables: Mapping[str, Dataset], layout: Layout) -> list[Row]:
    """One row of each key, longest first, so that the worst case comes first."""
    rows: dict[bytes, Row] = {}
    for name, table in tables.items():
        for index, pair in enumerate(pairs_of_table(table)):
            key = row_key(pair)
            if key not in rows:
                rows[key] = Row(key, name, table, index, layout.tokens(pair))
    return sorted(rows.values(), key=lambda row: -row.tokens)


def pairs_of_table(table: Dataset) -> Iterator[TokenPair]:
    """The rows of a table as slices of Arrow's flat values: no list per row."""
    unscored = [column for column in FROM_COLUMNS if column in table.column_names]
    shown = [column for column in ("images_key",) if column in table.column_names]
    for batch in table.select_columns([*ID_COLUMNS, *unscored, *shown]).with_format("arrow").iter(batch_size=1000):
        columns: list[Any] = [batch[column].combine_chunks() for column in ID_COLUMNS]  # type: ignore[index]
        values = [(column.values.to_numpy(), column.offsets.to_numpy()) for column in columns]
        counts = {column: batch[column].to_pylist() for column in unscored}  # type: ignore[index]
        keys = batch["images_key"].to_pylist() if shown else [b""] * len(columns[0])  # type: ignore[index]
        for row in range(len(columns[0])):
            ids = (flat[bounds[row] : bounds[row + 1]] for flat, bounds in values)
            images = Images("", (), keys[row]) if keys[row] else None  # what names a row, and not the images
            first = {column: values[row] or 0 for column, values in counts.items()}
            yield TokenPair(*ids, **first, images=images)


def computed(reference: Reference, rows: Sequence[Row], layout: Layout, config: DPOConfig) -> Iterator[Sequence[Row]]:
    """Runs the reference over rows that come longest first, into its memory, with a progress bar; -> each batch after
    its pass. Batches are neighbours by length: `precompute_ref_batch_size` of them, else what the token budget takes,
    which is halved where the GPU's memory runs out.
    """
    size, start = config.precompute_ref_batch_size, 0
    budget = ahead_budget(config, layout, rows[0].tokens if rows else 0)
    hidden = config.disable_tqdm or not rows
    with tqdm(total=len(rows), desc="Reference", unit="pair", disable=hidden, dynamic_ncols=True) as bar:
        while reference.ranks.makes_pass(start < len(rows)):
            longest = rows[start].tokens if start < len(rows) else 1
            group = rows[start : start + (size or max(1, budget // longest))]
            if not _fits(reference, group, layout, config):
                collect_memory()
                budget = sum(row.tokens for row in group) // 2
                logger.warning("reference: out of GPU memory, from here on at most %d tokens a batch", budget)
                continue
            start += len(group)
            bar.update(len(group))
            yield group


def _fits(reference: Reference, group: Sequence[Row], layout: Layout, config: DPOConfig) -> bool:
    """False where memory ran out, and fewer rows may do; by then the error has let go of what was computed."""
    try:
        reference.memory.store([row.key for row in group], _run(reference, group, layout, config))
        return True
    except RuntimeError as error:
        if not out_of_memory(error) or reference.ranks.fsdp is not None:  # others are amid the pass
            raise
        if config.precompute_ref_batch_size or len(group) == 1:
            error.add_note("fastdpo: the reference runs ahead: lower precompute_ref_batch_size or max_length")
            raise
    return False


def ahead_budget(config: DPOConfig, layout: Layout, longest: int) -> int:
    """Tokens of a batch of the reference: without a gradient next to nothing is kept, so more than training takes.
    Where training goes by pairs, as many of the longest.
    """
    budget = token_budget(config, layout)
    if budget is None and layout.make is not None:
        return config.per_device_train_batch_size * longest
    return max(AHEAD_TOKENS, budget or 0) if config.device.type == "cuda" or budget is None else budget


def _run(reference: Reference, rows: Sequence[Row], layout: Layout, config: DPOConfig) -> Tensor:
    """-> (len(rows), 2) fp64; without rows, a part in what other processes do."""
    pairs = [row.pair() for row in rows]
    batch = (layout.collate(pairs) if pairs else layout.empty()).to(config.device)
    assert reference.policy is not None
    training = reference.policy.training
    reference.policy.eval()
    try:
        return reference.compute(batch)
    finally:
        reference.policy.train(training)


def check_rows(reference: Reference, found: Sequence[Row], layout: Layout, config: DPOConfig, path: Path) -> None:
    """Computes a few rows again, together and each alone: what the two differ by is the rounding to allow for."""
    count = min(CHECKED_ROWS, len(found))
    picked = [found[(2 * number + 1) * len(found) // (2 * count)] for number in range(count)]  # of all lengths
    together = _run(reference, picked, layout, config)
    alone = torch.cat([_run(reference, [row], layout, config) for row in picked])
    stored = reference.memory.recall([row.key for row in picked])
    allowed = 4 * (together - alone).abs().max() + reference.rounding(stored)
    wrong = ~((stored - alone).abs() <= allowed).all(1)
    for row, there, here, bad in zip(picked, stored.tolist(), alone.tolist(), wrong.tolist(), strict=True):
        if bad:
            raise ValueError(
                f"{path} has log-probs of {there[0]:.6g} (chosen) and {there[1]:.6g} (rejected) for row {row.index} of "
                f"the {row.name} dataset, and the reference gives {here[0]:.6g} and {here[1]:.6g}, which is no "
                "rounding: delete the file, and they are computed anew"
            )


def cache_path(identity: Mapping[str, str]) -> Path:
    """The file of a reference in the cache."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    directory = Path(os.environ.get("FASTDPO_CACHE") or Path(base) / "fastdpo").expanduser()
    return directory / "reference" / f"{identity_key(identity)}.safetensors"


def check_directory(directory: Path) -> None:
    """Raises ValueError where nothing can be written, before hours of computing."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"reference log-probs cannot be kept in {directory} ({error.strerror}): set FASTDPO_CACHE to a directory "
            "that can be written, or ref_log_probs to a file in one"
        ) from error
    if not os.access(directory, os.W_OK):
        raise ValueError(f"reference log-probs cannot be kept in {directory}, which is read-only: set FASTDPO_CACHE")


def load(path: Path, identity: Mapping[str, str]) -> dict[bytes, tuple[float, float]]:
    """-> log-probs (chosen, rejected) by row key. Raises ValueError for a broken file and for another reference's."""
    if not path.exists():
        raise ValueError(
            f"ref_log_probs={str(path)!r} does not exist: make it with `fastdpo reference --output {path}`, or set "
            "precompute_ref_log_probs=True to write it"
        )
    about = _about(path)
    if not {"identity", "checksum"} <= set(about):  # whatever it is, it is not ours to delete
        raise Unreadable(
            f"{path} is no file of reference log-probs ({_kind(path)}): give one made by `fastdpo reference`, or "
            "another --output"
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            keys, logps = file.get_tensor("keys"), file.get_tensor("logps")
    except (SafetensorError, OSError) as error:
        raise Unreadable(f"{path} cannot be read as reference log-probs ({error}): delete it") from error
    shapes = (keys.dtype, keys.shape, logps.dtype, logps.shape)
    if shapes != (torch.uint8, (len(logps), 16), torch.float64, (len(logps), 2)) or not logps.isfinite().all():
        raise Unreadable(f"{path} holds other tensors than finite log-probs by row: delete it, and it is made anew")
    if about["checksum"] != _checksum(keys, logps):
        raise Unreadable(f"{path} holds other bytes than were written: delete it, and it is made anew")
    theirs = json.loads(about["identity"])
    # a copy of the weights has another time of writing: where the user names the file, the content decides
    if different := [part for part in identity if part != WRITTEN and theirs.get(part) != identity[part]]:
        lines = "; ".join(f"{part}: {theirs.get(part)} there, {identity[part]} here" for part in different)
        raise ValueError(
            f"{path} belongs to another reference ({lines}): give the model, the adapters and the options of loading "
            "that it was made with, or another file"
        )
    names = keys.numpy().tobytes()
    return {names[16 * row : 16 * row + 16]: tuple(values) for row, values in enumerate(logps.tolist())}


def _load_own(path: Path, identity: Mapping[str, str]) -> dict[bytes, tuple[float, float]]:
    """Of a file of the cache, which is ours: one that is broken is put aside and made anew."""
    try:
        return load(path, identity)
    except Unreadable:
        aside = path.with_name(f"{path.name}.damaged")
        path.replace(aside)
        logger.warning("reference log-probs: %s is damaged: put aside as %s, and made anew", path, aside.name)
        return {}


def _about(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, even of one that was cut; {} of anything else."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            about = json.loads(file.read(min(size, 2**20)))["__metadata__"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return about if isinstance(about, dict) else {}


def _kind(path: Path) -> str:
    """What there is in place of reference log-probs, in words."""
    if path.is_dir():
        return "it is a directory"
    try:
        with safe_open(str(path), framework="pt") as file:
            names = list(file.keys())
    except (SafetensorError, OSError) as error:
        return f"it is no safetensors file: {error}"
    return f"it has tensors of other names, such as {', '.join(names[:3])}" if names else "it has no tensors"


def save(path: Path, identity: Mapping[str, str], logps: Tensor, keys: Sequence[bytes]) -> None:
    """Adds rows to the file: written beside it, then renamed, so that a reader never sees half of it.

    Two processes that end in the same moment may leave the rows of one of them, and the other's are computed again.
    """
    if not logps.isfinite().all():
        raise ValueError(
            f"{int((~logps.isfinite()).any(1).sum())} of {len(keys)} rows have reference log-probs that are not "
            "finite: are the reference's weights whole?"
        )
    values = load(path, identity) if path.exists() else {}
    values |= dict(zip(keys, map(tuple, logps.tolist()), strict=True))
    names = torch.frombuffer(bytearray(b"".join(sorted(values))), dtype=torch.uint8).view(-1, 16)
    table = torch.tensor([values[key] for key in sorted(values)], dtype=torch.float64)
    about = {"identity": json.dumps(dict(identity)), "checksum": _checksum(names, table)}
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({"keys": names, "logps": table}, str(beside), about)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _checksum(keys: Tensor, logps: Tensor) -> str:
    digest = blake2b(keys.numpy().tobytes(), digest_size=16)
    digest.update(logps.numpy().tobytes())
    return digest.hexdigest()
