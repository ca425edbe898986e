"""Launch numbers are pure functions of shape, dtype and device, and stay inside what they promise."""

from __future__ import annotations

import ast
import inspect
import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastdpo_kernels import launch
from fastdpo_kernels.launch import EXAMPLES, INTERPRETER, MiB

CPU = launch.Device("other")
DEVICES = {**EXAMPLES, "interpreter": INTERPRETER, "CPU": CPU}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROWS = (0, 1, 2, 15, 16, 17, 63, 64, 100, 127, 128, 129, 512, 1000, 2048, 4096, 8192, 10**6)
VOCABULARIES = (1, 2, 63, 64, 65, 1003, 32000, 50257, 128256, 151936, 256000)
HIDDEN_SIZES = (1, 17, 64, 768, 3584, 4096, 8192)
WORKSPACES = (1, 1000, MiB, 20 * MiB, 64 * MiB, 384 * MiB)


# Which method


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_torch_serves_devices_that_triton_does_not_compile_for(dtype: torch.dtype) -> None:
    assert launch.head_method(32000, dtype, CPU, 64 * MiB, 100)[0] == "torch"
    assert launch.head_method(32000, dtype, INTERPRETER, 64 * MiB, 100)[0] == "torch"


@pytest.mark.parametrize("name", EXAMPLES)
def test_torch_serves_double_precision(name: str) -> None:
    method, reason = launch.head_method(32000, torch.float64, EXAMPLES[name], 64 * MiB, 100)
    assert method == "torch" and "float64" in reason


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_default_workspace_streams_the_benchmarks_shapes(name: str, dtype: torch.dtype) -> None:
    device = EXAMPLES[name]
    for rows, vocabulary in ((8192, 128256), (8192, 151936), (2048, 128256), (4096, 32000)):
        workspace = launch.default_workspace_bytes(device)
        assert launch.head_method(vocabulary, dtype, device, workspace, rows)[0] == "streamed"


def test_a_workspace_too_small_for_a_chunk_is_left_to_the_fused_kernel_except_on_turing() -> None:
    for name, device in EXAMPLES.items():
        method, reason = launch.head_method(128256, torch.float16, device, MiB, 1000)
        assert method == ("streamed" if name == "T4" else "fused")
        assert name == "T4" or f"only {MiB // (128256 * 2)} rows of 128256 logits" in reason


def test_few_rows_that_fit_a_small_workspace_are_streamed() -> None:
    fitting = MiB // (128256 * 2)
    assert launch.head_method(128256, torch.bfloat16, EXAMPLES["H200"], MiB, fitting)[0] == "streamed"
    assert launch.head_method(128256, torch.bfloat16, EXAMPLES["H200"], MiB, fitting + 1)[0] == "fused"


def test_no_rows_are_streamed() -> None:
    assert launch.head_method(128256, torch.bfloat16, EXAMPLES["H200"], 1, 0)[0] == "streamed"


def test_every_choice_says_why() -> None:
    for device, dtype, workspace in itertools.product(DEVICES.values(), (*DTYPES, torch.float64), WORKSPACES):
        method, reason = launch.head_method(50257, dtype, device, workspace, 300)
        assert method in ("torch", "streamed", "fused") and len(reason) > 10
        assert method == "torch" or device.compiles
        assert method != "fused" or device.has_matrix_products


# The streamed head


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_a_chunk_fits_the_workspace_and_has_a_row_at_least(device: launch.Device) -> None:
    for rows, vocabulary, hidden_size, workspace in itertools.product(ROWS, VOCABULARIES, HIDDEN_SIZES, WORKSPACES):
        for itemsize in (2, 4):
            chunk = launch.streamed_rows(rows, vocabulary, hidden_size, itemsize, device, workspace)
            assert 1 <= chunk <= max(1, rows)
            assert chunk == 1 or chunk * launch.row_stride(vocabulary) * itemsize <= workspace


