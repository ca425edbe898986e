"""The demo: teach a tiny language model good manners, offline, on two CPU cores, in about a minute.

A Llama of one million parameters first reads plain text in which every question is answered once politely and once
rudely, so it learns both manners and prefers neither. Then DPO with LoRA shows it pairs of answers, the polite one
chosen and the rude one rejected. The answers of a pair mostly give the same advice and are alike in length, so manner
is all that there is to learn. The score is taken on questions that neither stage has seen, half of them about subjects
that DPO has not seen either: manners must carry over to whatever else the model can talk about.

What it gives up: the model is far too small to be of use, and the phrases of both manners are the same few dozen
throughout. The held-out pairs were picked so that warmed-up models of two other seeds found the polite answer more
probable in half of them: the score before DPO is near 0.5 by design. It shows the whole way of a run, not what DPO does
to a real model.
"""

import argparse
import io
import json
import random
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, set_seed

import fastdpo

PAIRS_FILE = Path(__file__).with_name("demo_pairs.jsonl")
LEARNED = 0.9
SPECIAL_TOKENS = PAD, BOS, EOS = ["<pad>", "<s>", "</s>"]  # ids 0, 1, 2
WARM_UP_BATCH = 16

Row = dict[str, str]


def main(argv: list[str] | None = None) -> int:
    """Run the demo; returns 0 if the model learned, 1 if not."""
    options = parse_arguments(argv)
    with one_thread():
        return run(options)


def run(options: argparse.Namespace) -> int:
    started = time.perf_counter()
    set_seed(options.seed)
    train_rows, held_out = load_pairs("train")[: options.pairs], load_pairs("test")
    text_rows = load_pairs("train") + load_pairs("text")
    tokenizer = build_tokenizer([row["prompt"] + row[side] for row in text_rows for side in ("chosen", "rejected")])
    model = build_model(tokenizer)
    introduce(train_rows, held_out, model)

    with stage("1. Warm-up on plain text: the model learns to answer, politely and rudely alike"):
        warm_up(model, tokenizer, text_rows, options.warm_up_passes)
        ranking_before = ranking_accuracy(model, tokenizer, held_out)
        answers_before = [sample(model, tokenizer, row["prompt"], options.seed) for row in held_out[:2]]

    with stage("2. DPO with LoRA: fastdpo.train(model, train_rows, eval_dataset=held_out, ...)"):
        result = run_dpo(model, tokenizer, train_rows, held_out, options)
        print_history(result.history)

    with stage("3. What it learned, on held-out questions"):
        reward_after = result.metrics["eval_rewards/accuracies"]
        print_accuracies(ranking_before, ranking_accuracy(result.model, tokenizer, held_out), reward_after)
        answers_after = [sample(result.model, tokenizer, row["prompt"], options.seed) for row in held_out[:2]]
        for row, before, after in zip(held_out, answers_before, answers_after, strict=False):
            print_side_by_side(row["prompt"], before, after)
    return conclude(reward_after, Path(options.output_dir), time.perf_counter() - started)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fastdpo demo",
        description="Teach a tiny model good manners with DPO: no network, no GPU, about a minute on two cores.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output_dir", default="demo_output", help="where the model, its log and report.html go")
    parser.add_argument("--seed", type=int, default=42, help="seed of the model, the order of rows and the samples")
    parser.add_argument("--pairs", type=int, default=None, help="use only this many training pairs (default: all)")
    parser.add_argument("--warm_up_passes", type=int, default=14, help="passes over the plain text before DPO")
    options = parser.parse_args(argv)
    if options.pairs is not None and options.pairs < 1:
        parser.error(f"--pairs is {options.pairs}: give a number from 1 up, or leave it out to use all")
    if options.warm_up_passes < 1:
        parser.error(f"--warm_up_passes is {options.warm_up_passes}: give a number from 1 up")
    return options


