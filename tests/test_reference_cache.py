"""Reference log-probs ahead of training and on disk: computed once a row, found again, never taken for another's."""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_llama
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

import fastdpo
from fastdpo import cli
from fastdpo.batch import PreferenceBatch
from fastdpo.data import row_key
from fastdpo.reference import Reference
from fastdpo.reference_cache import CHECKED_ROWS, load, pairs_of_table, save

EVERY_LINEAR = LoraConfig(r=4, target_modules="all-linear")
AHEAD = {"precompute_ref_log_probs": True}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The directory of the cache's files, in none of the user's."""
    monkeypatch.setenv("FASTDPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "reference"


@pytest.fixture
def computed(monkeypatch) -> list[PreferenceBatch]:
    """Fills with every batch that a reference runs over."""
    seen: list[PreferenceBatch] = []
    compute = Reference.compute
    monkeypatch.setattr(Reference, "compute", lambda self, batch: seen.append(batch) or compute(self, batch))
    return seen


def other_model(scale: float = 1.2) -> PreTrainedModel:
    model = tiny_llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


def trained_adapter() -> Any:
    model = get_peft_model(tiny_llama(), EVERY_LINEAR)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def trainer(rows: Any, tokenizer: Any, quick: dict[str, Any], model: Any = None, **options: Any) -> Any:
    more = {name: options.pop(name) for name in ("ref_model", "eval_dataset", "peft_config") if name in options}
    args = fastdpo.DPOConfig(**quick | options)
    return fastdpo.DPOTrainer(model or tiny_llama(), args=args, train_dataset=rows, tokenizer=tokenizer, **more)


def losses(of: Any) -> list[float]:
    return [row[name] for row in of.state.log_history for name in ("loss", "eval_loss") if name in row]


def pairs_in(batches: list[PreferenceBatch]) -> int:
    return sum(batch.num_pairs for batch in batches)


STARTS = {
    "full copy": lambda: (tiny_llama(), {}),
    "bfloat16 full copy": lambda: (tiny_llama().bfloat16(), {"bf16": True, "use_cpu": True}),
    "adapters off": lambda: (tiny_llama(), {"peft_config": EVERY_LINEAR}),
    "frozen adapter": lambda: (trained_adapter(), {}),
    "ref_model": lambda: (tiny_llama(), {"ref_model": other_model()}),
    "bfloat16 adapters off": lambda: (
        tiny_llama().bfloat16(),
        {"peft_config": EVERY_LINEAR, "bf16": True, "use_cpu": True},
    ),
}


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_a_run_with_its_reference_ahead_is_bitwise_the_one_with_it_online(start, rows, tokenizer, quick) -> None:
    """One pair a pass both times, as rows rounds differently beside others."""
    alone = {"max_tokens_per_microbatch": 1, "max_steps": 5, "eval_strategy": "steps", "eval_steps": 2}
    histories = []
    for options in ({}, {**AHEAD, "precompute_ref_batch_size": 1}):
        model, more = start()
        run = trainer(rows, tokenizer, quick | alone, model, eval_dataset=rows[:5], **more, **options)
        run.train()
        histories.append(losses(run))
    assert len(histories[0]) == 8 and histories[0] == histories[1]


def test_batches_by_length_change_the_losses_by_rounding_alone(rows, tokenizer, quick) -> None:
    runs = [trainer(rows, tokenizer, quick, ref_model=other_model(), **options) for options in ({}, AHEAD)]
    for run in runs:
        run.train()
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-5)


def test_each_distinct_row_is_computed_once_for_all_epochs_evaluations_and_later_runs(
    rows, tokenizer, quick, computed
) -> None:
    """24 training rows of which 4 come twice, and 6 evaluation rows of which 2 are training rows."""
    unseen = [{**row, "chosen": row["chosen"] + " unseen"} for row in rows[:4]]
    data: dict[str, Any] = {"eval_dataset": {"a": unseen, "b": rows[:2] + unseen[:1]}}
    quick |= {"max_steps": -1, "num_train_epochs": 2, "eval_strategy": "epoch"}
    first = trainer(rows + rows[:4], tokenizer, quick, ref_model=other_model(), **data, **AHEAD)
    assert pairs_in(computed) == 24 + 4
    first.train()
    first.evaluate()
    assert pairs_in(computed) == 28
    others = {"beta": 0.5, "loss_type": "ipo", "learning_rate": 1e-2, "seed": 3, "per_device_train_batch_size": 4}
    second = trainer(rows + rows[:4], tokenizer, quick | others, ref_model=other_model(), **data, **AHEAD)
    second.train()
    second.evaluate()
    assert pairs_in(computed) == 28 + 2 * CHECKED_ROWS  # of what was read, together and each alone
    assert losses(second) != losses(first)


def test_other_rows_and_datasets_use_what_is_there_and_add_what_is_not(rows, tokenizer, quick, computed, cache) -> None:
    trainer(rows[:10], tokenizer, quick, **AHEAD)
    computed.clear()
    trainer(rows, tokenizer, quick, **AHEAD)
    assert pairs_in(computed) == 2 * CHECKED_ROWS + 14
    computed.clear()
    trainer(rows[5:9], tokenizer, quick, **AHEAD)
    assert pairs_in(computed) == 2 * CHECKED_ROWS
    assert len(list(cache.iterdir())) == 1


def test_longest_rows_come_first_in_batches_of_the_size_that_is_asked_for(rows, tokenizer, quick, computed) -> None:
    trainer(rows, tokenizer, quick, precompute_ref_batch_size=5, **AHEAD)
    assert [batch.num_pairs for batch in computed] == [5, 5, 5, 5, 4]
    lengths = [batch.num_tokens / batch.num_pairs for batch in computed]
    assert lengths == sorted(lengths, reverse=True)
    assert all(batch.input_ids.is_inference() is False for batch in computed)


@pytest.mark.parametrize("kind", ["path", "full copy"])
def test_a_model_of_the_reference_s_own_is_freed_before_training(
    kind, rows, tokenizer, quick, tmp_path, monkeypatch
) -> None:
    other_model().save_pretrained(tmp_path / "other")
    held: list[Any] = []
    free = Reference.free
    monkeypatch.setattr(Reference, "free", lambda self: held.append(weakref.ref(self.policy.model)) or free(self))
    more = {"ref_model": str(tmp_path / "other")} if kind == "path" else {}
    run = trainer(rows, tokenizer, quick, **more, **AHEAD)
    gc.collect()
    assert len(held) == 1 and held[0]() is None and run.ref_model is None
    run.train()
    with pytest.raises(RuntimeError, match="freed once its log-probs were known, and here are rows"):
        run.evaluate([{**rows[0], "chosen": "never seen"}])


def test_a_policy_that_is_no_longer_its_reference_is_found_without_the_reference(rows, tokenizer, quick) -> None:
    run = trainer(rows, tokenizer, quick, **AHEAD)
    assert run.reference.policy is None
    with torch.no_grad():
        run.model.lm_head.weight.mul_(1.01)
    with pytest.raises(RuntimeError, match="must be 0"):
        run.train()


def test_what_inference_mode_computed_can_be_trained_on_with_dropout_in_the_config(rows, tokenizer, quick) -> None:
    """Values of inference mode would stop autograd, and a pass in training mode would drop out."""
    model = tiny_llama(attention_dropout=0.5)
    run = trainer(rows, tokenizer, quick, model, peft_config=EVERY_LINEAR, **AHEAD)
    assert not run.reference.memory.values.is_inference() and run.policy.training
    run.train()
    assert losses(run)[0] == pytest.approx(math.log(2), abs=1e-6)


def test_a_stream_is_computed_online_and_the_run_says_so(rows, tokenizer, quick, computed, caplog) -> None:
    stream = Dataset.from_list(rows).to_iterable_dataset()
    with caplog.at_level(logging.INFO, "fastdpo"):
        run = trainer(stream, tokenizer, quick, ref_model=other_model(), eval_dataset=rows[:4], **AHEAD)
    assert "the train dataset is a stream: its reference log-probs are computed as rows come" in caplog.text
    assert pairs_in(computed) == 4 and run.ref_model is not None
    run.train()
    run.evaluate()
    assert pairs_in(computed) == 4 + 4 * 6
    with pytest.raises(ValueError, match="looked up by row, and the train dataset is a stream"):
        trainer(stream, tokenizer, quick, ref_log_probs="there")


def test_the_keys_of_arrow_s_values_are_those_of_a_batch(rows, tokenizer, quick) -> None:
    table = trainer(rows, tokenizer, quick).train_dataset.select(range(20, 2, -3))
    listed = [row_key(fastdpo.data.TokenPair(*row.values())) for row in table]  # type: ignore[attr-defined]
    assert [row_key(pair) for pair in pairs_of_table(table)] == listed


def file_of(cache: Path) -> Path:
    (path,) = cache.iterdir()
    return path


def test_a_value_that_the_reference_does_not_give_stops_the_run(rows, tokenizer, quick, cache) -> None:
    trainer(rows, tokenizer, quick, **AHEAD)
    path = file_of(cache)
    values = load(path, identity := _identity(path))
    path.unlink()
    moved = {key: (chosen, rejected - 0.1) for key, (chosen, rejected) in values.items()}
    save(path, identity, torch.tensor(list(moved.values()), dtype=torch.float64), list(moved))
    with pytest.raises(ValueError, match=r"row \d+ of the train dataset, and the reference gives .*delete the file"):
        trainer(rows, tokenizer, quick, **AHEAD)


def test_values_that_round_otherwise_are_taken(rows, tokenizer, quick, cache) -> None:
    trainer(rows, tokenizer, quick, **AHEAD)
    path = file_of(cache)
    values = load(path, identity := _identity(path))
    path.unlink()
    rounded = torch.tensor(list(values.values())).mul_(1 + 3e-6)
    save(path, identity, rounded.double(), list(values))
    run = trainer(rows, tokenizer, quick, **AHEAD)
    run.train()
    assert 0 < abs(run.state.log_history[0]["rewards/chosen"]) < 1e-3


def _identity(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        return json.loads(file.metadata()["identity"])


HARM = {
    "foreign": lambda path: path.write_bytes(b"something else"),
    "empty": lambda path: path.write_bytes(b""),
    "short": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "flipped": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x01"),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_broken_file_of_the_cache_is_put_aside_and_made_anew(
    harm, rows, tokenizer, quick, cache, computed, caplog
) -> None:
    trainer(rows, tokenizer, quick, **AHEAD)
    path = file_of(cache)
    whole = load(path, identity := _identity(path))
    HARM[harm](path)
    broken = path.read_bytes()
    computed.clear()
    with caplog.at_level(logging.WARNING, "fastdpo"):
        trainer(rows, tokenizer, quick, **AHEAD)
    assert pairs_in(computed) == 24 and load(path, identity) == whole
    assert path.with_name(path.name + ".damaged").read_bytes() == broken
    assert f"{path} is damaged: put aside as {path.name}.damaged" in caplog.text


@pytest.mark.parametrize("harm", ["short", "flipped"])
def test_a_broken_file_that_the_user_names_is_never_used(harm, rows, tokenizer, quick, tmp_path) -> None:
    file = {"ref_log_probs": str(tmp_path / "ref.safetensors")}
    trainer(rows, tokenizer, quick, **file, **AHEAD)
    HARM[harm](tmp_path / "ref.safetensors")
    for options in (file, file | AHEAD):
        with pytest.raises(ValueError, match=r"ref\.safetensors (cannot be read|holds other bytes).*: delete it"):
            trainer(rows, tokenizer, quick, **options)


@pytest.mark.parametrize("kind", ["dataset", "weights", "directory", "empty", "header of another"])
def test_a_file_of_the_user_s_is_not_said_to_be_one_to_delete(kind, rows, tokenizer, quick, tmp_path, computed) -> None:
    """A slip in --output or ref_log_probs once had the user delete a dataset or a model."""
    path = tmp_path / "model/model.safetensors"
    tiny_llama().save_pretrained(tmp_path / "model")
    found = {
        "dataset": "it is no safetensors file",
        "weights": "it has tensors of other names, such as ",
        "directory": "it is a directory",
        "empty": "it is no safetensors file",
        "header of another": "it is no safetensors file",
    }[kind]
    if kind == "directory":
        path = tmp_path / "model"
    elif kind != "weights":
        text = {"dataset": json.dumps(rows), "empty": "", "header of another": "\x02" + 7 * "\x00" + "[]"}[kind]
        (path := tmp_path / "pairs.jsonl").write_text(text)
    for options in ({}, AHEAD):
        with pytest.raises(ValueError) as raised:
            trainer(rows, tokenizer, quick, ref_log_probs=str(path), **options)
        assert f"{path} is no file of reference log-probs ({found}" in str(raised.value)
        assert "give one made by `fastdpo reference`, or another --output" in str(raised.value)
        assert "delete" not in str(raised.value) and not computed


def test_a_file_of_another_reference_or_without_all_rows_is_refused(rows, tokenizer, quick, tmp_path, computed) -> None:
    file = {"ref_log_probs": str(tmp_path / "deep/ref.safetensors")}
    with pytest.raises(ValueError, match="does not exist: make it with `fastdpo reference"):
        trainer(rows, tokenizer, quick, **file)
    trainer(rows[:20], tokenizer, quick, **file, **AHEAD)
    with pytest.raises(ValueError, match=r"another reference \(weights: memory \w+ there, memory \w+ here\)"):
        trainer(rows[:20], tokenizer, quick, other_model(), **file)
    with pytest.raises(ValueError, match="dtype of products: float32 there, bfloat16 here"):
        trainer(rows[:20], tokenizer, quick, bf16=True, use_cpu=True, **file)
    with pytest.raises(ValueError, match=r"has 20 of 24 rows, and 4 are missing, such as row 2\d of the train dataset"):
        trainer(rows, tokenizer, quick, **file)
    computed.clear()
    trainer(rows, tokenizer, quick, **file, **AHEAD)
    assert pairs_in(computed) == 2 * CHECKED_ROWS + 4
    run = trainer(rows, tokenizer, quick, **file)
    run.train()
    assert losses(run)[0] == pytest.approx(math.log(2), abs=1e-6)


def test_a_file_that_the_user_names_serves_a_copy_of_the_model(rows, tokenizer, quick, tmp_path, computed) -> None:
    """A copy has other times of writing, which the cache takes for another model's."""
    other_model().save_pretrained(tmp_path / "other")
    options = {"ref_model": str(tmp_path / "other"), "ref_log_probs": str(tmp_path / "ref.safetensors")}
    trainer(rows, tokenizer, quick, **options, **AHEAD)
    os.utime(tmp_path / "other/model.safetensors", ns=(1, 1))
    computed.clear()
    trainer(rows, tokenizer, quick, **options)
    assert pairs_in(computed) == 2 * CHECKED_ROWS
    del options["ref_log_probs"]
    for _ in range(2):
        computed.clear()
        trainer(rows, tokenizer, quick, **options, **AHEAD)
        os.utime(tmp_path / "other/model.safetensors", ns=(2, 2))
        assert pairs_in(computed) == 24


