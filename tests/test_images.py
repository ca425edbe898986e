"""Pairs with images: token log-probs against the model's own forward, one sequence at a time, through real processors;
what becomes of rows; and runs, beside TRL 1.16 too.
"""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import draw_no_picture, tiny_llama
from datasets import Dataset, List
from datasets import Image as ImageFeature
from peft import LoraConfig, get_peft_model
from tiny_models import gradient_error, gradients
from tiny_vision import KINDS, picture, tiny_processor, tiny_vision
from tokenizers_for_tests import byte_level, config
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

import fastdpo
from fastdpo.batch import PreferenceBatch, pairs_of
from fastdpo.cli import main
from fastdpo.data import TokenPair, load_rows, pair_of, row_key, tokenize_pairs
from fastdpo.images import Processing
from fastdpo.layout import Layout, find_layout
from fastdpo.loader import Collate
from fastdpo.model import Policy
from fastdpo.noise import EmbeddingNoise

SIZES = ((40, 30), (80, 50), (30, 90), (57, 57), (25, 60))
GOOD = ("a good question, thank you", "I do not know", "you are welcome at all", "two", "so it is, so it is")
BAD = ("the lazy dog", "it is a question for somebody else, and not for me", "lazy", "the dog", "a fox")


@cache
def made(name: str) -> tuple[Any, Any]:
    return tiny_vision(name)


def rows_of(name: str, several: bool = False, seed: int = 0) -> list[dict[str, Any]]:
    """Five rows of unlike images: one, or with `several` 0 to 2 a row; chats where the family has a template."""
    rows = []
    for number, (size, good, bad) in enumerate(zip(SIZES, GOOD, BAD, strict=True)):
        images = [picture(*size, seed=seed + number)]
        if several:
            images = (images + [picture(48, 30, seed=seed + 9)])[: number % 3]
        row = {"prompt": f"What is picture number {number}?", "chosen": good, "rejected": bad}
        if KINDS[name].chats:
            roles = zip(row.items(), ("user", "assistant", "assistant"), strict=True)
            row = {column: [{"role": role, "content": text}] for (column, text), role in roles}
        rows.append({**row, "images": images})
    return rows


def table_of(rows: Any, processor: Any, **options: Any) -> Dataset:
    table = tokenize_pairs(load_rows(rows, "train", "train"), processor, config(**options), "train")
    assert isinstance(table, Dataset)
    return table


def pairs_from(rows: Any, processor: Any, **options: Any) -> list[TokenPair]:
    table: Any = table_of(rows, processor, **options)
    return [pair_of(row) for row in table]


@cache
def layout_of(name: str) -> Layout:
    model, processor = made(name)
    return find_layout(Policy(model), 0, Processing(processor), pairs_from(rows_of(name)[:1], processor))


def batch_of(name: str, rows: Any) -> PreferenceBatch:
    return layout_of(name).collate(pairs_from(rows, made(name)[1]))


def with_places(message: dict[str, Any], images: int) -> dict[str, Any]:
    return {**message, "content": [{"type": "image"}] * images + [{"type": "text", "text": message["content"]}]}


def sequence(processor: Any, row: dict[str, Any], answer: str) -> dict[str, Any]:
    """The whole text and its images, by the processor alone; PaliGemma's has an argument for what is learned."""
    images = row["images"]
    options: Any = {"images": [images] if images else None, "return_tensors": "pt", "add_special_tokens": False}
    if isinstance(row["prompt"], str):
        prompt = "<image>" * len(images) + row["prompt"]
        made = processor(text=[prompt], suffix=[row[answer]], **options)
        made["input_ids"][0, -1] = processor.tokenizer.eos_token_id  # which no special tokens leaves out
    else:
        messages = [with_places(row["prompt"][0], len(images)), with_places(row[answer][0], 0)]
        text = processor.apply_chat_template(messages)
        made = processor(text=[text], **options)
    return {key: value for key, value in made.items() if key != "labels"}


