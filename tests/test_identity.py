"""What names a reference: everything that its log-probs depend on, nothing else, and in no time."""

from __future__ import annotations

import json
import math
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers_for_tests
import torch
from conftest import tiny_llama
from datasets import Dataset
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import fastdpo
from fastdpo.data import row_key
from fastdpo.identity import WRITTEN, base_tensors, files_digest, tensors_digest, weight_files
from fastdpo.reference_cache import pairs_of_table, reference_identity


def identity(model: Any, rows: Any, tokenizer: Any, quick: dict[str, Any], **options: Any) -> dict[str, str]:
    more = {name: options.pop(name) for name in ("ref_model", "peft_config") if name in options}
    args = fastdpo.DPOConfig(**quick | options)
    run = fastdpo.DPOTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer, **more)
    source = more.get("ref_model", model)
    return reference_identity(run.reference, source if isinstance(source, str) else None, run.args)


def moved(model: Any, name: str = "layers.1.mlp.up_proj", element: int = -1) -> Any:
    """The model after one element of a weight moved by one bit."""
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if name in key:
                parameter.view(-1)[element] = torch.nextafter(parameter.view(-1)[element], torch.tensor(9.0))
    return model


def adapted(std: float, **options: Any) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), LoraConfig(**{"r": 4, "target_modules": "all-linear", **options}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=std)
    return model


NEW = {"peft_config": LoraConfig(r=4, target_modules="all-linear")}
# What the log-probs depend on: two ways to a reference, and the parts of its identity that differ.
CHANGES: dict[str, tuple[Callable[[], Any], dict[str, Any], set[str]]] = {
    "one bit of a weight": (lambda: moved(tiny_llama()), {}, {"weights"}),
    "the architecture's numbers": (lambda: tiny_llama(rms_norm_eps=1e-5), {}, {"model"}),
    "rotary scaling": (
        lambda: tiny_llama(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
        {},
        {"model"},
    ),
    "the dtype of the weights": (
        lambda: tiny_llama().bfloat16(),
        NEW,
        {"weights", "dtype of weights", "dtype of products"},
    ),
    "the dtype of products": (tiny_llama, {"bf16": True, "use_cpu": True}, {"dtype of products"}),
    "ld_alpha": (tiny_llama, {"ld_alpha": 0.5}, {"ld_alpha"}),
    "an adapter": (lambda: adapted(0.1), {}, {"adapters"}),
    "another reference": (tiny_llama, {"ref_model": moved(tiny_llama())}, {"weights"}),
}


@pytest.mark.parametrize(("model", "options", "parts"), CHANGES.values(), ids=CHANGES)
def test_a_change_of_what_the_log_probs_depend_on_is_seen(model, options, parts, rows, tokenizer, quick) -> None:
    before = identity(tiny_llama(), rows, tokenizer, quick)
    after = identity(model(), rows, tokenizer, quick, **options)
    assert {part for part in before if before[part] != after[part]} == parts


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.5, "loss_type": "ipo", "learning_rate": 1e-2, "seed": 7, "data_seed": 1, "max_steps": 9},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_tokens_per_microbatch": 60},
        {"max_length": 40, "weight_decay": 0.1, "optim": "sgd", "gradient_checkpointing": True, "ld_alpha": 1.0},
        NEW,
        {"peft_config": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"])},
        {"ref_model": tiny_llama(), "disable_dropout": False},
        {"ref_model": tiny_llama(attention_dropout=0.5, eos_token_id=3)},
    ],
    ids=["loss", "batches", "run", "adapters", "other adapters", "the same as ref_model", "dropout in its config"],
)
def test_nothing_else_changes_it(options, rows, tokenizer, quick) -> None:
    before = identity(tiny_llama(), rows, tokenizer, quick)
    assert identity(tiny_llama(), rows[:5], tokenizer, quick, **options) == before


def test_an_adapter_is_told_by_every_element_and_its_scale(rows, tokenizer, quick) -> None:
    models = adapted(0.1), moved(adapted(0.1), "up_proj.lora_A.default"), adapted(0.1, lora_alpha=4), adapted(0.1)
    first, bit, scale, again = (identity(model, rows, tokenizer, quick) for model in models)
    assert first == again and len({one["adapters"] for one in (first, bit, scale)}) == 3
    assert {**first, "adapters": ""} == {**bit, "adapters": ""} == {**scale, "adapters": ""}


