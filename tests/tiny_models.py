"""Tiny random models of many families, and which layout each of them takes.

Every weight is drawn anew and large: biases are not zero, norms are not one, attention sinks are not zero, and
attention is far from uniform, so that a wrong mask or a forgotten bias moves log-probs by much more than rounding.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fastdpo.data import TokenPair

VOCABULARY = 97
WINDOW = 6  # shorter than most sequences of RAGGED

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


@dataclass(frozen=True)
class Family:
    """A model type with what its config needs, and why it cannot be packed ("" where it can)."""

    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    why_padded: str = ""


# Reasons, as the layout says them.
OWN_ATTENTION = "0 of 2 layers"  # nothing calls the custom function
NO_ATTENTION = "1 of 2 layers"  # the other layer is a convolution or a recurrence
NO_POSITIONS = "takes no position ids"  # ALiBi
NEEDS_MASK = "fails on a packed batch"  # computes attention itself and adds a mask that is not made
NO_KEYWORDS = "does not hand keyword arguments on"
WINDOW_IN_MASK = "has windows or chunks"  # only its mask knows them

FAMILIES: dict[str, Family] = {
    "llama": Family("llama"),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3", {"head_dim": 8}),
    "mistral-window": Family("mistral", {"sliding_window": WINDOW}),
    "gemma": Family("gemma", {"head_dim": 8}),
    "gemma2": Family(
        "gemma2",
        {
            "head_dim": 8,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": Family(
        "gemma3_text",
        {
            "head_dim": 8,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "phi3": Family("phi3", {"sliding_window": WINDOW}),
    "phi-head-bias": Family("phi"),
    "gpt2": Family("gpt2", GPT2_SIZES),
    "opt": Family("opt", {"ffn_dim": 48, "word_embed_proj_dim": 16}),
    "gpt-neox": Family("gpt_neox", {"rotary_pct": 0.5}),
    "granite": Family(
        "granite",
        {"logits_scaling": 0.5, "embedding_multiplier": 2.0, "residual_multiplier": 0.7, "attention_multiplier": 0.5},
    ),
    "cohere": Family("cohere", {"logit_scale": 0.5}),
    "cohere2": Family(
        "cohere2",
        {"logit_scale": 0.5, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "olmo2": Family("olmo2"),
    "mixtral": Family("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2-moe": Family("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 16}),
    "qwen3-moe": Family("qwen3_moe", {**EXPERTS, "head_dim": 8}),
    "deepseek-v3-mla": Family(
        "deepseek_v3",
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
        },
    ),
    "stablelm": Family("stablelm", {}, NO_KEYWORDS),
    "smollm3": Family("smollm3"),
    "glm4": Family("glm4", {"head_dim": 8}),
    "starcoder2": Family("starcoder2", {"sliding_window": WINDOW}),
    "falcon-rotary": Family(
        "falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False}, NEEDS_MASK
    ),
    "falcon-alibi": Family("falcon", {"alibi": True, "multi_query": False}, NEEDS_MASK),
    "bloom": Family("bloom", {"n_layer": 2, "n_head": 4}, NO_POSITIONS),
    "mpt": Family("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2}, NO_POSITIONS),
    "gptj": Family("gptj", {**GPT2_SIZES, "rotary_dim": 4}, OWN_ATTENTION),
    "gpt-oss-sinks": Family(
        "gpt_oss", {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW}
    ),
    "lfm2-conv": Family("lfm2", {"layer_types": ["conv", "full_attention"]}, NO_ATTENTION),
    "qwen3-next-hybrid": Family(
        "qwen3_next",
        {
            **EXPERTS,
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "shared_expert_intermediate_size": 16,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
        NO_ATTENTION,
    ),
    "qwen2-moe-window": Family(
        "qwen2_moe",
        {
            **EXPERTS,
            "shared_expert_intermediate_size": 16,
            "use_sliding_window": True,
            "sliding_window": 14,
            "max_window_layers": 2,
        },
        WINDOW_IN_MASK,
    ),
    "phimoe-window": Family(
        "phimoe", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 14}, WINDOW_IN_MASK
    ),
    "llama4-chunks": Family(
        "llama4_text",
        {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48, "attention_chunk_size": 14},
        WINDOW_IN_MASK,
    ),
}


def tiny_model(name: str | Family, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """The family's model on CPU in evaluation mode; `changes` go into its config."""
    family = FAMILIES[name] if isinstance(name, str) else name
    config = AutoConfig.for_model(family.model_type, **{**SIZES, **family.config, **changes})
    # transformers before 5.2x runs Gemma-2 by an sdpa that leaves the softcap out
    attention = {"attn_implementation": "eager"} if family.model_type == "gemma2" else {}
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **attention)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + 0.1 * noise if parameter.ndim < 2 else 0.2 * noise)
    return model.to(dtype).eval()


def random_pairs(*lengths: tuple[int, int, int], seed: int = 0) -> list[TokenPair]:
    """Pairs of so many prompt, chosen and rejected tokens."""
    draw = random.Random(seed)
    tokens = lambda count: [draw.randrange(3, VOCABULARY) for _ in range(count)]  # noqa: E731
    return [TokenPair(*map(tokens, pair)) for pair in lengths]


# Prompts of one token and of none, answers of one token, of one scored token and of none.
RAGGED = random_pairs((7, 5, 9), (1, 11, 2), (20, 1, 1), (0, 4, 1), (0, 2, 8), (3, 1, 6))


def plain_logps(model: PreTrainedModel, pairs: Sequence[TokenPair]) -> Tensor:
    """(N,) token log-probs by the model's own logits, one sequence at a time, in the order of a batch's targets."""
    values = []
    for pair in pairs:
        for response in (pair.chosen, pair.rejected):
            tokens = torch.tensor([[*pair.prompt, *response]])
            log_probs = model(input_ids=tokens, use_cache=False).logits[0].log_softmax(-1)
            first = max(len(pair.prompt), 1)  # nothing predicts the first token of all
            values.append(log_probs[first - 1 : -1].gather(1, tokens[0, first:, None])[:, 0])
    return torch.cat(values)


def gradient_error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference, each relative to its tensor's largest entry.

    No tensor is taken for smaller than 1% of the largest of all: the gradient of a key bias without rotary positions
    is 0 but for rounding, because the softmax does not see it.
    """
    assert actual.keys() == expected.keys()
    floor = 0.01 * max(float(value.abs().max()) for value in expected.values())
    errors = [(actual[n] - e).abs().max() / e.abs().max().clamp_min(floor) for n, e in expected.items()]
    return float(torch.stack(errors).max())


def gradients(logps: Tensor, model: torch.nn.Module) -> dict[str, Tensor]:
    """Gradients of a fixed random linear functional of the log-probs, by parameter name."""
    weights = torch.randn(logps.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(logps.dtype)
    model.zero_grad()
    (logps * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