def plain_logps(model: Any, processor: Any, rows: list[dict[str, Any]], pairs: list[TokenPair]) -> Tensor:
    """(N,) token log-probs in the order of a batch's targets."""
    values = []
    for row, pair in zip(rows, pairs, strict=True):
        for answer in ("chosen", "rejected"):
            inputs, scored = sequence(processor, row, answer), getattr(pair, answer)
            assert inputs["input_ids"][0].tolist() == [*pair.prompt, *scored]
            logps = model(**inputs, use_cache=False).logits[0].log_softmax(-1)
            targets = torch.tensor(scored)
            values.append(logps[-len(scored) - 1 : -1].gather(1, targets[:, None])[:, 0])
    return torch.cat(values)


@pytest.mark.parametrize("name", KINDS)
def test_log_probs_of_a_batch_are_those_of_each_sequence_with_its_images_alone(name: str) -> None:
    (model, processor), rows = made(name), rows_of(name)
    batch = batch_of(name, rows)
    with torch.no_grad():
        logps, _ = Policy(model)(batch)
        expected = plain_logps(model, processor, rows, pairs_of(batch))
    assert float((logps - expected).abs().max()) < 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("name", ["idefics2", "smolvlm", "llava", "qwen2_5_vl", "gemma3"])
def test_rows_of_one_batch_may_show_two_images_one_or_none(name: str) -> None:
    (model, processor), rows = made(name), rows_of(name, several=True)
    batch = batch_of(name, rows)
    with torch.no_grad():
        logps, _ = Policy(model)(batch)
        expected = plain_logps(model, processor, rows, pairs_of(batch))
    assert float((logps - expected).abs().max()) < 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_gradients_vision_tower_included_are_those_of_the_models_own_forward(name: str) -> None:
    (model, processor), rows = made(name), rows_of(name)
    batch = batch_of(name, rows)
    ours = gradients(Policy(model)(batch)[0], model)
    own = gradients(plain_logps(model, processor, rows, pairs_of(batch)), model)
    assert gradient_error(ours, own) < 1e-4
    assert any("vis" in parameter and float(gradient.abs().max()) > 0 for parameter, gradient in ours.items())


@pytest.mark.parametrize("name", KINDS)
def test_other_images_give_other_log_probs(name: str) -> None:
    policy = Policy(made(name)[0])
    with torch.no_grad():
        first, second = (policy(batch_of(name, rows_of(name, seed=seed)))[0] for seed in (0, 50))
    assert float((first - second).abs().max()) > 1e-3


def test_a_layout_that_loses_the_images_is_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = made("llava")
    whole = Processing.media

    def shuffled(self: Processing, prompts: Any) -> Any:
        types, media = whole(self, prompts)
        return types, {name: value.flip(0) for name, value in media.items()}

    monkeypatch.setattr(Processing, "media", shuffled)
    with pytest.raises(ValueError, match="differ from the model's own"):
        find_layout(Policy(model), 0, Processing(processor), pairs_from(rows_of("llava")[:2], processor))


def test_a_batch_that_is_split_after_running_out_of_memory_gives_the_same_gradient() -> None:
    (model, processor), layout = made("qwen2_5_vl"), layout_of("qwen2_5_vl")
    table = table_of(rows_of("qwen2_5_vl"), processor)
    collate = Collate(layout, 8, None)
    whole = collate([table[index] for index in range(len(table))])
    smaller = collate.regroup(whole, layout.tokens(pair_of(table[0])))
    assert (len(whole), len(smaller)) == (1, 5)

    def gradient_of(batches: Any) -> dict[str, Tensor]:
        model.zero_grad()
        for batch in batches:
            Policy(model)(batch)[0].sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    assert gradient_error(gradient_of(smaller), gradient_of(whole)) < 1e-5


# What becomes of rows


def test_rows_that_differ_by_their_image_alone_have_different_keys() -> None:
    first, second = (pairs_from(rows_of("llava", seed=seed)[:1], made("llava")[1])[0] for seed in (0, 50))
    assert first.prompt == second.prompt
    assert row_key(first) != row_key(second)


def test_a_processor_that_normalises_otherwise_gives_rows_other_keys() -> None:
    other = tiny_processor("llava")
    other.image_processor.image_mean = [0.1, 0.2, 0.3]
    first, second = (pairs_from(rows_of("llava")[:1], processor)[0] for processor in (made("llava")[1], other))
    assert row_key(first) != row_key(second)


