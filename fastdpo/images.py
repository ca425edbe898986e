"""Pairs whose prompts show images, for vision-language models and their processors.

A processor resizes images, cuts them up and writes as many image tokens into the prompt as that gives. This happens
twice. Once when a table is tokenized, for the token ids: lengths, truncation and row keys then know what an image
costs. And again for each batch, for the pixels, which are far too large to keep: the table holds the images as they
came, and the prompts' texts. The second time must give the same token ids, which is checked.

A batch has the rows of all chosen responses first, then those of all rejected ones. Whatever a processor's tensors
count along their first dimension (images, patches, prompts), they are then the prompts' own, twice.

    prompt text   <image>What is this?                  processor     table: prompt_ids, prompt_text, images, images_key
    prompt ids    <image> <image> <image> What is this?               batch: input_ids (2P, T), media (2M, ...)

Legend: P pairs, T tokens of the longest row, M whatever a tensor counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from torch import Tensor
from transformers import BatchFeature

from fastdpo.batch import PreferenceBatch, pad
from fastdpo.rows import IMAGE_COLUMNS

PAYLOADS = ("image", "url", "path", "base64", "video")  # keys of a message's part that hold an image, or a film
# Inputs with a number for each token, which are made longer by the responses; `labels` are PaliGemma's own.
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
NOT_FOR_THE_BACKBONE = ("input_ids", "attention_mask", "labels")
# Processors whose prompts attend to themselves in both directions: a response's tokens are of type 1, and an image
# stands before the prompt even where its text does not say so.
PREFIX_PROCESSORS = ("PaliGemmaProcessor",)


class Images(NamedTuple):
    """What a pair's prompt shows."""

    text: str  # of the prompt, as the processor takes it
    files: Sequence[dict[str, Any]]  # {"bytes": ..., "path": ...}, as datasets keeps images
    key: bytes  # of their contents and of the processor's settings


@dataclass(frozen=True)
class Processing:
    """A processor, and what is asked of it."""

    processor: Any

    @cached_property
    def settings(self) -> bytes:
        """All that decides what becomes of an image."""
        named = lambda part: type(part).__name__  # noqa: E731 (words of an object may have its place in memory)
        return json.dumps(self.processor.to_dict(), sort_keys=True, default=named).encode()

    @property
    def prefixes(self) -> bool:
        return type(self.processor).__name__ in PREFIX_PROCESSORS

    @cached_property
    def image_tokens(self) -> set[int]:
        """Ids that stand for a part of an image or a film."""
        holders = (self.processor, self.processor.tokenizer)
        names = ("image_token_id", "video_token_id")
        ids = {getattr(holder, name, None) for holder in holders for name in names}
        return {token for token in ids if isinstance(token, int)}

    def images(self, text: str, files: Sequence[dict[str, Any]], where: str) -> Images | None:
        """None for a prompt without images. Raises ValueError for a file that is not there."""
        if not files:
            return None
        if self.prefixes and self.processor.image_token not in text:
            text = self.processor.image_token * len(files) + text
        return Images(text, files, self._key(files, where))

    def _key(self, files: Sequence[dict[str, Any]], where: str) -> bytes:
        digest = blake2b(self.settings, digest_size=16)
        for file in files:
            digest.update(blake2b(_content(file, where)).digest())
        return digest.digest()

    def prompt_ids(self, images: Images, where: str) -> list[int]:
        """The prompt's tokens, those of its images included. Raises ValueError for what the processor refuses."""
        tokens = [getattr(self.processor, name, None) for name in ("image_token", "boi_token")]
        counts = [images.text.count(token) for token in tokens if token]
        if counts and len(images.files) not in counts:
            raise ValueError(
                f"{where}: the prompt {images.text[:80]!r} has {counts[0]} placeholders for {len(images.files)} "
                f"images: a prompt that is a string has {tokens[0]!r} for each, and a chat template writes them."
            )
        try:
            return self._call([images], where)["input_ids"][0].tolist()
        except (ValueError, TypeError, OSError, IndexError) as error:
            raise ValueError(
                f"{where}: {type(self.processor).__name__} refuses the prompt {images.text[:80]!r} with "
                f"{len(images.files)} images: {error}"
            ) from error

    def _call(self, prompts: Sequence[Images], where: str) -> BatchFeature:
        return self.processor(
            text=[images.text for images in prompts],
            images=[[_open(file, where) for file in images.files] for images in prompts],
            add_special_tokens=False,  # what a text begins with is added where the answers are, see data.py
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )

    def media(
        self, prompts: Sequence[tuple[Sequence[int], Images]]
    ) -> tuple[dict[str, list[list[int]]], dict[str, Tensor]]:
        """-> for each prompt the types of its tokens, by keyword; and all other tensors that the model takes.

        Raises RuntimeError where the tokens, or the images, are no longer what the table was made from.
        """
        if not prompts:
            return {}, {}
        made = dict(self._call([images for _, images in prompts], "a batch"))
        lengths = made["attention_mask"].sum(1).tolist()
        offsets = [
            self._offset(ids, row[:length], images)
            for (ids, images), row, length in zip(prompts, made["input_ids"].tolist(), lengths, strict=True)
        ]
        types = {name: made.pop(name).tolist() for name in TOKEN_TYPES if name in made}
        spread = {
            name: [
                ([0] * offset + row)[: len(ids)] for (ids, _), offset, row in zip(prompts, offsets, rows, strict=True)
            ]
            for name, rows in types.items()
        }
        media = {name: value for name, value in made.items() if name not in NOT_FOR_THE_BACKBONE}
        if odd := [name for name, value in media.items() if not isinstance(value, Tensor) or _by_token(value, made)]:
            raise ValueError(
                f"{type(self.processor).__name__} makes {', '.join(odd)}, which fastdpo cannot extend over responses: "
                "this family is not supported"
            )
        return spread, media

    def _offset(self, stored: Sequence[int], made: list[int], images: Images) -> int:
        """How many tokens the stored prompt has before the processor's own."""
        ids = list(stored)
        for offset in range(4):  # BOS, or what else the tokenizer begins a text with
            if ids[offset:] == made[: len(ids) - offset] and self._key(images.files, "a batch") == images.key:
                return offset
        raise RuntimeError(
            f"the prompt {images.text[:80]!r} and its images are not what they were when the dataset was tokenized: "
            "the processor or an image file changed since. Start again (and call cleanup_cache_files() of the dataset)"
        )


