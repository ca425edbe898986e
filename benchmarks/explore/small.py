"""A small Llama that has learned something, and real preference pairs to train it on.

Random weights would answer other questions than trained ones: their activations are even and their predictions flat. So
the model is first trained as a language model on the texts of the pairs, for a minute or two on one thread.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from benchmarks.device import Device
from benchmarks.models import MODELS
from benchmarks.workload import build_model
from fastdpo.data import TokenPair

SHAPE = replace(MODELS["20m"], vocab_size=4096, num_hidden_layers=4, tie_word_embeddings=False)
LONGEST = 256  # tokens of a prompt, and of a response: what is longer is cut
STEPS, ROWS, WINDOW, LEARNING_RATE = 300, 4, 128, 2e-3
OUTLIER = 32.0  # a power of two: bf16 rounds as before


def texts(path: Path) -> list[dict[str, str]]:
    """Rows with `prompt`, `chosen` and `rejected` as strings."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    names = ("prompt", "chosen", "rejected")
    if not rows or not all(isinstance(row.get(name), str) for row in rows for name in names):
        raise ValueError(f"{path} needs rows with {', '.join(names)} as strings, one JSON object a line")
    return rows


def encode(rows: list[dict[str, str]]) -> list[TokenPair]:
    """In a byte-level BPE made of these texts, END behind each response."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=SHAPE.vocab_size, special_tokens=["<pad>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((row[name] for row in rows for name in ("prompt", "chosen", "rejected")), trainer)
    ids = {name: [tokenizer.encode(row[name]).ids for row in rows] for name in ("prompt", "chosen", "rejected")}
    return [
        TokenPair(prompt[-LONGEST:], [*chosen[:LONGEST], 1], [*rejected[:LONGEST], 1])
        for prompt, chosen, rejected in zip(ids["prompt"], ids["chosen"], ids["rejected"], strict=True)
    ]


def learned(pairs: list[TokenPair], device: Device, steps: int = STEPS) -> tuple[dict[str, Tensor], float]:
    """-> fp32 weights after so many steps of language modelling on the chosen responses, and the last loss."""
    model: Any = build_model(SHAPE, 4 * LONGEST, "float32", device.place)
    stream = torch.tensor([token for pair in pairs for token in (*pair.prompt, *pair.chosen)], device=device.place)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    generator, loss = torch.Generator().manual_seed(0), torch.zeros(())
    for _ in range(steps):
        starts = torch.randint(len(stream) - WINDOW, (ROWS,), generator=generator).tolist()
        rows = torch.stack([stream[start : start + WINDOW] for start in starts])
        loss = model(input_ids=rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return {name: value.detach() for name, value in model.state_dict().items()}, loss.item()


def with_outliers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same function with one activation of 64 made OUTLIER times larger, as trained large models have some.

    A norm's weight, or the rows of up_proj, times OUTLIER; the columns that meet them divided by it.
    """
    found = {name: value.clone() for name, value in weights.items()}
    into = {"input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")}
    into |= {"post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"), "mlp.up_proj": ("mlp.down_proj",)}
    for layer in range(SHAPE.num_hidden_layers):
        for source, sinks in into.items():
            found[f"model.layers.{layer}.{source}.weight"][::64] *= OUTLIER
            for sink in sinks:
                found[f"model.layers.{layer}.{sink}.weight"][:, ::64] /= OUTLIER
    return found
