"""Tiny vision-language models of many families with real processors, and pictures for them, all made here.

Weights are drawn anew and large, as in `tiny_models`: an image that is left out, or one that lands in another row,
moves log-probs by much more than rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers_for_tests import byte_level
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.idefics2.processing_idefics2 import Idefics2Processor
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.llava.processing_llava import LlavaProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
from transformers.models.paligemma.processing_paligemma import PaliGemmaProcessor
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}PLACE{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
SQUARE: dict[str, Any] = {"size": {"height": 28, "width": 28}}
CLIP = {"model_type": "clip_vision_model", "projection_dim": 32, **VISION}
SIGLIP = {"model_type": "siglip_vision_model", **VISION}
QWEN_IMAGES: dict[str, Any] = {"patch_size": 4, "size": {"shortest_edge": 8 * 8, "longest_edge": 24 * 24}}
QWEN_TEXT = {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}


@dataclass(frozen=True)
class Kind:
    """A family: special tokens of its tokenizer, what stands for an image in a prompt, its processor and its config."""

    tokens: dict[str, str]
    place: str
    processor: Callable[[PreTrainedTokenizerFast], Any]
    config: Callable[[dict[str, int], int], dict[str, Any]]  # ids by token, rows of the embedding
    chats: bool = True


def _idefics2(ids: dict[str, int], rows: int) -> dict[str, Any]:
    perceiver = {"hidden_size": 32, "resampler_n_latents": 3, "resampler_depth": 1, "resampler_n_heads": 2}
    perceiver |= {"resampler_head_dim": 16, "num_key_value_heads": 1}
    return {
        "image_token_id": ids["<image>"],
        "vision_config": {**VISION, "image_size": 56},
        "perceiver_config": perceiver,
        "text_config": {"model_type": "mistral", "vocab_size": rows, **TEXT},
    }


def _smolvlm(ids: dict[str, int], rows: int) -> dict[str, Any]:
    text = {"model_type": "llama", "vocab_size": rows, **TEXT}
    return {"image_token_id": ids["<image>"], "vision_config": VISION, "text_config": text, "scale_factor": 2}


def _llava(ids: dict[str, int], rows: int) -> dict[str, Any]:
    text = {"model_type": "llama", "vocab_size": rows, **TEXT}
    return {"image_token_index": ids["<image>"], "vision_config": CLIP, "text_config": text}


def _llava_next(ids: dict[str, int], rows: int) -> dict[str, Any]:
    return {**_llava(ids, rows), "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]]}


def _qwen(ids: dict[str, int], rows: int, vision: dict[str, Any]) -> dict[str, Any]:
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    names |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    found = {name: ids[token] for name, token in names.items()}
    return {**found, "vision_config": vision, "text_config": {"vocab_size": rows, **QWEN_TEXT}}


def _qwen2(ids: dict[str, int], rows: int) -> dict[str, Any]:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
    return _qwen(ids, rows, vision)


def _qwen2_5(ids: dict[str, int], rows: int) -> dict[str, Any]:
    vision = {"depth": 2, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 4, "intermediate_size": 48}
    vision |= {"patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1]}
    return _qwen(ids, rows, vision)


def _paligemma(ids: dict[str, int], rows: int) -> dict[str, Any]:
    text = {"model_type": "gemma", "vocab_size": rows, "head_dim": 8, **TEXT}
    own = {"image_token_index": ids["<image>"], "vocab_size": rows, "projection_dim": 32, "hidden_size": 32}
    return {**own, "vision_config": {**SIGLIP, "projection_dim": 32, "vision_use_head": False}, "text_config": text}


def _gemma3(ids: dict[str, int], rows: int) -> dict[str, Any]:
    text = {"vocab_size": rows, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 24, **TEXT}
    text |= {"layer_types": ["sliding_attention", "full_attention"]}
    own = {"image_token_index": ids["<img>"], "boi_token_index": ids["<boi>"], "eoi_token_index": ids["<eoi>"]}
    return {**own, "mm_tokens_per_image": 4, "vision_config": {**SIGLIP, "vision_use_head": False}, "text_config": text}


class _WithoutVideos:
    """Of processors that also take videos: the part for these needs torchvision, and smolvlm's num2words."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


class ImagesOfQwen2VL(_WithoutVideos, Qwen2VLProcessor):
    pass


class ImagesOfQwen2_5VL(_WithoutVideos, Qwen2_5_VLProcessor):  # noqa: N801
    pass


class ImagesOfSmolVLM(_WithoutVideos, SmolVLMProcessor):
    video_processor = SimpleNamespace(num_frames=1, fps=1)  # its chat template reads them


