"""The shapes in which a preference row comes: strings or chat messages, the prompt explicit or implicit, or token ids.

Every shape becomes prompt, chosen and rejected of one kind, or is refused with the row, the column and the type found.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
TEXT_COLUMNS = ("prompt", "chosen", "rejected")
COMPLETION_COLUMNS = ("completion", "label")  # of unpaired rows: one answer, and whether it is liked
OPTION_COLUMNS = ("tools", "chat_template_kwargs")  # passed to the chat template, row by row
IMAGE_COLUMNS = ("image", "images")
PAIR_COLUMNS = (*ID_COLUMNS, *TEXT_COLUMNS, *OPTION_COLUMNS, *IMAGE_COLUMNS)  # others are not read
EXPECTED = (
    "a preference dataset has 'chosen' and 'rejected', and 'prompt' unless both answers repeat it "
    "(strings or lists of chat messages), or 'prompt_ids', 'chosen_ids' and 'rejected_ids'"
)


def check_columns(columns: Sequence[str], name: str, images: bool = False) -> None:
    """Raises ValueError for columns that are no preference dataset's; `images` are allowed with a processor."""
    shown = [column for column in IMAGE_COLUMNS if column in columns]
    found = f"The {name} dataset has the columns {', '.join(map(repr, columns))[:400]}"
    if shown and not images:
        raise ValueError(
            f"{found}; rows with images need a vision-language model and its processor (processing_class). Remove "
            f"{shown[0]!r} to train on the text."
        )
    if len(shown) > 1:
        raise ValueError(f"{found}; 'image' is for rows of one image, 'images' for lists: remove one of them.")
    if set(ID_COLUMNS) <= set(columns):
        if shown:
            raise ValueError(f"{found}; rows with images are texts or chat messages: remove the token ids.")
        return
    if missing := [column for column in ("chosen", "rejected") if column not in columns]:
        hint = ""
        if {"completion", "label"} <= set(columns):
            hint = " These look like unpaired (KTO) rows: pair them first."
        elif "messages" in columns:
            hint = " These look like rows for supervised fine-tuning, which have one answer each."
        raise ValueError(f"{found}; missing {' and '.join(map(repr, missing))}: {EXPECTED}.{hint}")


def type_name(value: Any) -> str:
    if isinstance(value, list) and value:
        return f"list of {type(value[0]).__name__}"
    return "nothing (None)" if value is None else type(value).__name__


def _typed(row: dict[str, Any], column: str, where: str) -> str | list[dict]:
    """A string or a list of messages, without the empty keys that Arrow adds to messages of unlike keys."""
    value = row[column]
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value):
        for place, message in enumerate(value):
            content = message.get("content")
            if not isinstance(content, (str, list, dict, type(None))):  # None beside tool calls, a dict of a tool's
                raise ValueError(
                    f"{where}: column {column!r}, message {place}: the content is {type_name(content)}, expected a "
                    "string or a list of parts."
                )
        return without_none(value)
    raise ValueError(
        f"{where}: column {column!r} is {type_name(value)}, expected a string or a list of chat messages "
        f'({{"role": ..., "content": ...}}){_no_message(value)}.'
    )


def _no_message(value: Any) -> str:
    """Which dict of a list is no chat message, and why."""
    messages: list[Any] = value if isinstance(value, list) else []
    for place, message in enumerate(messages):
        if isinstance(message, dict) and not isinstance(message.get("role"), str):
            keys = [key for key, item in message.items() if item is not None]
            hint = "; rename 'from' to 'role' and 'value' to 'content'" if {"from", "value"} <= set(keys) else ""
            fault = f"whose role is {type_name(message['role'])}" if "role" in keys else "without 'role'"
            return f": message {place} is one {fault}, with the keys {', '.join(map(repr, keys))[:200]}{hint}"
    return ""


def without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value


