"""What a run leaves on disk: models that plain transformers and peft load, and checkpoints that a run goes on from.

A checkpoint is written beside and takes its name once all of it is on disk, with a list of its files, their sizes and
checksums: a run that is killed while it saves leaves the checkpoints that there were, and one that was damaged later is
told from a whole one. `save_total_limit` are kept, the best one among them.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerState

from fastdpo.model import OUTSIDE, base_model, unsaved_by_peft
from fastdpo.reference import FROZEN_ADAPTER
from fastdpo.sharding import fill_from_first, is_sharded, share_like, whole_tree

logger = logging.getLogger(__name__)

FILES = "files.json"  # of a checkpoint: name -> size and checksum
STATE = "trainer_state.json"
RUN = "run.pt"  # what a run goes on from, unless save_only_model leaves it out
Weights = Mapping[str, Tensor] | None
TRAINED = "trained.safetensors"  # what trains, by parameter name and in its own dtype


def whole_weights(model: PreTrainedModel | PeftModel, keep: bool) -> Weights:
    """What `save_model` and `save_trained` write of a model that is sharded, by its names in the state dict, on the CPU
    of the process that is to `keep` it; all processes call this. None where each holds the whole model.
    """
    if not any(is_sharded(parameter) for parameter in model.parameters()):
        return None
    adapters = set(model.peft_config) - {FROZEN_ADAPTER} if isinstance(model, PeftModel) else None
    base: Any = base_model(model)
    tokens = {id(layer.weight) for layer in (base.get_input_embeddings(), base.get_output_embeddings())}  # peft saves
    found: dict[int, Any] = {}  # tied weights are one, and stay so
    weights = {}
    for name, value in model.state_dict(keep_vars=True).items():
        of_adapters = adapters is None or not adapters.isdisjoint(name.split("."))
        if of_adapters or value.requires_grad or id(value) in tokens:  # resized ones, with the adapter
            if id(value) not in found:
                found[id(value)] = whole_tree(value.detach(), keep)
            weights[name] = found[id(value)]
    return weights


def save_model(
    model: PreTrainedModel | PeftModel, processing_class: Any, directory: Path, weights: Weights = None
) -> None:
    """Weights (only the adapters of a PeftModel, and beside them what trains outside of them) and tokenizer; a frozen
    reference adapter stays behind. `weights`: of `whole_weights`.
    """
    options: dict[str, Any] = {} if weights is None else {"state_dict": dict(weights)}
    if isinstance(model, PeftModel):
        options["selected_adapters"] = [name for name in model.peft_config if name != FROZEN_ADAPTER]
    model.save_pretrained(str(directory), **options)
    outside = unsaved_by_peft(model) if isinstance(model, PeftModel) else {}
    (directory / OUTSIDE).unlink(missing_ok=True)  # of an earlier run
    if outside:
        _save(outside, directory / OUTSIDE, weights)
    if processing_class is not None:
        processing_class.save_pretrained(str(directory))


def load_weights(model: PreTrainedModel | PeftModel, directory: Path) -> None:
    """Puts the weights of a checkpoint back into the model they came from."""
    if (directory / TRAINED).exists():
        load_trained(model, directory)
        return
    if isinstance(model, PeftModel):
        active = model.active_adapters[0]
        where = directory if active == "default" else directory / active  # where peft writes an adapter of that name
        set_peft_model_state_dict(model, load_peft_weights(str(where)), adapter_name=active)
        load_outside(model, directory)
        return
    saved = type(model).from_pretrained(str(directory), dtype=model.dtype)
    model.load_state_dict(saved.state_dict())


def load_shares(model: nn.Module, directory: Path, reads: bool) -> None:
    """The same for a sharded model, from what `save_trained` wrote: the first process `reads`, all call this."""
    saved = load_file(str(directory / TRAINED)) if reads else None
    fill_from_first(trained_parameters(model), saved)


def load_outside(model: PeftModel, directory: Path) -> None:
    """What `save_model` wrote of weights outside of adapters, if anything."""
    if (directory / OUTSIDE).exists():
        model.load_state_dict(load_file(directory / OUTSIDE), strict=False)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_trained(model: nn.Module, directory: Path, weights: Weights = None) -> None:
    _save(trained_parameters(model), directory / TRAINED, weights)


def _save(parameters: Mapping[str, Tensor], path: Path, weights: Weights) -> None:
    chosen = parameters if weights is None else {name: weights[name] for name in parameters}
    save_file({name: value.detach().contiguous() for name, value in chosen.items()}, str(path))


@torch.no_grad()
def load_trained(model: nn.Module, directory: Path) -> None:
    """Raises ValueError where other parameters train."""
    saved, ours = load_file(str(directory / TRAINED)), trained_parameters(model)
    wrong = sorted(saved.keys() ^ ours.keys()) or [n for n, p in ours.items() if p.shape != saved[n].shape]
    if wrong:
        raise ValueError(
            f"{directory} is of another model, or of other adapters: {wrong[0]} does not train in both, or has "
            "another shape. Resume with the model and the options that the run began with"
        )
    for name, parameter in ours.items():
        parameter.copy_(share_like(saved[name], parameter))


@contextmanager
def written_whole(directory: Path) -> Iterator[Path]:
    """A folder to write into, which takes the name `directory` once all in it is on disk; on an error it goes, and what
    was there before stays.
    """
    recover(directory.parent)
    draft, old = (directory.with_name(f".{directory.name}.{word}") for word in ("writing", "old"))
    for leftover in (draft, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        yield draft
        files = [path for path in sorted(draft.rglob("*")) if path.is_file()]
        listed = {str(path.relative_to(draft)): [path.stat().st_size, _checksum(path)] for path in files}
        (draft / FILES).write_text(json.dumps(listed, indent=1))
        for path in [*files, draft / FILES, *(folder for folder in draft.rglob("*") if folder.is_dir()), draft]:
            _to_disk(path)
    except BaseException as error:  # safetensors' and torch's, too, which are no OSErrors where a disk is full
        written, free = sum(path.stat().st_size for path in draft.rglob("*") if path.is_file()), free_bytes(draft)
        shutil.rmtree(draft, ignore_errors=True)
        error.add_note(
            f"fastdpo: {directory} was not written; the checkpoints before it are as they were. {_mib(written)} of it "
            f"were there, and {_mib(free)} free: if it was that, make room, by a lower save_total_limit perhaps. "
            f"{onwards(directory.parent)}"
        )
        raise
    if directory.exists():  # of an earlier run
        directory.rename(old)
    draft.rename(directory)
    _to_disk(directory.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(output_dir: Path) -> None:
    """Gives what was whole its name back, where a run was killed between taking the old away and the new's naming."""
    for word in ("writing", "old"):  # the new one, if all of it is on disk
        for left in _left(output_dir, "checkpoint", word):
            directory = output_dir / left.name.removeprefix(".").removesuffix(f".{word}")
            if not directory.exists() and not damage(left):
                left.rename(directory)


