"""Writes what two README.md and the pictures take from a folder of results, and says where they have drifted.

`python -m benchmarks table --results FOLDER` reads another one than results/, where the pictures go all the same: there
the pages look for them. A page holds its generated texts between markers, each by a name.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks import front_page, memory_table, picture, table

ROOT = Path(__file__).parent.parent
END = "<!-- end generated -->"


def begin(name: str) -> str:
    return f"<!-- begin generated ({name}): python -m benchmarks table -->"


def files(folder: Path) -> dict[Path, str]:
    """Pages and pictures, as they should be."""
    front = {name: draw(folder) for name, draw in front_page.BLOCKS.items()}
    blocks = {ROOT / "benchmarks" / "README.md": {"results": table.generated(folder)}, ROOT / "README.md": front}
    wanted = {page: filled(page.read_text(), texts) for page, texts in blocks.items()}
    for file, drawing in memory_table.pictures(folder).items():
        wanted |= picture.files(ROOT / front_page.ADDRESS / file.name, *drawing)
    return wanted


def filled(text: str, blocks: dict[str, str]) -> str:
    """A page with its generated texts in place; raises ValueError where a marker is missing."""
    for name, block in blocks.items():
        before, mark, rest = text.partition(begin(name) + "\n")
        _, end, after = rest.partition(END)
        if not mark or not end:
            raise ValueError(f"the page has no {begin(name)!r} with {END!r} after it: put both where the text belongs")
        text = before + mark + block + end + after
    return text


def main(check: bool, folder: Path = table.RESULTS) -> int:
    """Writes them, or with `check` only says which of them are not what the folder holds; 1 where there is one."""
    drifted = {file: text for file, text in files(folder).items() if not file.exists() or file.read_text() != text}
    for file, text in drifted.items():
        if check:
            print(f"error: {file} is not what {folder} holds: run python -m benchmarks table", file=sys.stderr)
        else:
            file.write_text(text)
            print(f"{file} written from {folder}")
    return 1 if check and drifted else 0
