"""What a run leaves on disk: models that plain transformers and peft load, kept to `save_total_limit`.

A checkpoint holds the model, its tokenizer and the trainer's state. (Optimizer state and resuming are not part of it
yet.)
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from transformers import PreTrainedModel, TrainerState

from fastdpo.reference import FROZEN_ADAPTER

logger = logging.getLogger(__name__)


def save_model(model: PreTrainedModel | PeftModel, processing_class: Any, directory: Path) -> None:
    """Weights (only the adapters of a PeftModel) and tokenizer; a frozen reference adapter stays behind."""
    options: dict[str, Any] = {}
    if isinstance(model, PeftModel):
        options["selected_adapters"] = [name for name in model.peft_config if name != FROZEN_ADAPTER]
    model.save_pretrained(str(directory), **options)
    if processing_class is not None:
        processing_class.save_pretrained(str(directory))


def load_weights(model: PreTrainedModel | PeftModel, directory: Path) -> None:
    """Puts the weights that `save_model` wrote back into the model they came from."""
    if isinstance(model, PeftModel):
        active = model.active_adapters[0]
        where = directory if active == "default" else directory / active  # where peft writes an adapter of that name
        set_peft_model_state_dict(model, load_peft_weights(str(where)), adapter_name=active)
        return
    saved = type(model).from_pretrained(str(directory), dtype=model.dtype)
    model.load_state_dict(saved.state_dict())


def save_checkpoint(
    model: PreTrainedModel | PeftModel, processing_class: Any, state: TrainerState, output_dir: Path, limit: int | None
) -> Path:
    """-> output_dir/checkpoint-STEP; the oldest ones beyond `limit` go, never the best one."""
    directory = path_of(output_dir, state)
    save_model(model, processing_class, directory)
    state.save_to_json(str(directory / "trainer_state.json"))
    if limit:
        best = state.best_model_checkpoint
        kept = {directory} | ({Path(best)} if best else set())
        others = [path for path in checkpoints(output_dir) if path not in kept]
        for old in others[: max(0, len(others) + len(kept) - limit)]:
            shutil.rmtree(old)
    return directory


def path_of(output_dir: Path, state: TrainerState) -> Path:
    """Where the checkpoint of this step goes."""
    return output_dir / f"checkpoint-{state.global_step}"


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a directory, oldest step first."""
    found = [p for p in output_dir.glob("checkpoint-*") if p.is_dir() and p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))
