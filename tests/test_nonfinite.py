"""A loss or a gradient that is not finite never reaches the weights, and the run names it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from conftest import tiny_llama
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import TrainerCallback

from fastdpo import DPOConfig, DPOTrainer, checkpoint
from fastdpo.data import pair_of, row_key
from fastdpo.loader import epoch_batches, row_numbers
from fastdpo.nonfinite import ROWS, SHOWN

BAD = 9  # the row with the marker: of the second step of an epoch
MARKER = " ZZ"
LORA = LoraConfig(r=4, target_modules="all-linear")
SKIP = {"on_nonfinite": "skip", "train_sampling_strategy": "sequential"}
RAISE = SKIP | {"on_nonfinite": "raise"}


@pytest.fixture(scope="module")
def marked(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [row | {"chosen": row["chosen"] + MARKER * (number == BAD)} for number, row in enumerate(rows)]


@pytest.fixture(scope="module")
def broken(tokenizer: Any) -> Callable[[], Any]:
    """-> a model whose embedding of the marker's token is NaN."""

    def make() -> Any:
        model = tiny_llama()
        with torch.no_grad():
            model.get_input_embeddings().weight[tokenizer("Z", add_special_tokens=False)["input_ids"][0]] = math.nan
        return model

    return make


def trainer_of(model: Any, rows: list, tokenizer: Any, options: dict, **more: Any) -> DPOTrainer:
    return DPOTrainer(model, args=DPOConfig(**options), train_dataset=rows, processing_class=tokenizer, **more)


def tensors(value: Any) -> list[bytes]:
    """The bits of all tensors and numbers of a nested state, in order."""
    if isinstance(value, torch.Tensor):
        return [value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()]
    if isinstance(value, dict):
        value = list(value.values())
    parts = value if isinstance(value, (list, tuple)) else []
    return [bits for part in parts for bits in tensors(part)] or [repr(value).encode()]


