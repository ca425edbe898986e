"""Which model a reference is: a name for all that its log-probs of given tokens depend on, made in under a second.

Rows are named by their tokens (`row_key`), so templates, truncation and the tokenizer are none of its business. What
else a log-prob depends on is the model: architecture, weights, adapters, the dtype of its matrix products, and
`ld_alpha`. Library versions, devices and kernels only change rounding; should one of them change more than that, the
rows that every run computes again say so; so do they of modelling code that came with a model and was changed.

Reading every weight of an 8B model takes longer than the key is worth, so weights are told apart in one of two ways:

files   of a model loaded by name or path. In the Hub's cache a file is called by the hash of its content. A file
        elsewhere goes by its size, its header (safetensors: every tensor's name, shape, dtype and place), 64 blocks
        spread over it, and the time of its last change, which no program that writes weights leaves as it was. Not
        seen: a file changed in place between the blocks with its old time put back.
memory  of a model that came loaded, whose files, if there ever were any, prove nothing. Name, shape and dtype of every
        tensor, 8192 elements spread over it, and the sum of all of its bits as 64-bit integers, exact in whatever
        order it is added up. A CPU with more than 2 GiB of weights leaves out the sum, so that a change of a few
        elements between the sampled ones is not seen there; training, merging and quantising change nearly all.

Adapters are small, and hashed whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from fastdpo.model import base_model
from fastdpo.sharding import whole

FORMAT = 1  # raised when the meaning of a remembered value changes
WRITTEN = "files written"  # the one part that a copy of the files does not share
# What from_pretrained reads of a directory: the first of these that is there, an index together with its shards.
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
WEIGHT_FILES += ("pytorch_model.bin", "pytorch_model.bin.index.json")
BLOCKS, BLOCK_BYTES = 64, 4096  # read of each file
SAMPLES = 8192  # elements of each tensor
WHOLE_BYTES = 2 << 30  # on a CPU, whose memory gives 7 GiB/s a thread (Xeon, 2026-11-22); a GPU sums 16 GB in 10 ms
# Entries of configs that no log-prob depends on
IDLE_MODEL = {"transformers_version", "use_cache", "dtype", "torch_dtype", "architectures", "initializer_range"}
IDLE_MODEL |= {"pad_token_id", "bos_token_id", "eos_token_id"}
IDLE_ADAPTER = {"inference_mode", "init_lora_weights", "base_model_name_or_path", "revision", "peft_version"}
IDLE_ADAPTER |= {"lora_dropout", "task_type", "auto_mapping"}


def model_identity(
    model: nn.Module, adapters: Iterable[str], name: str | None, revision: str, products: str, ld_alpha: float | None
) -> dict[str, str]:
    """-> the parts of a reference's identity, in words that an error can show.

    `adapters` are on while it computes; `name` is where its weights were loaded from, None where they may differ from
    what lies there; `products` is the dtype of its matrix products.
    """
    base = base_model(model)
    files = weight_files(name, revision) if name is not None else []
    tensors = base_tensors(base)
    dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in tensors.values()})
    weights = f"files {files_digest(files)}" if files else f"memory {tensors_digest(tensors)}"
    config = {
        key: value
        for key, value in base.config.to_diff_dict().items()
        if key not in IDLE_MODEL and "drop" not in key  # a reference runs without dropout
    }
    return {
        "format": str(FORMAT),
        "model": f"{type(base).__name__} {_digest([_json(config)])}",
        "weights": weights,
        WRITTEN: _written(files),
        "dtype of weights": ", ".join(dtypes),
        "dtype of products": products,
        "adapters": ", ".join(adapter_digest(model, adapter) for adapter in adapters) or "none",
        "ld_alpha": "1.0" if ld_alpha is None else str(float(ld_alpha)),
    }


def identity_key(identity: Mapping[str, str]) -> str:
    """32 hex digits, the name of a file."""
    return _digest([_json(identity)], 16)


def weight_files(name: str, revision: str) -> list[Path]:
    """What `from_pretrained` reads the weights from; [] where that cannot be told."""
    for first in WEIGHT_FILES:
        path = _locate(name, first, revision)
        if path is None:
            continue
        if path.suffix != ".json":
            return [path]
        shards = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        found = [shard for file in shards if (shard := _locate(name, file, revision))]
        return found if len(found) == len(shards) else []
    return []


def _locate(name: str, file: str, revision: str) -> Path | None:
    if Path(name).is_dir():
        path = Path(name) / file
        return path if path.exists() else None
    cached = try_to_load_from_cache(name, file, revision=revision)
    return Path(cached) if isinstance(cached, str) else None


def files_digest(files: Iterable[Path]) -> str:
    """Of the contents, as far as they are looked at; the directory that they lie in does not matter."""
    return _digest(part for file in files for part in _file_parts(file))


def _file_parts(file: Path) -> list[bytes]:
    real = file.resolve()
    if real.parent.name == "blobs":  # the Hub's cache, by content
        return [file.name.encode(), real.name.encode()]
    size = real.stat().st_size
    with real.open("rb") as stream:
        header = stream.read(8)
        if real.suffix == ".safetensors":
            header += stream.read(int.from_bytes(header, "little"))
        blocks = []
        for number in range(BLOCKS):
            stream.seek((size - BLOCK_BYTES) * number // (BLOCKS - 1) if size > BLOCK_BYTES else 0)
            blocks.append(stream.read(BLOCK_BYTES))
    return [file.name.encode(), str(size).encode(), header, *blocks]


def _written(files: Iterable[Path]) -> str:
    times = [str(real.stat().st_mtime_ns) for file in files if (real := file.resolve()).parent.name != "blobs"]
    return _digest(time.encode() for time in times) if times else "content hashes"


def base_tensors(base: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by their names in the model without adapters: a model gives the same with adapters
    around its layers and without.
    """
    of_adapters = []
    for name, module in base.named_modules():
        if isinstance(module, BaseTunerLayer):
            of_adapters += [f"{name}.{one}." for one in (*module.adapter_layer_names, *module.other_param_names)]
        elif isinstance(module, AuxiliaryTrainingWrapper):
            of_adapters.append(f"{name}.modules_to_save.")
    return {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): value
        for name, value in base.state_dict().items()
        if not name.startswith(tuple(of_adapters))
    }


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Of a sample of every tensor's elements, and of exact sums of their bits; waits for the device once."""
    kept = {name: value for name, value in sorted(tensors.items()) if isinstance(value, Tensor)}
    on_cpu = sum(value.nbytes for value in kept.values() if value.device.type == "cpu")
    samples, sums = [], []
    for value in kept.values():
        flat = whole(value.detach()).reshape(-1)
        # an odd stride walks through the columns of a matrix, instead of down one of them
        samples.append(flat[:: (flat.numel() // SAMPLES) | 1].contiguous().view(torch.uint8))
        if value.device.type != "cpu" or on_cpu <= WHOLE_BYTES:
            sums.append(_bit_sum(flat))
    described = [f"{name} {tuple(value.shape)} {value.dtype}".encode() for name, value in kept.items()]
    return _digest([*described, *_bytes_of(samples), *_bytes_of(sums)])


def _bit_sum(flat: Tensor) -> Tensor:
    """(1,) int64, the sum modulo 2^64 of a tensor's bytes taken eight at a time: exact, so no order changes it."""
    raw = flat.contiguous().view(torch.uint8)
    words = raw[: raw.numel() // 8 * 8]
    if words.data_ptr() % 8:
        words = words.clone()
    tail = raw[words.numel() :].sum(dtype=torch.int64)
    return (words.view(torch.int64).sum() + tail).reshape(1)


def adapter_digest(model: nn.Module, adapter: str) -> str:
    """Of every element of an adapter, and of what its config says about them."""
    assert isinstance(model, PeftModel)
    config = {key: value for key, value in model.peft_config[adapter].to_dict().items() if key not in IDLE_ADAPTER}
    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    described = [f"{name} {tuple(value.shape)} {value.dtype}".encode() for name, value in sorted(state.items())]
    values = [whole(value.detach()).reshape(-1).view(torch.uint8) for _, value in sorted(state.items())]
    return _digest([_json(config), *described, *_bytes_of(values)])


def _bytes_of(values: list[Tensor]) -> list[Any]:
    """What the tensors hold, read from each device at once."""
    joined: dict[torch.device, list[Tensor]] = {}
    for value in values:
        joined.setdefault(value.device, []).append(value)
    return [torch.cat(part).cpu().numpy().data for part in joined.values()]


def _digest(parts: Iterable[Any], size: int = 8) -> str:
    digest = blake2b(digest_size=size)
    for part in parts:
        digest.update(part)
        digest.update(b"\0")
    return digest.hexdigest()


def _json(value: Any) -> bytes:
    """The same bytes for the same entries, in whatever order; sets come sorted."""
    plain = lambda one: sorted(map(str, one)) if isinstance(one, (set, frozenset)) else str(one)  # noqa: E731
    return json.dumps(value, sort_keys=True, default=plain).encode()
