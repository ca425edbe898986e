"""An adapter that was trained over quantised weights is merged into those weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_llama
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import fastdpo
from fastdpo import cli
from fastdpo.quantized import keep_unpacked

IDS = torch.arange(5, 25)[None]


def logits(model: Any) -> torch.Tensor:
    keep_unpacked(model)  # bitsandbytes would round the scales of 4-bit weights on some CPUs
    return model(input_ids=IDS).logits.detach()


@pytest.fixture
def trained(tmp_path: Path, tokenizer: Any) -> Any:
    """-> makes base and sft in tmp_path, the adapter over 4-bit or whole weights; -> that model's logits."""

    def make(four_bits: bool) -> torch.Tensor:
        tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        packed = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
        options: dict[str, Any] = {"quantization_config": packed} if four_bits else {}
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32, **options)
        model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(tmp_path / "sft")
        return logits(model)

    return make


def merge(where: Path, *more: str) -> int:
    paths = ["--adapter", str(where / "sft"), "--output_dir", str(where / "merged")]
    return cli.main(["merge", *paths, "--use_cpu", "--dtype", "float32", *more])


@pytest.mark.parametrize("four_bits", [False, True], ids=["whole", "4 bits"])
def test_the_merged_model_computes_what_base_and_adapter_did(four_bits: bool, trained: Any, tmp_path: Path) -> None:
    expected = trained(four_bits)
    assert merge(tmp_path, *["--load_in_4bit"] * four_bits) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    assert getattr(merged.config, "quantization_config", None) is None
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) > 0


def test_merging_into_whole_weights_what_was_trained_over_4_bits_is_another_model(trained: Any, tmp_path: Path) -> None:
    expected = trained(True)
    assert merge(tmp_path) == 0
    other = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert (other - expected).abs().max() > 0.1


def test_weights_saved_beside_an_adapter_are_merged_with_it(trained: Any, tmp_path: Path) -> None:
    expected = trained(False)
    norm = {"base_model.model.model.norm.weight": torch.full((64,), 2.0)}
    save_file(norm, tmp_path / "sft/outside_adapters.safetensors")
    assert merge(tmp_path) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), 2 * expected, rtol=1e-4, atol=1e-5)


def test_a_new_adapter_trains_on_top_of_the_merged_model(trained: Any, tmp_path: Path, rows: Any, quick: Any) -> None:
    trained(True)
    assert merge(tmp_path, "--load_in_4bit") == 0
    out = fastdpo.train(str(tmp_path / "merged"), rows, load_in_4bit=True, **quick | {"use_cpu": True, "bf16": False})
    assert out.history[0]["loss"] == pytest.approx(0.693147, abs=1e-5) and out.history[-1]["train_loss"] < 0.69


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--adapter", "base", "--output_dir", "x"], "has no adapter_config.json"),
        (["--adapter", "sft", "--output_dir", "sft"], "holds the adapter or its base"),
        (["--adapter", "sft", "--output_dir", "base"], "holds the adapter or its base"),
        (["--adapter", "sft", "--output_dir", "x", "--model", "nowhere"], "neither a directory with a model"),
        (["--adapter", "sft", "--output_dir", "x", "--load_in_4bit", "--load_in_8bit"], "exclude each other"),
    ],
    ids=["no adapter", "onto the adapter", "onto the base", "no base", "both widths"],
)
def test_what_cannot_be_merged_is_told_in_a_line(
    arguments: list[str], words: str, trained: Any, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(False)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["merge", *arguments, "--use_cpu"]) == 1
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("fastdpo: error: ") and words in line
