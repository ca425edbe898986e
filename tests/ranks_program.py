"""What tests/test_ranks.py runs in one process and, under torchrun, in several: `python ranks_program.py OUT NAME ...`.

Each scenario is one run on optimizer batches of 12 pairs, whatever the number of processes; what it ends with goes to
OUT/NAME-RANK.pt.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import draw_no_picture, praise_and_scolding, tiny_llama
from datasets import Dataset
from peft import LoraConfig
from test_out_of_memory import Operations
from tiny_vision import picture, tiny_vision
from tokenizers_for_tests import byte_level
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback

import fastdpo
from fastdpo import checkpoint
from fastdpo.batch import OptimizerBatch
from fastdpo.collator import padded_rows
from fastdpo.data import ID_COLUMNS, TokenPair
from fastdpo.ranks import GradientSum, Ranks
from fastdpo.sharding import whole

PAIRS = 12
ROWS = praise_and_scolding()
LORA = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=True)
TIMING = ("runtime", "per_second")


def options(out: Path, count: int, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(out / "run"),
        "per_device_train_batch_size": PAIRS // count,
        "per_device_eval_batch_size": PAIRS // count,
        "max_tokens_per_microbatch": 200,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-6,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        **({"bf16": False} if os.environ.get("FASTDPO_TEST_DEVICE") == "cuda" else {"use_cpu": True}),
        "ddp_timeout": 120,
        **changes,
    }


class KindsOfGradients(TrainerCallback):
    def __init__(self) -> None:
        self.kinds: set[str] = set()

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        self.kinds |= {type(p.grad).__name__ for p in model.parameters() if p.requires_grad}


def trainer_of(
    out: Path,
    count: int,
    rows: Any = ROWS,
    eval_dataset: Any = None,
    model: Any = None,
    lora: bool = False,
    hooks: dict[str, Any] | None = None,
    **more: Any,
) -> fastdpo.DPOTrainer:
    trainer = fastdpo.DPOTrainer(
        model or tiny_llama(),
        args=fastdpo.DPOConfig(**options(out, count, **more)),
        train_dataset=rows,
        eval_dataset=eval_dataset,
        processing_class=byte_level(),
        **{"peft_config": LORA if lora else None, **(hooks or {})},
    )
    trainer.add_callback(KindsOfGradients)
    return trainer


def summary(trainer: fastdpo.DPOTrainer, **more: Any) -> dict[str, Any]:
    """What is the same whatever the number of processes, as far as it is."""
    log = [{k: v for k, v in row.items() if not k.endswith(TIMING)} for row in trainer.state.log_history]
    weights = {name: whole(p.detach()).clone().cpu() for name, p in trainer.model.named_parameters() if p.requires_grad}
    kinds = [one.kinds for one in trainer.callback_handler.callbacks if isinstance(one, KindsOfGradients)]
    return {"log": log, "weights": weights, "gradients": sorted(set().union(*kinds)), **more}


def run(out: Path, count: int, **more: Any) -> dict[str, Any]:
    trainer = trainer_of(out, count, **more)
    trainer.train()
    return summary(trainer)


def lora_with_evaluation(out: Path, count: int) -> dict[str, Any]:
    return run(out, count, lora=True, eval_dataset=ROWS[:17], eval_strategy="epoch")


def matched(out: Path, count: int) -> dict[str, Any]:
    return run(out, count, loss_type="aot", eval_dataset=ROWS[:17], eval_strategy="epoch")


def sampled(out: Path, count: int) -> dict[str, Any]:
    """Two sets drawn by weight, noise on embeddings, and samples, which the first process alone writes."""
    drawn = {"rows": [ROWS[:12], ROWS[12:]], "train_dataset_weights": [2.0, 1.0], "neftune_noise_alpha": 5.0}
    evaluating = {"eval_dataset": ROWS[:7], "eval_strategy": "epoch", "generate_during_eval": True}
    evaluating["max_length"] = 80  # no row has as many, and samples end there
    return run(out, count, lora=True, **drawn, **evaluating)


def unpaired(out: Path, count: int) -> dict[str, Any]:
    rows = [
        {"prompt": row["prompt"] + str(number), "completion": row[side], "label": side == "chosen"}
        for number, side in enumerate(("chosen", "rejected", "chosen"))
        for row in ROWS[: 12 - number]
    ]
    return run(out, count, rows=rows, loss_type="aot_unpaired")


def pictured(out: Path, count: int) -> dict[str, Any]:
    """Prompts that show images, and a last batch of one, of which some processes have nothing."""
    model, processor = tiny_vision("llava")
    rows = [
        {**row, "prompt": "<image>" + row["prompt"], "images": [picture(30 + number, 40, number)]}
        for number, row in enumerate(ROWS[:13])
    ]
    args = fastdpo.DPOConfig(**options(out, count, max_tokens_per_microbatch=None, num_train_epochs=1))
    trainer = fastdpo.DPOTrainer(model, args=args, train_dataset=rows, processing_class=processor)
    trainer.train()
    return summary(trainer)


def running_mean(out: Path, count: int) -> dict[str, Any]:
    trainer = trainer_of(out, count, loss_type="bco_pair")
    trainer.train()
    return summary(trainer, mean=(trainer.mean_reward.value, trainer.mean_reward.pairs))


def predicted(out: Path, count: int) -> dict[str, Any]:
    """Of a row alone, too, where some processes have none."""
    trainer = trainer_of(out, count)
    trainer.train()
    found = [torch.from_numpy(trainer.predict(ROWS[:rows]).predictions) for rows in (1, 17)]
    return summary(trainer, predictions=found)


def left_padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    batch = padded_rows([TokenPair(*(row[column] for column in ID_COLUMNS)) for row in rows], 0)
    places = batch["attention_mask"].argsort(dim=1, stable=True)
    return {name: values.gather(1, places) for name, values in batch.items()}


def best_tokens(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    padding = labels == 0  # as wide as a process's own rows are
    best = logits.log_softmax(-1).amax(-1).masked_fill(padding, 0)
    return best.sum(1, keepdim=True), logits.argmax(-1).masked_fill(padding, 0)


def sums_by_place(given: Any) -> dict[str, float]:
    """Each value times its place, so that the order counts."""
    (logps, best), places = given.predictions, np.arange(1, len(given.label_ids) + 1)
    parts = {"logps": logps[:, 0], "best": (best * (best != -100)).sum(1), "labels": given.label_ids.sum(1)}
    found = {name: float((places * values).sum()) for name, values in parts.items()}
    return {**found, "losses": float((places[: len(given.losses)] * given.losses).sum())}


def hooked(out: Path, count: int) -> dict[str, Any]:
    hooks = {"compute_metrics": sums_by_place, "preprocess_logits_for_metrics": best_tokens}
    more = {"eval_dataset": ROWS[:13], "eval_strategy": "epoch", "include_for_metrics": ["loss"]}
    return run(out, count, hooks={**hooks, "data_collator": left_padded}, **more)


def token_mean(out: Path, count: int) -> dict[str, Any]:
    return run(out, count, rpo_alpha=0.5)


def padded(out: Path, count: int) -> dict[str, Any]:
    return run(out, count, model=tiny_llama(attn_implementation="eager"), gradient_checkpointing=True)


def a_last_batch_of_one_pair(out: Path, count: int) -> dict[str, Any]:
    return run(out, count, rows=ROWS[:13], eval_dataset=ROWS[:1], eval_strategy="epoch")


def stream(out: Path, count: int) -> dict[str, Any]:
    return run(out, count, rows=Dataset.from_list(ROWS).to_iterable_dataset(), max_steps=3)


def weights_that_differ_at_first(out: Path, count: int) -> dict[str, Any]:
    """As of a script that makes its model without a seed: the first process's are taken."""
    model = tiny_llama()
    if count > 1 and torch.distributed.is_initialized() and torch.distributed.get_rank():
        model = tiny_llama(initializer_range=0.3)
    return run(out, count, model=model)