def _by_token(value: Tensor, made: dict[str, Any]) -> bool:
    return value.shape[:2] == made["input_ids"].shape and value.ndim > 2 and not value.is_floating_point()


def collate(
    pairs: Sequence[Any],  # TokenPairs
    keys: Sequence[bytes] = (),
    *,
    processing: Processing,
    pad_token_id: int,
    types: Sequence[str],  # those of TOKEN_TYPES that the model takes
) -> PreferenceBatch:
    """One sequence a row, right-padded, all chosen ones first; with the media of prompts that show images."""
    batch = pad(pairs, keys, pad_token_id)
    assert batch.attention_mask is not None
    rows, width = batch.input_ids.shape
    order = torch.cat([torch.arange(0, rows, 2), torch.arange(1, rows, 2)])
    places = order.argsort()  # of chosen_0, rejected_0, chosen_1, ...
    shown = [number for number, pair in enumerate(pairs) if pair.images is not None]
    of_tokens, media = processing.media([(pairs[number].prompt, pairs[number].images) for number in shown])
    media = {name: torch.cat([value, value]) for name, value in media.items()}
    for name in types:
        if name in of_tokens or not shown:
            of_prompts = dict(zip(shown, of_tokens.get(name, []), strict=True))
            media[name] = _token_types(pairs, of_prompts, width, int(processing.prefixes))
    return replace(
        batch,
        input_ids=batch.input_ids[order],
        attention_mask=batch.attention_mask[order],
        logit_rows=places[batch.logit_rows // width] * width + batch.logit_rows % width,
        media=media,
        pairs=tuple(pairs),
    )


def _token_types(pairs: Sequence[Any], of_prompts: dict[int, list[int]], width: int, of_responses: int) -> Tensor:
    """(2P, T), 0 where padded."""
    made = torch.zeros(2 * len(pairs), width, dtype=torch.int64)
    for number, pair in enumerate(pairs):
        start = len(pair.prompt)
        for row, response in ((number, pair.chosen), (number + len(pairs), pair.rejected)):
            made[row, :start] = torch.tensor(of_prompts.get(number, [0] * start), dtype=torch.int64)
            made[row, start : start + len(response)] = of_responses
    return made


def stored_images(rows: datasets.Dataset, column: str, name: str) -> datasets.Dataset:
    """The rows with their images as files, {"bytes": ..., "path": ...}, instead of decoded."""
    stored = datasets.Image(decode=False)
    feature = rows.features[column]
    several = isinstance(feature, (datasets.List, datasets.LargeList))
    try:
        return rows.cast_column(column, datasets.List(stored) if several else stored)  # type: ignore[arg-type]
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"The {name} dataset: column {column!r} is {feature}, expected images: PIL images, paths of files, or what "
            "datasets keeps of them ({'bytes': ..., 'path': ...}), a list of them in 'images'."
        ) from error


def files_of(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row's images, of which there may be none."""
    value = next((row[column] for column in IMAGE_COLUMNS if row.get(column) is not None), [])
    return [file for file in (value if isinstance(value, list) else [value]) if file is not None]


def _content(file: dict[str, Any], where: str) -> bytes:
    if file["bytes"] is not None:
        return file["bytes"]
    try:
        return Path(file["path"]).read_bytes()
    except (OSError, TypeError) as error:
        raise ValueError(
            f"{where}: the image {file['path']!r} cannot be read ({error}): give paths of files that are here, which "
            "in a json or csv file may be relative to its folder."
        ) from error


def _open(file: dict[str, Any], where: str) -> Any:
    """A PIL image, turned as its camera was held."""
    return datasets.Image().decode_example({"bytes": _content(file, where), "path": None})


def with_parts(messages: list[dict[str, Any]], images: int, part_of_row: str, where: str) -> list[dict[str, Any]]:
    """Messages whose contents are lists of parts, as the templates of vision-language models take them.

    Where none of them says where the images stand, they come first in the first message of the user. Raises ValueError
    where there are not as many places as images.
    """
    parted = [{**message, "content": _parts(message.get("content") or [])} for message in messages]
    places = [part for message in parted for part in message["content"] if part.get("type") == "image"]
    if held := [key for part in places for key in PAYLOADS if key in part]:
        raise ValueError(
            f"{where}: a part of a message holds its image itself ({held[0]!r}): put the images of a row into a column "
            '\'images\', in order, and leave {"type": "image"} in their places.'
        )
    user = next((message for message in parted if message.get("role") == "user"), None)
    if images and not places and user is not None:
        user["content"] = [{"type": "image"} for _ in range(images)] + user["content"]
    elif len(places) != images:
        raise ValueError(
            f"{where}: {part_of_row} has {len(places)} places for images, and the row gives {images} for it: a prompt "
            'has a part {"type": "image"} for each image, or none in all of its messages; answers have none.'
        )
    return parted


def _parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
