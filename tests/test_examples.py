"""The scripts of examples/ that train from the command line, at a size for a CPU: what they train, and from where."""

from __future__ import annotations

import json
import math
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import draw_no_picture, praise_and_scolding, tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_vision import picture, tiny_vision
from torch import Tensor
from transformers import AutoModelForCausalLM

import fastdpo
from fastdpo.quantized import is_quantized

EXAMPLES = Path(__file__).parent.parent / "examples"
PAIRS = 8
TINY = {"max_steps": 4, "per_device_train_batch_size": PAIRS, "gradient_accumulation_steps": 1, "logging_steps": 1}
TINY |= {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "warmup_ratio": 0, "report_to": "none"}
TINY |= {"save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
ROLES = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
WAYS = ("two_models", "merged", "adapter_twice")

Run = Callable[..., fastdpo.TrainResult]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A directory with a model in base/, an adapter that does something in sft/, and rows.jsonl."""
    folder = tmp_path_factory.mktemp("place")
    model: Any = tiny_llama(hidden_size=64, intermediate_size=128)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(str(folder / "sft"))
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, praise_and_scolding()[:PAIRS])))
    return folder


@pytest.fixture
def run(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs an example's `main` with the words of a command line, in a directory of its own."""
    draw_no_picture(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTDPO_CACHE", str(tmp_path / "cache"))

    def call(name: str, **options: Any) -> fastdpo.TrainResult:
        given = {"train_dataset": place / "rows.jsonl", **TINY, **options}
        words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](words)

    return call


def of_steps(out: fastdpo.TrainResult, key: str) -> list[float]:
    return [row[key] for row in out.history if key in row]


@torch.no_grad()
def chosen_logps(model: Any, out: fastdpo.TrainResult) -> list[Tensor]:
    """Token log-probs of the chosen answers, by the model's own logits."""
    found = []
    table: Any = out.trainer.train_dataset
    for row in table:
        prompt, answer = row["prompt_ids"], row["chosen_ids"]
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        found.append(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0])
    return found


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path)


def test_full_finetuning_moves_every_weight_and_learns(run: Run, place: Path, tmp_path: Path) -> None:
    out = run("full_finetuning", model=place / "base")
    losses = of_steps(out, "loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-7) and losses[-1] < losses[0] - 0.1
    before, after = (dict(load(path).named_parameters()) for path in (place / "base", tmp_path / "full_finetuned"))
    assert before.keys() == after.keys()
    assert not any(torch.equal(value, after[name]) for name, value in before.items())
    assert out.trainer.ref_model is None, "the reference is computed ahead, and its model freed"


def test_qlora_learns_with_4_bit_weights_under_adapters(run: Run, place: Path) -> None:
    out = run("qlora", model=place / "base")
    assert of_steps(out, "rewards/margins")[0] == 0.0
    assert of_steps(out, "loss")[-1] < math.log(2) - 0.1
    layers = [module for module in out.model.modules() if is_quantized(module)]
    assert len(layers) == 2 * 7 and {layer.weight.quant_state.quant_type for layer in layers} == {"nf4"}
    assert all("lora_" in name for name, value in out.model.named_parameters() if value.requires_grad)


def start_from_adapter(run: Run, way: str, place: Path) -> fastdpo.TrainResult:
    if way == "sft_adapter_as_reference":
        return run(way, adapter=place / "sft")
    return run("peft_options", way=way, adapter=place / "sft")


@pytest.mark.parametrize("way", [*WAYS, "sft_adapter_as_reference"])
def test_policy_and_reference_start_as_the_sft_adapter(way: str, run: Run, place: Path) -> None:
    out = start_from_adapter(run, way, place)
    assert of_steps(out, "rewards/margins")[0] == 0.0
    adapted = PeftModel.from_pretrained(load(place / "base"), place / "sft")
    expected = sum(map(torch.sum, chosen_logps(adapted, out))) / PAIRS
    assert of_steps(out, "logps/chosen")[0] == pytest.approx(float(expected), rel=1e-5)
    base = sum(map(torch.sum, chosen_logps(load(place / "base"), out))) / PAIRS
    assert abs(expected - base) > 1
    assert of_steps(out, "loss")[-1] < math.log(2) - 0.1


def test_the_ways_to_go_on_with_one_adapter_are_one_run(run: Run, place: Path) -> None:
    """The adapter that trains is the same, and so is the reference, wherever it lies."""
    ways = ("two_models", "adapter_twice", "sft_adapter_as_reference")
    one, two, three = (of_steps(start_from_adapter(run, way, place), "loss") for way in ways)
    assert one == pytest.approx(two, rel=1e-6) and one == pytest.approx(three, rel=1e-6)


def test_a_new_adapter_on_the_merged_model_leaves_it_as_it_is(run: Run, place: Path, tmp_path: Path) -> None:
    out = run("peft_options", way="merged", adapter=place / "sft", use_peft=True, lora_r=2)
    assert out.model.active_peft_config.r == 2
    trained = {name.replace(".base_layer", ""): value for name, value in out.model.base_model.model.named_parameters()}
    for name, value in load(tmp_path / "dpo_adapter/merged").named_parameters():
        assert torch.equal(value, trained[name]), name


def test_own_loss_is_the_formula_and_a_little_likelihood(run: Run, place: Path) -> None:
    out = run("own_loss", model=place / "base")
    tokens = torch.cat(chosen_logps(load(place / "base"), out))
    expected = math.log1p(math.exp(1.0)) - 0.1 * float(tokens.mean())  # policy and reference start equal
    losses = of_steps(out, "loss")
    assert losses[0] == pytest.approx(expected, rel=1e-5)
    assert losses[-1] < losses[0] - 0.1


def test_vision_language_learns_from_what_the_images_show(run: Run, tmp_path: Path) -> None:
    model, processor = tiny_vision("llava")
    model.save_pretrained(tmp_path / "vision")
    processor.save_pretrained(tmp_path / "vision")
    rows: list[dict[str, Any]] = [
        {side: [{"role": role, "content": row[side]}] for side, role in ROLES.items()}
        for row in praise_and_scolding()[:PAIRS]
    ]
    first = {}
    for seed in (0, 100):
        for number, row in enumerate(rows):
            picture(30, 40, seed + number).save(tmp_path / f"{seed}-{number}.png")
            row["image"] = f"{seed}-{number}.png"
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        out = run("vision_language", model=tmp_path / "vision", train_dataset=tmp_path / "rows.jsonl")
        assert of_steps(out, "rewards/margins")[0] == 0.0
        assert of_steps(out, "loss")[-1] < math.log(2) - 0.05
        first[seed] = of_steps(out, "logps/chosen")[0]
    assert abs(first[0] - first[100]) > 0.1, "other pictures make other log-probs"
