"""What tests/test_fsdp.py runs beside scenarios of ranks_program.py: `python fsdp_program.py OUT NAME ...`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ranks_program
from accelerate.utils import patch_environment
from conftest import tiny_llama
from peft import LoraConfig, get_peft_model
from ranks_program import LORA, RESUMED, ROWS, best, options, run, summary, trainer_of
from safetensors.torch import load_file
from test_encoder_decoder import tiny
from tiny_vision import picture, tiny_vision
from tokenizers_for_tests import byte_level
from torch import distributed
from transformers import AutoModelForCausalLM, TrainerCallback

import fastdpo
from fastdpo import DPOConfig, DPOTrainer, build
from fastdpo.ranks import Ranks, _host_group
from fastdpo.sharding import asked_plugin, is_sharded


def fused(out: Path, count: int) -> dict[str, Any]:
    more: Any = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"every_n_layers": 2}}
    return run(out, count, lora=True, fused_kernels=True, **more)


def tied(out: Path, count: int) -> dict[str, Any]:
    """Embedding and head are one tensor, also on disk; the reference follows."""
    more: Any = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5}
    trainer = trainer_of(out / str(count), count, model=tiny_llama(tie_word_embeddings=True), **more)
    trainer.train()
    trainer.save_model()
    found = summary(trainer)
    trainer.ranks.wait()
    saved = AutoModelForCausalLM.from_pretrained(out / str(count) / "run")
    assert saved.lm_head.weight is saved.model.embed_tokens.weight
    return {**found, "saved": {name: value.clone() for name, value in saved.state_dict().items()}}


def norms_beside_adapters(out: Path, count: int) -> dict[str, Any]:
    """What trains of the base has its first values whenever the reference runs."""
    model = get_peft_model(tiny_llama(), LORA)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or "norm" in name)
    return run(out, count, model=model, save_strategy="steps", save_steps=2)


def a_trained_adapter(out: Path, count: int) -> dict[str, Any]:
    """With one on the head, too; its frozen copy is the reference."""
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False))
    return run(out, count, model=model)


def encoder_decoder(out: Path, count: int) -> dict[str, Any]:
    found = run(out, count, model=tiny("t5", 500), is_encoder_decoder=True, max_tokens_per_microbatch=None)
    del found["log"][0]["rewards/accuracies"]  # the first margins are rounding, of either sign
    return found


def read_by_one(out: Path, count: int, **more: Any) -> dict[str, Any]:
    """The first process reads the weights for all, also of a frozen copy; embedding and head are one tensor."""
    fastdpo.DPOConfig(**ranks_program.options(out, count))  # which connects the processes
    name, read, load = str(out / "tied"), [], build.load_model
    if int(os.environ.get("RANK", "0")) == 0:
        tiny_llama(tie_word_embeddings=True).save_pretrained(name)
    if count > 1:
        distributed.barrier()

    def watched(*given: Any, **options: Any) -> Any:
        model = load(*given, **options)
        read.append(not any(parameter.is_meta for parameter in model.parameters()))
        return model

    build.load_model = watched
    try:
        with patch_environment(FSDP_CPU_RAM_EFFICIENT_LOADING="true"):
            return {**run(out, count, model=name, **more), "read": read}
    finally:
        build.load_model = load


def read_by_one_under_adapters(out: Path, count: int) -> dict[str, Any]:
    """Which begin with what they take from the weights below them."""
    peft_config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights="pissa")
    return read_by_one(out, count, hooks={"peft_config": peft_config})


def half(out: Path, count: int) -> dict[str, Any]:
    return run(out, count, bf16=True, max_steps=2)


def continued(out: Path, count: int) -> dict[str, Any]:
    """From a checkpoint of one process, of the same run."""
    trainer = trainer_of(out, count, **RESUMED)
    trainer.train(resume_from_checkpoint=os.environ.get("FASTDPO_TEST_CHECKPOINT"))
    return summary(trainer)


def failed(out: Path, count: int) -> str:
    """What a second train() says after an error amid a pass."""
    trainer = trainer_of(out, count, max_steps=2)
    block: Any = trainer.model.model.layers[1]

    def fail(*_: Any) -> None:
        raise ArithmeticError

    handle = block.register_forward_pre_hook(fail)
    try:
        trainer.train()
    except ArithmeticError:
        handle.remove()
    try:
        trainer.train()
    except RuntimeError as error:
        return str(error)
    raise AssertionError("it went through")


def whole_blocks_after_forward(out: Path, count: int) -> dict[str, Any]:
    """reshard_after_forward=False: weights stay until the backward pass; the best ones are loaded at the end."""
    os.environ["FSDP_RESHARD_AFTER_FORWARD"] = "false"
    try:
        return best(out / "whole", count)
    finally:
        del os.environ["FSDP_RESHARD_AFTER_FORWARD"]


def resized_embeddings(out: Path, count: int) -> dict[str, Any]:
    """peft saves embedding and head, though frozen, with an adapter of a model of more tokens than its base has."""
    base, where = out / f"base-{count}", out / f"resized-{count}"
    DPOConfig(**options(out, count))  # which connects the processes
    if not distributed.is_initialized() or not distributed.get_rank():
        tiny_llama().save_pretrained(base)
    if distributed.is_initialized():
        distributed.barrier()
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(512, mean_resizing=False)
    trainer = trainer_of(where, count, model=model, lora=True, max_steps=1)
    trainer.train()
    trainer.save_model()
    found = summary(trainer)
    trainer.ranks.wait()
    saved = load_file(where / "run/adapter_model.safetensors")
    return {**found, "saved": {name: value for name, value in saved.items() if "lora" not in name}}


def gathers(out: Path, count: int) -> dict[str, Any]:
    """How often weights are gathered, and from how many micro-batches on."""
    trainer = trainer_of(out, count, reference_free=True, max_steps=2, max_tokens_per_microbatch=100)
    name = next(name for name in ("all_gather_single", "all_gather_into_tensor") if hasattr(distributed, name))
    gather, calls, batches = getattr(distributed, name), [], []

    class Watch(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            calls.clear()

    backward = trainer._backward
    trainer._backward = lambda whole: batches.append(len(whole.microbatches)) or backward(whole)  # type: ignore[method-assign]
    setattr(distributed, name, lambda *given, **more: calls.append(1) or gather(*given, **more))
    trainer.add_callback(Watch())
    try:
        trainer.train()
    finally:
        setattr(distributed, name, gather)
    return summary(trainer, gathers=len(calls), batches=batches[-1])


def shares(out: Path, count: int) -> dict[str, Any]:
    """Elements that this process holds, of weights and of optimizer states."""
    trainer = trainer_of(out, count, max_steps=1)
    trainer.train()
    weights = list(trainer.policy.parameters())
    states = [value for state in trainer.optimizer.state.values() for value in state.values() if value.dim()]
    held = [sum((t.to_local() if is_sharded(t) else t).numel() for t in part) for part in (weights, states)]  # type: ignore[operator]
    return summary(trainer, held=held, whole=sum(weight.numel() for weight in weights))


def refused(out: Path, count: int) -> dict[str, Any]:
    said, trained = {}, trainer_of(out, count).model
    for name, more in {
        "fp16": {"fp16": True},
        "torch_compile": {"torch_compile": True},
        "load_in_4bit": {"load_in_4bit": True, "lora": True},
        "optim": {"optim": "adafactor"},
        "modules_to_save": {
            "hooks": {"peft_config": LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])},
            "sync_ref_model": True,
        },
        "activation_checkpointing": {"fsdp": True, "fsdp_config": {"activation_checkpointing": True}},
    }.items():
        try:
            trainer_of(out, count, **more).train()
        except ValueError as error:
            said[name] = str(error)
    model, processor = tiny_vision("llava")
    rows = [{**row, "prompt": "<image>" + row["prompt"], "images": [picture(30, 40, 1)]} for row in ROWS[:12]]
    args = DPOConfig(**options(out, count, max_tokens_per_microbatch=None))
    for name, given in {"images": (model, rows, processor), "twice": (trained, ROWS, byte_level())}.items():
        try:
            DPOTrainer(given[0], args=args, train_dataset=given[1], processing_class=given[2])
        except ValueError as error:
            said[name] = str(error)
    return {"said": {**said, "error": failed(out, count)}}


SCENARIOS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    scenario.__name__: scenario
    for scenario in (
        *(fused, tied, norms_beside_adapters, a_trained_adapter, encoder_decoder),
        *(whole_blocks_after_forward, resized_embeddings, half, continued, gathers, shares, read_by_one),
        *(read_by_one_under_adapters, refused),
    )
}


def group_of_one(config: DPOConfig) -> Ranks:
    """One process that shards, where fastdpo would train on its own: what there is to test on one GPU."""
    assert distributed.group.WORLD is not None
    hosts = _host_group(distributed.group.WORLD, config.ddp_timeout)
    return Ranks(0, 1, hosts, asked_plugin(config.fsdp_plugin_args))


if __name__ == "__main__":
    ranks_program.SCENARIOS.update(SCENARIOS)
    if os.environ["WORLD_SIZE"] == "1":
        build.find_ranks = sys.modules["fastdpo.train"].find_ranks = group_of_one  # type: ignore[attr-defined]
    ranks_program.main(Path(sys.argv[1]), int(os.environ["WORLD_SIZE"]), sys.argv[2:])