def tidy(output_dir: Path) -> None:
    """Recovers what is whole, and removes what killed runs left half-written."""
    recover(output_dir)
    for kind, word in (("checkpoint", "writing"), ("checkpoint", "old"), ("nonfinite-step", "writing")):
        for left in _left(output_dir, kind, word):
            shutil.rmtree(left, ignore_errors=True)


def _left(output_dir: Path, kind: str, word: str) -> list[Path]:
    """Folders beside those of fastdpo's own names, of `written_whole`."""
    return [path for path in output_dir.glob(".*") if re.fullmatch(rf"\.{kind}-[0-9]+\.{word}", path.name)]


def onwards(output_dir: Path) -> str:
    """How a run that ended goes on, in words."""
    newest = checkpoints(output_dir)[-1:]
    if not any((directory / RUN).is_file() for directory in newest):
        return (
            "There is no checkpoint to go on from: save_strategy='steps' with a smaller save_steps, and without "
            "save_only_model, saves them on the way"
        )
    return f"resume_from_checkpoint=True goes on from {newest[0].name}"


def size_of(model: nn.Module, optimizer: Any, only_model: bool) -> int:
    """Bytes of a checkpoint, but for what is small, and for optimizer states that the first update makes."""
    trained = sum(parameter.nbytes for parameter in trained_parameters(model).values())
    weights = trained if isinstance(model, PeftModel) else sum(parameter.nbytes for parameter in model.parameters())
    states = (value for state in optimizer.state.values() if isinstance(state, dict) for value in state.values())
    return weights if only_model else weights + trained + sum(one.nbytes for one in states if isinstance(one, Tensor))


