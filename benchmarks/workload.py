"""What both trainers are given: a random Llama and preference pairs shaped like HH-RLHF, made without a network.

The lengths follow HH-RLHF (a median of 186 tokens a sequence, prompts 2.15 times as long as a response); the tokens are
random, because cost depends on shapes only. Rows are text over a word-level vocabulary rather than token ids: TRL 1.16
tokenizes whatever it is given, so both trainers read the same text and do that work.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from math import exp
from statistics import NormalDist, median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 32_000  # words of the rows; a model may have room for more
PAD, END, FIRST_WORD = 0, 1, 2  # token ids; every id from FIRST_WORD on is a word `w<id>`
MAX_LENGTH = 1024  # the default of both trainers; no row is longer, so truncation never enters

MEDIAN_TOTAL = 186  # tokens of prompt plus one response, EOS included
PROMPT_TO_RESPONSE = 2.15
# Spread of log length and the correlation between a pair's two responses. A sample of 88 HH-RLHF pairs has spreads of
# 0.89 (prompt) and 1.02 (response) and a correlation of 0.43. 0.8 is narrower: it pads TRL's batches less, not more.
LOG_SPREAD = 0.8
RESPONSE_CORRELATION = 0.43


@dataclass(frozen=True)
class PairLengths:
    """Tokens of one pair; a response's count includes the end token that both trainers append."""

    prompt: int
    chosen: int
    rejected: int


def pair_lengths(pairs: int, seed: int = 0) -> list[PairLengths]:
    """Log-normal lengths at evenly spaced quantiles, so that even 24 pairs have the profile's median and spread."""
    rng = random.Random(seed)
    normal = NormalDist()

    def shuffled_quantiles() -> list[float]:
        quantiles = [normal.inv_cdf((i + 0.5) / pairs) for i in range(pairs)]
        rng.shuffle(quantiles)
        return quantiles

    prompt, chosen, own = shuffled_quantiles(), shuffled_quantiles(), shuffled_quantiles()
    rho = RESPONSE_CORRELATION
    rejected = [rho * c + (1 - rho**2) ** 0.5 * o for c, o in zip(chosen, own, strict=True)]
    response_median = MEDIAN_TOTAL / (1 + PROMPT_TO_RESPONSE)
    prompts = [PROMPT_TO_RESPONSE * response_median * exp(LOG_SPREAD * z) for z in prompt]
    responses = [[response_median * exp(LOG_SPREAD * z) for z in side] for side in (chosen, rejected)]
    # The shuffles leave ratio and median a few percent off; two scale factors put them on the profile exactly.
    ratio = 2 * sum(prompts) / sum(responses[0] + responses[1])
    prompts = [p * PROMPT_TO_RESPONSE / ratio for p in prompts]
    totals = [p + r for side in responses for p, r in zip(prompts, side, strict=True)]
    scale = MEDIAN_TOTAL / median(totals)
    rows = zip(prompts, *responses, strict=True)
    return [_clipped(scale * p, scale * c, scale * r) for p, c, r in rows]


def _clipped(prompt: float, chosen: float, rejected: float) -> PairLengths:
    sides = [min(max(2, round(side)), MAX_LENGTH // 2) for side in (chosen, rejected)]
    return PairLengths(min(max(1, round(prompt)), MAX_LENGTH - max(sides)), *sides)


def text_rows(lengths: list[PairLengths], seed: int = 0) -> list[dict[str, str]]:
    """Rows of random words; a response starts with a space so that it joins the prompt on a token boundary."""
    rng = random.Random(seed + 1)

    def words(count: int) -> str:
        return " ".join(f"w{rng.randrange(FIRST_WORD, VOCABULARY)}" for _ in range(count))

    return [
        {
            "prompt": words(pair.prompt),
            "chosen": " " + words(pair.chosen - 1),
            "rejected": " " + words(pair.rejected - 1),
        }
        for pair in lengths
    ]


def longest_first(lengths: list[PairLengths]) -> list[int]:
    """Row numbers by padded length: the order transformers' LengthGroupedSampler gives a set of this size."""
    return sorted(range(len(lengths)), key=lambda i: -(lengths[i].prompt + max(lengths[i].chosen, lengths[i].rejected)))


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, so text and token ids round-trip and the prompt is always a prefix."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": PAD, "</s>": END} | {f"w{i}": i for i in range(FIRST_WORD, VOCABULARY)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")


def model_config(shape: Mapping[str, int]) -> LlamaConfig:
    from transformers import LlamaConfig

    options: dict[str, Any] = {"tie_word_embeddings": True, "pad_token_id": PAD, "eos_token_id": END, **shape}
    return LlamaConfig(bos_token_id=None, **options)


def build_model(shape: Mapping[str, int], dtype: str, place: str, seed: int = 0) -> PreTrainedModel:
    """Random weights of that dtype, drawn where they stay: the same for the same seed, place and machine."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    with torch.device(place):
        return AutoModelForCausalLM.from_config(model_config(shape), dtype=getattr(torch, dtype))


def parameter_counts(config: LlamaConfig) -> dict[str, int]:
    """Parameters by part, by arithmetic: the head is the embedding again when they are tied."""
    embedding = config.vocab_size * config.hidden_size
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
    trunk = config.num_hidden_layers * sum(i * o for i, o in layer_linears(config).values()) + norms
    head = 0 if config.tie_word_embeddings else embedding
    return {"trunk": trunk, "embedding": embedding, "untied_head": head, "total": trunk + embedding + head}


def layer_linears(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of a Llama layer's linear modules: what "all-linear" LoRA adapts."""
    hidden, wide = config.hidden_size, config.intermediate_size
    head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries = config.num_attention_heads * head_dim
    keys = (config.num_key_value_heads or config.num_attention_heads) * head_dim
    return {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, wide),
        "up_proj": (hidden, wide),
        "down_proj": (wide, hidden),
    }