@pytest.mark.parametrize("hidden", [True, False])
def test_a_progress_bar_counts_pairs_unless_bars_are_off(hidden, rows, tokenizer, quick, capfd) -> None:
    trainer(rows, tokenizer, quick | {"disable_tqdm": hidden}, **AHEAD)
    shown = capfd.readouterr().err
    assert ("Reference: 100%" in shown and "24/24" in shown) != hidden


def test_an_interrupted_computation_goes_on_where_it_was(rows, tokenizer, quick, computed, monkeypatch) -> None:
    counting = Reference.compute

    def stop(self: Reference, batch: PreferenceBatch) -> torch.Tensor:
        if len(computed) == 3:
            raise KeyboardInterrupt
        return counting(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Reference, "compute", stop)
        with pytest.raises(KeyboardInterrupt):
            trainer(rows, tokenizer, quick, precompute_ref_batch_size=4, **AHEAD)
    assert pairs_in(computed) == 12
    computed.clear()
    trainer(rows, tokenizer, quick, **AHEAD)
    assert pairs_in(computed) == 2 * CHECKED_ROWS + 12


def broken_reference(patch: pytest.MonkeyPatch, computed: list[PreferenceBatch], at: int = 1) -> None:
    """Its second batch has a row that is no number, where that is the first one."""
    counting = Reference.compute

    def compute(self: Reference, batch: PreferenceBatch) -> torch.Tensor:
        logps = counting(self, batch)
        logps[0] = torch.tensor([-1.0, math.nan]) if len(computed) == at + 1 else logps[0]
        return logps

    patch.setattr(Reference, "compute", compute)


