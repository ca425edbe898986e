"""Which modules of which model family get which kernel: one row of data a family.

A row is known by the file that a module's class comes from (`transformers.models.llama.modeling_llama` is "llama"), so
the language model inside of a larger one is found, too. It lists classes by name, and what each of them computes:

    Norm     y = w * n or (offset + w) * n with n = x / sqrt(mean(x^2) + eps): rms_norm
    Gated    down(act(gate(x)) * up(x)): glu, and lora_mlp where the three projections are frozen
    Block    attention, or an MLP without a gate: rope where it rotates, lora_qkv and lora for its projections
    Left     what is left alone, and why

The rotary functions of the families differ in which columns make a pair, where they round, and what their table of
cosines and sines looks like:

    full      cos and sin (B, T, R), a column for each number
    pair      cos and sin (B, T, R/2), a column for each pair
    doubled   cos and sin (B, T, R), of which the first half is read, a column for each pair
    complex   one complex (B, T, R/2), a column for each pair; heads stand behind tokens

Legend: B rows, T tokens, R rotated columns of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Norm:
    """`round_first`: the normed x is rounded to its dtype before the weight. No weight where `weight` is None."""

    offset: float = 0.0
    round_first: bool = True
    eps: str = "variance_epsilon"
    weight: str | None = "weight"


@dataclass(frozen=True)
class Gated:
    """`projections`: gate, up and down, or both in one (the gate's rows first) and down. `activation`: a module's
    attribute, or the activation itself where `fixed`.
    """

    projections: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    activation: str = "act_fn"
    fixed: bool = False


@dataclass(frozen=True)
class Rotary:
    """`function`: its name among the modeling file's globals; the rest as in `fastdpo_kernels.rope`."""

    table: str = "full"
    interleaved: bool = False
    upcast: bool = False
    function: str = "apply_rotary_pos_emb"


@dataclass(frozen=True)
class Block:
    """`qkv`: three projections of the same input, () where there are no three."""

    rotary: Rotary | None = None
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Left:
    why: str


@dataclass(frozen=True)
class Family:
    """`classes`: what a family is promised to have. `some`: those that only some of its models have."""

    classes: dict[str, Norm | Gated | Block | Left]
    some: frozenset[str] = field(default_factory=frozenset)


LLAMA_NORM = Norm()
OLMO_NORM = Norm(round_first=False)
GEMMA_NORM = Norm(offset=1.0, round_first=False, eps="eps")
GATED = Gated()
MERGED = Gated(("gate_up_proj", "down_proj"), "activation_fn")
ROTARY = Rotary()
ATTENTION = Block(ROTARY)
COHERE_ATTENTION = Block(Rotary(interleaved=True, upcast=True))
OLMO_ATTENTION = Block(Rotary(upcast=True))
GLM_ATTENTION = Block(Rotary("doubled", interleaved=True))
ERNIE_ATTENTION = Block(Rotary("doubled", interleaved=True, upcast=True))
PLAIN = Block(qkv=())  # projections with nothing between them that has a kernel
ONE_PROJECTION = Block(ROTARY, qkv=())
EXPERTS = Left("experts are 3-D weights with kernels of transformers' own")


def _family(
    prefix: str,
    norm: Norm | None = LLAMA_NORM,
    mlp: Gated | Block | None = GATED,
    attention: Block = ATTENTION,
    **more: object,
) -> Family:
    """The usual names: {prefix}RMSNorm, {prefix}MLP and {prefix}Attention; `more` by what follows the prefix."""
    usual = {"RMSNorm": norm, "MLP": mlp, "Attention": attention, **more}
    some = usual.pop("some", ())
    classes = {prefix + name: piece for name, piece in usual.items() if piece is not None}
    return Family(classes, frozenset(prefix + name for name in some))  # type: ignore[arg-type, union-attr]


FAMILIES: dict[str, Family] = {
    "llama": _family("Llama"),
    "llama4": _family(
        "Llama4Text",
        Norm(eps="eps"),
        Gated(activation="activation_fn"),
        Block(Rotary("complex", interleaved=True, upcast=True, function="apply_rotary_emb")),
        L2Norm=Norm(eps="eps", weight=None),
        Experts=EXPERTS,
        some=("L2Norm", "Experts", "MLP"),
    ),
    "mistral": _family("Mistral"),
    "mixtral": _family("Mixtral", mlp=None, Experts=EXPERTS),
    "ministral": _family("Ministral"),
    "ministral3": _family("Ministral3"),
    "qwen2": _family("Qwen2"),
    "qwen2_moe": _family("Qwen2Moe", Experts=EXPERTS, some=("Experts",)),
    "qwen3": _family("Qwen3"),
    "qwen3_moe": _family("Qwen3Moe", Experts=EXPERTS, some=("Experts", "MLP")),
    "gemma": _family("Gemma", GEMMA_NORM),
    "gemma2": _family("Gemma2", GEMMA_NORM),
    "gemma3": _family("Gemma3", GEMMA_NORM),
    "phi": _family("Phi", None, PLAIN),
    "phi3": _family("Phi3", mlp=MERGED, attention=ONE_PROJECTION),
    "smollm3": _family("SmolLM3"),
    "olmo": _family("Olmo", None, attention=OLMO_ATTENTION),
    "olmo2": _family("Olmo2", OLMO_NORM, attention=OLMO_ATTENTION),
    "olmo3": _family("Olmo3", OLMO_NORM, attention=OLMO_ATTENTION),
    "granite": _family("Granite"),
    "cohere": _family("Cohere", None, attention=COHERE_ATTENTION),
    "cohere2": _family("Cohere2", None, attention=COHERE_ATTENTION),
    "glm": _family("Glm", mlp=MERGED, attention=GLM_ATTENTION),
    "glm4": _family("Glm4", mlp=MERGED, attention=GLM_ATTENTION),
    "stablelm": _family("StableLm", None),
    "starcoder2": _family("Starcoder2", None, PLAIN),
    "falcon": _family(
        "Falcon", None, PLAIN, ONE_PROJECTION, FlashAttention2=ONE_PROJECTION, some=("FlashAttention2", "Attention")
    ),
    "gpt2": _family("GPT2", None, PLAIN, PLAIN),
    "gpt_neox": _family("GPTNeoX", None, PLAIN, ONE_PROJECTION),
    "gpt_oss": _family("GptOss", OLMO_NORM, None, Block(Rotary("pair")), Experts=EXPERTS),
    "exaone4": _family("Exaone4"),
    "ernie4_5": _family("Ernie4_5", attention=ERNIE_ATTENTION),
    "seed_oss": _family("SeedOss"),
    "hunyuan_v1_dense": _family("HunYuanDenseV1"),
    "arcee": _family("Arcee", mlp=PLAIN),
    "lfm2": _family("Lfm2", mlp=Gated(("w1", "w3", "w2"), "silu", fixed=True), some=("Attention",)),
    "qwen3_next": _family("Qwen3Next", GEMMA_NORM, Experts=EXPERTS, some=("Experts", "MLP", "Attention")),
    "deepseek_v3": _family("DeepseekV3", attention=PLAIN, Experts=EXPERTS, some=("Experts", "MLP")),
    "phimoe": _family("Phimoe", None, None, Experts=EXPERTS),
    "opt": _family("OPT", None, None, Block()),
    "bloom": _family("Bloom", None, PLAIN, PLAIN),
    "gptj": _family("GPTJ", None, PLAIN, Block(), FlashAttention2=Block(), some=("FlashAttention2", "Attention")),
}
