"""Encoder-decoders: a prompt is encoded once a pair, and the numbers are those of the model's own forward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import SIZES, gradient_error, gradients, random_pairs
from tokenizers_for_tests import CHAT, PLAIN, byte_level, pairs_of
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedModel

import fastdpo
from fastdpo import DPOConfig, DPOTrainer, batch
from fastdpo.data import TokenPair
from fastdpo.layout import find_layout
from fastdpo.model import Policy

T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
BART = {
    **{f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in
       {"layers": 2, "ffn_dim": 48, "attention_heads": 4}.items()},
    **{"d_model": 32, "decoder_start_token_id": 2, "forced_eos_token_id": 2},
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("t5", T5),
    "t5-untied": ("t5", {**T5, "tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}),
    "mt5": ("mt5", T5),
    "umt5": ("umt5", T5),
    "longt5": ("longt5", T5),
    "switch": ("switch_transformers", {**T5, "num_experts": 2}),
    "bart": ("bart", BART),
    "pegasus": ("pegasus", BART),
    "marian": ("marian", {**BART, "decoder_vocab_size": 97}),
    "m2m100": ("m2m_100", BART),
}
PAIRS = random_pairs((7, 5, 9), (1, 11, 2), (20, 1, 1), (3, 1, 6))


def tiny(name: str, vocabulary: int = 97, **changes: Any) -> PreTrainedModel:
    kind, own = FAMILIES[name]
    config = AutoConfig.for_model(kind, **{**SIZES, **own, "vocab_size": vocabulary, **changes})
    model = AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*model.parameters(), *(b for n, b in model.named_buffers() if "logits_bias" in n)]:
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(tensor + 0.1 * noise if tensor.ndim < 2 else 0.2 * noise)
    return model


def plain_logps(model: nn.Module, pairs: list[TokenPair], start: int) -> Tensor:
    """(N,) by the model's own logits, one sequence at a time."""
    values = []
    for pair in pairs:
        for response in (pair.chosen, pair.rejected):
            decoder = torch.tensor([[start, *response[:-1]]])
            logits = model(input_ids=torch.tensor([pair.prompt]), decoder_input_ids=decoder, use_cache=False).logits[0]
            values.append(logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0])
    return torch.cat(values)


@pytest.mark.parametrize("name", FAMILIES)
def test_log_probs_and_gradients_are_those_of_the_models_own_forward(name: str) -> None:
    if name == "umt5" and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("in transformers 5.17 tokens of UMT5's decoder see later ones, which is refused")
    model = tiny(name)
    layout = find_layout(Policy(model))
    logps, _ = Policy(model)(layout.collate(PAIRS))
    expected = plain_logps(model, PAIRS, model.config.decoder_start_token_id)
    torch.testing.assert_close(logps, expected, rtol=0, atol=2e-5)
    if name != "switch":  # whose routers drop what is beyond an expert's share of the batch: gradients as log-probs are
        assert gradient_error(gradients(logps, model), gradients(expected, model)) < 1e-4


def test_a_batch_gives_back_the_pairs_that_it_was_made_of() -> None:
    made = batch.encode_decode(PAIRS, pad_token_id=5, start_token_id=2)
    assert [TokenPair(**pair._asdict()) for pair in batch.pairs_of(made)] == PAIRS
    assert made.input_ids.shape == (4, 20)  # each prompt once


def test_a_decoder_that_begins_by_its_labels_is_refused() -> None:
    config = AutoConfig.for_model("mbart", **{**SIZES, **BART})
    with pytest.raises(ValueError, match="begins by its labels"):
        find_layout(Policy(AutoModelForSeq2SeqLM.from_config(config)))


SEQ2SEQ = {"is_encoder_decoder": True}


@pytest.mark.parametrize("limits", [{}, {"max_prompt_length": 5, "max_target_length": 3}, {"max_length": 4}])
def test_rows_are_what_the_tokenizer_makes_of_each_text_alone(limits: dict[str, int]) -> None:
    tokenizer = byte_level(adds_bos=True, adds_eos=True)
    ours = pairs_of([PLAIN], tokenizer, **SEQ2SEQ, **limits, truncation_mode="keep_start")[0]
    longest = limits.get("max_length")
    for text, ids, limit in (
        (PLAIN["prompt"], ours.prompt, limits.get("max_prompt_length", longest)),
        (PLAIN["chosen"], ours.chosen, limits.get("max_target_length", longest)),
        (PLAIN["rejected"], ours.rejected, limits.get("max_target_length", longest)),
    ):
        assert ids == tokenizer(text, truncation=limit is not None, max_length=limit)["input_ids"]


def test_keep_end_keeps_the_end_of_a_prompt_and_its_special_tokens() -> None:
    tokenizer = byte_level(adds_bos=True, adds_eos=True)
    whole, cut = (pairs_of([PLAIN], tokenizer, **SEQ2SEQ, max_prompt_length=limit)[0].prompt for limit in (None, 6))
    assert cut == [whole[0], *whole[-5:]]