@pytest.mark.parametrize("change", ["answer", "template", "truncation"])
def test_a_changed_row_template_or_truncation_is_another_row(change, quick) -> None:
    chat = dict(tokenizers_for_tests.CHAT)
    keys = []
    for changed in (False, True):
        tokenizer, options, row = tokenizers_for_tests.byte_level(), {}, chat
        if changed and change == "answer":
            row = {**chat, "chosen": [{"role": "assistant", "content": "I am quite well."}]}
        if changed and change == "template":
            tokenizer.chat_template = tokenizers_for_tests.CHATML.replace("'\\n'", "' '").replace("\n", " ")
        if changed and change == "truncation":
            options["max_completion_length"] = 3
        run = fastdpo.DPOTrainer(
            tiny_llama(), args=fastdpo.DPOConfig(**quick | options), train_dataset=[row], processing_class=tokenizer
        )
        assert isinstance(run.train_dataset, Dataset)
        keys += [row_key(pair) for pair in pairs_of_table(run.train_dataset)]
    assert len(keys) == len(set(keys)) == 2


@pytest.fixture
def directory(tmp_path, tokenizer) -> Path:
    tiny_llama().save_pretrained(tmp_path / "model", max_shard_size="100KB")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_model_by_path_goes_by_its_files_and_a_rewritten_one_is_another(directory, rows, tokenizer, quick) -> None:
    before = identity(str(directory), rows, tokenizer, quick)
    assert before["weights"].startswith("files ") and len(weight_files(str(directory), "main")) > 1
    (directory / "optimizer.safetensors").write_bytes(b"what from_pretrained does not read")
    (directory / "README.md").write_text("nor this")
    assert identity(str(directory), rows, tokenizer, quick, **NEW) == before
    shard = sorted(directory.glob("model-*.safetensors"))[0]
    tensors = load_file(shard)
    last = max(tensors)
    tensors[last].view(-1)[-1] += 1
    save_file(tensors, shard, {"format": "pt"})
    after = identity(str(directory), rows, tokenizer, quick)
    assert {part for part in before if before[part] != after[part]} == {"weights", WRITTEN}


def test_a_copy_of_the_files_differs_in_their_time_alone(directory, rows, tokenizer, quick) -> None:
    """An automatic cache takes it for another model; a file of log-probs that the user names does not."""
    before = identity(str(directory), rows, tokenizer, quick)
    for file in directory.glob("model-*.safetensors"):
        os.utime(file, ns=(1, 1))
    after = identity(str(directory), rows, tokenizer, quick)
    assert {part for part in before if before[part] != after[part]} == {WRITTEN}


def test_arguments_of_from_pretrained_send_the_model_to_the_hash_of_its_memory(
    directory, rows, tokenizer, quick
) -> None:
    plain = identity(tiny_llama(), rows, tokenizer, quick)
    given = identity(str(directory), rows, tokenizer, quick, model_init_kwargs={"low_cpu_mem_usage": True})
    assert given["weights"] == plain["weights"] and plain["weights"].startswith("memory ")
    options = {"ref_model": str(directory), "ref_model_init_kwargs": {"low_cpu_mem_usage": True}}
    assert identity(tiny_llama(), rows, tokenizer, quick, **options)["weights"] == plain["weights"]
    pissa = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="pissa")
    assert identity(str(directory), rows, tokenizer, quick, peft_config=pissa)["weights"].startswith("memory ")


