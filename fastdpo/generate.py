"""Samples of what policy and reference write, side by side, at each evaluation (`generate_during_eval`).

The same rows of an evaluation set are drawn each time, from `seed`, and answers are sampled from one random state, so
that what changes from step to step is the policy. Sampling leaves the run as it was: its random state, the mode of the
model and so every number of the training are those of a run without it. Of several processes the first one samples.

They go into the log, `output_dir/samples.md`, the report, and to TensorBoard, Weights & Biases, Comet and MLflow where
the run reports there.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import TrainerState
from transformers.integrations import CometCallback, MLflowCallback, TensorBoardCallback, WandbCallback

from fastdpo.batch import PreferenceBatch, pairs_of
from fastdpo.collator import padded_pairs
from fastdpo.config import DPOConfig
from fastdpo.data import pair_of
from fastdpo.model import Policy, base_model, evaluation_mode, learned_positions
from fastdpo.reference import NoReference, Reference
from fastdpo.report import HtmlReport
from fastdpo.retry import collect_memory, out_of_memory
from fastdpo.sharding import is_sharded
from fastdpo.trackers import attempt

logger = logging.getLogger(__name__)

NEW_TOKENS = 128  # of an answer, where max_length sets no limit
LOGGED_ROWS, LOGGED_CHARACTERS = 2, 200
Table = Dataset | IterableDataset


@dataclass
class Sampler:
    """Generates with the models of a run."""

    policy: Policy
    reference: Reference | NoReference
    tokenizer: Any
    config: DPOConfig
    continues: bool = False  # samples.md, from an evaluation before

    def check(self, tables: Mapping[str, Table]) -> None:
        """Raises ValueError where there can be no samples."""
        if not base_model(self.policy.model).can_generate():
            kind = type(base_model(self.policy.model)).__name__
            raise ValueError(f"generate_during_eval=True, and {kind} cannot generate: leave it out")
        for name, table in tables.items():
            _check_text(name, table)
        if not self.reference.runs:
            why = "there is no reference" if isinstance(self.reference, NoReference) else "the reference was freed"
            logger.info("samples: of the policy alone, %s", why)

    def answers(self, prompts: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[list[int]] | None]:
        """-> the policy's, and the reference's where that can run: their tokens without the prompts'."""
        with self._random_state():
            policy = self._generate(self.policy, prompts)
        if not self.reference.runs:
            return policy, None
        with self._random_state(), self.reference.without_policy():  # type: ignore[union-attr]
            return policy, self._generate(self.reference.policy, prompts)  # type: ignore[arg-type]

    def show(self, name: str, table: Table, state: TrainerState, callbacks: Sequence[Any]) -> None:
        """Of one evaluation set, everywhere."""
        _check_text(name, table)
        prompts = self._draw(table)
        try:
            policy, reference = self.answers(prompts)
        except RuntimeError as error:
            if not out_of_memory(error) or is_sharded(next(self.policy.parameters())):  # others are amid the pass
                raise
            collect_memory()
            logger.warning(
                "samples: none at step %d, out of GPU memory: lower per_device_eval_batch_size", state.global_step
            )
            return
        if self.config.process_index:
            return  # it took part in the others' passes
        columns = {"prompt": prompts, "policy": policy, **({} if reference is None else {"reference": reference})}
        rows = list(zip(*(self._decode(ids) for ids in columns.values()), strict=True))
        for row in rows[:LOGGED_ROWS]:
            logger.info("samples: %s, step %d\n%s", name, state.global_step, _brief(columns, row))
        text = _markdown(list(columns), rows)
        path = Path(str(self.config.output_dir)) / "samples.md"
        with path.open("a" if self.continues or state.global_step else "w", encoding="utf-8") as file:
            file.write(f"## {name}, step {state.global_step}\n\n{text}\n\n")
        self.continues = True
        for callback in callbacks:
            attempt(callback, "samples", _report, callback, name, state.global_step, list(columns), rows, text)

    def texts(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[str]:
        """Prompts and answers, decoded together."""
        apart = self.config.is_encoder_decoder
        joint = answers if apart else [[*p, *answer] for p, answer in zip(prompts, answers, strict=True)]
        return self._decode(joint)

    def _decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)

    def _draw(self, table: Table) -> list[list[int]]:
        """Prompts of the same rows at each evaluation; of a stream, of its first ones."""
        count = self.config.per_device_eval_batch_size
        if isinstance(table, IterableDataset):
            rows: Any = table.take(count)
        else:
            chosen = random.Random(self.config.seed).sample(range(len(table)), min(count, len(table)))
            rows = table.select(sorted(chosen))
        pairs = [pair_of(row) for row in rows]
        return [[*pair.prompt, *pair.chosen[: pair.chosen_from]] or [self._first_token] for pair in pairs]

    @property
    def _first_token(self) -> int:
        """Of an answer to an empty prompt, which has to begin with something."""
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    @torch.no_grad()
    def _generate(self, policy: Policy, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        config, device = self.config, self.config.device
        input_ids, attention_mask = _padded(prompts, self.tokenizer.pad_token_id, left=not config.is_encoder_decoder)
        width = 0 if config.is_encoder_decoder else input_ids.shape[1]
        with ExitStack() as stack:
            stack.enter_context(evaluation_mode(policy))
            if policy.autocast:
                stack.enter_context(torch.autocast(device.type, policy.autocast))
            if config.torch_compile:  # for batches without a cache
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            options: dict[str, Any] = {
                "input_ids": input_ids.to(device),
                "attention_mask": attention_mask.to(device),
                "max_new_tokens": self._new_tokens(policy, width),
                "pad_token_id": self.tokenizer.pad_token_id,
                "synced_gpus": is_sharded(next(policy.parameters())),  # all processes stop together
            }
            model: Any = policy.model
            generated = policy.within(lambda: model.generate(**options, do_sample=True, use_cache=True))
        return generated[:, width:].tolist()

    def _new_tokens(self, policy: Policy, width: int) -> int:
        """Of an answer after so many tokens: up to max_length, and to what the model has positions for."""
        config, base = self.config, base_model(policy.model)
        if config.is_encoder_decoder:
            return config.max_target_length or config.max_completion_length or config.max_length or NEW_TOKENS
        reach = learned_positions(base) or getattr(base.config.get_text_config(), "max_position_embeddings", None)
        limit = config.max_length or width + NEW_TOKENS
        return max(1, (limit if reach is None else min(limit, reach)) - width)

    @contextmanager
    def _random_state(self) -> Iterator[None]:
        """One that depends on the seed alone, and on the way out the run's own."""
        device = self.config.device
        with torch.random.fork_rng([device.index or 0] if device.type == "cuda" else []):
            torch.manual_seed(self.config.seed)
            yield


def _check_text(name: str, table: Table) -> None:
    if "images_key" in (table.column_names or ()):
        raise ValueError(f"generate_during_eval=True answers text alone, and {name} has images: leave it out")


def prompts_of(batch: Any, label_pad_token_id: int = -100) -> list[list[int]]:
    """Of one or several PreferenceBatches, or of a dict of tensors that is padded on either side: its prompts, or the
    pairs of either of TRL's forms.
    """
    if isinstance(batch, (list, tuple)):
        return [prompt for one in batch for prompt in prompts_of(one, label_pad_token_id)]
    if isinstance(batch, PreferenceBatch):
        return [[*pair.prompt, *pair.chosen[: pair.chosen_from]] for pair in pairs_of(batch.to("cpu"))]
    keys = "prompt_input_ids", "prompt_attention_mask"
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"the batch is a {type(batch).__name__}, expected a PreferenceBatch, a dict with {keys}, or one of padded "
            "rows in TRL's form"
        )
    if not set(keys) <= set(batch):
        return [list(pair.prompt) for pair in padded_pairs(batch, label_pad_token_id)]
    rows = zip(*(batch[key].tolist() for key in keys), strict=True)
    return [[token for token, seen in zip(ids, mask, strict=True) if seen] for ids, mask in rows]