def test_rows_without_a_number_are_named_and_the_others_kept(rows, tokenizer, quick, computed, monkeypatch) -> None:
    """One of them once lost what hours had computed."""
    with monkeypatch.context() as patch:
        broken_reference(patch, computed)
        with pytest.raises(ValueError, match=r"1 of 24 rows .* not finite: row \d+ of the train dataset; are the"):
            trainer(rows, tokenizer, quick, precompute_ref_batch_size=4, **AHEAD)
    assert pairs_in(computed) == 24
    computed.clear()
    trainer(rows, tokenizer, quick, **AHEAD)
    assert pairs_in(computed) == 2 * CHECKED_ROWS + 1


def test_what_interrupts_a_computation_is_not_hidden_by_what_follows(
    rows, tokenizer, quick, cache, computed, monkeypatch
) -> None:
    """A row without a number, and then a disk that is full."""
    broken_reference(monkeypatch, computed)
    counting = Reference.compute

    def stop(self: Reference, batch: PreferenceBatch) -> torch.Tensor:
        if len(computed) == 3:
            raise KeyboardInterrupt
        return counting(self, batch)

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Reference, "compute", stop)
    with pytest.raises(KeyboardInterrupt):
        trainer(rows, tokenizer, quick, precompute_ref_batch_size=4, **AHEAD)
    path = file_of(cache)
    assert len(load(path, _identity(path))) == 11
    computed.clear()
    path.unlink()
    monkeypatch.setattr("fastdpo.reference_cache.save", full)
    with pytest.raises(KeyboardInterrupt) as raised:
        trainer(rows, tokenizer, quick, precompute_ref_batch_size=4, **AHEAD)
    assert raised.value.__notes__ == [
        "fastdpo: the 12 rows computed by then could not be written: No space left on device"
    ]


