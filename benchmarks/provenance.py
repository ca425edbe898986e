"""Where a number comes from: machine, versions and commit. A number without them does not exist; a file holds both."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import threading
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.device import ROOT


def provenance(machine: dict[str, Any], threads: int, packages: Iterable[str], commit: str | None) -> dict[str, Any]:
    """`commit` says which code this is where it was copied without its repository."""
    changes = _git("status", "--porcelain", "--", "fastdpo", "kernels", "benchmarks/*.py")
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit or _git("rev-parse", "HEAD") or "none",
        "uncommitted_changes": None if changes is None else bool(changes),
        "machine": {**machine, "threads": threads},
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "load_before": os.getloadavg()[0],  # other work on the machine is in every wall time
    }


def save(file: Path, result: Any) -> None:
    """As JSON; the file is whole, the old or the new, whenever this process is ended."""
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = file.with_name(f"{file.name}.{os.getpid()}-{threading.get_ident()}.new")  # nobody else's who saves it now
    try:
        whole.write_text(json.dumps(result, indent=1) + "\n")
        whole.replace(file)
    finally:
        whole.unlink(missing_ok=True)


def load(file: Path) -> dict[str, Any]:
    """What was saved; ends the program where the file cannot be read."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {file} holds no results ({error}): measure again or `git checkout` it") from None


def _git(*arguments: str) -> str | None:
    """What it says; None where there is no git, or no repository."""
    if shutil.which("git") is None:
        return None
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