def test_the_chunks_that_the_docstring_promises_for_an_h200() -> None:
    device = EXAMPLES["H200"]
    workspace = launch.default_workspace_bytes(device)
    assert launch.streamed_rows(8192, 128256, 4096, 2, device, workspace) == 1024
    assert launch.streamed_rows(8192, 151936, 3584, 2, device, workspace) == 1152


def test_the_default_workspace_keeps_to_300_mb_at_the_largest_benchmark_and_to_70_on_a_small_card() -> None:
    h200, small = EXAMPLES["H200"], replace(EXAMPLES["RTX 3090"], memory_bytes=8 * 2**30)
    chunk = launch.streamed_rows(8192, 128256, 4096, 2, h200, launch.default_workspace_bytes(h200))
    assert chunk * launch.row_stride(128256) * 2 <= 300e6
    assert launch.default_workspace_bytes(small) <= 70e6


def test_all_rows_go_in_one_chunk_where_they_fit() -> None:
    for rows in (1, 63, 129, 1000):
        assert launch.streamed_rows(rows, 1003, 64, 4, EXAMPLES["A100"], 384 * MiB) == rows


def test_more_workspace_wastes_no_more_of_the_multiprocessors() -> None:
    for device, hidden_size in itertools.product(EXAMPLES.values(), (768, 3584, 4096, 8192)):

        def idle(workspace: int, device: launch.Device = device, hidden_size: int = hidden_size) -> float:
            chunk = launch.streamed_rows(10**6, 32000, hidden_size, 2, device, workspace)
            tiles = max(1, chunk // 128) * -(-hidden_size // 256)
            return -(-tiles // device.multiprocessors) / chunk

        costs = [idle(workspace) for workspace in range(8 * MiB, 384 * MiB, 8 * MiB)]
        assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(costs))


@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_row_of_a_workspace_starts_at_a_multiple_of_16_bytes(itemsize: int) -> None:
    for vocabulary in VOCABULARIES:
        stride = launch.row_stride(vocabulary)
        assert vocabulary <= stride < vocabulary + 64 and stride * itemsize % 16 == 0


def test_blocks_are_powers_of_two_and_every_thread_has_an_element() -> None:
    for size in (*VOCABULARIES, *HIDDEN_SIZES):
        row = launch.row_config(size)
        assert row.block & (row.block - 1) == 0 and row.num_warps & (row.num_warps - 1) == 0
        assert row.block >= 32 * row.num_warps
        target = launch.target_block(size)
        assert target & (target - 1) == 0 and target >= 32
    pair = launch.pair_loss_config()
    assert pair.block & (pair.block - 1) == 0 and pair.block >= 32 * pair.num_warps


# The fused head

WITH_PRODUCTS = {name: device for name, device in DEVICES.items() if device.has_matrix_products}
PRODUCTS = ("fused_logits", "fused_gradient")


def products(device: launch.Device) -> Iterator[tuple[torch.dtype, launch.MatmulConfig]]:
    """Every configuration that launch.py has for a product on a device."""
    for name, dtype, rows, columns, aligned in itertools.product(
        PRODUCTS, DTYPES, ROWS[1:], (64, 10**5), (True, False)
    ):
        given = {"dtype": dtype, "device": device, "rows": rows, "columns": columns, "aligned": aligned}
        function = getattr(launch, name)
        yield dtype, function(**{argument: given[argument] for argument in inspect.signature(function).parameters})


def test_every_function_that_configures_a_product_is_looked_at() -> None:
    functions = {name: function for name, function in vars(launch).items() if inspect.isfunction(function)}
    found = {name for name, f in functions.items() if inspect.signature(f).return_annotation == "MatmulConfig"}
    assert found == set(PRODUCTS)


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != "T4"])
def test_as_many_programs_of_a_product_as_promised_fit_a_multiprocessors_shared_memory(name: str) -> None:
    """What their loops hold, with the KiB that CUDA keeps for itself in each. The loads of wgmma (sm_90) and tcgen05
    (sm_100) wait in as many stages as asked for, the others in one less. The compile report asks the compiler itself.
    """
    device = EXAMPLES[name]
    kept = 1024 if device.kind == "cuda" else 0
    for dtype, config in products(device):
        stages = config.num_stages - (device.arch not in (90, 100) or dtype == torch.float32)
        stage = (config.block_m + config.block_n) * config.block_k * dtype.itemsize
        assert config.resident * (max(1, stages) * stage + kept) <= device.shared_bytes + kept, (dtype, config)