def load_pairs(split: str) -> list[Row]:
    """The rows of one split: "train" for DPO, "text" read in the warm-up only, "test" held out from both."""
    with PAIRS_FILE.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [row for row in rows if row["split"] == split]


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE learned from `texts`: any other text is spelled out in smaller pieces, none is unknown."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=1024,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, SPECIAL_TOKENS.index(BOS))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=PAD, bos_token=BOS, eos_token=EOS)


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with random weights and about a million parameters."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            pad_token_id=SPECIAL_TOKENS.index(PAD),
            bos_token_id=SPECIAL_TOKENS.index(BOS),
            eos_token_id=SPECIAL_TOKENS.index(EOS),
        )
    )


def warm_up_texts(rows: list[Row]) -> list[str]:
    """Every question with a polite and a rude answer, each borrowed from a random row on the same subject.

    Fresh company in every pass keeps the model from learning the rows by heart: it learns subject and manner apart.
    """
    by_subject: dict[str, list[Row]] = {}
    for row in rows:
        by_subject.setdefault(row["subject"], []).append(row)
    return [
        row["prompt"] + random.choice(by_subject[row["subject"]])[side]
        for row in rows
        for side in ("chosen", "rejected")
    ]


def warm_up(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: list[Row], passes: int) -> None:
    """Ordinary language modelling on questions and answers of both manners.

    DPO moves a model that can already write both answers; from random weights there would be nothing to prefer.
    """
    steps = passes * -(-2 * len(rows) // WARM_UP_BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    model.train()
    for number in range(1, passes + 1):
        texts = warm_up_texts(rows)
        losses = []
        for indices in torch.randperm(len(texts)).split(WARM_UP_BATCH):
            batch = tokenizer([texts[i] + EOS for i in indices.tolist()], padding=True, return_tensors="pt")
            batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            loss = model(**batch, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        if number in (1, passes // 2, passes):
            print(f"   pass {number:2d} of {passes}: loss per token {torch.stack(losses).mean():.2f}", flush=True)


def run_dpo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    train_rows: list[Row],
    held_out: list[Row],
    options: argparse.Namespace,
) -> fastdpo.TrainResult:
    """The call that this package is about, as you would write it for a model and rows of your own."""
    with redirect_stdout(io.StringIO()):  # transformers prints each log row as a dict; print_history shows them later
        return fastdpo.train(
            model,
            train_rows,
            eval_dataset=held_out,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
            output_dir=options.output_dir,
            beta=0.3,
            learning_rate=6e-4,
            num_train_epochs=4,
            per_device_train_batch_size=8,
            per_device_eval_batch_size=16,
            gradient_checkpointing=False,  # saves memory that a model this small does not need
            logging_steps=9,
            eval_strategy="epoch",
            save_strategy="no",
            seed=options.seed,
            disable_tqdm=not sys.stderr.isatty(),
        )


def encode(tokenizer: PreTrainedTokenizerFast, prompt: str, answer: str) -> list[int]:
    return tokenizer.encode(prompt + answer + EOS)


@torch.no_grad()
def answer_logp(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, prompt: str, answer: str) -> float:
    """log p(answer | prompt): the sum over the answer's tokens, its end token included."""
    ids = torch.tensor([encode(tokenizer, prompt, answer)])
    start = len(tokenizer.encode(prompt))
    logps = model(input_ids=ids).logits[0, start - 1 : -1].float().log_softmax(-1)
    return logps.gather(1, ids[0, start:, None]).sum().item()


def ranking_accuracy(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> float:
    """The share of rows whose chosen answer the model itself finds more probable than the rejected one.

    Unlike reward accuracy it needs no reference model, so it can be asked before DPO too, when policy and reference
    are still the same and every reward is 0.
    """
    model.eval()
    right = [
        answer_logp(model, tokenizer, row["prompt"], row["chosen"])
        > answer_logp(model, tokenizer, row["prompt"], row["rejected"])
        for row in rows
    ]
    return sum(right) / len(right)


@torch.no_grad()
def sample(model: Any, tokenizer: PreTrainedTokenizerFast, prompt: str, seed: int) -> str:
    """One answer drawn from the model, the same draw for the same seed."""
    model.eval()
    torch.manual_seed(seed)
    prompt_ids = torch.tensor([tokenizer.encode(prompt)])
    tokens = model.generate(input_ids=prompt_ids, do_sample=True, temperature=0.7, top_p=0.9, max_new_tokens=60)
    return str(tokenizer.decode(tokens[0, prompt_ids.shape[1] :], skip_special_tokens=True)).strip()


@contextmanager
def one_thread() -> Iterator[None]:
    """Keeps torch to one thread: a model this small gains nothing from two, and on busy cores they wait for each other.

    Measured on two cores shared with other programs: 311 s with two threads, 71 s with one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def stage(title: str) -> Iterator[None]:
    """Says what comes, and how long it took."""
    print(f"\n{title}", flush=True)
    started = time.perf_counter()
    yield
    print(f"   ({time.perf_counter() - started:.0f} s)", flush=True)


def introduce(train_rows: list[Row], held_out: list[Row], model: PreTrainedModel) -> None:
    new = len({row["prompt"] for row in held_out if row["subject"] not in {row["subject"] for row in train_rows}})
    print("fastdpo demo: teach a tiny language model good manners")
    print(f"   model: a Llama with random weights, {model.num_parameters() / 1e6:.1f} million parameters")
    print(
        f"   data:  {len(train_rows)} pairs to train on; {len(held_out)} held out, {new} of them on subjects new to DPO"
    )
    row = train_rows[0]
    for name, text in (
        ("prompt", row["prompt"].splitlines()[0]),
        ("chosen", row["chosen"]),
        ("rejected", row["rejected"]),
    ):
        print(textwrap.fill(text.strip(), 110, initial_indent=f"     {name:<10}", subsequent_indent=" " * 15))


def print_history(history: list[dict[str, float]]) -> None:
    """The evaluations of the run; the whole log is in output_dir/metrics.jsonl and drawn in report.html."""
    print(f"   {'held out, after epoch':<24}{'loss':>8}{'reward margin':>16}{'reward accuracy':>18}")
    for row in history:
        if "eval_loss" in row:
            loss, margin, accuracy = (row[f"eval_{key}"] for key in ("loss", "rewards/margins", "rewards/accuracies"))
            print(f"   {row['epoch']:<24.0f}{loss:>8.3f}{margin:>16.2f}{accuracy:>18.2f}")


def print_accuracies(ranking_before: float, ranking_after: float, reward_after: float) -> None:
    def line(name: str, before: str, after: str) -> None:
        print(f"   {name:<66}{before:>10}{after:>11}")

    line("share of the held-out pairs where", "before DPO", "after DPO")
    line(
        "the model finds chosen more probable than rejected (ranking)", f"{ranking_before:.2f}", f"{ranking_after:.2f}"
    )
    line("DPO raised chosen over rejected (reward accuracy)", "-", f"{reward_after:.2f}")


def print_side_by_side(prompt: str, before: str, after: str, width: int = 52) -> None:
    print(f"\n   {prompt.splitlines()[0]}")
    left = ["before DPO:", *textwrap.wrap(before, width)]
    right = ["after DPO:", *textwrap.wrap(after, width)]
    for i in range(max(len(left), len(right))):
        print(f"     {left[i] if i < len(left) else '':<{width + 3}}{right[i] if i < len(right) else ''}")


def conclude(accuracy: float, output_dir: Path, seconds: float) -> int:
    print(f"\n   the run on one page, for a browser: {output_dir / 'report.html'}")
    print(f"   the trained adapter: {output_dir}")
    print("   next, a model and pairs of your own (one row a line: prompt, chosen, rejected):")
    print(
        "     fastdpo train --model Qwen/Qwen2.5-0.5B-Instruct --train_dataset pairs.jsonl --output_dir out --use_peft"
    )
    learned = accuracy >= LEARNED
    verdict = f"at least {LEARNED}: learned" if learned else f"below {LEARNED}: it did not learn"
    print(f"\nHeld-out reward accuracy {accuracy:.2f}, {verdict} ({seconds:.0f} s in all)")
    return 0 if learned else 1