@pytest.mark.parametrize("form", ["PIL", "one image", "bytes", "path", "datasets"])
def test_images_come_in_every_form_of_datasets(form: str, tmp_path: Path) -> None:
    processor, row = made("llava")[1], rows_of("llava")[0]
    expected = pairs_from([row], processor)[0]
    (image,) = row.pop("images")
    image.save(tmp_path / "0.png")
    path = str(tmp_path / "0.png")
    forms: dict[str, Any] = {
        "PIL": {"images": [image]},
        "one image": {"image": image},
        "bytes": {"images": [{"bytes": Path(path).read_bytes(), "path": None}]},
        "path": {"images": [path]},
        "datasets": {"images": [path]},
    }
    rows: Any = [{**row, **forms[form]}]
    if form == "datasets":
        rows = Dataset.from_list(rows).cast_column("images", List(ImageFeature()))
    pair = pairs_from(rows, processor)[0]
    assert (pair.prompt, row_key(pair)) == (expected.prompt, row_key(expected))


def test_paths_in_a_file_are_seen_from_its_folder(tmp_path: Path) -> None:
    processor, row = made("llava")[1], rows_of("llava")[0]
    expected = row_key(pairs_from([row], processor)[0])
    (tmp_path / "pictures").mkdir()
    row.pop("images")[0].save(tmp_path / "pictures/0.png")
    for column, value in (("images", ["pictures/0.png"]), ("image", "pictures/0.png")):
        (tmp_path / "rows.jsonl").write_text(json.dumps({**row, column: value}))
        assert row_key(pairs_from(tmp_path / "rows.jsonl", processor)[0]) == expected


def test_images_stand_where_the_messages_say_else_first() -> None:
    processor, row = made("llava")[1], rows_of("llava", several=True)[2]
    text = processor.tokenizer.decode(pairs_from([row], processor)[0].prompt)
    assert text.startswith("<|im_start|>user\n" + "<image>" * 8 + "What is picture")
    parts = [{"type": "text", "text": "See "}, {"type": "image"}, {"type": "text", "text": " and "}, {"type": "image"}]
    row["prompt"] = [{"role": "user", "content": parts}]
    text = processor.tokenizer.decode(pairs_from([row], processor)[0].prompt)
    assert text.startswith("<|im_start|>user\nSee " + "<image>" * 4 + " and " + "<image>" * 4 + "<|im_end|>")


def test_a_prompt_that_is_a_string_begins_and_ends_as_the_tokenizer_has_it() -> None:
    processor = tiny_processor("llava", adds_bos=True)
    row = {"prompt": "<image>What?", "chosen": " A dog.", "rejected": " A cat.", "images": [picture(40, 30)]}
    (pair,) = pairs_from([row], processor)
    decode = processor.tokenizer.decode
    assert decode(pair.prompt) == "<s>" + "<image>" * 4 + "What?"
    assert (decode(pair.chosen), decode(pair.rejected)) == (" A dog.</s>", " A cat.</s>")
    batch = layout_of("llava").collate([pair])
    assert batch.media["pixel_values"].shape[0] == 2


def test_tokens_that_merge_over_the_prompts_end_go_to_the_answers_here_too() -> None:
    processor = made("llava")[1]
    row = {"prompt": "<image>What is qu", "chosen": "estion and", "rejected": "ick", "images": [picture(40, 30)]}
    (pair,) = pairs_from([row], processor)
    text = processor.tokenizer
    for answer in ("chosen", "rejected"):
        tokens = text(row["prompt"] + row[answer], add_special_tokens=False)["input_ids"]
        whole = [*[processor.image_token_id] * 3, *tokens, text.eos_token_id]
        assert [*pair.prompt, *getattr(pair, answer)] == whole


def test_answers_are_cut_and_images_never(caplog: pytest.LogCaptureFixture) -> None:
    processor, rows = made("qwen2_vl")[1], rows_of("qwen2_vl")
    whole = pairs_from(rows, processor)
    limit = sorted(len(pair.prompt) for pair in whole)[2] + 2
    with caplog.at_level(logging.INFO, "fastdpo"):
        cut = pairs_from(rows, processor, max_length=limit)
    fits = [pair for pair in whole if len(pair.prompt) < limit]
    assert [pair.prompt for pair in cut] == [pair.prompt for pair in fits]
    assert all(len(pair.prompt) + len(answer) <= limit for pair in cut for answer in (pair.chosen, pair.rejected))
    assert f"{len(whole) - len(fits)} whose prompt with its images leaves no room" in caplog.text