def _padded(prompts: Sequence[Sequence[int]], padding: int, left: bool) -> tuple[Tensor, Tensor]:
    """-> (P, T) tokens and (P, T) attention mask."""
    side = "left" if left else "right"
    ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], True, padding, side)
    mask = pad_sequence([torch.ones(len(prompt), dtype=torch.int64) for prompt in prompts], True, 0, side)
    return ids, mask


def _brief(names: Mapping[str, Any], row: Sequence[str]) -> str:
    cut = (text if len(text) <= LOGGED_CHARACTERS else text[:LOGGED_CHARACTERS] + "…" for text in row)
    return "\n".join(f"  {name}: {text}" for name, text in zip(names, cut, strict=True))


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [["<br>".join(text.replace("|", "\\|").splitlines()) for text in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in (columns, ["---"] * len(columns), *cells))


def _report(
    callback: Any, name: str, step: int, columns: Sequence[str], rows: Sequence[Sequence[str]], text: str
) -> None:
    """To the report, or the tracker that transformers' callback writes to, if it is one of those that show text."""
    if isinstance(callback, HtmlReport):
        callback.add_samples(name, step, columns, rows)
    elif isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
        callback.tb_writer.add_text(f"samples/{name}", text, step)
    elif isinstance(callback, WandbCallback) and callback._wandb is not None and callback._wandb.run is not None:
        table = callback._wandb.Table(columns=list(columns), data=[list(row) for row in rows])
        callback._wandb.log({f"samples/{name}": table, "train/global_step": step})
    elif isinstance(callback, CometCallback) and callback._experiment is not None:
        callback._experiment.log_table(f"samples-{name}-{step}.csv", [list(row) for row in rows], headers=list(columns))
    elif isinstance(callback, MLflowCallback) and callback._initialized:
        callback._ml_flow.log_text(text, f"samples/{name}-{step}.md")