def split_row(row: dict[str, Any], where: str) -> tuple[Any, Any, Any]:
    """Prompt, chosen and rejected: three strings or three lists of messages, whichever shape the row has."""
    chosen, rejected = _typed(row, "chosen", where), _typed(row, "rejected", where)
    prompt = _typed(row, "prompt", where) if "prompt" in row else None
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            return _split_text(chosen, rejected)
        if isinstance(prompt, str):
            return prompt, chosen, rejected
    if isinstance(chosen, list) and isinstance(rejected, list):
        # each side keeps a message to answer with, even where one conversation is the beginning of the other
        shared = min(common_prefix_length(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
        if isinstance(prompt, list):
            # the prompt repeated at the head of both conversations is still only once the prompt
            repeated = 0 < len(prompt) <= shared and chosen[: len(prompt)] == prompt
            if not repeated and any(answer and answer[0].get("role") == "user" for answer in (chosen, rejected)):
                raise ValueError(
                    f"{where}: the prompt is not how chosen and rejected begin, which are conversations of their own: "
                    f"{str(prompt)[:80]} and {str(chosen[:1])[:80]}. Give the answers alone, or leave out the prompt."
                )
            return (prompt, chosen[len(prompt) :], rejected[len(prompt) :]) if repeated else (prompt, chosen, rejected)
        if shared > 0 and (prompt is None or chosen[shared - 1].get("content") == prompt):
            return chosen[:shared], chosen[shared:], rejected[shared:]
        if prompt is None:
            raise ValueError(
                f"{where}: chosen and rejected share no first message, so there is no prompt; they begin with "
                f"{str(chosen[:1])[:80]} and {str(rejected[:1])[:80]}."
            )
    kinds = ", ".join(
        f"{column} is {type_name(value)}"
        for column, value in zip(TEXT_COLUMNS, (prompt, chosen, rejected), strict=True)
        if value is not None
    )
    raise ValueError(
        f"{where} mixes formats: {kinds}. Prompt and answers must all be strings or all lists of messages; "
        'an answer as a message is [{"role": "assistant", "content": ...}].'
    )


def _split_text(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Cut two texts after what they share, at the beginning of a word.

    Answers that begin with the same words leave these words to the prompt: they would add the same log-probs to both
    sides. A word that the texts share only in part goes to the answers whole, and so does the space before it, which
    most tokenizers keep in one token with the word.
    """
    end = common_prefix_length(chosen, rejected)
    if end and any(end < len(text) and _in_word(text[end - 1]) and _in_word(text[end]) for text in (chosen, rejected)):
        while end and _in_word(chosen[end - 1]):
            end -= 1
    if end and chosen[end - 1] == " ":
        end -= 1
    return chosen[:end], chosen[end:], rejected[end:]


def _in_word(character: str) -> bool:
    """Letters, their marks, digits, and what joins them: apostrophes and zero-width joiners."""
    return unicodedata.category(character)[0] in "LMN" or character in "_'\u2019\u200c\u200d"


def says_nothing(answer: str | list[dict]) -> bool:
    if isinstance(answer, str):
        return not answer.strip()
    contents = [message.get("content") for message in answer if not set(message) - {"role", "content"}]
    return len(contents) == len(answer) and not any(
        content.strip() if isinstance(content, str) else content for content in contents
    )


def given_ids(row: dict[str, Any], where: str) -> tuple[list[int], list[int], list[int]]:
    for column in ID_COLUMNS:
        ids = row[column]
        if not isinstance(ids, list) or not all(map(_is_id, ids)):
            raise ValueError(
                f"{where}: column {column!r} is {type_name(ids)}, expected a list of token ids (>= 0){_no_id(ids)}."
            )
    return row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]


def _is_id(token: Any) -> bool:
    return type(token) is int and 0 <= token < 2**31


def _no_id(ids: Any) -> str:
    """Which item of a list is no token id."""
    for place, token in enumerate(ids if isinstance(ids, list) else ()):
        if not _is_id(token):
            large = type(token) is int and token.bit_length() > 64  # Python may refuse to print it
            return f": item {place} is {'beyond 64 bits' if large else ascii(token)[:40]}"
    return ""


def common_prefix_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many leading items two sequences share, by bisection over slices (no Python loop over the items)."""
    low, high = 0, min(len(first), len(second))
    if first[:high] == second[:high]:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