def quantised_weights_that_differ_at_first(out: Path, count: int) -> dict[str, Any]:
    """Their scales are no parameters."""
    where, several = out / f"base-{count}", count > 1
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(where)  # of the first process alone, it sees to
    if several:
        fastdpo.DPOConfig(**options(out, count))  # which connects the processes
        torch.distributed.barrier()
    packed = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(where, quantization_config=packed, dtype=torch.float32)
    if several and torch.distributed.get_rank():
        for parameter in model.parameters():
            if state := getattr(parameter, "quant_state", None):
                for tensor in (parameter.data, state.absmax, state.state2.absmax, state.offset):
                    tensor.mul_(3)
    return run(out, count, model=model, lora=True, max_steps=2)


def remembered(out: Path, count: int) -> dict[str, Any]:
    """The second epoch deals rows otherwise, and no process runs the reference again."""
    trainer, passes = trainer_of(out, count, rows=ROWS[:13]), []
    compute = trainer.reference.compute
    trainer.reference.compute = lambda batch: passes.append((trainer.state.epoch, batch.num_pairs)) or compute(batch)
    trainer.train()
    return summary(trainer, passes=passes)


RESUMED: dict[str, Any] = {"lora": True, "loss_type": "bco_pair", "sync_ref_model": True, "ref_model_sync_steps": 2}


