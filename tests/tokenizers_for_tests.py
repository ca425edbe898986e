"""Small tokenizers made here, without a network, rows for them, and the way from rows to token pairs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fastdpo.data import TokenPair, load_rows, tokenize_pairs

TEXT = (
    "The quick brown fox jumps over the lazy dog, and the dog does not mind it at all. Human: what is the answer? "
    "Assistant: I'm sorry, I do not know; it is a question for somebody else. You're welcome! I would like to help you "
    "with that, if you tell me more about what you are looking for. There are many ways to do this, and the best of "
    "them begins with a good question. Hello, how are you today? I am doing quite well, thank you for asking. "
) * 4

CHATML = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] or '' }}"
    "{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if no_thinking %}<think></think>{% endif %}{% endif %}"
)
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<unk>"]


PLAIN = {"prompt": "Human: Hello\n\nAssistant:", "chosen": " I am well.", "rejected": " Go away!"}
USER, GOOD, BAD = (
    {"role": role, "content": text}
    for role, text in (("user", "Hello?"), ("assistant", "I am well."), ("assistant", "Go away!"))
)
CHAT = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}


def config(**options: Any) -> Any:
    defaults = {"max_length": None, "max_prompt_length": None, "max_completion_length": None}
    defaults |= {"is_encoder_decoder": False, "max_target_length": None, "remove_unused_columns": True}
    more = {"truncation_mode": "keep_end", "dataset_num_proc": None, "disable_tqdm": True, "loss_type": ["sigmoid"]}
    return SimpleNamespace(**{**defaults, **more, **options})


def pairs_of(source: Any, tokenizer: Any, **options: Any) -> list[TokenPair]:
    table = tokenize_pairs(load_rows(source, "train", "train"), tokenizer, config(**options), "train")
    return [TokenPair(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in table]


def byte_level(adds_bos: bool = False, adds_eos: bool = False, template: str | None = CHATML, **special: str | None):
    """GPT-2 like. `special` overrides the roles of the special tokens: pad_token=None leaves it out."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return _wrap(tokenizer, adds_bos, adds_eos, template, special)


def metaspace(adds_bos: bool = True, template: str | None = CHATML, **special: str | None) -> PreTrainedTokenizerFast:
    """Llama-2 like: a space before the first word, merges over the end of a prompt that lacks one."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator([TEXT, "".join(map(chr, range(33, 127)))], trainer)
    return _wrap(tokenizer, adds_bos, False, template, special)


def _wrap(
    tokenizer: Tokenizer, adds_bos: bool, adds_eos: bool, template: str | None, special: dict[str, str | None]
) -> PreTrainedTokenizerFast:
    if adds_bos or adds_eos:
        single = " ".join(["<s>"] * adds_bos + ["$A"] + ["</s>"] * adds_eos)
        names = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=names)
    roles = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **special}
    given = {role: token for role, token in roles.items() if token is not None}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **given)
    wrapped.chat_template = template
    return wrapped


TOKENIZERS = (byte_level, lambda: byte_level(adds_bos=True), metaspace)
