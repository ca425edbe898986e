"""The model card: README.md in output_dir, what the run is, from the run itself and nothing else.

A card that somebody else wrote, or took over by removing its second line, is never written over.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TrainerState

from fastdpo.config import DPOConfig
from fastdpo.losses import find_loss
from fastdpo.mixture import is_hub_name
from fastdpo.model import Policy, base_model

logger = logging.getLogger(__name__)

MARK = "<!-- Written by fastdpo at every save: remove this line to keep what you change. -->"
TAGS = ("fastdpo", "dpo")
PACKAGES = ("fastdpo", "torch", "transformers", "peft", "datasets")
SHOWN_METRICS = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")


@dataclass(frozen=True)
class Run:
    """What a card tells of."""

    policy: Policy
    processing_class: Any
    config: DPOConfig
    state: TrainerState
    reference: str
    pairs: int | None  # of the training set; None: of a stream, or none
    pairs_per_step: int
    dataset_names: Sequence[str] = ()  # on the Hub
    tags: Sequence[str] = field(default=TAGS)
    model_name: str | None = None
    finetuned_from: str | None = None  # in place of the name that the model has
    language: str | list[str] | None = None
    license: str | None = None
    data: str = ""  # in words

    @property
    def name(self) -> str:
        return self.model_name or Path(self.config.hub_model_id or str(self.config.output_dir)).absolute().name

    @property
    def base_name(self) -> str | None:
        """Of the model that training started from, where it has one on the Hub."""
        name = self.finetuned_from or base_model(self.policy.model).config._name_or_path
        return name if name and is_hub_name(name) else None


def may_write(directory: Path) -> bool:
    """Whether README.md in `directory` is ours, or not there."""
    path = directory / "README.md"
    return not path.exists() or MARK in path.read_text(encoding="utf-8")


def write_card(run: Run, directory: Path) -> None:
    (directory / "README.md").write_text(model_card(run), encoding="utf-8")


def model_card(run: Run) -> str:
    adapters = isinstance(run.policy.model, PeftModel)
    front = ModelCardData(
        base_model=run.base_name,
        datasets=list(run.dataset_names) or None,
        language=run.language,
        license=run.license,
        library_name="peft" if adapters else "transformers",
        model_name=run.name,
        tags=list(dict.fromkeys([*TAGS, *run.tags])),
    )
    started = f"[{run.base_name}](https://huggingface.co/{run.base_name})" if run.base_name else "a local model"
    what = "Adapters for" if adapters else "A fine-tuned version of"
    parts = [
        f"---\n{front.to_yaml()}\n---\n{MARK}\n\n# {run.name}",
        f"{what} {started}, trained from preference pairs with fastdpo.",
        "## Use it\n\n" + _snippet(run, adapters),
        "## Training\n\n" + _table(("", ""), _facts(run)),
        _metrics(run.state),
        "## Versions\n\n" + ", ".join(versions()),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _snippet(run: Run, adapters: bool) -> str:
    kind = type(base_model(run.policy.model)).__name__
    saved = run.config.hub_model_id or run.name
    lines = [f"from transformers import {kind}, AutoTokenizer", ""]
    if adapters:
        lines[1:1] = ["from peft import PeftModel"]
        base = run.base_name or "the model that training started from"
        lines += [f'model = PeftModel.from_pretrained({kind}.from_pretrained("{base}"), "{saved}")']
    else:
        lines += [f'model = {kind}.from_pretrained("{saved}")']
    if isinstance(run.processing_class, PreTrainedTokenizerBase):
        lines += [f'tokenizer = AutoTokenizer.from_pretrained("{saved}")']
        if run.processing_class.chat_template:
            chat = '[{"role": "user", "content": "Hello!"}], add_generation_prompt=True, return_dict=True'
            lines += [f'inputs = tokenizer.apply_chat_template({chat}, return_tensors="pt")']
        else:
            lines += ['inputs = tokenizer("Hello!", return_tensors="pt")']
        lines += ["print(tokenizer.decode(model.generate(**inputs, max_new_tokens=128)[0]))"]
    else:
        lines[0] = lines[0].removesuffix(", AutoTokenizer")
    return "```python\n" + "\n".join(lines) + "\n```"


def _facts(run: Run) -> Iterable[tuple[str, str]]:
    config, state = run.config, run.state
    yield "method", "preference pairs, " + " + ".join(_losses(config))
    yield "beta", f"{config.beta:g}"
    yield "reference", run.reference
    if run.data:
        yield "data", run.data
    yield "pairs", f"{run.pairs:,}" if run.pairs is not None else "a stream"
    yield (
        "steps",
        f"{state.global_step}, of {run.pairs_per_step} pairs"
        + (f", {state.epoch:.3g} epochs" if state.epoch and run.pairs is not None else ""),
    )
    schedule = getattr(config.lr_scheduler_type, "value", config.lr_scheduler_type)
    yield "learning rate", f"{config.learning_rate:g}, {schedule}" if config.learning_rate else "unset"
    yield "optimizer", str(getattr(config.optim, "value", config.optim))
    longest = "no limit" if config.max_length is None else f"{config.max_length} tokens"
    yield "longest sequence", longest
    dtype = str(run.policy.autocast or next(run.policy.parameters()).dtype).removeprefix("torch.")
    yield "precision", f"matrix products in {dtype}" + (", weights quantised" if config.quantizes else "")
    for name, adapter in getattr(run.policy.model, "peft_config", {}).items():
        if name in run.policy.model.active_adapters:  # type: ignore[union-attr]
            kind = getattr(adapter.peft_type, "value", adapter.peft_type)
            rank = f", r {adapter.r}, alpha {adapter.lora_alpha}" if kind == "LORA" else ""
            yield "adapters", f"{kind}{rank}"
    yield "seed", str(config.seed)


def _losses(config: DPOConfig) -> Iterable[str]:
    weights = config.loss_weights or [1.0] * len(config.loss_type)
    for given, weight in zip(config.loss_type, weights, strict=True):
        loss = find_loss(given)
        shown = given if isinstance(given, str) else loss.name
        link = f"[`{shown}`](https://arxiv.org/abs/{loss.paper})" if loss.paper else f"`{shown}`"
        yield link if weight == 1 else f"{weight:g} {link}"


def versions() -> Iterable[str]:
    for name in PACKAGES:
        try:
            yield f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:  # fastdpo, from a bare checkout
            yield name


def _metrics(state: TrainerState) -> str:
    """The last log line that has each metric, of training and of every evaluation set."""
    last: dict[str, float] = {}
    for row in state.log_history:
        last |= row
    prefixes = {"training": ""}
    prefixes |= {
        "evaluation " + key.removesuffix("_loss"): key.removesuffix("loss")
        for key in last
        if key.startswith("eval_") and key.endswith("_loss")
    }
    rows = [
        (where, *(_number(last, prefix + name) for name in SHOWN_METRICS))
        for where, prefix in prefixes.items()
        if prefix + "loss" in last
    ]
    return "## Last metrics\n\n" + _table(("", *SHOWN_METRICS), rows) if rows else ""


def _number(metrics: Mapping[str, float], name: str) -> str:
    return f"{metrics[name]:.4g}" if name in metrics else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
