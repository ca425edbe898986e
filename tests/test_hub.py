"""What goes to the Hub, when, and what its model card says. No test reaches the network: the Hub is a list of calls."""

from __future__ import annotations

import logging
import re
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from conftest import tiny_llama
from peft import LoraConfig
from transformers import AutoModelForCausalLM

import fastdpo
from fastdpo.card import MARK


class FakeHub:
    """In place of huggingface_hub's functions: notes each call, with what the folder held by then."""

    def __init__(self, failing: str = "") -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.failing, self.slow = failing, False

    def create_repo(self, name: str, **options: Any) -> Any:
        self.calls.append(("create_repo", {"name": name, **options}))
        if self.failing == "create_repo":
            raise OSError("401: invalid token")
        return SimpleNamespace(repo_id=f"me/{name}" if "/" not in name else name)

    def create_branch(self, name: str, **options: Any) -> None:
        self.calls.append(("create_branch", {"name": name, **options}))

    def upload_folder(self, *, folder_path: Path, **options: Any) -> Future:
        held = sorted(path.name for path in Path(folder_path).iterdir())
        self.calls.append(("upload_folder", {"folder": Path(folder_path).name, "held": held, **options}))
        job: Future = Future()
        if self.failing == "upload_folder":
            job.set_exception(OSError("connection lost"))
        elif not self.slow:
            job.set_result(f"commit {len(self.calls)}")
        return job

    @property
    def uploads(self) -> list[dict[str, Any]]:
        return [options for name, options in self.calls if name == "upload_folder"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    for name in ("create_repo", "create_branch", "upload_folder"):
        monkeypatch.setattr(f"huggingface_hub.{name}", getattr(fake, name))
    return fake


@pytest.fixture
def pushed(quick: dict[str, Any]) -> dict[str, Any]:
    """Options of a run that saves at steps 2 and 4."""
    saving = {"save_strategy": "steps", "save_steps": 2, "push_to_hub": True, "hub_model_id": "me/better"}
    return {**quick, **saving, "hub_token": "hf_secret", "per_device_train_batch_size": 2}


def test_the_repository_is_made_before_anything_loads_with_the_runs_token(hub, tokenizer, pushed) -> None:
    hub.failing = "create_repo"
    with pytest.raises(ValueError, match="'me/better' .401: invalid token.: check hub_model_id and hub_token"):
        args = fastdpo.DPOConfig(**pushed, hub_private_repo=True)
        fastdpo.DPOTrainer(tiny_llama(), args=args, train_dataset="/not/read.jsonl", processing_class=tokenizer)
    assert hub.calls == [
        ("create_repo", {"name": "me/better", "token": "hf_secret", "private": True, "exist_ok": True})
    ]


@pytest.mark.parametrize("name", ["a b", "me/you/it", "-x"])
def test_a_name_that_no_repository_can_have_is_refused(name, hub, rows, tokenizer, pushed) -> None:
    with pytest.raises(ValueError, match="hub_model_id is .*Set hub_model_id, such as 'me/model'"):
        fastdpo.train(tiny_llama(), rows, processing_class=tokenizer, **{**pushed, "hub_model_id": name})
    assert hub.calls == []


@pytest.mark.parametrize(
    ("strategy", "uploaded"),
    [
        ("end", [("out", None)]),
        ("every_save", [("out", None), ("out", None), ("out", None)]),
        (
            "checkpoint",
            [
                *(("out", None), ("checkpoint-2", "last-checkpoint")),
                *(("out", None), ("checkpoint-4", "last-checkpoint"), ("out", None)),
            ],
        ),
        (
            "all_checkpoints",
            [
                *(("out", None), ("checkpoint-2", "checkpoint-2")),
                *(("out", None), ("checkpoint-4", "checkpoint-4"), ("out", None)),
            ],
        ),
    ],
)
def test_what_is_uploaded_when_is_what_the_strategy_says(strategy, uploaded, hub, rows, tokenizer, pushed) -> None:
    fastdpo.train(tiny_llama(), rows, processing_class=tokenizer, **pushed, hub_strategy=strategy, hub_revision="dev")
    assert [(options["folder"], options["path_in_repo"]) for options in hub.uploads] == uploaded
    assert [name for name, _ in hub.calls[:2]] == ["create_repo", "create_branch"]
    for options in hub.uploads:
        assert (options["repo_id"], options["token"], options["revision"]) == ("me/better", "hf_secret", "dev")
        assert {"model.safetensors", "tokenizer.json"} <= set(options["held"])
        if options["folder"] == "out":
            never = ["_*", "checkpoint-*", ".checkpoint-*", "samples.md", "report.html", ".report.*"]
            assert options["ignore_patterns"] == never and "README.md" in options["held"]
    assert hub.uploads[-1]["commit_message"] == "Model save"


def test_a_save_is_not_pushed_while_the_last_push_goes_on_unless_all_are_asked_for(
    hub, rows, tokenizer, pushed, monkeypatch
) -> None:
    monkeypatch.setattr("fastdpo.hub.Repository.finish", lambda self: None)  # which would wait for ever
    hub.slow = True
    for always, count in ((False, 1), (True, 2)):
        hub.calls.clear()
        args = fastdpo.DPOConfig(**pushed, hub_always_push=always)
        fastdpo.DPOTrainer(tiny_llama(), args=args, train_dataset=rows, processing_class=tokenizer).train()
        assert len(hub.uploads) == count


def test_a_push_that_fails_leaves_the_run_and_the_last_one_says_where_the_model_is(
    hub, rows, tokenizer, pushed, caplog
) -> None:
    hub.failing = "upload_folder"
    with caplog.at_level(logging.WARNING, "fastdpo"), pytest.raises(OSError, match="connection lost") as raised:
        fastdpo.train(tiny_llama(), rows, processing_class=tokenizer, **pushed)
    assert f"the model is saved in {pushed['output_dir']}" in raised.value.__notes__[0]
    assert caplog.text.count("a push failed (OSError: connection lost)") == 2
    assert AutoModelForCausalLM.from_pretrained(pushed["output_dir"]).num_parameters() == tiny_llama().num_parameters()


def test_push_to_hub_makes_the_repository_where_the_run_did_not_and_takes_what_a_card_takes(
    hub, rows, tokenizer, quick
) -> None:
    trainer = fastdpo.DPOTrainer(
        tiny_llama(), args=fastdpo.DPOConfig(**quick), train_dataset=rows, processing_class=tokenizer
    )
    assert trainer.push_to_hub(dataset_name="me/pairs", tags="mine", token="other", private=True) == "commit 2"
    made, upload = (options for _, options in hub.calls)
    assert (made["name"], made["token"], made["private"]) == ("out", "other", True)
    assert (upload["commit_message"], upload["token"]) == ("End of training", "other")
    front, _ = read_card(quick)
    assert front["datasets"] == ["me/pairs"] and front["tags"] == ["fastdpo", "dpo", "mine"]
    job = trainer.push_to_hub("again", blocking=False)
    assert job.result() == "commit 3" and hub.uploads[-1]["run_as_future"]


def test_a_card_has_what_the_older_trl_takes_for_it(hub, rows, tokenizer, quick) -> None:
    trainer = fastdpo.DPOTrainer(
        tiny_llama(), args=fastdpo.DPOConfig(**quick), train_dataset=rows, processing_class=tokenizer
    )
    given = {"language": "en", "license": "mit", "finetuned_from": "someone/tiny", "tasks": "text-generation"}
    given |= {"dataset_tags": ["me/pairs", "me/more"], "dataset": "Pairs of mine", "dataset_args": "split: train"}
    trainer.push_to_hub(**given)
    front, text = read_card(quick)
    assert (front["language"], front["license"], front["base_model"]) == ("en", "mit", "someone/tiny")
    assert front["datasets"] == ["me/pairs", "me/more"] and front["tags"] == ["fastdpo", "dpo", "text-generation"]
    assert "| data | Pairs of mine, split: train |" in text and "huggingface.co/someone/tiny" in text


def test_the_old_names_of_the_options_lead_to_the_new_ones(tmp_path) -> None:
    made = fastdpo.DPOConfig(str(tmp_path), use_cpu=True, push_to_hub_model_id="me/better", push_to_hub_token="hf_x")
    assert (made.hub_model_id, made.hub_token) == ("me/better", "hf_x")


def read_card(options: dict[str, Any]) -> tuple[dict[str, Any], str]:
    _, front, text = (Path(options["output_dir"]) / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def test_the_card_tells_what_the_run_was_and_came_to(rows, tokenizer, quick) -> None:
    quick |= {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], "beta": 0.2}
    model = tiny_llama()
    model.config._name_or_path = "someone/tiny"
    adapters = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    out = fastdpo.train(
        model, rows[:18], eval_dataset=rows[18:], processing_class=tokenizer, peft_config=adapters, **quick
    )
    front, text = read_card(quick)
    assert front["base_model"] == "someone/tiny" and front["library_name"] == "peft"
    assert front["tags"] == ["fastdpo", "dpo"] and front["model_name"] == "out"
    assert out.model.model_tags == ["fastdpo", "dpo"]
    facts = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE))
    assert "[`sigmoid`](https://arxiv.org/abs/2305.18290) + 0.5 [`sft`](" in facts["method"]
    assert facts["beta"] == "0.2" and facts["pairs"] == "18" and facts["steps"] == "4, of 6 pairs, 1.33 epochs"
    assert facts["learning rate"] == "0.001, linear" and facts["adapters"] == "LORA, r 4, alpha 8"
    assert "adapters off" in facts["reference"] and facts["precision"] == "matrix products in float32"
    last = {row["step"]: row for row in out.history if "rewards/margins" in row}[4]
    (training,) = [line for line in text.splitlines() if line.startswith("| training |")]
    (evaluation,) = [line for line in text.splitlines() if line.startswith("| evaluation eval |")]
    assert f"| {last['loss']:.4g} |" in training and f"| {out.metrics['eval_rewards/margins']:.4g} |" in evaluation


def test_a_run_without_a_model_of_the_hub_names_none_in_its_card(rows, tokenizer, quick, tmp_path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    fastdpo.train(str(tmp_path / "base"), rows, processing_class=tokenizer, **quick)
    front, text = read_card(quick)
    assert "base_model" not in front and str(tmp_path) not in text and front["library_name"] == "transformers"


def test_a_card_that_somebody_wrote_stays_and_ours_is_renewed(rows, tokenizer, quick, caplog) -> None:
    directory = Path(quick["output_dir"])
    directory.mkdir()
    (directory / "README.md").write_text("mine")
    trainer = fastdpo.DPOTrainer(
        tiny_llama(), args=fastdpo.DPOConfig(**quick), train_dataset=rows, processing_class=tokenizer
    )
    trainer.save_model()
    with caplog.at_level(logging.INFO, "fastdpo"):
        trainer.create_model_card()
    assert (directory / "README.md").read_text() == "mine" and "stays as it is" in caplog.text
    (directory / "README.md").write_text(f"{MARK}\nof an earlier save")
    trainer.create_model_card("better")
    assert read_card(quick)[0]["model_name"] == "better"
