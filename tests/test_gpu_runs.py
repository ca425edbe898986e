"""Whole runs on a GPU, in fp32: the log and the weights of the same run on a CPU, alone and under FSDP2.

One GPU takes one process, so what several share is tested on CPUs (test_ranks.py, test_fsdp.py); here it is that NCCL
and FSDP2 take the tensors of a GPU, in a group of one. The same over gloo on a CPU shows that the comparison is right
where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fsdp_program
import pytest
import torch
from conftest import tiny_llama
from peft import LoraConfig
from ranks_program import SCENARIOS
from test_fsdp import LAUNCHED
from test_ranks import TESTS, assert_same, ends_alone, launch
from torch import distributed

import fastdpo
from fastdpo.ranks import GradientSum, Ranks

ALL = SCENARIOS | fsdp_program.SCENARIOS
RUNS = ("lora_with_evaluation", "matched", "running_mean", "fused", "encoder_decoder")
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
WITHIN = 1e-3  # sums in another order, and three TF32 products for one of fp32 in attention, over some steps of AdamW
SHARDED = {"cpu": ("matched",), "cuda": (*RUNS, "tied", "sampled")}  # noise is drawn on the device


@pytest.fixture(scope="module")
def on_the_cpu(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    return ends_alone(tmp_path_factory, ALL)


@pytest.fixture(scope="module")
def on_the_gpu(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    def there(scenario: Callable[[Path, int], dict[str, Any]]) -> Callable[[Path, int], dict[str, Any]]:
        def run(out: Path, count: int) -> dict[str, Any]:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("FASTDPO_TEST_DEVICE", "cuda")
                patch.setattr(torch.backends.cudnn, "allow_tf32", False)  # convolutions of images
                return scenario(out, count)

        return run

    of_gpu: Mapping[str, Any] = {name: there(scenario) for name, scenario in ALL.items()}
    return ends_alone(tmp_path_factory, of_gpu)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], dict[str, Any]]:
    """-> what one process under FSDP2 on a device ended a scenario with; it is started once for all of them."""
    folders: dict[str, Path] = {}

    def of(device: str, name: str) -> dict[str, Any]:
        if device not in folders:
            folders[device] = tmp_path_factory.mktemp(device)
            command = str(TESTS / "fsdp_program.py"), str(folders[device]), *SHARDED[device]
            launch(1, *command, **LAUNCHED, FASTDPO_TEST_DEVICE=device)
        return torch.load(folders[device] / f"{name}-0.pt", weights_only=True)

    return of


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*RUNS, "tied", "pictured"])
def test_a_run_on_a_gpu_has_the_numbers_of_one_on_the_cpu(name: str, on_the_gpu: Any, on_the_cpu: Any) -> None:
    assert_same(on_the_gpu(name), on_the_cpu(name), WITHIN)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        pytest.param(device, name, marks=[pytest.mark.gpu] * (device == "cuda"))
        for device, names in SHARDED.items()
        for name in names
    ],
)
def test_one_process_under_fsdp2_has_the_numbers_of_one_alone(
    device: str, name: str, sharded: Any, on_the_gpu: Any, on_the_cpu: Any
) -> None:
    found = sharded(device, name)
    assert found["gradients"] == ["DTensor"]
    assert_same(found, {"cpu": on_the_cpu, "cuda": on_the_gpu}[device](name), WITHIN)


@pytest.mark.parametrize("device", DEVICES)
def test_a_group_of_one_leaves_what_it_sums_and_sends_as_it_is(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL on a GPU; told that they are two, with the other's numbers of the host left out."""
    monkeypatch.setattr(Ranks, "exchange", lambda self, purpose, numbers=(): [list(numbers)])
    backend = "nccl" if device == "cuda" else "gloo"
    distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    try:
        ranks, module = Ranks(0, 2), torch.nn.Linear(300, 70, device=device).to(torch.bfloat16)
        other = torch.nn.Linear(5, 7, device=device)
        trained = [*module.parameters(), *other.parameters()]
        for parameter in trained[:-1]:
            parameter.grad = torch.randn_like(parameter)
        trained[0].grad = torch.randn(300, 70, device=device).to(torch.bfloat16).T  # not contiguous
        before = [(parameter.detach().clone(), parameter.grad) for parameter in trained]
        gradients = [None if gradient is None else gradient.clone() for _, gradient in before]
        ranks.equalise(module)
        GradientSum(ranks, trained)()
        assert trained[-1].grad is None and (distributed.get_backend(), trained[0].device.type) == (backend, device)
        for parameter, (values, _), gradient in zip(trained, before, gradients, strict=True):
            assert torch.equal(parameter, values)
            assert gradient is None or torch.equal(parameter.grad, gradient)
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("device", DEVICES)
def test_a_run_that_goes_on_has_the_bits_of_one_that_did_not_stop(
    device: str, rows: list, tokenizer: Any, quick: dict, tmp_path: Path
) -> None:
    quick |= {"save_strategy": "steps", "save_steps": 2, "use_cpu": device == "cpu"}
    quick |= {"full_determinism": device == "cuda"}  # else atomic additions come in any order

    def run(out: str, **more: Any) -> dict[str, torch.Tensor]:
        trainer = fastdpo.DPOTrainer(
            tiny_llama(),
            args=fastdpo.DPOConfig(**quick | {"output_dir": str(tmp_path / out)}),
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules="all-linear"),
        )
        trainer.train(**more)
        return {name: value.detach().cpu() for name, value in trainer.model.named_parameters() if value.requires_grad}

    whole = run("whole")
    again = run("again", resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


@pytest.mark.parametrize("device", DEVICES)
def test_a_run_that_samples_has_the_numbers_of_one_that_does_not(
    device: str, rows: list, tokenizer: Any, quick: dict, tmp_path: Path
) -> None:
    quick |= {"use_cpu": device == "cpu", "full_determinism": device == "cuda", "max_length": 60}
    quick |= {"eval_strategy": "steps", "eval_steps": 4, "eval_dataset": rows[:3], "use_peft": True}
    runs = [
        fastdpo.train(tiny_llama(), rows, processing_class=tokenizer, generate_during_eval=on, **quick)
        for on in (False, True)
    ]
    losses = [[row["loss"] for row in run.history if "loss" in row] for run in runs]
    assert len(losses[0]) == 4 and losses[0] == losses[1]
    assert (tmp_path / "out/samples.md").read_text().count("Human: what is the answer number") == 3
