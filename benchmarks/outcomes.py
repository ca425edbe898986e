"""A pytest plugin: what became of each test, a line of JSON at a time, so that a process that dies leaves what it knew.

    pytest -p benchmarks.outcomes --outcomes FILE

Tests that FILE already has are left out: a process that was killed, or gave up because the GPU answers no more (an
illegal access ends a process's CUDA context, and every later test would fail), is started again and goes on.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # who reads the file may have no pytest
    import pytest

NOT_REACHED, DIED = "not reached", "died"  # before a test begins, and until it ends
GPU_DEAD = 70  # the exit code after that


def read(file: Path) -> dict[str, dict[str, Any]]:
    """Test -> outcome, seconds, reason and figures: of each the last line that is whole."""
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return {row["test"]: row for row in map(json.loads, lines)}


def reached(file: Path) -> dict[str, dict[str, Any]]:
    return {test: row for test, row in read(file).items() if row["outcome"] != NOT_REACHED}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, required=True, help="the file that is added to")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Outcomes(config.option.outcomes))


class Outcomes:
    def __init__(self, file: Path) -> None:
        self.file = file
        self.row: dict[str, Any] = {}  # of the test that runs

    def _write(self) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(self.row) + "\n")

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        known = reached(self.file)
        items[:] = [item for item in items if item.nodeid not in known]

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            self._begin(item.nodeid, NOT_REACHED)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._begin(nodeid, DIED)

    def _begin(self, test: str, outcome: str) -> None:
        self.row = {"test": test, "outcome": outcome, "seconds": 0.0, "reason": "", "figures": {}}
        self._write()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.row["seconds"] = round(self.row["seconds"] + report.duration, 3)
        self.row["figures"] |= dict(report.user_properties)
        says_something = report.when == "call" or not report.passed
        if says_something and (self.row["outcome"] == DIED or report.failed):
            self.row |= {"outcome": report.outcome, "reason": _reason(report)}

    def pytest_runtest_logfinish(self) -> None:
        self._write()
        if self.row["outcome"] == "failed" and (fault := _gpu_fault()):
            import pytest

            pytest.exit(f"the GPU answers no more: {fault}", returncode=GPU_DEAD)


def _reason(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):  # skipped: file, line, reason
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return " ".join(str(crash.message if crash else report.longrepr or "").split())[:300]


def _gpu_fault() -> str:
    """What the GPU answers with, "" where nothing is wrong or this process has not used it."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""