def resumed(out: Path, count: int) -> dict[str, Any]:
    """From amid the second epoch, with the bits of the run that did not stop."""
    whole = trainer_of(out, count, **RESUMED, save_strategy="steps", save_steps=3)
    whole.train()
    again, saved = trainer_of(out / "again", count, **RESUMED), out / "run/checkpoint-3"
    again.ranks.wait()  # until the first process has written
    again.train(resume_from_checkpoint=str(saved))
    first, second = summary(whole), summary(again)
    assert first["log"] == second["log"] and all(
        map(torch.equal, first["weights"].values(), second["weights"].values())
    )
    return {**second, "checkpoint": str(saved)}


def precomputed(out: Path, count: int) -> dict[str, Any]:
    path = out / f"reference-{count}.safetensors"
    more: Any = {"precompute_ref_log_probs": True, "ref_log_probs": str(path)}
    trainer_of(out, count, rows=ROWS[:7], **more)  # these are read by the next
    trainer = trainer_of(out, count, rows=ROWS[:13], **more)
    trainer.train()
    memory = trainer.reference.memory
    keys = sorted(memory.slots)
    return summary(trainer, keys=keys, values=memory.recall(keys), freed=trainer.reference.policy is None)


def best(out: Path, count: int) -> dict[str, Any]:
    """Checkpoints, the best of them, which is the first, loaded in the end by all."""
    trainer = trainer_of(
        *(out / f"of-{count}", count),
        eval_dataset=[row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in ROWS[:17]],
        **{"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best"},
        **{"metric_for_best_model": "loss", "load_best_model_at_end": True},
    )
    trainer.train()
    at, saved = trainer.state.best_global_step, trainer.state.best_model_checkpoint
    return summary(trainer, best=at, saved=Path(saved).name, there=Path(saved).exists())


def slow_to_save(out: Path, count: int) -> dict[str, Any]:
    """The first process writes for a while, and nothing else makes the others wait: there is no reference."""
    save = checkpoint.save_model

    def slowly(*given: Any) -> None:
        time.sleep(1)
        save(*given)

    checkpoint.save_model = slowly
    try:
        more: Any = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best", "reference_free": True}
        more |= {"metric_for_best_model": "loss", "load_best_model_at_end": True, "max_steps": 2}
        model, tokenizer = tiny_llama(), byte_level()
        given = options(out / f"slow-{count}", count, **more)
        result = fastdpo.train(model, ROWS, ROWS[:5], processing_class=tokenizer, **given)
        there = (out / f"slow-{count}/run/model.safetensors").exists()
    finally:
        checkpoint.save_model = save
    return summary(result.trainer, there=there)


def stopped_by_one(out: Path, count: int) -> dict[str, Any]:
    """A callback looks at a clock, and in the last process it is time after two steps."""
    trainer = trainer_of(out, count, num_train_epochs=3)

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 2 and trainer.ranks.rank == count - 1

    trainer.add_callback(Clock())
    trainer.train()
    return summary(trainer, steps=trainer.state.global_step)


def asked_by_one(out: Path, count: int) -> dict[str, Any]:
    """In the last process alone callbacks ask for an evaluation, a checkpoint and the end, each where no step ends."""
    trainer = trainer_of(out / f"asked-{count}", count, eval_dataset=ROWS[:5], num_train_epochs=3)

    class Asking(TrainerCallback):
        asks = trainer.ranks.rank == count - 1

        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **_: Any) -> None:
            control.should_evaluate = self.asks and "loss" in logs

        def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_save = self.asks and state.global_step == 2

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = self.asks

    trainer.add_callback(Asking())
    trainer.train()
    return summary(trainer, steps=trainer.state.global_step)


