"""The tree keeps its promises: who imports whom, and what the packages are called."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FASTDPO = {path.stem: path for path in (ROOT / "fastdpo").glob("*.py")}
KERNELS = list((ROOT / "kernels/fastdpo_kernels").glob("*.py"))

# Which modules of fastdpo each one may import; train, build and cli see everything.
MAY_IMPORT = {
    "losses": set(),
    "batch": set(),
    "verdicts": set(),
    "sharding": set(),
    "config": {"verdicts", "losses", "sharding"},
    "rows": set(),
    "sources": {"rows"},
    "unpaired": {"config", "rows"},
    "images": {"batch", "rows"},
    "encoders": {"config", "images", "rows", "unpaired"},
    "data": {"config", "encoders", "images", "rows", "sources", "unpaired"},
    "attention_backends": {"batch"},
    "attention": {"attention_backends", "batch"},
    "architectures": set(),
    "projections": set(),
    "first_use": {"projections", "quantized"},
    "patching": {"architectures", "first_use", "messages", "projections", "quantized"},
    "loading": {"config", "model", "quantized"},
    "meta": {"config", "loading", "model", "quantized"},
    "logps": {"first_use", "head", "model", "patching", "quantized"},
    "quantized": {"config", "verdicts"},
    "offload": set(),
    "head": set(),
    "model": {"attention", "batch", "config", "head", "offload", "quantized"},
    "layout": {"attention", "attention_backends", "batch", "data", "images", "model", "quantized", "sharding"},
    "compiled": {"attention", "model"},
    "ranks": {"config", "quantized", "sharding"},
    "retry": {"batch", "ranks"},
    "collator": {"data"},
    "loader": {"batch", "collator", "config", "data", "layout", "ranks", "unpaired"},
    "predictions": {"collator", "config", "data", "model", "ranks", "retry"},
    "reference": {"batch", "model", "quantized", "ranks", "sharding"},
    "identity": {"model", "sharding"},
    "activations": {
        *("attention", "attention_backends", "batch", "data", "head", "layout", "model", "offload", "patching"),
        *("projections", "quantized"),
    },
    "memory": {
        *(
            "activations",
            "attention_backends",
            "config",
            "data",
            "head",
            "losses",
            "meta",
            "model",
            "quantized",
            "ranks",
        ),
        *("loading", "rows", "sharding"),
    },
    "reference_cache": {
        *("batch", "config", "data", "identity", "images", "layout", "loader", "ranks", "reference", "retry"),
        "unpaired",
    },
    "step": {"batch", "losses", "model", "ranks"},
    "metrics": {"ranks", "step"},
    "checkpoint": {"model", "reference", "sharding"},
    "checks": {"attention_backends", "config", "head", "loading", "losses", "meta", "model", "quantized"},
    "merge": {"checkpoint", "config", "loading", "model", "quantized"},
    "messages": set(),
    "trackers": set(),
    "faults": {"checkpoint"},
    "interrupts": set(),
    "nonfinite": {"batch", "checkpoint", "metrics", "optimizer", "ranks", "sharding"},
    "resume": {
        *("batch", "checkpoint", "config", "data", "metrics", "ranks", "reference", "retry", "step", "verdicts"),
        *("identity", "model", "sharding"),
    },
    "hub": {"config"},
    "card": {"config", "losses", "mixture", "model"},
    "mixture": {"rows"},
    "noise": {"batch", "model"},
    "last_block": {"attention", "batch", "model", "projections"},
    "by_hand": {
        *("batch", "collator", "config", "data", "layout", "metrics", "model", "predictions", "ranks", "reference"),
        "step",
    },
    "generate": {
        *("batch", "collator", "config", "data", "model", "reference", "report", "retry", "sharding", "trackers"),
    },
    "optimizer": {"config"},
    "report": {"card", "config", "memory", "messages", "reference", "verdicts"},
    "describe": {
        *("attention", "checks", "config", "last_block", "layout", "loader", "memory", "model", "patching"),
        *("quantized", "ranks", "reference", "report"),
    },
}


def imported(path: Path) -> set[str]:
    """Dotted names of the modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_a_module_imports_only_what_stands_before_it(name: str) -> None:
    ours = {module.split(".")[1] for module in imported(FASTDPO[name]) if module.startswith("fastdpo.")}
    assert ours <= MAY_IMPORT[name]


def test_losses_and_batch_need_torch_and_the_kernels_at_most() -> None:
    heavy = {"transformers", "peft", "datasets", "accelerate", "bitsandbytes"}
    for name in ("losses", "batch", "step"):
        assert not {module.split(".")[0] for module in imported(FASTDPO[name])} & heavy, name


def test_the_kernels_know_nothing_of_fastdpo_transformers_or_peft() -> None:
    for path in KERNELS:
        roots = {module.split(".")[0] for module in imported(path)}
        assert not roots & {"fastdpo", "transformers", "peft", "datasets", "accelerate"}, path.name


def test_benchmarks_do_not_import_tests_and_packages_import_neither() -> None:
    tests = {path.stem for path in (ROOT / "tests").glob("*.py")} | {"tests"}
    for path in (ROOT / "benchmarks").rglob("*.py"):
        assert not {module.split(".")[0] for module in imported(path)} & tests, path.name
    for path in [*FASTDPO.values(), *KERNELS]:
        assert not {module.split(".")[0] for module in imported(path)} & (tests | {"benchmarks"}), path.name


def test_the_folder_kernels_is_no_package_that_would_hide_hugging_faces() -> None:
    """transformers imports a package `kernels`; a regular one installed beside us must win over our folder."""
    assert not (ROOT / "kernels/__init__.py").exists()
    assert not any(path.suffix == ".py" for path in (ROOT / "kernels").iterdir())


def test_an_installed_package_called_kernels_is_found_from_the_checkout(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("get_kernel = 'theirs'")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.get_kernel)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "theirs"


def test_a_bare_checkout_works_on_the_python_path() -> None:
    code = "import fastdpo, fastdpo_kernels.pair_loss; print(fastdpo.DPOConfig.__name__)"
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": "/usr/bin:/bin", "HOME": "/tmp"}
    run = subprocess.run([sys.executable, "-c", code], cwd="/", env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == "DPOConfig", run.stderr


def test_the_losses_load_neither_sympy_nor_triton_before_something_needs_them() -> None:
    """Every DPOConfig reads them, on machines that have no Triton, too."""
    code = "import sys, fastdpo.losses; print({'sympy', 'triton', 'transformers'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_no_module_is_called_utils_common_or_helpers() -> None:
    names = {path.stem for path in [*FASTDPO.values(), *KERNELS]}
    assert not names & {"utils", "common", "helpers", "misc"}


def test_every_row_of_the_table_of_features_names_tests_that_exist() -> None:
    table = (ROOT / "README.md").read_text().split("\n## What it does\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) > 15
    for what, _, proofs in rows:
        named = re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", proofs)
        assert len(named) == proofs.count("`") / 2 > 0, what
        for file, function in named:
            tree = ast.parse((ROOT / "tests" / file).read_text())
            functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert function in functions if function else functions, (what, file, function)
