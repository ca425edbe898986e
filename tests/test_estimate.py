"""The paper estimate: its sizes are those of real modules, and the docs hold its tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks import estimate
from benchmarks.__main__ import main
from benchmarks.estimate import EIGHT, FULL, LLAMA, LORA, MANY
from fastdpo.model import Policy
from fastdpo.sharding import asked_plugin, gathered_bytes

PAGE = Path(__file__).parent.parent / "docs/several_gpus.md"
BEGIN, END = "<!-- begin generated: python -m benchmarks estimate -->\n", "<!-- end generated -->"


@pytest.fixture
def policies() -> Iterator[dict[str, Policy]]:
    """Full training and LoRA of that shape, without weights, in what each loads them in."""
    sizes = {name: getattr(LLAMA, name) for name in LlamaConfig().to_dict() if hasattr(LLAMA, name)}
    with torch.device("meta"):
        full = AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=torch.float32)
        half = AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=torch.bfloat16)
        adapted = get_peft_model(half, LoraConfig(r=estimate.RANK, target_modules="all-linear"))
    yield {name: Policy(model, torch.bfloat16) for name, model in (("full", full), ("LoRA", adapted))}


@pytest.mark.parametrize("training", [FULL, LORA], ids=lambda training: training.title)
def test_weights_and_what_is_gathered_are_those_of_the_modules(training: estimate.Training, policies: dict) -> None:
    policy = policies[training.title]
    held = estimate.held(training, replace(EIGHT, ranks=1))
    assert held["weights"] == sum(parameter.nbytes for parameter in policy.parameters())
    assert held["gradients"] == 4 * sum(p.numel() for p in policy.parameters() if p.requires_grad)
    plugin = asked_plugin({"fsdp_version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"})
    assert held["gathered: blocks"] + held["gathered: around them"] == gathered_bytes(policy, plugin)


def test_a_process_of_more_holds_less_and_gathers_as_much() -> None:
    few, many = (estimate.held(FULL, replace(MANY, ranks=ranks)) for ranks in (8, 64))
    shared = ("weights", "gradients", "optimizer states", "reference model")
    assert all(few[name] == 8 * many[name] if name in shared else few[name] == many[name] for name in few)


def test_as_many_tokens_as_cover_a_pass_make_its_products_as_long_as_its_traffic() -> None:
    tokens = estimate.covering(FULL, MANY, "backward")
    traffic = estimate.seconds(estimate.traffic(FULL)["backward"], MANY)
    assert estimate.computed(FULL, tokens)["backward"] == pytest.approx(traffic)


def test_the_docs_hold_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate"]) == 0
    assert PAGE.read_text().split(BEGIN)[1].split(END)[0] == capsys.readouterr().out