def test_the_hub_s_files_go_by_their_content_whatever_their_time(tmp_path, monkeypatch) -> None:
    """Laid out as huggingface_hub does: refs, snapshots of links, blobs named by hash."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--someone--model"
    for revision, commit, blob in (("main", "a" * 40, "1234"), ("v2", "b" * 40, "5678"), ("v3", "c" * 40, "1234")):
        for name in ("refs", f"snapshots/{commit}", "blobs"):
            (repo / name).mkdir(parents=True, exist_ok=True)
        (repo / "refs" / revision).write_text(commit)
        (repo / "blobs" / blob).write_bytes(b"weights")
        (repo / "snapshots" / commit / "model.safetensors").symlink_to(repo / "blobs" / blob)
    digests = [files_digest(weight_files("someone/model", revision)) for revision in ("main", "v2", "v3")]
    os.utime(repo / "blobs/1234", ns=(1, 1))
    assert digests[0] == digests[2] != digests[1]
    assert files_digest(weight_files("someone/model", "main")) == digests[0]
    assert weight_files("someone/model", "nowhere") == []


def shapes_of_8b() -> dict[str, tuple[int, ...]]:
    """Llama-3.1-8B: 291 tensors, 16 GB in bf16."""
    layer = {f"self_attn.{name}_proj": (4096 if name in "qo" else 1024, 4096) for name in "qkvo"}
    layer |= {"mlp.gate_proj": (14336, 4096), "mlp.up_proj": (14336, 4096), "mlp.down_proj": (4096, 14336)}
    layer |= {"input_layernorm": (4096,), "post_attention_layernorm": (4096,)}
    every = {f"model.layers.{n}.{name}.weight": shape for n in range(32) for name, shape in layer.items()}
    return {**every, "model.embed_tokens.weight": (128256, 4096), "model.norm.weight": (4096,)} | {
        "lm_head.weight": (128256, 4096)
    }


def seconds(run: Callable[[], Any]) -> float:
    """The quicker of two."""
    times = []
    for _ in "ab":
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def test_the_files_of_an_8b_model_are_named_in_under_a_second(tmp_path) -> None:
    shapes, weight_map = list(shapes_of_8b().items()), {}
    assert len(shapes) == 291
    for shard in range(4):
        header, offset = {}, 0
        for name, shape in shapes[shard::4]:
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + 2 * math.prod(shape)]}
            offset += 2 * math.prod(shape)
            weight_map[name] = f"model-{shard + 1:05}-of-00004.safetensors"
        text = json.dumps(header).encode()
        with (tmp_path / f"model-{shard + 1:05}-of-00004.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + offset)  # holes take no room on the disk
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    files = weight_files(str(tmp_path), "main")
    assert len(files) == 4 and sum(file.stat().st_size for file in files) > 16e9
    assert seconds(lambda: files_digest(weight_files(str(tmp_path), "main"))) < 1


def test_the_memory_of_an_8b_model_is_named_in_under_a_second() -> None:
    """Its tensors share one buffer here, as 16 GB are not everywhere: what is read of each is the same."""
    shapes = shapes_of_8b()
    buffer = torch.randint(-(2**15), 2**15, (max(map(math.prod, shapes.values())) // 4,), dtype=torch.int16)
    buffer = buffer.view(torch.bfloat16)

    def view(shape: tuple[int, ...]) -> torch.Tensor:
        rows = min(shape[0], buffer.numel() // math.prod(shape[1:]))
        return buffer[: rows * math.prod(shape[1:])].view(rows, *shape[1:])

    tensors = {name: view(shape) for name, shape in shapes.items()}
    assert sum(value.nbytes for value in tensors.values()) > 12e9
    assert seconds(lambda: tensors_digest(tensors)) < 1
    eighth = {"w": buffer[: 2**27]}  # 256 MiB of the 2 GiB up to which a CPU sums every bit
    assert seconds(lambda: tensors_digest(eighth)) * 8 < 1


def test_sums_of_bits_see_any_element_of_any_dtype_and_the_sample_sees_an_exchange() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.float64):
        values = torch.ones(20_011).to(dtype)  # more than are sampled, and no multiple of eight bytes
        for place in (1, 10_000, 20_010):
            changed = values.clone()
            changed[place] = 0
            assert tensors_digest({"w": changed}) != tensors_digest({"w": values}), (dtype, place)
    values = torch.arange(20_000.0)
    assert tensors_digest({"w": values}) != tensors_digest({"w": values.flip(0)})
    assert tensors_digest({"w": values}) != tensors_digest({"v": values})
    assert tensors_digest({"w": values}) != tensors_digest({"w": values.view(100, 200)})
    offset = torch.arange(20_001.0)[1:] - 1  # the same numbers, at an address that is no multiple of eight
    assert tensors_digest({"w": values}) == tensors_digest({"w": offset})


def test_a_model_has_the_same_weights_with_adapters_around_its_layers() -> None:
    plain = base_tensors(tiny_llama())
    wrapped = get_peft_model(
        tiny_llama(), LoraConfig(r=2, target_modules=["q_proj", "lm_head"], modules_to_save=["embed_tokens"])
    )
    inside = base_tensors(wrapped.get_base_model())
    assert plain.keys() == inside.keys()
    assert all(torch.equal(value, inside[name]) for name, value in plain.items())