def test_a_prompt_with_images_beyond_max_prompt_length_drops_its_row() -> None:
    processor, rows = made("qwen2_vl")[1], rows_of("qwen2_vl")
    lengths = [len(pair.prompt) for pair in pairs_from(rows, processor)]
    kept = pairs_from(rows, processor, max_length=max(lengths) + 1, max_prompt_length=max(lengths) - 1)
    assert [len(pair.prompt) for pair in kept] == [length for length in lengths if length < max(lengths)]


def test_text_alone_goes_through_a_processor_too() -> None:
    (model, processor), rows = made("gemma3"), rows_of("gemma3")
    rows = [{**row, "images": []} for row in rows]
    pairs = pairs_from(rows, processor)
    with torch.no_grad():
        logps, _ = Policy(model)(layout_of("gemma3").collate(pairs))
        expected = plain_logps(model, processor, rows, pairs)
    assert float((logps - expected).abs().max()) < 1e-4


CHAT = {column: value for column, value in rows_of("llava")[0].items() if column != "images"}
TEXT = {"prompt": "<image>What?", "chosen": "A dog.", "rejected": "A cat."}
HELD = [{"role": "user", "content": [{"type": "image", "path": "a.png"}]}]
ONE = {"images": [picture(30, 30)]}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no placeholder": ({**TEXT, "prompt": "What?", **ONE}, "has 0 placeholders for 1 images"),
    "no image": ({**TEXT, "images": []}, "a placeholder for an image where there is none"),
    "placeholder in an answer": ({**TEXT, "chosen": "<image>", **ONE}, "a placeholder for an image where there is"),
    "image held by a message": ({**CHAT, "prompt": HELD, **ONE}, "holds its image itself"),
    "too few places": (
        {**CHAT, "prompt": [with_places(CHAT["prompt"][0], 1)], "images": ONE["images"] * 2},
        "the prompt has 1 places for images, and the row gives 2",
    ),
    "image in an answer": (
        {**CHAT, "chosen": [with_places(CHAT["chosen"][0], 1)], **ONE},
        "chosen has 1 places for images, and the row gives 0",
    ),
    "file that is not there": ({**TEXT, "images": ["nowhere.png"]}, "'nowhere.png' cannot be read"),
    "numbers for images": ({**TEXT, "images": [3]}, "expected images"),
    "image and images": ({**TEXT, "image": ONE["images"][0], **ONE}, "remove one of them"),
    "token ids": (
        {"prompt_ids": [3], "chosen_ids": [4], "rejected_ids": [5], **ONE},
        "rows with images are texts or chat messages",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_row_that_cannot_be_shown_is_refused(name: str) -> None:
    row, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        table_of([row], made("llava")[1])


def test_a_table_none_of_whose_prompts_fit_is_refused_by_its_images() -> None:
    with pytest.raises(ValueError, match="5 whose prompt with its images leaves no room"):
        table_of(rows_of("llava"), made("llava")[1], max_length=8)


def test_an_image_that_changed_after_tokenization_stops_the_run(tmp_path: Path) -> None:
    processor, row = made("llava")[1], rows_of("llava")[0]
    row["images"][0].save(tmp_path / "0.png")
    pairs = pairs_from([{**row, "images": [str(tmp_path / "0.png")]}], processor)
    picture(40, 30, seed=99).save(tmp_path / "0.png")
    with pytest.raises(RuntimeError, match="not what they were when the dataset was tokenized"):
        layout_of("llava").collate(pairs)


# Runs


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        draw_no_picture(patch)
        yield {
            "output_dir": str(tmp_path_factory.mktemp("run")),
            "max_steps": 3,
            "per_device_train_batch_size": 3,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
        }


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model on disk with its processor, which loads without torchvision, and rows whose images are files beside."""
    path = tmp_path_factory.mktemp("llava")
    model, processor = made("llava")
    model.save_pretrained(path / "model")
    processor.save_pretrained(path / "model")
    rows = rows_of("llava")
    for number, row in enumerate(rows):
        row.pop("images")[0].save(path / f"{number}.png")
        row["image"] = f"{number}.png"
    (path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("more", [{"use_peft": True}, {"load_in_4bit": True}], ids=["lora", "4-bit"])
def test_training_from_files_starts_at_the_reference_and_learns(
    more: dict[str, Any], saved: Path, options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fastdpo")
    given = {**options, **more, "output_dir": str(tmp_path), "max_steps": 6}
    out = fastdpo.train(str(saved / "model"), saved / "rows.jsonl", saved / "rows.jsonl", **given)
    assert "adapters: on 28 layers, 12 of them in the vision tower" in caplog.text
    lines = [row for row in out.history if "loss" in row]
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert lines[0]["rewards/margins"] == 0
    assert lines[-1]["rewards/margins"] > 0.1
    assert out.metrics["eval_rewards/accuracies"] == 1
    assert (tmp_path / "processor_config.json").exists()
    predictions: Any = out.trainer.predict(saved / "rows.jsonl").predictions
    assert (predictions[:, 0] > predictions[:, 1]).tolist() == [True] * 5


def test_the_whole_model_trains_with_checkpointing_as_without(options: dict[str, Any]) -> None:
    lines = []
    for checkpointing in (False, True):
        model, processor = copy.deepcopy(made("qwen2_5_vl")[0]), made("qwen2_5_vl")[1]
        given = fastdpo.DPOConfig(**{**options, "learning_rate": 1e-4}, gradient_checkpointing=checkpointing)
        trainer = fastdpo.DPOTrainer(model, args=given, train_dataset=rows_of("qwen2_5_vl"), processing_class=processor)
        trainer.train()
        lines.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert lines[0] == pytest.approx(lines[1], abs=1e-6)


def test_a_reference_computed_ahead_gives_the_run_that_computes_it_on_the_way(
    saved: Path, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTDPO_CACHE", str(tmp_path))
    losses = []
    ahead: dict[str, Any] = {"precompute_ref_log_probs": True}
    for more in ({}, ahead, ahead):  # the last from disk
        out = fastdpo.train(str(saved / "model"), saved / "rows.jsonl", **options, **more)
        losses.append([row["loss"] for row in out.history if "loss" in row])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_run_beside_trl_logs_the_same_numbers(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", "1.16", reason="parity is measured beside TRL 1.16")
    model, processor = made(name)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    same = {**options, "per_device_train_batch_size": 2, "gradient_checkpointing": False, "max_length": None}
    same |= {"bf16": False, "train_sampling_strategy": "sequential", "lr_scheduler_type": "constant"}
    histories = []
    for package in (trl, fastdpo):
        args = package.DPOConfig(**{**same, "output_dir": str(tmp_path / package.__name__)})
        rows = Dataset.from_list(rows_of(name))
        trainer = package.DPOTrainer(copy.deepcopy(adapted), args=args, train_dataset=rows, processing_class=processor)
        trainer.train()
        histories.append([row for row in trainer.state.log_history if "loss" in row])
    for step, (their, our) in enumerate(zip(*histories, strict=True)):
        for key in ("loss", "grad_norm", "rewards/margins", "logps/chosen", "logps/rejected", "num_tokens"):
            assert our[key] == pytest.approx(float(their[key]), rel=1e-4, abs=1e-5), (step, key)
    assert abs(histories[1][-1]["rewards/margins"]) > 0.01


def test_the_command_line_trains_from_a_file_of_paths_and_plans_nothing(
    saved: Path, options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--model", str(saved / "model"), "--train_dataset", str(saved / "rows.jsonl")]
    run = ["train", *given, "--output_dir", str(tmp_path), "--use_cpu", "--max_steps", "1", "--report_to", "none"]
    assert main([*run, "--dataset_num_proc", "2", "--dataloader_num_workers", "1"]) == 0
    assert (tmp_path / "model.safetensors").exists()
    assert main(["plan", *given, "--gpu_memory", "24GiB"]) == 1
    assert "there is no plan for vision-language models" in capsys.readouterr().err


def test_a_merged_adapter_comes_with_the_processor(saved: Path, options: dict[str, Any], tmp_path: Path) -> None:
    given = {**options, "max_steps": 1, "use_peft": True, "output_dir": str(tmp_path / "adapter")}
    out = fastdpo.train(str(saved / "model"), saved / "rows.jsonl", **given)
    where = ["--adapter", f"{tmp_path}/adapter", "--output_dir", f"{tmp_path}/merged"]
    assert main(["merge", *where, "--dtype", "float32", "--use_cpu"]) == 0
    processor = AutoProcessor.from_pretrained(tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    inputs = sequence(processor, rows_of("llava")[0], "chosen")
    with torch.no_grad():
        difference = merged(**inputs).logits - out.model(**inputs).logits
    assert float(difference.abs().max()) < 1e-5


def test_noise_on_embeddings_goes_by_the_rows_of_a_pair(options: dict[str, Any]) -> None:
    """Within alpha / sqrt(L * D) of the pair's longer row, and nearly so somewhere, chosen rows being first."""
    batch = batch_of("llava", rows_of("llava"))
    noise = EmbeddingNoise(5.0, 0, lambda: 1)(batch, torch.zeros(*batch.input_ids.shape, 32))
    longer = [len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) for pair in pairs_of(batch)]
    bounds = torch.tensor([5 / math.sqrt(length * 32) for length in longer * 2])
    largest = noise.abs().amax((1, 2))
    assert bool((largest <= bounds).all() and (largest > 0.99 * bounds).all())