@pytest.mark.parametrize("words", ["CUDA out of memory.", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling x"])
def test_a_precompute_without_memory_halves_its_batches_in_whatever_words_it_comes(
    words, rows, tokenizer, quick, computed, monkeypatch
) -> None:
    counting, freed = Reference.compute, []

    def full(self: Reference, batch: PreferenceBatch) -> torch.Tensor:
        if batch.num_pairs > 3:
            raise RuntimeError(words)
        return counting(self, batch)

    monkeypatch.setattr(Reference, "compute", full)
    monkeypatch.setattr("fastdpo.reference_cache.collect_memory", lambda: freed.append(gc.collect()))
    trainer(rows, tokenizer, quick, max_tokens_per_microbatch=500, **AHEAD)
    assert freed and pairs_in(computed) == 24
    (cached := Path(os.environ["FASTDPO_CACHE"])).rename(cached.with_name("other"))
    with pytest.raises(RuntimeError, match=words) as raised:
        trainer(rows, tokenizer, quick, precompute_ref_batch_size=8, **AHEAD)
    assert "lower precompute_ref_batch_size" in raised.value.__notes__[0]


def test_log_probs_that_are_no_numbers_are_not_kept(tmp_path) -> None:
    values = torch.tensor([[math.nan, 0], [-1, -2]], dtype=torch.float64)
    with pytest.raises(ValueError, match="1 of 2 rows have reference log-probs that are not finite"):
        save(tmp_path / "x", {}, values, [bytes(16), bytes(range(16))])
    assert not any(tmp_path.iterdir())


def test_a_cache_that_cannot_be_written_is_said_before_anything_runs(
    rows, tokenizer, quick, tmp_path, computed, monkeypatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FASTDPO_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="cannot be kept in .*: set FASTDPO_CACHE"):
        trainer(rows, tokenizer, quick, **AHEAD)
    assert not computed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({**AHEAD, "reference_free": True}, "precompute_ref_log_probs=True has no effect with reference_free"),
        ({**AHEAD, "loss_type": ["simpo", "sft"]}, "has no effect with a loss_type that sees the policy alone"),
        ({"ref_log_probs": "x", "loss_type": "orpo"}, "ref_log_probs='x' has no effect"),
        ({"precompute_ref_batch_size": 4}, "no effect without precompute_ref_log_probs=True"),
        ({**AHEAD, "precompute_ref_batch_size": 0}, "precompute_ref_batch_size must be at least 1"),
    ],
    ids=str,
)
def test_an_option_of_the_reference_that_would_do_nothing_is_refused(options, message, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        fastdpo.DPOConfig(str(tmp_path), **options)


def test_the_command_line_writes_a_file_that_a_run_reads(rows, tokenizer, tmp_path, computed, capsys, quick) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    file, before = tmp_path / "ref.safetensors", set(tmp_path.iterdir())
    base = ["--model", str(tmp_path / "model"), "--train_dataset", str(tmp_path / "pairs.jsonl"), "--use_peft"]
    assert cli.main(["reference", *base, "--output", str(file), "--max_length", "200"]) == 0
    assert f"reference log-probs of 24 rows are in {file}" in capsys.readouterr().out
    assert set(tmp_path.iterdir()) == before | {file} and pairs_in(computed) == 24
    run = fastdpo.train(
        str(tmp_path / "model"), str(tmp_path / "pairs.jsonl"), ref_log_probs=str(file), use_peft=True, **quick
    )
    assert pairs_in(computed) >= 24 + 2 * CHECKED_ROWS and run.history[0]["loss"] == pytest.approx(math.log(2))
    assert cli.main(["reference", *base, "--output", str(file), "--ref_log_probs", "x"]) == 1
    assert "fastdpo reference writes to --output" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["reference", *base])
    assert "--output is missing: fastdpo reference --model MODEL" in capsys.readouterr().err