@pytest.mark.parametrize("name", WITH_PRODUCTS)
def test_a_product_has_blocks_that_tl_dot_takes(name: str) -> None:
    """Powers of two from 16 up; descriptors from sm_90 on, and only where rows are aligned."""
    device = WITH_PRODUCTS[name]
    for _, config in products(device):
        blocks = config.block_m, config.block_n, config.block_k, config.epilogue
        assert all(block >= 16 and block & (block - 1) == 0 for block in blocks), config
        assert config.epilogue <= config.block_n
        assert config.num_warps in (1, 2, 4, 8, 16) and config.num_stages >= 1 and config.resident >= 1
        assert not config.descriptors or (device.kind == "cuda" and int(device.arch) >= 90)


@pytest.mark.parametrize("name", WITH_PRODUCTS)
def test_the_ranges_of_a_split_vocabulary_are_at_most_its_tiles(name: str) -> None:
    device = WITH_PRODUCTS[name]
    for rows, vocabulary, dtype in itertools.product(ROWS[1:], VOCABULARIES, DTYPES):
        config = launch.fused_logits(rows, dtype, device, aligned=True)
        ranges = launch.fused_ranges(rows, vocabulary, config, device)
        assert 1 <= ranges <= -(-vocabulary // config.block_n)


def test_one_row_fills_a_device_by_ranges_and_many_rows_need_few() -> None:
    device = EXAMPLES["H200"]
    few, many = (
        launch.fused_ranges(rows, 128256, launch.fused_logits(rows, torch.bfloat16, device, aligned=True), device)
        for rows in (1, 10**5)
    )
    assert few >= device.multiprocessors / 2 and many < few


@pytest.mark.parametrize("whole_rows", [False, True])
def test_a_slab_has_rows_and_columns_and_no_more_than_there_are_rows(whole_rows: bool) -> None:
    for device, rows, vocabulary, hidden_size in itertools.product(
        WITH_PRODUCTS.values(), ROWS[1:], VOCABULARIES, (17, 4096)
    ):
        for dtype, workspace in itertools.product(DTYPES[1:], WORKSPACES):
            chunk, columns = launch.fused_slab(rows, vocabulary, hidden_size, dtype, device, workspace, whole_rows)
            assert 1 <= chunk <= rows and columns >= 1
            assert chunk == rows or not whole_rows


# Pretending


def test_a_pretended_device_ends_with_its_block_also_on_an_exception() -> None:
    cpu = torch.device("cpu")
    before = launch.device_of(cpu)
    with pytest.raises(KeyError), launch.pretend(EXAMPLES["H200"]):
        assert launch.device_of(cpu) is EXAMPLES["H200"]
        raise KeyError
    assert launch.device_of(cpu) == before


def test_pretended_devices_nest() -> None:
    meta = torch.device("meta")
    with launch.pretend(EXAMPLES["H200"]):
        with launch.pretend(EXAMPLES["T4"]):
            assert launch.device_of(meta) is EXAMPLES["T4"]
        assert launch.device_of(meta) is EXAMPLES["H200"]


def test_the_examples_have_the_shared_memory_of_their_architecture_and_are_all_different() -> None:
    assert len({device.arch for device in EXAMPLES.values()}) == len(EXAMPLES)
    assert {device.arch for device in EXAMPLES.values()} == set(launch.SHARED_BYTES)
    for device in EXAMPLES.values():
        assert device.compiles and device.shared_bytes == launch.SHARED_BYTES[device.arch]
        assert device.multiprocessors >= 40 and device.memory_bytes >= 16 * 2**30
        assert device.has_matrix_products == (device.arch != 75)


# The parts of a block


@pytest.mark.parametrize("width", [1, 2, 17, 64, 128, 1000, 1024, 4096, 8192, 8193, 14336, 16384])
def test_a_norms_rows_fit_their_block_and_its_threads_have_32_elements_at_most(width: int) -> None:
    for with_weight in (False, True):
        config = launch.norm_config(width, with_weight)
        assert config.block >= width and config.block & (config.block - 1) == 0 and config.rows >= 1
        assert config.rows * config.block <= 32 * 32 * config.num_warps


def test_programs_that_sum_a_norms_weight_gradient_are_no_more_than_rows_and_fill_a_device() -> None:
    for device, width, rows in itertools.product(DEVICES.values(), (64, 128, 4096, 16384), (0, 1, 100, 10**6)):
        programs = launch.norm_programs(rows, width, device)
        assert min(1, rows) <= programs <= rows
    assert launch.norm_programs(10**6, 4096, EXAMPLES["H200"]) == 264


@pytest.mark.parametrize("heads", [1, 2, 7, 32, 71, 128])
@pytest.mark.parametrize("pairs", [1, 5, 12, 32, 48, 64, 128, 2048])
def test_a_ropes_heads_fit_their_program(heads: int, pairs: int) -> None:
    config = launch.rope_config(pairs, heads)
    assert config.block >= pairs and config.rows >= 1 and config.rows < 2 * heads
    assert 1 <= config.num_warps <= 4


# Where the numbers come from

SOURCE = Path(inspect.getfile(launch)).read_text()
PROVENANCE = re.compile(rf"unmeasured|({'|'.join(EXAMPLES)})[^.]*\b20\d\d-\d\d(-\d\d)?")

# Facts of a device or of arithmetic, not choices that a measurement could change.
GIVEN = {"MiB", "SHARED_BYTES", "EXAMPLES", "CARDS", "INTERPRETER", "BLOCK_METHODS", "row_stride"}


def definitions() -> dict[str, tuple[ast.stmt, str]]:
    """{name: its definition in launch.py, and what is said of it: docstring, comment beside it, comment above it or
    above the definitions that it follows without an empty line}
    """
    lines, found, above = SOURCE.splitlines(), {}, ""
    for node in ast.parse(SOURCE).body:
        comment = [*itertools.takewhile(lambda line: line.startswith("#"), reversed(lines[: node.lineno - 1]))]
        if comment or not lines[node.lineno - 2]:
            above = " ".join(reversed(comment))
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node, f"{above} {ast.get_docstring(node)}"
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node, f"{above} {lines[node.lineno - 1]}"
    return found


def said(name: str, known: dict[str, tuple[ast.stmt, str]]) -> str:
    """What is said of a name, of the private names and configurations that it uses, and where a comment says `see`."""
    node, text = known.pop(name)
    used = {child.id for child in ast.walk(node) if isinstance(child, ast.Name)} & known.keys()
    parts = {other for other in used if other.startswith("_") or other.endswith("_config")}
    parts |= known.keys() & set(re.findall(r"\bsee `?(\w+)", text))
    return " ".join([text, *(said(other, known) for other in sorted(parts) if other in known)])


def numbers() -> list[str]:
    """Public constants, and functions that return a number or a configuration."""
    known = definitions()
    functions = [
        name
        for name, (node, _) in known.items()
        if isinstance(node, ast.FunctionDef)
        and re.search(r"\bint\b|Config", ast.unparse(node.returns or ast.Constant(None)))
    ]
    constants = [name for name, (node, _) in known.items() if isinstance(node, ast.Assign)]
    return [name for name in functions + constants if not name.startswith("_") and name not in GIVEN]


@pytest.mark.parametrize("name", numbers())
def test_a_launch_number_says_what_measured_it_or_that_nothing_did(name: str) -> None:
    assert PROVENANCE.search(said(name, definitions())), (
        f"launch.{name}: name GPU and date, or say 'unmeasured' and why"
    )


def test_the_scan_finds_functions_and_constants() -> None:
    assert {"streamed_rows", "row_config", "fused_ranges", "MIN_STREAMED_ROWS"} <= set(numbers())
    assert not {"pretend", "device_of", "head_method"} & set(numbers())
