"""What a run leaves on disk: models that plain transformers and peft load, and checkpoints that a run goes on from.

A checkpoint is written beside and takes its name once all of it is on disk, with a list of its files, their sizes and
checksums: a run that is killed while it saves leaves the checkpoints that there were, and one that was damaged later is
told from a whole one. `save_total_limit` are kept, the best one among them.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, TrainerState

from fastdpo.model import OUTSIDE, unsaved_by_peft
from fastdpo.reference import FROZEN_ADAPTER

logger = logging.getLogger(__name__)

FILES = "files.json"  # of a checkpoint: name -> size and checksum
STATE = "trainer_state.json"
TRAINED = "trained.safetensors"  # what trains, by parameter name and in its own dtype


def save_model(model: PreTrainedModel | PeftModel, processing_class: Any, directory: Path) -> None:
    """Weights (only the adapters of a PeftModel, and beside them what trains outside of them) and tokenizer; a frozen
    reference adapter stays behind.
    """
    options: dict[str, Any] = {}
    if isinstance(model, PeftModel):
        options["selected_adapters"] = [name for name in model.peft_config if name != FROZEN_ADAPTER]
    model.save_pretrained(str(directory), **options)
    outside = unsaved_by_peft(model) if isinstance(model, PeftModel) else {}
    (directory / OUTSIDE).unlink(missing_ok=True)  # of an earlier run
    if outside:
        _save(outside, directory / OUTSIDE)
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


def load_outside(model: PeftModel, directory: Path) -> None:
    """What `save_model` wrote of weights outside of adapters, if anything."""
    if (directory / OUTSIDE).exists():
        model.load_state_dict(load_file(directory / OUTSIDE), strict=False)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_trained(model: nn.Module, directory: Path) -> None:
    _save(trained_parameters(model), directory / TRAINED)


def _save(parameters: dict[str, nn.Parameter], path: Path) -> None:
    save_file({name: parameter.detach().contiguous() for name, parameter in parameters.items()}, str(path))


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
        parameter.copy_(saved[name])


@contextmanager
def written_whole(directory: Path) -> Iterator[Path]:
    """A folder to write into, which takes the name `directory` once all in it is on disk; on an error it goes, and what
    was there before stays.
    """
    recover(directory.parent)
    draft, old = (directory.with_name(f".{directory.name}.{word}") for word in ("writing", "old"))
    for leftover in (draft, old):
        shutil.rmtree(leftover, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        files = [path for path in sorted(draft.rglob("*")) if path.is_file()]
        listed = {str(path.relative_to(draft)): [path.stat().st_size, _checksum(path)] for path in files}
        (draft / FILES).write_text(json.dumps(listed, indent=1))
        for path in [*files, draft / FILES, *(folder for folder in draft.rglob("*") if folder.is_dir()), draft]:
            _to_disk(path)
    except BaseException as error:
        shutil.rmtree(draft, ignore_errors=True)
        if isinstance(error, OSError):
            error.add_note(f"fastdpo: {directory} was not written; the checkpoints before it are as they were")
        raise
    if directory.exists():  # of an earlier run
        directory.rename(old)
    draft.rename(directory)
    _to_disk(directory.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(output_dir: Path) -> None:
    """Gives what was whole its name back, where a run was killed between taking the old away and the new's naming."""
    for word in ("writing", "old"):  # the new one, if all of it is on disk
        for left in output_dir.glob(f".checkpoint-*.{word}"):
            directory = output_dir / left.name.removeprefix(".").removesuffix(f".{word}")
            if not directory.exists() and not damage(left):
                left.rename(directory)


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
    except (OSError, ValueError):
        return f"it has no {FILES} that can be read: it was written by another program, or by an earlier version"
    for name, (size, checksum) in listed.items():
        path = directory / name
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


def remove_old(output_dir: Path, newest: Path, state: TrainerState, limit: int | None) -> None:
    """The oldest checkpoints beyond `limit`, but never the newest and the best one."""
    if limit:
        best = state.best_model_checkpoint
        kept = {newest.resolve()} | ({Path(best).resolve()} if best else set())
        others = [path for path in checkpoints(output_dir) if path.resolve() not in kept and not path.is_symlink()]
        for old in others[: max(0, len(others) + len(kept) - limit)]:
            shutil.rmtree(old)


def path_of(output_dir: Path, state: TrainerState) -> Path:
    """Where the checkpoint of this step goes."""
    return output_dir / f"checkpoint-{state.global_step}"


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a directory, oldest step first."""
    found = [p for p in output_dir.glob("checkpoint-*") if p.is_dir() and p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))