def check_room(output_dir: Path, free: int, size: int, kept: int) -> None:
    """Raises ValueError where there is none for a checkpoint, and warns where there is none for all of them."""
    if free < size:
        raise ValueError(
            f"output_dir={str(output_dir)!r} has {_mib(free)} free, and a checkpoint takes {_mib(size)}: make room or "
            "give another directory; save_only_model=True takes less, save_strategy='no' saves none"
        )
    if free < kept * size:
        logger.warning(
            "output_dir has %s free, room for %d checkpoints of %s, and this run comes to have %d: set a lower "
            "save_total_limit, or save less often",
            *(_mib(free), free // size, _mib(size), kept),
        )


def free_bytes(path: Path) -> int:
    """Of the disk that a path is on, or will be; `sys.maxsize` of a file system that does not say."""
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    usage = shutil.disk_usage(there)
    return usage.free if usage.total else sys.maxsize


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB" if count < sys.maxsize else "an unknown number of bytes"


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while part := file.read(2**24):
            value = crc32(part, value)
    return value


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def damage(directory: Path) -> str:
    """What is wrong with a checkpoint, "" where nothing is."""
    if not directory.is_dir():
        return "it is not there"
    try:
        listed = json.loads((directory / FILES).read_text())
        listed = {name: (size, checksum) for name, (size, checksum) in listed.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return f"it has no {FILES} that can be read: it was written by another program, or by an earlier version"
    if STATE not in listed:
        return f"{FILES} lists no {STATE}: it is no checkpoint of a run"
    for name, (size, checksum) in listed.items():
        path = directory / name
        if ".." in Path(name).parts or Path(name).is_absolute():  # links are read: downloads are made of them
            return f"{FILES} lists {name!r}, which is not a file of the checkpoint's own"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, and had {size} when it was written"
        if _checksum(path) != checksum:
            return f"{name} is not what was written (its checksum is another one)"
    return ""


def find(resume_from: str | bool, output_dir: Path) -> Path:
    """The checkpoint to go on from: a path, or for True (or its word) the newest whole one. Raises ValueError where
    there is none.
    """
    if isinstance(resume_from, str) and resume_from.lower() != "true":
        if reason := damage(Path(resume_from)):
            raise ValueError(f"resume_from_checkpoint={resume_from!r} is no whole checkpoint: {reason}")
        return Path(resume_from)
    recover(output_dir)
    for directory in reversed(checkpoints(output_dir)):
        if not (reason := damage(directory)):
            return directory
        logger.warning("%s is left out: %s", directory, reason)
    raise ValueError(
        f"resume_from_checkpoint=True, and there is no whole checkpoint in {output_dir}: leave it out to start anew, "
        "with save_strategy='steps' to be able to go on later"
    )


def load_state(directory: Path) -> TrainerState:
    """Of a checkpoint's callbacks and log. Raises ValueError for what is no such state."""
    try:
        state = TrainerState.load_from_json(str(directory / STATE))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{directory / STATE} cannot be read ({error}): resume from another checkpoint") from error
    steps = state.global_step, state.best_global_step or 0  # which name folders
    if not all(type(step) is int for step in steps) or not isinstance(state.log_history, list):
        raise ValueError(f"{directory / STATE} holds no state of a run: resume from another checkpoint")
    return state


def remove_old(output_dir: Path, newest: Path, state: TrainerState, limit: int | None) -> None:
    """The oldest checkpoints beyond `limit`, but never the newest and the best one."""
    if limit:
        best = state.best_model_checkpoint
        kept = {newest.resolve()} | ({Path(best).resolve()} if best else set())
        ours = [path for path in checkpoints(output_dir) if not path.is_symlink() and (path / FILES).is_file()]
        others = [path for path in ours if path.resolve() not in kept]
        for old in others[: max(0, len(others) + len(kept) - limit)]:
            shutil.rmtree(old)


def path_of(output_dir: Path, state: TrainerState) -> Path:
    """Where the checkpoint of this step goes."""
    return output_dir / f"checkpoint-{state.global_step}"


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a directory, oldest step first."""
    named = (path for path in output_dir.glob("checkpoint-*") if re.fullmatch("checkpoint-[0-9]+", path.name))
    found = [path for path in named if path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))
