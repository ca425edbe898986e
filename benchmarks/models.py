"""Models by their shapes: costs depend on nothing else, so weights are random and nothing is downloaded.

`--model` takes their names, and `--load-in-4bit` their quantised twins. All are of the Llama kind: attention with
grouped queries, a gated MLP, RMS norms (StableLM: layer norms).
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Model:
    """Sizes under the names that transformers' configs have for them."""

    name: str  # of --model and of results/
    title: str
    family: str  # transformers' model_type
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    tie_word_embeddings: bool
    qkv_bias: bool  # on the projections to queries, keys and values
    learning_rate: float  # of the benchmarks: high, so that a few steps move the loss and equal curves mean something
    in_4_bits: bool = False  # NF4 with double quantisation, of all linear modules but the head
    packs: bool = True  # whether its attention takes fastdpo's packed pairs

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of a layer's linear modules: what "all-linear" LoRA adapts."""
        hidden, wide, keys = self.hidden_size, self.intermediate_size, self.num_key_value_heads * self.head_size
        return {
            "q_proj": (hidden, hidden),
            "k_proj": (hidden, keys),
            "v_proj": (hidden, keys),
            "o_proj": (hidden, hidden),
            "gate_proj": (hidden, wide),
            "up_proj": (hidden, wide),
            "down_proj": (wide, hidden),
        }

    @property
    def parameters(self) -> dict[str, int]:
        """Parameters by part, by arithmetic: the head is the embedding again where they are tied."""
        embedding = self.vocab_size * self.hidden_size
        biases = sum(self.linears[name][1] for name in ("q_proj", "k_proj", "v_proj")) if self.qkv_bias else 0
        norm = self.hidden_size * (2 if self.family == "stablelm" else 1)  # layer norms have biases
        layer = sum(i * o for i, o in self.linears.values()) + biases + 2 * norm
        trunk = self.num_hidden_layers * layer + norm
        head = 0 if self.tie_word_embeddings else embedding
        return {"trunk": trunk, "embedding": embedding, "untied_head": head, "total": trunk + embedding + head}

    @property
    def weight_bytes(self) -> float:
        """By arithmetic, in bf16 but for what is quantised."""
        quantised = self.num_hidden_layers * sum(i * o for i, o in self.linears.values()) if self.in_4_bits else 0
        return 2 * (self.parameters["total"] - quantised) + NF4_BYTES * quantised


NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # of a number: its code, and its shares of a scale and of the scales' own

# Learning rates. 16 layers 512 wide, bf16 on a CPU, 2026-11-22: when pairs come a second time their loss is 0.62 from
# 3e-5, 0.35 from 1e-4, 0.13 from 3e-4. What a step does grows about as the width; a loss near 0 would compare nothing.
# 20M parameters with a trunk larger than the head, as real models have
_20M = Model("20m", "a Llama of 20M parameters", "llama", 32_000, 256, 704, 16, 4, 2, True, False, 3e-4)
_MODELS = (
    _20M,
    replace(
        _20M,
        name="20m-stablelm",
        title="a StableLM of 20M parameters",
        family="stablelm",
        learning_rate=1e-3,  # two steps over sorted rows move its loss by less than 0.002 at 3e-4
        packs=False,
    ),
    Model("llama-3.2-1b", "Llama-3.2-1B's shape", "llama", 128_256, 2048, 8192, 16, 32, 8, True, False, 3e-5),
    Model("llama-3.1-8b", "Llama-3.1-8B's shape", "llama", 128_256, 4096, 14_336, 32, 32, 8, False, False, 1.5e-5),
    Model("qwen2.5-7b", "Qwen2.5-7B's shape", "qwen2", 152_064, 3584, 18_944, 28, 28, 4, False, True, 1.5e-5),
    Model("mistral-7b", "Mistral-7B-v0.3's shape", "mistral", 32_768, 4096, 14_336, 32, 32, 8, False, False, 1.5e-5),
)
WHOLE = tuple(model.name for model in _MODELS)


def quantised(name: str) -> str:
    """The name of a model's twin in 4 bits."""
    return f"{name}-nf4"


_TWINS = (replace(one, name=quantised(one.name), title=f"{one.title} in NF4", in_4_bits=True) for one in _MODELS)
MODELS = {model.name: model for model in (*_MODELS, *_TWINS)}