processing_smolvlm.num2words = processing_smolvlm.num2words or str  # for times of frames

IMAGE = {"image_token": "<image>"}
QWEN = {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>", "image_token": "<|image_pad|>"}
QWEN |= {"video_token": "<|video_pad|>"}
FAKE = {"image_boundary_token": "<fake_token_around_image>"}
SMOL = {"fake_image_token": "<fake_token_around_image>", "end_of_utterance_token": "<end_of_utterance>"}
SMOL |= {"global_image_token": "<global-img>"}
SPLIT: dict[str, Any] = {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}}
LLAVA: dict[str, Any] = {
    "patch_size": 14,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
}
ANYRES: dict[str, Any] = {"size": {"shortest_edge": 28}, "crop_size": SQUARE["size"]}
ANYRES |= {"image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]]}

KINDS: dict[str, Kind] = {
    "idefics2": Kind(
        {**IMAGE, **FAKE},
        "<image>",
        lambda tokenizer: Idefics2Processor(
            Idefics2ImageProcessorPil(size={"shortest_edge": 28, "longest_edge": 56}), tokenizer, image_seq_len=3
        ),
        _idefics2,
    ),
    "smolvlm": Kind(
        {**IMAGE, **SMOL},
        "<image>",
        lambda tokenizer: ImagesOfSmolVLM(SmolVLMImageProcessorPil(**SPLIT), tokenizer, None, image_seq_len=1),
        _smolvlm,
    ),
    "idefics3": Kind(
        {**IMAGE, **SMOL},
        "<image>",
        lambda tokenizer: Idefics3Processor(Idefics3ImageProcessorPil(**SPLIT), tokenizer, image_seq_len=1),
        _smolvlm,
    ),
    "llava": Kind(
        IMAGE,
        "<image>",
        lambda tokenizer: LlavaProcessor(CLIPImageProcessorPil(**SQUARE, crop_size=SQUARE["size"]), tokenizer, **LLAVA),
        _llava,
    ),
    "llava_next": Kind(
        IMAGE,
        "<image>",
        lambda tokenizer: LlavaNextProcessor(LlavaNextImageProcessorPil(**ANYRES), tokenizer, **LLAVA),
        _llava_next,
    ),
    "qwen2_vl": Kind(
        QWEN,
        "<|vision_start|><|image_pad|><|vision_end|>",
        lambda tokenizer: ImagesOfQwen2VL(Qwen2VLImageProcessorPil(**QWEN_IMAGES), tokenizer),
        _qwen2,
    ),
    "qwen2_5_vl": Kind(
        QWEN,
        "<|vision_start|><|image_pad|><|vision_end|>",
        lambda tokenizer: ImagesOfQwen2_5VL(Qwen2VLImageProcessorPil(**QWEN_IMAGES), tokenizer),
        _qwen2_5,
    ),
    "paligemma": Kind(
        IMAGE,
        "<image>",
        lambda tokenizer: PaliGemmaProcessor(SiglipImageProcessorPil(**SQUARE, image_seq_length=4), tokenizer),
        _paligemma,
        chats=False,
    ),
    "gemma3": Kind(
        {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<img>"},
        "<boi>",
        lambda tokenizer: Gemma3Processor(Gemma3ImageProcessorPil(**SQUARE), tokenizer, image_seq_length=4),
        _gemma3,
    ),
}


def tiny_processor(name: str, **options: Any) -> Any:
    """The family's own processor around a small tokenizer; `options` go to that."""
    kind = KINDS[name]
    tokenizer = byte_level(**options)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.add_special_tokens({"additional_special_tokens": list(kind.tokens.values())})
    plain = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        **{role: getattr(tokenizer, role) for role in ("pad_token", "bos_token", "eos_token", "unk_token")},
        extra_special_tokens=kind.tokens,
    )
    plain.model_input_names = ["input_ids", "attention_mask"]
    processor = kind.processor(plain)
    processor.chat_template = CHAT.replace("PLACE", kind.place) if kind.chats else None
    return processor


def tiny_vision(name: str, **options: Any) -> tuple[PreTrainedModel, Any]:
    """The family's model on the CPU in evaluation mode, and its processor."""
    processor = tiny_processor(name, **options)
    ids = processor.tokenizer.get_vocab()
    config = AutoConfig.for_model(name, **KINDS[name].config(ids, len(processor.tokenizer)))
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + 0.1 * noise if parameter.ndim < 2 else 0.2 * noise)
    return model.eval(), processor


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)