class Watch(TrainerCallback):
    """The bits of what trains and of the optimizer's state before each step and after it."""

    def __init__(self) -> None:
        self.states: list[list[bytes]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        self.note(**parts)

    def on_train_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        self.note(**parts)

    def note(self, model: Any, optimizer: Any, **_: Any) -> None:
        weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.states.append(tensors(weights) + tensors(optimizer.state_dict()["state"]))


class Momentum(torch.optim.Optimizer):
    """A user's own: its weights move and decay at gradients of 0, too."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1e-3})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            velocity = self.state[parameter].setdefault("velocity", torch.zeros_like(parameter))
            velocity.mul_(0.9).add_(parameter.grad)
            parameter.mul_(0.99).sub_(velocity, alpha=1e-3)


def nan_at(trainer: DPOTrainer, step: int, name: str = "model.norm.weight") -> None:
    """The gradient of one parameter is NaN at that step (from 1), and the loss is none."""
    (parameter,) = (p for n, p in trainer.model.named_parameters() if n.endswith(name) and p.requires_grad)
    parameter.register_hook(lambda gradient: gradient * (math.nan if trainer.state.global_step + 1 == step else 1.0))


GIVEN: dict[str, Callable[[Any], Any]] = {
    "a user's own": Momentum,
    "fused SGD": lambda parameters: torch.optim.SGD(parameters, 1e-3, momentum=0.9, fused=True),
    "AMSGrad": lambda parameters: torch.optim.AdamW(parameters, 1e-3, amsgrad=True, fused=True),
}
OPTIMIZERS = ["adamw_torch_fused", "adamw_torch", "adafactor", "sgd", "rmsprop", "adamw_8bit", "lion_32bit", *GIVEN]
FIRST = ["adamw_torch_fused", "fused SGD", "adamw_8bit"]  # whose states are made at different times


@pytest.mark.parametrize(("name", "step"), [*((name, 2) for name in OPTIMIZERS), *((name, 1) for name in FIRST)])
def test_a_gradient_of_nan_moves_no_weight_and_no_state_of_any_optimizer(name, step, rows, tokenizer, quick) -> None:
    model, watch = tiny_llama(), Watch()
    given = {"optimizers": (GIVEN[name](model.parameters()), None)} if name in GIVEN else {}
    options = quick | {"max_steps": 3, "on_nonfinite": "skip", "weight_decay": 0.1, "logging_steps": 3}
    options |= {"optim": name} if name not in GIVEN else {}
    trainer = trainer_of(model, rows, tokenizer, options, callbacks=[watch], **given)
    nan_at(trainer, step)
    trainer.train()
    moved = [before != after for before, after in zip(watch.states, watch.states[1:], strict=False)]
    assert moved == [number != step for number in (1, 2, 3)]
    assert trainer.state.log_history[0]["skipped_steps"] == 1


KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "full": ({}, {}),
    "LoRA in bf16": ({"bf16": True}, {"peft_config": LORA}),
    "clipping off": ({"max_grad_norm": 0.0}, {}),
    "padded": ({"attn_implementation": "eager", "use_peft": True}, {}),
    "accumulation": ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}, {}),
    "a loss of all pairs together": ({"loss_type": "aot", "max_tokens_per_microbatch": 100}, {}),
    "a running mean": ({"loss_type": "bco_pair", "max_tokens_per_microbatch": 100}, {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_row_of_nan_is_named_alone_and_skips_its_step_alone(
    kind, marked, broken, tokenizer, quick, caplog, tmp_path
) -> None:
    """The others are those of a run whose second update was never made."""
    options, more = KINDS[kind]
    options = quick | {"use_cpu": True} | SKIP | options
    watch = Watch()
    model: Any = broken()
    if kind == "padded":
        model.save_pretrained(tmp_path)
        model = str(tmp_path)
    trainer = trainer_of(model, marked, tokenizer, options, callbacks=[watch], **more)
    trainer.train()
    assert watch.states[1] == watch.states[2] and watch.states[2] != watch.states[3] != watch.states[4]
    assert "step 2: the loss is not finite" in caplog.text
    assert f"nor are log-probs or loss of row {BAD} of trainer.train_dataset. " in caplog.text
    assert [row.get("skipped_steps") for row in trainer.state.log_history] == [0, 1, 1, 1, None]
    assert trainer.state.log_history[-1]["train_skipped_steps"] == 1
    assert math.isfinite(trainer.state.log_history[-1]["train_loss"])
    saved = [json.loads(line) for line in Path(quick["output_dir"], "nonfinite-step-2", ROWS).read_text().splitlines()]
    assert sorted(row["row"] for row in saved) == list(range(6, 12))
    for row in saved:
        pair = pair_of(trainer.train_dataset[row["row"]])
        assert (row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) == (pair.prompt, pair.chosen, pair.rejected)
        assert math.isnan(row["chosen_logps"]) == (row["row"] == BAD) != math.isfinite(row["ref_chosen_logps"])
        assert row["prompt"] in marked[row["row"]]["prompt"]


def test_a_skipped_step_leaves_the_run_of_which_it_was_no_part(marked, broken, tokenizer, quick) -> None:
    trainers = [trainer_of(broken(), marked, tokenizer, quick | SKIP | {"loss_type": "bco_pair"}) for _ in range(2)]
    trainers[0].train()
    without = trainers[1]
    step = without._optimizer_step

    def left_out(batches: Any) -> None:
        """The schedule's part of the second step alone."""
        step(batches) if without.state.global_step != 1 else without.lr_scheduler.step()

    without._optimizer_step = left_out  # type: ignore[method-assign]
    without.train()
    states = [tensors([t.model.state_dict(), t.optimizer.state_dict(), vars(t.mean_reward)]) for t in trainers]
    assert states[0] == states[1]
    assert float(trainers[0].mean_reward.pairs) == 18
    logs = [{row["step"]: row for row in t.state.log_history[:-1]} for t in trainers]
    for step in (1, 3, 4):
        one, other = ({**log[step], "num_tokens": 0, "skipped_steps": 0} for log in logs)
        assert one == other


def test_a_run_ends_with_the_weights_that_the_step_met_saved_beside_its_rows(
    marked, broken, tokenizer, quick, tmp_path
) -> None:
    """At once, though no log line and no checkpoint is due, and with no step after it."""
    watch = Watch()
    options = quick | RAISE | {"max_steps": 8, "logging_steps": 100, "save_strategy": "steps", "save_steps": 3}
    trainer = trainer_of(broken(), marked, tokenizer, options, callbacks=[watch])
    with pytest.raises(FloatingPointError) as caught:
        trainer.train()
    for words in (
        "step 2: the loss is not finite (loss nan, gradient norm nan), ",
        f"nor are log-probs or loss of row {BAD} of trainer.train_dataset. ",
        "model.embed_tokens.weight holds numbers that are not finite; the step moved none. ",
        f"Its rows and the weights that train are in {quick['output_dir']}/nonfinite-step-2. ",
    ):
        assert words in str(caught.value)
    where = Path(quick["output_dir"], "nonfinite-step-2")
    assert sorted(path.name for path in where.iterdir()) == ["files.json", ROWS, "trained.safetensors"]
    assert len(watch.states) == 2
    weights = load_file(where / "trained.safetensors")
    ours = {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert weights.keys() == ours.keys() and tensors(list(ours.values())) == tensors([weights[name] for name in ours])
    assert watch.states[1][: len(ours)] == tensors(list(ours.values()))
    again = broken()
    again.load_state_dict(weights, strict=False)
    options = quick | RAISE | {"output_dir": str(tmp_path / "again")}
    with pytest.raises(FloatingPointError, match=r"step 1: .*of row 3 of"):
        trainer_of(again, str(where / ROWS), tokenizer, options).train()  # type: ignore[arg-type]


def test_a_gradient_alone_that_is_not_finite_is_called_that(rows, tokenizer, quick) -> None:
    trainer = trainer_of(tiny_llama(), rows, tokenizer, quick | RAISE)
    nan_at(trainer, 3)
    expected = r"step 3: the gradient is not finite \(loss 0\.\d+, gradient norm nan\), though log-probs and losses of "
    expected += r"its rows are \(rows 12, .* 17 of trainer.train_dataset\), so the backward pass made it\. All weights"
    with pytest.raises(FloatingPointError, match=expected):
        trainer.train()


def test_steps_after_the_one_that_ends_a_run_move_nothing_though_nobody_knows_of_it_yet(
    rows, tokenizer, quick, monkeypatch
) -> None:
    """As on a GPU, whose numbers come to the host later."""
    monkeypatch.setattr("fastdpo.nonfinite._is_there", lambda copied: False)
    watch = Watch()
    trainer = trainer_of(tiny_llama(), rows, tokenizer, quick | RAISE | {"logging_steps": 4}, callbacks=[watch])
    nan_at(trainer, 2)
    with pytest.raises(FloatingPointError, match="step 2"):
        trainer.train()
    assert len(watch.states) == 4 and watch.states[0] != watch.states[1] == watch.states[2] == watch.states[3]


def test_no_checkpoint_is_written_over_a_step_that_nobody_knows_of_yet(rows, tokenizer, quick, monkeypatch) -> None:
    monkeypatch.setattr("fastdpo.nonfinite._is_there", lambda copied: False)
    options = quick | RAISE | {"logging_steps": 4, "save_strategy": "steps", "save_steps": 1}
    trainer = trainer_of(tiny_llama(), rows, tokenizer, options)
    nan_at(trainer, 2)
    with pytest.raises(FloatingPointError, match="step 2"):
        trainer.train()
    assert [path.name for path in checkpoint.checkpoints(Path(quick["output_dir"]))] == ["checkpoint-1"]


def test_a_reference_that_was_not_finite_once_is_not_remembered(rows, tokenizer, quick, caplog) -> None:
    """A row's loss is infinite, its gradient is not, and in the next epoch it trains."""
    options = quick | SKIP | {"loss_type": "hinge", "beta": 1.0, "num_train_epochs": 2, "max_steps": -1}
    trainer = trainer_of(tiny_llama(), rows, tokenizer, options)
    compute = trainer.reference.compute

    def infinite(batch: Any) -> torch.Tensor:
        values = compute(batch)
        if trainer.state.global_step == 1:
            values[2, 0] = math.inf
        return values

    trainer.reference.compute = infinite  # type: ignore[method-assign]
    trainer.train()
    assert "step 2: the loss is not finite (loss inf, gradient norm" in caplog.text
    losses = [row["loss"] for row in trainer.state.log_history[:-1]]
    assert [math.isfinite(loss) for loss in losses] == [True, False, *[True] * 6]
    last = trainer.state.log_history[-1]
    assert last["train_skipped_steps"] == 1 and last["train_loss"] == pytest.approx((sum(losses[2:]) + losses[0]) / 7)


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """fp16's loss scaling, which a CPU can do as well, from that scale on."""
    real = torch.amp.GradScaler
    return lambda scale: monkeypatch.setattr(torch.amp, "GradScaler", lambda *_, **__: real("cpu", init_scale=scale))


def test_a_gradient_that_overflows_in_fp16_is_no_fault_but_lowers_the_scale(rows, tokenizer, quick, scaled) -> None:
    scaled(1024.0)
    watch = Watch()
    trainer = trainer_of(tiny_llama(), rows, tokenizer, quick | RAISE, callbacks=[watch])
    nan_at(trainer, 2)
    trainer.train()
    moved = [before != after for before, after in zip(watch.states, watch.states[1:], strict=False)]
    assert moved == [True, False, True, True]
    assert trainer.scaler.get_scale() == 512 and not list(Path(quick["output_dir"]).glob("nonfinite*"))


def test_in_fp16_a_loss_that_is_not_finite_and_a_scale_of_1_that_still_overflows_are_faults(
    rows, marked, broken, tokenizer, quick, scaled
) -> None:
    scaled(1024.0)
    with pytest.raises(FloatingPointError, match="step 2: the loss is not finite"):
        trainer_of(broken(), marked, tokenizer, quick | RAISE).train()
    scaled(1.0)
    trainer = trainer_of(tiny_llama(), rows, tokenizer, quick | RAISE)
    nan_at(trainer, 2)
    with pytest.raises(FloatingPointError, match="step 2: the gradient is not finite"):
        trainer.train()


def test_a_run_that_goes_on_counts_on_and_saves_no_second_first(marked, broken, tokenizer, quick, tmp_path) -> None:
    options = quick | SKIP | {"max_steps": 7, "save_strategy": "steps", "save_steps": 3, "logging_steps": 2}
    whole = trainer_of(broken(), marked, tokenizer, options)
    whole.train()
    again = trainer_of(broken(), marked, tokenizer, options | {"output_dir": str(tmp_path / "again")})
    again.train(resume_from_checkpoint=f"{quick['output_dir']}/checkpoint-3")
    keys = ("step", "loss", "skipped_steps", "num_tokens")
    logs = [[[row.get(key) for key in keys] for row in run.state.log_history[:-1]] for run in (whole, again)]
    assert logs[0] == logs[1] and [row[2] for row in logs[0]] == [1, 1, 2]
    assert tensors(whole.optimizer.state_dict()["state"]) == tensors(again.optimizer.state_dict()["state"])
    ends = [[run.state.log_history[-1][f"train_{key}"] for key in ("loss", "skipped_steps")] for run in (whole, again)]
    assert ends[0] == ends[1] and ends[0][1] == 2
    assert [path.name for path in Path(quick["output_dir"]).glob("nonfinite*")] == ["nonfinite-step-2"]
    assert not list((tmp_path / "again").glob("nonfinite*"))


@pytest.mark.parametrize("error", [OSError, SafetensorError, RuntimeError])
def test_a_full_disk_does_not_hide_the_fault(error, rows, tokenizer, quick, monkeypatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise error("No space left on device")

    monkeypatch.setattr("fastdpo.checkpoint._to_disk", full)
    trainer = trainer_of(tiny_llama(), rows, tokenizer, quick | RAISE)
    nan_at(trainer, 1)
    with pytest.raises(FloatingPointError, match="could not be written to .*nonfinite-step-1: .*No space left"):
        trainer.train()


def test_a_stream_has_no_row_numbers_and_its_rows_are_saved(marked, broken, tokenizer, quick) -> None:
    stream = datasets.Dataset.from_list(marked).to_iterable_dataset()
    with pytest.raises(FloatingPointError, match="nor are log-probs or loss of 1 of the step's rows"):
        trainer_of(broken(), stream, tokenizer, quick | RAISE).train()
    saved = [json.loads(line) for line in Path(quick["output_dir"], "nonfinite-step-2", ROWS).read_text().splitlines()]
    (bad,) = (row for row in saved if math.isnan(row["loss"]))
    assert bad["row"] is None and bad["chosen"].endswith(MARKER + tokenizer.eos_token)


def test_rows_are_named_in_a_shuffled_second_epoch_too(rows, tokenizer, quick) -> None:
    trainer = trainer_of(tiny_llama(), rows, tokenizer, quick | {"max_steps": 8})
    keys = [row_key(pair_of(row)) for row in trainer.train_dataset]
    loader = trainer.get_train_dataloader()
    for epoch in range(2):
        for done, share in enumerate(epoch_batches(loader, epoch)):
            for key, numbers in row_numbers(loader, epoch, done, share).items():
                assert [keys[number] for number in numbers] == [key]
            assert len(share.places) == 6


def test_of_rows_that_begin_alike_it_is_said_that_one_may_be_the_cause(marked, broken, tokenizer, quick) -> None:
    alike = "You are asked by somebody whom you know. Answer as a friend would, in one sentence or two. "
    for system, said in ((alike, True), ("", False)):
        rows = [row | {"prompt": system + row["prompt"]} for row in marked]
        with pytest.raises(FloatingPointError) as raised:
            trainer_of(broken(), rows, tokenizer, quick | RAISE | {"max_tokens_per_microbatch": 4000}).train()
        assert ("one of them may be the cause" in str(raised.value)) is said
        assert f"row{'s' * said}" in str(raised.value) and f" {BAD}" in str(raised.value)


def test_of_equal_rows_each_is_named(marked, broken, tokenizer, quick) -> None:
    twice = [*marked[:6], marked[BAD], marked[7], marked[BAD], *marked[9:]]
    with pytest.raises(FloatingPointError, match="log-probs or loss of rows 6, 8, 9 of trainer.train_dataset"):
        trainer_of(broken(), twice, tokenizer, quick | RAISE).train()


def test_of_later_faults_no_tokens_and_of_many_no_rows_are_kept(marked, broken, tokenizer, quick) -> None:
    trainer = trainer_of(broken(), [marked[BAD]] * 6, tokenizer, quick | SKIP | {"max_steps": 11, "logging_steps": 11})
    seen: list[list] = []
    keep = lambda *_, **__: seen.append([fault.rows for fault in trainer._guard.found])  # noqa: E731
    trainer._report_faults, report = (lambda: (keep(), report())), trainer._report_faults
    trainer.train()
    rows = max(seen, key=len)
    assert [len(found) for found in rows] == [6] * SHOWN + [0] * 3
    assert ["chosen_ids" in found[0] for found in rows[:SHOWN]] == [True] + [False] * (SHOWN - 1)
    assert [row["row"] for row in rows[1]] == list(range(6))


def test_another_word_is_refused_with_those_that_there_are(quick) -> None:
    with pytest.raises(ValueError, match="on_nonfinite='ignore' is none of raise, skip"):
        DPOConfig(**quick, on_nonfinite="ignore")
