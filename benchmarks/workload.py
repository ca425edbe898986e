"""What every trainer is given: a random model and preference pairs as long as a real dataset's, made without a network.

A profile has the dataset's median length and its ratio of prompt to response; the tokens are random, because cost
depends on shapes only. Rows are text over a word-level vocabulary rather than token ids: TRL 1.16 tokenizes whatever it
is given, so both trainers read the same text and do that work.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from math import exp
from statistics import NormalDist, median
from typing import TYPE_CHECKING, Any

from benchmarks.models import Model
from benchmarks.quantised import QuantisedWeights

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 32_000  # words of the rows; a model may have room for more
PAD, END, FIRST_WORD = 0, 1, 2  # token ids; every id from FIRST_WORD on is a word `w<id>`
ROOM_STEP = 1024  # `max_length` of both trainers is a multiple of it: their default for short rows


@dataclass(frozen=True)
class Profile:
    """How long pairs are. Medians and ratios of datasets as published with dpo-prefix-sharing."""

    name: str  # of --profile and of results/
    title: str
    median_total: int  # tokens of prompt plus one response, EOS included
    prompt_to_response: float
    log_spread: float  # standard deviation of the log of a prompt's and of a response's length
    is_dataset: bool = True  # or lengths that somebody made up

    @property
    def pairs(self) -> str:
        """In words."""
        return f"pairs as long as {self.title}'s" if self.is_dataset else self.title

    @property
    def tokens_per_pair(self) -> float:
        """A typical pair's, its prompt once."""
        response = self.median_total / (1 + self.prompt_to_response)
        return self.median_total + response


# Spread. A sample of 88 HH-RLHF pairs has 0.89 (prompt) and 1.02 (response); 0.8 is narrower: it pads TRL's batches
# less, not more. Of the other chats no sample was at hand: 0.6, narrower again for the same reason. TL;DR's posts are
# cut at 512 tokens and its summaries were picked between 24 and 48: 0.3.
_PROFILES = (
    Profile("hh-rlhf", "HH-RLHF", 186, 2.15, 0.8),
    Profile("ultrafeedback", "UltraFeedback", 409, 0.42, 0.6),
    Profile("capybara", "Capybara", 1160, 1.59, 0.6),
    Profile("tldr", "TL;DR", 416, 11.14, 0.3),
    Profile("helpsteer", "HelpSteer", 775, 6.34, 0.6),
    # nothing to share and nothing to pad; and so little of it that what surrounds the products shows
    Profile("no-prompt", "prompts of 1 token, responses all of 128", 129, 1 / 128, 0.0, is_dataset=False),
    Profile("short", "prompts of 8 tokens, responses all of 8", 16, 1.0, 0.0, is_dataset=False),
)
PROFILES = {profile.name: profile for profile in _PROFILES}
RESPONSE_CORRELATION = 0.43  # between the log lengths of a pair's two responses, in the same sample of HH-RLHF


@dataclass(frozen=True)
class PairLengths:
    """Tokens of one pair; a response's count includes the end token that both trainers append."""

    prompt: int
    chosen: int
    rejected: int

    @property
    def tokens(self) -> int:
        """Its prompt once."""
        return self.prompt + self.chosen + self.rejected


def pair_lengths(profile: Profile, pairs: int, seed: int = 0) -> list[PairLengths]:
    """Log-normal lengths at evenly spaced quantiles, so that even 16 pairs have the profile's median and spread."""
    rng = random.Random(seed)
    normal = NormalDist()

    def shuffled_quantiles() -> list[float]:
        quantiles = [normal.inv_cdf((i + 0.5) / pairs) for i in range(pairs)]
        rng.shuffle(quantiles)
        return quantiles

    prompt, chosen, own = shuffled_quantiles(), shuffled_quantiles(), shuffled_quantiles()
    rho, spread = RESPONSE_CORRELATION, profile.log_spread
    rejected = [rho * c + (1 - rho**2) ** 0.5 * o for c, o in zip(chosen, own, strict=True)]
    response_median = profile.median_total / (1 + profile.prompt_to_response)
    prompts = [profile.prompt_to_response * response_median * exp(spread * z) for z in prompt]
    responses = [[response_median * exp(spread * z) for z in side] for side in (chosen, rejected)]
    # The shuffles leave ratio and median a few percent off; two scale factors put them on the profile exactly.
    ratio = 2 * sum(prompts) / sum(responses[0] + responses[1])
    prompts = [p * profile.prompt_to_response / ratio for p in prompts]
    totals = [p + r for side in responses for p, r in zip(prompts, side, strict=True)]
    scale = profile.median_total / median(totals)
    return [
        PairLengths(max(1, round(scale * p)), max(2, round(scale * c)), max(2, round(scale * r)))
        for p, c, r in zip(prompts, *responses, strict=True)
    ]


def room_for(lengths: list[PairLengths]) -> int:
    """`max_length` of both trainers and positions of the model: no row is longer, so nothing is ever truncated."""
    longest = max(pair.prompt + max(pair.chosen, pair.rejected) for pair in lengths)
    return -(-longest // ROOM_STEP) * ROOM_STEP


def sequence_tokens(lengths: list[PairLengths]) -> int:
    """Tokens of all sequences, a prompt in both of its pair's and padding in none: the same for every trainer."""
    return sum(2 * pair.prompt + pair.chosen + pair.rejected for pair in lengths)


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


def model_config(model: Model, room: int) -> PretrainedConfig:
    """Of `room` positions; attention sees all of them."""
    from transformers import AutoConfig

    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    options: dict[str, Any] = {name: getattr(model, name) for name in sizes}
    options |= {"num_key_value_heads": model.num_key_value_heads, "tie_word_embeddings": model.tie_word_embeddings}
    options |= {"max_position_embeddings": room, "pad_token_id": PAD, "eos_token_id": END, "bos_token_id": None}
    options |= {"sliding_window": None} if model.family == "mistral" else {}  # the others have none by themselves
    return AutoConfig.for_model(model.family, **options)


def build_model(
    model: Model, room: int, dtype: str, place: str, attention: str | None = None, seed: int = 0
) -> PreTrainedModel:
    """Random weights of that dtype, drawn where they stay: the same for the same seed, place and machine."""
    import torch
    from transformers import AutoModelForCausalLM

    config = model_config(model, room)
    if model.in_4_bits:
        return QuantisedWeights(config, dtype, place, attention, seed).model()
    torch.manual_seed(seed)
    with torch.device(place):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation=attention)