def test_an_answer_ends_once_where_the_tokenizer_writes_no_end() -> None:
    tokenizer = byte_level()
    pair = pairs_of([PLAIN], tokenizer, **SEQ2SEQ)[0]
    assert pair.chosen == [*tokenizer(PLAIN["chosen"])["input_ids"], tokenizer.eos_token_id]
    chat = pairs_of([CHAT], tokenizer, **SEQ2SEQ)[0]
    assert tokenizer.decode(chat.prompt).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(chat.chosen) == "I am well.<|im_end|>\n</s>"


def plain_run(model: nn.Module, pairs: list[TokenPair], steps: int, rate: float) -> list[tuple[float, float]]:
    """(loss, gradient norm) of SGD steps on the sigmoid loss over all pairs, beta 0.1, by the model's own forward."""
    lengths = [len(side) for pair in pairs for side in (pair.chosen, pair.rejected)]
    sums = lambda: torch.stack([part.sum() for part in plain_logps(model, pairs, 0).split(lengths)]).view(-1, 2)  # noqa: E731
    reference, trained = sums().detach(), [p for p in model.parameters() if p.requires_grad]
    seen = []
    for _ in range(steps):
        margins = (sums() - reference).diff(dim=1)
        loss = -F.logsigmoid(-0.1 * margins).mean()
        grads = torch.autograd.grad(loss, trained)
        seen.append((loss.item(), torch.stack([grad.norm() for grad in grads]).norm().item()))
        with torch.no_grad():
            for parameter, grad in zip(trained, grads, strict=True):
                parameter -= rate * grad
    return seen


def adapted(model: PreTrainedModel) -> PeftModel:
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM", init_lora_weights=False)
    return get_peft_model(model, config)


SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 0.05, "max_grad_norm": 1e9, "max_steps": 3}


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("more", [{}, {"max_tokens_per_microbatch": 120}, {"gradient_checkpointing": True}], ids=str)
def test_training_is_a_plain_loop_of_the_models_own_forward(
    adapters: bool, more: dict[str, Any], rows: list[dict], quick: dict[str, Any]
) -> None:
    make = lambda: (adapted if adapters else lambda model: model)(tiny("t5", 500))  # noqa: E731
    options = {**quick, **SGD, **more, "per_device_train_batch_size": 24}
    tokenizer = byte_level(adds_eos=True)
    out = fastdpo.train(make(), rows, processing_class=tokenizer, **options)
    ours = [(row["loss"], row["grad_norm"]) for row in out.history if "grad_norm" in row]
    expected = plain_run(make(), pairs_of(rows, tokenizer, **SEQ2SEQ), 3, 0.05)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(expected), rtol=1e-4, atol=1e-5)


@pytest.fixture
def saved(tmp_path: Path) -> str:
    tiny("t5", 500).save_pretrained(tmp_path / "model")
    byte_level(adds_eos=True).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_four_bit_weights_train_adapters_that_load_with_pefts_own_class(
    saved: str, rows: list[dict], quick: dict[str, Any]
) -> None:
    out = fastdpo.train(saved, rows, rows[:6], load_in_4bit=True, **quick)
    first, last = (row["loss"] for row in [out.history[0], out.history[3]])
    assert abs(first - 0.693147) < 1e-5 and last < first
    assert json.loads(Path(quick["output_dir"], "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    again = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(saved), quick["output_dir"])
    assert type(again).__name__ == "PeftModelForSeq2SeqLM"


def test_a_name_precomputed_references_and_predictions_agree(saved: str, rows: list[dict], quick: dict) -> None:
    trainers = [
        DPOTrainer(
            saved, args=DPOConfig(**quick, precompute_ref_log_probs=ahead), train_dataset=rows, eval_dataset=rows
        )
        for ahead in (False, True)
    ]
    for trainer in trainers:
        trainer.train()
    one, other = (trainer.evaluate()["eval_loss"] for trainer in trainers)
    assert one == pytest.approx(other, abs=1e-6)
    rewards = trainers[0].predict(rows).predictions
    assert (rewards[:, 0] - rewards[:, 1]).mean() == pytest.approx(
        trainers[0].state.log_history[-2]["eval_rewards/margins"], abs=1e-6
    )


@pytest.mark.parametrize(
    "options, error",
    [
        ({"is_encoder_decoder": False}, "is_encoder_decoder=False, and model is encoder-decoder"),
        ({"max_target_length": 4, "max_completion_length": 4}, "there is max_completion_length"),
    ],
)
def test_options_that_contradict_the_model_are_refused(
    options: dict, error: str, rows: list[dict], quick: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=error):
        fastdpo.train(tiny("t5", 500), rows, processing_class=byte_level(), **quick, **options)


def test_max_target_length_is_for_encoder_decoders(model: Any, rows: list[dict], quick: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="decoder-only models go by max_completion_length"):
        fastdpo.train(model, rows, processing_class=byte_level(), **quick, max_target_length=4)
    with pytest.raises(ValueError, match="model is decoder-only and ref_model encoder-decoder"):
        fastdpo.train(model, rows, ref_model=tiny("t5", 500), processing_class=byte_level(), **quick)


def test_a_row_of_ids_without_a_prompt_is_refused() -> None:
    row = {"prompt_ids": [], "chosen_ids": [3, 4], "rejected_ids": [4, 5]}
    with pytest.raises(ValueError, match="an encoder needs one"):
        pairs_of([row], byte_level(), **SEQ2SEQ)
