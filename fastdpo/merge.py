"""An adapter merged into its base, so that another one can train on top and the merged model be its reference.

An adapter that was trained over 4-bit weights has learned to correct those weights, so it is merged into them: the base
is loaded as it was then, dequantised, merged and written in 16 bits. Training then quantises it again (`load_in_4bit`);
how far that moves log-probs depends on the model, and nothing corrects it but training.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from peft import PeftModel
from transformers import AutoProcessor, AutoTokenizer

from fastdpo.checkpoint import load_outside
from fastdpo.config import DPOConfig
from fastdpo.loading import check_model, load_model, model_kind
from fastdpo.quantized import quantized_by

logger = logging.getLogger(__name__)


def merge(adapter: str, output_dir: str, model: str | None, config: DPOConfig) -> None:
    """Writes the model with the adapter of a directory merged into it, and its tokenizer or processor, into
    `output_dir`.

    `model` is the base, by default the one that the adapter names; `config` says how it loads (dtype, load_in_4bit or
    quantization_config, revision). Raises ValueError for what is no adapter, or one that cannot merge.
    """
    about = Path(adapter) / "adapter_config.json"
    if not about.exists():
        raise ValueError(f"adapter={adapter!r} has no adapter_config.json: give the directory that training wrote")
    try:
        described = json.loads(about.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{about} is no json ({error}): give the directory that training wrote") from error
    base = model or (described.get("base_model_name_or_path") if isinstance(described, dict) else None)
    if not base or not isinstance(base, str):
        raise ValueError(f"the adapter in {adapter} does not name its base: give it as model")
    if Path(output_dir).resolve() in (Path(adapter).resolve(), Path(base).resolve()):
        raise ValueError(f"output_dir={output_dir!r} holds the adapter or its base: give another")
    check_model(base, "model", config)
    loaded = load_model(base, config, adapters=True)
    if quantized_by(loaded):
        loaded = loaded.dequantize()
    adapted = PeftModel.from_pretrained(loaded, adapter)
    load_outside(adapted, Path(adapter))
    adapted.merge_and_unload(safe_merge=True).save_pretrained(output_dir)
    tokenizer = adapter if (Path(adapter) / "tokenizer_config.json").exists() else base
    source = AutoProcessor if model_kind(loaded.config) == "vision-language" else AutoTokenizer
    source.from_pretrained(tokenizer, trust_remote_code=config.trust_remote_code).save_pretrained(output_dir)
    logger.info("merged %s into %s: written to %s in %s", adapter, base, output_dir, adapted.dtype)