def test_text_alone_is_packed_and_refuses_images_that_come_later(options: dict[str, Any]) -> None:
    model, processor = made("gemma3")
    text = [{column: value for column, value in row.items() if column != "images"} for row in rows_of("gemma3")]
    given = fastdpo.DPOConfig(**options)
    trainer = fastdpo.DPOTrainer(copy.deepcopy(model), args=given, train_dataset=text, processing_class=processor)
    assert trainer.layout.packed
    with torch.no_grad():
        pairs = pairs_from(text, processor)
        logps, _ = Policy(model)(trainer.layout.collate(pairs))
        expected = plain_logps(model, processor, [{**row, "images": []} for row in text], pairs)
    assert float((logps - expected).abs().max()) < 1e-4
    with pytest.raises(ValueError, match="built with rows of text alone, and these show images"):
        trainer.evaluate(rows_of("gemma3"))


def test_a_text_model_refuses_rows_with_images(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="rows with images need a vision-language model and its processor"):
        fastdpo.train(tiny_llama(), rows_of("llava"), processing_class=byte_level(), **options)


def test_a_text_model_refuses_a_processor(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="the model takes no images: pass its .tokenizer"):
        fastdpo.train(tiny_llama(), rows_of("llava"), processing_class=made("llava")[1], **options)