def stopped_before_the_first_step_by_one(out: Path, count: int) -> dict[str, Any]:
    trainer = trainer_of(out, count, eval_dataset=ROWS[:5], eval_on_start=True)

    class Stopping(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = trainer.ranks.rank == count - 1

    trainer.add_callback(Stopping())
    trainer.train()
    return summary(trainer, steps=trainer.state.global_step)


def evaluated_by_one(out: Path, count: int) -> dict[str, Any]:
    """A callback evaluates in the last process while the others train."""
    trainer = trainer_of(out, count, eval_dataset=ROWS[:5])

    class Evaluating(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if trainer.ranks.rank == count - 1:
                trainer.evaluate()

    trainer.add_callback(Evaluating())
    try:
        trainer.train()
    except (RuntimeError, ValueError) as error:
        return {"error": str(error)}
    raise AssertionError("it went through")


def a_row_that_is_not_finite(out: Path, count: int) -> dict[str, Any]:
    """One process has it, in the second step; all skip that step, or end at it."""
    rows = [row | {"chosen": row["chosen"] + " ZZ" * (number == 15)} for number, row in enumerate(ROWS)]
    more: Any = {"rows": rows, "train_sampling_strategy": "sequential", "loss_type": "bco_pair", "logging_steps": 4}

    def broken() -> torch.nn.Module:
        model = tiny_llama()
        with torch.no_grad():
            model.get_input_embeddings().weight[byte_level()("Z", add_special_tokens=False)["input_ids"][0]] = torch.nan
        return model

    skipping = trainer_of(out, count, model=broken(), on_nonfinite="skip", **more)
    skipping.train()
    ending = trainer_of(out / f"ending-{count}", count, model=broken(), **more)
    try:
        ending.train()
    except FloatingPointError as error:
        found = summary(skipping, error=str(error), ended=summary(ending)["weights"])
        saved = out / f"ending-{count}/run/nonfinite-step-2"
        return {**found, "rows": (saved / "rows.jsonl").read_text()}
    raise AssertionError("it went through")


def rows_that_differ(out: Path, count: int) -> dict[str, Any]:
    rank = torch.distributed.get_rank() if count > 1 else 0
    try:
        trainer_of(out, count, rows=ROWS[rank:] + ROWS[:rank]).train()
    except ValueError as error:
        return {"error": str(error)}
    raise AssertionError("it went through")


def workers(out: Path, count: int) -> dict[str, Any]:
    """Processes that collate; of two, spawned: what they are given is pickled."""
    more: Any = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "max_steps": 2}
    return run(out, count, dataloader_multiprocessing_context="spawn" if count == 2 else "fork", **more)


def evaluated_out_of_memory(out: Path, count: int) -> dict[str, Any]:
    """The last process alone, in the first batch of an evaluation of a loss that couples pairs."""
    trainer = trainer_of(out, count, loss_type="aot", max_tokens_per_microbatch=10_000)
    compute, calls = trainer.reference.compute, []

    def failing(batch: Any) -> Any:
        calls.append(batch)
        if len(calls) == 1 and trainer.ranks.rank == count - 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return compute(batch)

    trainer.reference.compute = failing
    trainer.evaluate(ROWS[:17])
    return summary(trainer, budget=trainer._retry.budget)


def noisy(out: Path, count: int) -> dict[str, Any]:
    """Each process draws dropout masks of its own, and all end with the same weights."""
    model, drawn = tiny_llama(attention_dropout=0.3), []
    trainer = trainer_of(out, count, model=model, disable_dropout=False, max_steps=2)
    backward = trainer._backward
    trainer._backward = lambda whole: drawn.append(torch.get_rng_state()) or backward(whole)  # type: ignore[method-assign]
    trainer.train()
    return summary(trainer, drawn=drawn[0])


@contextmanager
def counted_outside_of_ranks(operations: list[Operations]) -> Iterator[None]:
    """Operations on the CPU, and those between an agreement and a transfer, are not counted: none allocates on a
    device.
    """
    names = [*((Ranks, name) for name in ("exchange", "agree", "sum")), (GradientSum, "_sum")]
    kept = [getattr(where, name) for where, name in names]

    def uncounted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if not operations:
                return function(*args)
            count, failing = operations[-1].count, operations[-1].failing
            operations[-1].failing = None
            try:
                return function(*args)
            finally:
                operations[-1].count, operations[-1].failing = count, failing

        return call

    for (where, name), function in zip(names, kept, strict=True):
        setattr(where, name, uncounted(function))
    try:
        yield
    finally:
        for (where, name), function in zip(names, kept, strict=True):
            setattr(where, name, function)


def attempts_of(trainer: fastdpo.DPOTrainer, failing: Callable[[int], int | None]) -> list[int]:
    """Trains, attempt n failing at operation `failing(n)`; -> operations of each attempt."""
    backward, counts, running = trainer._backward, [], []

    def watched(whole: OptimizerBatch) -> None:
        with Operations(failing(len(counts))) as operations:
            running.append(operations)
            counts.append(0)
            try:
                backward(whole)
            finally:
                counts[-1] = operations.count
                running.clear()

    trainer._backward = watched  # type: ignore[method-assign]
    with counted_outside_of_ranks(running):
        trainer.train()
    return counts


USUAL: dict[str, list[int]] = {}  # operations of each step of a loss, where nothing fails


def out_of_memory(out: Path, count: int, loss: str, where: float) -> dict[str, Any]:
    """The last rank alone runs out of memory, in its second step, and again at its next try."""
    more: Any = {"loss_type": loss, "max_tokens_per_microbatch": 10_000, "max_steps": 3}
    if loss not in USUAL:
        USUAL[loss] = attempts_of(trainer_of(out, count, **more), lambda attempt: None)
    trainer = trainer_of(out, count, **more)
    last = trainer.ranks.rank == count - 1
    at = 1 + round(where * (USUAL[loss][1] - 1))
    counts = attempts_of(trainer, lambda attempt: at if last and attempt in (1, 2) else None)
    return summary(trainer, attempts=len(counts), budget=trainer._retry.budget)


def a_pair_that_never_fits(out: Path, count: int) -> dict[str, Any]:
    trainer = trainer_of(out, count, max_tokens_per_microbatch=1, max_steps=1)
    last = trainer.ranks.rank == count - 1
    try:
        attempts_of(trainer, lambda attempt: 5 if last else None)
    except RuntimeError as error:
        return {"error": f"{type(error).__name__}: {error}", "notes": getattr(error, "__notes__", [])}
    raise AssertionError("it went through")


def gradients_that_only_some_have(out: Path, count: int) -> dict[str, Any]:
    """As of an expert that no token of one process went to; and large tensors, which are summed one by one."""
    fastdpo.DPOConfig(**options(out, count))  # which connects the processes
    there = torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if there else 0
    ranks = Ranks(rank, count, torch.distributed.group.WORLD) if there else Ranks()
    shapes = [(3,), (2, 2), (5,), (2**24 + 1,), (4, 3)]
    trained = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    trained.append(torch.nn.Parameter(torch.zeros(2, dtype=torch.float64)))
    total = GradientSum(ranks, trained)
    for index, parameter in enumerate(trained):
        if index not in (1, 2) or (index == 2 and rank == 0):  # nobody has 1, the first alone has 2
            parameter.grad = torch.full_like(parameter, rank + index + 1.0)
    trained[4].grad = torch.full((3, 4), rank + 5.0).T  # not contiguous
    total()
    return {"sums": [None if p.grad is None else (p.grad.min().item(), p.grad.max().item()) for p in trained]}


AROUND_THE_EXCHANGE = (0.39, 0.395, 0.4, 0.405, 0.41)  # of log-probs after the look-ahead of a loss that couples pairs
OUT_OF_MEMORY: dict[str, Callable[..., dict[str, Any]]] = {
    f"out_of_memory-{loss}-{where}": lambda out, count, loss=loss, where=where: out_of_memory(out, count, loss, where)
    for loss in ("sigmoid", "aot", "bco_pair")
    for where in (0.0, 0.3, 0.6, 0.9, 1.0, *(AROUND_THE_EXCHANGE if loss == "aot" else ()))
}
SCENARIOS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    scenario.__name__: scenario
    for scenario in (
        *(
            lora_with_evaluation,
            matched,
            sampled,
            unpaired,
            pictured,
            running_mean,
            predicted,
            hooked,
            token_mean,
            padded,
            a_last_batch_of_one_pair,
            stream,
        ),
        *(
            weights_that_differ_at_first,
            quantised_weights_that_differ_at_first,
            remembered,
            precomputed,
            resumed,
            best,
            noisy,
            a_pair_that_never_fits,
        ),
        *(slow_to_save, stopped_by_one, asked_by_one, stopped_before_the_first_step_by_one, evaluated_by_one),
        *(workers, evaluated_out_of_memory, gradients_that_only_some_have, rows_that_differ),
        a_row_that_is_not_finite,
    )
} | OUT_OF_MEMORY


def main(out: Path, count: int, names: list[str]) -> None:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        draw_no_picture(patch)
        for name in names:
            gc.freeze()  # a run would look through all that is imported, and takes five times as long
            torch.manual_seed(0)
            found = SCENARIOS[name](out, count)
            torch.save(found, out / f"{name}-{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(os.environ["WORLD_SIZE"]), sys.argv[2:])