def test_a_model_without_its_processor_asks_for_one_by_name(options: dict[str, Any], tmp_path: Path) -> None:
    made("llava")[0].config.save_pretrained(tmp_path / "alone")
    with pytest.raises(ValueError, match="processing_class is missing, and no processor loads from .*alone"):
        fastdpo.train(str(tmp_path / "alone"), rows_of("llava"), **options)
    model = copy.deepcopy(made("llava")[0])
    model.config._name_or_path = ""
    with pytest.raises(ValueError, match="was not loaded from a place that has a processor: give one"):
        fastdpo.train(model, rows_of("llava"), **options)


def test_a_stream_of_images_is_refused(options: dict[str, Any]) -> None:
    model, processor = made("llava")
    stream = Dataset.from_list(rows_of("llava")).to_iterable_dataset()
    with pytest.raises(ValueError, match="is a stream, with images"):
        fastdpo.train(model, stream, processing_class=processor, **options)


def test_a_data_collator_is_refused_beside_a_processor(options: dict[str, Any]) -> None:
    model, processor = made("llava")
    with pytest.raises(ValueError, match="data_collator sees rows of decoder-only models"):
        fastdpo.DPOTrainer(
            model,
            args=fastdpo.DPOConfig(**options),
            data_collator=lambda rows: rows,
            train_dataset=rows_of("llava"),
            processing_class=processor,
        )
