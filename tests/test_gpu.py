"""What only a CUDA device shows: bf16 and fp16 arithmetic, heads of real sizes, the allocator's peaks, the packed
layout and its attention there, repeatability, and no host sync.

Legend: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import assert_errs_at_most_twice
from conftest import tiny_llama
from dense_attention import dense_attention, projections, visible
from peft import LoraConfig
from tiny_models import random_pairs, tiny_model
from torch import Tensor

import fastdpo
from fastdpo import attention
from fastdpo.attention_backends import BACKENDS, OBSTACLES, Scores, facts_of, segment_groups
from fastdpo.batch import PreferenceBatch, pack, pad
from fastdpo.data import TokenPair
from fastdpo.identity import tensors_digest
from fastdpo.layout import find_layout, probe_pairs
from fastdpo.model import Policy
from fastdpo.ranks import Ranks
from fastdpo_kernels import launch
from fastdpo_kernels.head import STATS
from fastdpo_kernels.linear_logps import linear_logps, linear_logps_reference
from fastdpo_kernels.pair_loss import LossTerm, PairwiseLoss, pair_loss, sequence_sums

pytestmark = pytest.mark.gpu
PRECISIONS = {"bf16": {"bf16": True}, "fp16": {"fp16": True}, "fp32": {"bf16": False}}
MiB = 2**20
METHODS = ["torch", "streamed", "fused"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
EVERYTHING = {"logit_scale": 0.8, "softcap": 20.0, "temperature": 0.9}
LEAVES = ("hidden", "weight", "bias")


# ---- the head


@pytest.fixture(autouse=True)
def emptied() -> None:
    """No test's memory is another one's."""
    torch.cuda.empty_cache()


def needs(gigabytes: float) -> None:
    available = torch.cuda.get_device_properties(0).total_memory / 1e9
    if available < gigabytes:
        pytest.skip(f"needs {gigabytes} GB of device memory, has {available:.0f}")


def runs_here(method: str, dtype: torch.dtype) -> None:
    facts = launch.device_of(torch.device("cuda"))
    if method == "fused" and not facts.has_matrix_products:
        pytest.skip("Triton reaches no matrix units here")
    if dtype is torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("no bf16 here")


def head(rows: int, vocabulary: int, hidden_size: int, dtype: torch.dtype, scale: float = 3.0) -> dict[str, Any]:
    """Logits of standard deviation `scale`."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", generator=generator, dtype=dtype)

    return {
        "hidden": normal(rows, hidden_size),
        "weight": normal(vocabulary, hidden_size).mul_(scale / hidden_size**0.5),
        "targets": torch.randint(vocabulary, (rows,), device="cuda", generator=generator),
        "bias": normal(vocabulary),
    }


def exactly(given: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor.double() if name in LEAVES else tensor for name, tensor in given.items()}


def run(
    function: Callable[..., tuple[Tensor, dict[str, Tensor]]],
    given: dict[str, Any],
    wanted: tuple[str, ...],
    **options: Any,
) -> dict[str, Tensor]:
    leaves = dict(given)
    for name in wanted:
        leaves[name] = leaves[name].detach().requires_grad_()
    logps, stats = function(**leaves, **options)
    if wanted:
        (logps * torch.linspace(-1, 1.3, len(logps), device="cuda")).sum().backward()
    return {"logps": logps.detach(), **stats, **{f"grad of {name}": leaves[name].grad for name in wanted}}


def assert_accurate(
    given: dict[str, Any], wanted: tuple[str, ...], method: str, stats: tuple[str, ...] = (), **options: Any
) -> None:
    of_head: dict[str, Any] = {name: value for name, value in options.items() if name != "workspace_bytes"}
    truth = run(linear_logps_reference, exactly(given), wanted, **of_head)
    torchs = run(linear_logps_reference, given, wanted, **of_head)
    ours = run(linear_logps, given, wanted, method=method, stats=stats, **options)
    assert ours["logps"].max() <= 0
    for name, value in ours.items():
        assert_errs_at_most_twice(name, value, torchs[name], truth[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("vocabulary", [128256, 50257])
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("wanted", [("hidden",), LEAVES], ids=["frozen", "trained"])
def test_a_real_heads_errors_are_at_most_twice_torchs(
    dtype: torch.dtype, method: str, vocabulary: int, options: dict, wanted: tuple[str, ...]
) -> None:
    """In several chunks: 64 MiB of bf16 hold 261 of the 700 rows, or 667 with the smaller vocabulary."""
    runs_here(method, dtype)
    needs(14)
    given = head(700, vocabulary, 1024, dtype)
    if not options:
        del given["bias"]
        wanted = tuple(name for name in wanted if name != "bias")
    assert_accurate(given, wanted, method, STATS, workspace_bytes=64 * MiB * dtype.itemsize // 2, **options)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [0.1, 10.0, 40.0], ids=["flat", "peaked", "one-hot"])
def test_flat_and_peaked_rows_err_at_most_twice_as_torchs(method: str, scale: float) -> None:
    runs_here(method, torch.bfloat16)
    needs(14)
    given = head(700, 128256, 1024, torch.bfloat16, scale)
    del given["bias"]
    probability = raise_targets(given, torch.arange(0, 700, 2, device="cuda"))
    assert probability.min() < 1e-3 and probability.max() > 1 - 1e-4 and (probability > 0.1).sum() > 100
    assert_accurate(given, ("hidden",), method, ("entropy", "mean_logit", "log_sum_sq_probs"))


def raise_targets(given: dict[str, Any], rows: Tensor) -> Tensor:
    """Moves these rows of hidden along their targets' rows of weight, for probabilities from 1e-4 to 1 - 1e-6."""
    hidden, weight, targets = (given[name].float() if name != "targets" else given[name] for name in given)
    wanted = torch.linspace(math.log(1e-4), -math.log(1e-6), len(rows), device="cuda")  # log p / (1 - p)
    logits = hidden[rows] @ weight.T
    own = logits.gather(1, targets[rows, None])[:, 0]
    along = weight[targets[rows]]
    push = (logits.logsumexp(-1) - own + wanted) / along.square().sum(-1)
    given["hidden"][rows] = (hidden[rows] + push[:, None] * along).to(given["hidden"].dtype)
    return run(linear_logps_reference, exactly(given), ())["logps"][rows].exp()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wanted", [("hidden",), ("hidden", "weight")], ids=["frozen", "trained"])
def test_weights_of_more_than_two_to_the_31_elements(method: str, wanted: tuple[str, ...]) -> None:
    runs_here(method, torch.bfloat16)
    needs(110)
    given = head(300, 262144, 8448, torch.bfloat16)
    del given["bias"]
    given["targets"][:3] = torch.tensor([0, 262143, 262142])
    assert given["weight"].numel() > 2**31
    assert_accurate(given, wanted, method)


@pytest.mark.parametrize("wanted", [("hidden",), LEAVES], ids=["frozen", "trained"])
def test_a_workspace_of_more_than_two_to_the_31_elements(wanted: tuple[str, ...]) -> None:
    needs(60)
    given, rows = head(8400, 262144, 64, torch.bfloat16), slice(8000, 8400)
    assert given["hidden"].shape[0] * 262144 > 2**31
    ours = run(linear_logps, given, wanted, method="streamed", workspace_bytes=5 * 2**30)
    chunked = run(linear_logps, given, wanted, method="streamed", workspace_bytes=256 * MiB)
    for name, value in ours.items():
        torch.testing.assert_close(value, chunked[name], rtol=2e-2, atol=2e-2)
    few = given | {name: given[name][rows] for name in ("hidden", "targets")}
    truth = run(linear_logps_reference, exactly(few), ())["logps"]
    torch.testing.assert_close(ours["logps"][rows].double(), truth, rtol=0, atol=2e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wanted", [("hidden",), LEAVES], ids=["frozen", "trained"])
def test_a_head_repeats_bitwise(dtype: torch.dtype, method: str, wanted: tuple[str, ...]) -> None:
    runs_here(method, dtype)
    given = head(1500, 128256, 1024, dtype)
    first, *others = (run(linear_logps, given, wanted, method=method, stats=STATS, **EVERYTHING) for _ in range(3))
    for other in others:
        assert all(torch.equal(value, other[name]) for name, value in first.items())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", ["streamed", "fused"])
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
def test_log_probs_are_bitwise_the_same_whatever_else_is_asked_for(
    dtype: torch.dtype, method: str, options: dict
) -> None:
    """Every combination is another compiled kernel; a policy that is its reference has margins of exactly 0."""
    runs_here(method, dtype)
    given = head(1500, 128256, 1024, dtype)
    alone = run(linear_logps, given, (), method=method, **options)["logps"]
    for wanted, stats in (((), STATS), (("hidden",), ()), (("hidden",), STATS), (("hidden", "weight"), STATS)):
        asked = run(linear_logps, given, wanted, method=method, stats=stats, **options)
        assert torch.equal(asked["logps"], alone)


@pytest.mark.parametrize("method", ["streamed", "fused"])
@pytest.mark.parametrize("wanted", [("hidden",), LEAVES], ids=["frozen", "trained"])
def test_chunks_of_every_size_give_the_same_numbers(method: str, wanted: tuple[str, ...]) -> None:
    """Racing programs would not: in fp32, where only the products' order of addition differs."""
    given = head(1031, 50257, 512, torch.float32)
    results = [
        run(linear_logps, given, wanted, method=method, stats=STATS, workspace_bytes=rows * 50304 * 4, **EVERYTHING)
        for rows in (2000, 512, 384, 128, 77)
    ]
    for other in results[1:]:
        for name, value in results[0].items():
            torch.testing.assert_close(value, other[name], rtol=2e-5, atol=2e-5)


def test_gradients_are_the_same_in_the_forward_and_recomputed() -> None:
    given = head(1031, 50257, 512, torch.float32)
    frozen, trained = (run(linear_logps, given, wanted, method="streamed") for wanted in (("hidden",), LEAVES))
    torch.testing.assert_close(frozen["grad of hidden"], trained["grad of hidden"], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("method", "workspace", "allowed"),
    [
        ("streamed", None, 300e6),
        ("streamed", 64 * MiB, 70e6),
        ("fused", 64 * MiB, 20e6),
        ("torch", 64 * MiB, 90e6),
    ],
    ids=["streamed", "streamed in 64 MiB", "fused", "torch in 64 MiB"],
)
@pytest.mark.parametrize("stats", [(), STATS], ids=["", "statistics"])
def test_a_forward_stays_within_its_workspace(method: str, workspace: int | None, allowed: float, stats: tuple) -> None:
    """(8192, 128256, 4096): the logits would be 2.1 GB."""
    runs_here(method, torch.bfloat16)
    needs(10)
    given = head(8192, 128256, 4096, torch.bfloat16)
    del given["bias"]

    def beyond_what_comes_out(wanted: tuple[str, ...]) -> int:
        for name in ("hidden", "weight"):
            given[name].requires_grad_(name in wanted)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = linear_logps(**given, method=method, stats=stats, workspace_bytes=workspace)
        kept = torch.cuda.memory_allocated() - before
        del results
        return torch.cuda.max_memory_allocated() - before - kept

    beyond_what_comes_out(("hidden",))  # cuBLAS takes a workspace of its own once
    assert beyond_what_comes_out(()) <= allowed
    assert beyond_what_comes_out(("hidden",)) <= allowed


@pytest.mark.parametrize(
    ("method", "allowed"), [("streamed", 300e6 + 2.2e9), ("fused", 64 * MiB + 200e6)], ids=["streamed", "fused"]
)
def test_a_backward_of_a_head_that_trains_stays_within_its_workspace(method: str, allowed: float) -> None:
    """(8192, 128256, 4096): streamed sums dW, 1.05 GB, in 2.1 GB of fp32, fused dH in 134 MB."""
    runs_here(method, torch.bfloat16)
    needs(14)
    given = head(8192, 128256, 4096, torch.bfloat16)
    del given["bias"]
    workspace = 64 * MiB if method == "fused" else None
    for _ in range(2):  # cuBLAS takes a workspace of its own once
        leaves = [given[name].requires_grad_() for name in ("hidden", "weight")]
        logps, _ = linear_logps(**given, method=method, workspace_bytes=workspace)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        gradients = torch.autograd.grad(logps.sum(), leaves)
        peak = torch.cuda.max_memory_allocated() - before - sum(gradient.nbytes for gradient in gradients)
        del gradients, logps
    assert peak <= allowed


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wanted", [("hidden",), LEAVES], ids=["frozen", "trained"])
def test_the_head_never_waits_for_the_device(method: str, wanted: tuple[str, ...]) -> None:
    runs_here(method, torch.float16)
    given = head(700, 32000, 512, torch.float16)
    run(linear_logps, given, wanted, method=method, stats=STATS)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(linear_logps, given, wanted, method=method, stats=STATS)
    finally:
        torch.cuda.set_sync_debug_mode(0)


@pytest.mark.parametrize("method", METHODS[1:])
def test_targets_outside_the_vocabulary_are_nan_and_raise_when_debugging(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = head(300, 1003, 64, torch.float16)
    given["targets"][7] = 1003
    assert run(linear_logps, given, ("hidden",), method=method)["logps"].isnan().nonzero().tolist() == [[7]]
    monkeypatch.setenv("FASTDPO_DEBUG", "1")
    with pytest.raises(ValueError, match=r"targets\[7\] is 1003"):
        run(linear_logps, given, (), method=method)


def test_auto_streams_and_fuses_where_the_workspace_is_too_small() -> None:
    facts = launch.device_of(torch.device("cuda"))
    given = head(300, 128256, 256, torch.float16)
    for workspace, method in ((None, "streamed"), (MiB, "fused" if facts.has_matrix_products else "streamed")):
        auto, named = (
            run(linear_logps, given, (), method=name, workspace_bytes=workspace)["logps"] for name in ("auto", method)
        )
        assert torch.equal(auto, named)


@pytest.mark.skipif("torch.cuda.device_count() < 2", reason="needs two devices")
@pytest.mark.parametrize("method", METHODS)
def test_tensors_of_another_device_than_the_current_one_work(method: str) -> None:
    given = head(300, 1003, 64, torch.float16)
    there = {name: tensor.to("cuda:1") for name, tensor in given.items()}
    here, other = linear_logps(**given, method=method)[0], linear_logps(**there, method=method)[0]
    assert other.device.index == 1 and torch.equal(here.cpu(), other.cpu())


# ---- the pair loss


def pairs(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """-> token log-probs that are the reference's but for a little, offsets, and the reference's sums."""
    generator = torch.Generator("cuda").manual_seed(0)
    lengths = torch.randint(1, 900, (2 * count,), device="cuda", generator=generator)
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    total = int(offsets[-1])
    values = -torch.rand(total, device="cuda", generator=generator, dtype=torch.float64).mul_(5).to(dtype)
    noise = torch.randn(total, device="cuda", generator=generator, dtype=torch.float64).mul_(0.05).to(dtype)
    return values + noise, offsets, sequence_sums(values, offsets).view(-1, 2)


def _sigmoid(m: Any, chosen: Any, rejected: Any, beta: float) -> Any:
    return -m.log_sigmoid(beta * (chosen - rejected))


SIGMOID = PairwiseLoss((LossTerm(_sigmoid, {"beta": 0.1}),), 0.1)


def test_the_kernels_sums_are_bitwise_the_references() -> None:
    for dtype in (torch.float32, torch.float64):
        values, offsets, _ = pairs(64, dtype)
        sums = sequence_sums(values, offsets).view(-1, 2)
        result = pair_loss(values.requires_grad_(), offsets, sums, SIGMOID, method="triton")
        assert torch.equal(result.logps, sums) and not result.log_ratios.any()
        assert torch.allclose(result.losses, torch.tensor(math.log(2), device="cuda", dtype=dtype), rtol=0, atol=1e-7)


def test_the_pair_losss_methods_agree_to_rounding() -> None:
    results = []
    for method in ("triton", "torch"):
        values, offsets, reference = pairs(64, torch.float64)
        result = pair_loss(values.requires_grad_(), offsets, reference, SIGMOID, method=method)
        result.losses.mean().backward()
        results.append([result.losses.detach(), result.logps, result.log_ratios, result.rewards, values.grad])
    rounding = 1e-14 * float(results[1][1].abs().max())  # of sums up to 2250, of which log-ratios are what is left
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=rounding)


def test_the_pair_loss_is_one_launch_and_its_backward_another() -> None:
    values, offsets, reference = pairs(64)
    values.requires_grad_()
    pair_loss(values, offsets, reference, SIGMOID).losses.sum().backward()  # compiles
    kept: dict[str, Any] = {}

    def forward() -> None:
        kept["losses"] = pair_loss(values, offsets, reference, SIGMOID).losses

    def backward() -> None:
        torch.autograd.grad(kept["losses"], values, kept["upstream"], retain_graph=True)

    assert len(launched(forward)) == 1
    kept["upstream"] = torch.ones_like(kept["losses"])
    assert len(launched(backward)) == 1


def launched(call: Callable[[], None]) -> list[str]:
    """Names of the kernels that a call runs."""
    torch.cuda.synchronize()
    schedule = torch.profiler.schedule(wait=0, warmup=1, active=1)  # a session may lose the events that it begins with
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, schedule=schedule) as profile:
        for _ in range(2):
            call()
            torch.cuda.synchronize()
            profile.step()
    recorded: Any = profile
    return [
        event.name
        for event in recorded.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not event.name.startswith(("ProfilerStep", "Context"))
    ]


# ---- packed attention


# Tokens of prompt, chosen and rejected.
LENGTHS = ((700, 300, 411), (1, 1, 130), (0, 5, 7), (129, 1, 1), (0, 1, 1), (513, 128, 64), (33, 200, 2))
SHAPES = {"GQA": ((8, 2), 128, 128), "MQA": ((4, 1), 256, 256), "latent": ((4, 4), 192, 128), "odd": ((4, 4), 100, 100)}


def attend_by(backend: str, inputs: list[Tensor], batch: PreferenceBatch, scores: Scores) -> Tensor:
    """(1, T, Hq, dv) by one backend; the test is skipped where it is not for this card."""
    facts = facts_of(inputs[0], inputs[2], scores, None)
    if obstacle := OBSTACLES[backend](facts):
        pytest.skip(obstacle)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "choose", lambda facts: (backend, "a test's choice"))
        given = {"scaling": scores.scaling, "sliding_window": scores.window, "dropout": scores.dropout}
        more = {"softcap": scores.softcap, "s_aux": scores.sinks, "segments": batch.segments}
        return attention.prefix_attention(torch.nn.Module(), *inputs, None, **given, **more)[0]


def layer(
    shape: tuple[tuple[int, int], int, int], dtype: torch.dtype, pairs: list[TokenPair]
) -> tuple[list[Tensor], PreferenceBatch]:
    """-> query, key and value of a packed row, and the row."""
    tokens = sum(pair.length for pair in pairs)
    exact = projections(tokens, shape[0], torch.float64, *shape[1:])
    inputs = [tensor.detach().to("cuda", dtype).requires_grad_() for tensor in exact]
    return inputs, pack(pairs).to("cuda")


def with_gradients(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    return [output.detach(), *torch.autograd.grad(output, inputs, weights)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("window", [None, 1, 100, 5000])
def test_every_backend_here_is_dense_attention_under_the_explicit_mask(
    backend: str, dtype: torch.dtype, shape: tuple[tuple[int, int], int, int], window: int | None
) -> None:
    """Empty prompts, one-token responses, queries fewer than keys: outputs and gradients against fp64."""
    pairs = random_pairs(*LENGTHS)
    mask = visible(pairs, window).cuda()
    inputs, batch = layer(shape, dtype, pairs)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    ours = with_gradients(attend_by(backend, inputs, batch, Scores(0.1, window)), inputs)
    truth = with_gradients(dense_attention(*exact, mask, 0.1), exact)
    torchs = with_gradients(dense_attention(*inputs, mask, 0.1), inputs)
    for name, mine, theirs, right in zip(("output", "dq", "dk", "dv"), ours, torchs, truth, strict=True):
        if dtype == torch.float32:  # efficient attention multiplies by three TF32 products
            torch.testing.assert_close(mine.double(), right, rtol=0, atol=2e-5 * float(right.abs().max()))
        else:
            assert_errs_at_most_twice(name, mine, theirs, right)


@pytest.mark.parametrize("backend", BACKENDS)
def test_softcaps_and_sinks_are_right_where_a_backend_takes_them(backend: str) -> None:
    pairs = random_pairs(*LENGTHS)
    for softcap, sinks in ((3.0, None), (None, torch.randn(8, device="cuda"))):
        inputs, batch = layer(SHAPES["GQA"], torch.bfloat16, pairs)
        exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
        ours = with_gradients(attend_by(backend, inputs, batch, Scores(0.1, 100, softcap, sinks)), inputs)
        double = None if sinks is None else sinks.double()
        truth = with_gradients(dense_attention(*exact, visible(pairs, 100).cuda(), 0.1, softcap, double), exact)
        for mine, right in zip(ours, truth, strict=True):
            torch.testing.assert_close(mine.double(), right, rtol=0, atol=2e-2 * float(right.abs().max()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_attention_never_waits_for_the_device(backend: str) -> None:
    inputs, batch = layer(SHAPES["GQA"], torch.float16, random_pairs(*LENGTHS))
    weights = torch.randn(1, inputs[0].shape[2], 8, 128, device="cuda", dtype=torch.float16)
    for mode in (0, "error"):  # the first run makes the masks
        torch.cuda.set_sync_debug_mode(mode)
        try:
            output = attend_by(backend, inputs, batch, Scores(0.1))
            torch.autograd.grad(output, inputs, weights)
        finally:
            torch.cuda.set_sync_debug_mode(0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_keeps_the_weights_mean(backend: str) -> None:
    """Values of one come out as the sum of the weights that are left, scaled up."""
    inputs, batch = layer(SHAPES["GQA"], torch.float16, random_pairs(*LENGTHS))
    inputs[2] = torch.ones_like(inputs[2]).requires_grad_()
    output = attend_by(backend, inputs, batch, Scores(0.1, dropout=0.25))
    sums = output.detach().float()
    assert abs(float(sums.mean()) - 1) < 0.02 and float(sums.std()) > 0.01
    gradients = torch.autograd.grad(output.float().sum(), inputs)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_row_of_more_segments_than_the_kernels_buffer_can_count_is_cut() -> None:
    """FlashAttention-2's backward would count 2.3e9 elements in int32, and write where it should not."""
    needs(60)
    pairs = random_pairs((3, 2, 4)) * 2200
    inputs, batch = layer(((32, 8), 128, 128), torch.bfloat16, pairs)
    assert len(segment_groups(batch.segments.query_lengths, 32, 128)) == 2  # type: ignore[union-attr]
    weights = torch.randn(1, 9 * 2200, 32, 128, device="cuda", dtype=torch.bfloat16)
    output = attend_by("flash", inputs, batch, Scores(0.1))
    whole = [output, *torch.autograd.grad(output, inputs, weights)]
    for start in (0, 9 * 2190):
        part = slice(start, start + 90)
        few = [tensor[:, :, part].detach().requires_grad_() for tensor in inputs]
        output = attend_by("flash", few, pack(pairs[:10]).to("cuda"), Scores(0.1))
        alone = [output, *torch.autograd.grad(output, few, weights[:, part])]
        assert torch.equal(whole[0][:, part], alone[0])
        for mine, right in zip(whole[1:], alone[1:], strict=True):
            torch.testing.assert_close(mine[:, :, part], right, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma2", "gemma3", "deepseek-v3-mla", "gpt-oss-sinks"])
def test_a_models_packed_bf16_errs_no_more_than_its_padded_bf16(name: str) -> None:
    pairs = random_pairs((7, 5, 9), (1, 11, 2), (20, 1, 1), (0, 4, 1), (17, 8, 8), (3, 1, 6), (12, 20, 30))
    model = tiny_model(name).cuda()
    truth = logps_and_gradients(Policy(model).eval(), pad(pairs))
    half = Policy(model, torch.bfloat16).eval()
    assert find_layout(half).packed
    packed, padded = (logps_and_gradients(half, collate(pairs)) for collate in (pack, pad))
    for mine, theirs, right in zip(packed, padded, truth, strict=True):
        scale = right.square().mean().sqrt()
        error, allowed = ((other - right).square().mean().sqrt() / scale for other in (mine, theirs))
        assert error <= 1.5 * allowed + 1e-3, (float(error), float(allowed))


def logps_and_gradients(policy: Policy, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
    logps, _ = policy(batch.to("cuda"))
    found = torch.autograd.grad(logps.sum(), list(policy.parameters()), allow_unused=True)
    return logps.detach().double(), torch.cat([one.flatten().double() for one in found if one is not None])


# ---- training


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_training_starts_at_margin_zero_and_learns(precision, adapters, rows, tokenizer, quick) -> None:
    quick |= {"max_steps": 20, "learning_rate": 1e-2 if adapters else 3e-3, **precision}
    peft_config = LoraConfig(r=8, target_modules="all-linear") if adapters else None
    out = fastdpo.train(tiny_llama(), rows, processing_class=tokenizer, peft_config=peft_config, **quick)
    assert out.history[0]["rewards/margins"] == 0 and abs(out.history[0]["loss"] - math.log(2)) <= 1e-6
    assert out.history[19]["loss"] < 0.4


def test_packed_and_padded_log_probs_agree_in_fp32() -> None:
    policy = Policy(tiny_llama().cuda())
    pairs = probe_pairs(500)
    packed, _ = policy(pack(pairs).to("cuda"))
    padded, _ = policy(pad(pairs).to("cuda"))
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-5)


def test_gradients_of_what_many_sequences_share_repeat_bitwise() -> None:
    system = list(range(100, 160))
    pairs = [TokenPair([*system, *pair.prompt], pair.chosen, pair.rejected) for pair in probe_pairs(500) * 4]
    policy, batch = Policy(tiny_llama().cuda().bfloat16()), pack(pairs, least_shared=32).to("cuda")
    assert batch.segments is not None and batch.segments.crowded
    runs = [torch.autograd.grad(policy(batch)[0].sum(), list(policy.parameters())) for _ in range(5)]
    assert all(torch.equal(one, other) for run in runs[1:] for one, other in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_two_runs_are_bitwise_the_same(precision, adapters, rows, tokenizer, quick) -> None:
    quick |= {"full_determinism": True, "processing_class": tokenizer, **precision}
    peft_config = LoraConfig(r=8, target_modules="all-linear") if adapters else None
    runs = [fastdpo.train(tiny_llama(), rows, peft_config=peft_config, **quick) for _ in "ab"]
    first, second = (run.model.state_dict() for run in runs)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("broken", [0, 3], ids=["finite", "one step of NaN"])
def test_a_step_waits_for_the_device_at_log_lines_only(broken, rows, tokenizer, quick) -> None:
    quick |= {"max_steps": 6, "logging_steps": 100, "on_nonfinite": "skip"}
    trainer = fastdpo.DPOTrainer(
        tiny_llama(), args=fastdpo.DPOConfig(**quick), train_dataset=rows, processing_class=tokenizer
    )
    trainer.model.model.norm.weight.register_hook(lambda g: g * (math.nan if len(seen) + 1 == broken else 1.0))
    step, seen = trainer._optimizer_step, []

    def watched(batches: list) -> None:
        torch.cuda.set_sync_debug_mode("error" if seen else 0)  # the first step checks the margins
        try:
            step(batches)
        finally:
            torch.cuda.set_sync_debug_mode(0)
        seen.append(len(batches))

    trainer._optimizer_step = watched
    trainer.train()
    assert len(seen) == 6 and all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    assert trainer.state.log_history[-1]["train_skipped_steps"] == bool(broken)


@pytest.mark.parametrize("given", ["path", "loaded"])
def test_a_reference_ahead_leaves_its_memory_to_training_and_the_loss_as_it_is_online(
    given, rows, tokenizer, quick, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("FASTDPO_CACHE", str(tmp_path / "cache"))
    wide = {"hidden_size": 512, "intermediate_size": 2048}  # 16 MiB in bf16
    losses, held = [], []
    for ahead in (False, True, True):
        ref_model: Any = tiny_llama(**wide).bfloat16()
        size = sum(parameter.nbytes for parameter in ref_model.parameters())
        if given == "path":
            ref_model.save_pretrained(tmp_path / "other")
            ref_model = str(tmp_path / "other")
        before = torch.cuda.memory_allocated()
        trainer = fastdpo.DPOTrainer(
            tiny_llama(),
            ref_model,
            fastdpo.DPOConfig(**quick | {"precompute_ref_log_probs": ahead}),
            train_dataset=rows,
            processing_class=tokenizer,
        )
        held.append((torch.cuda.memory_allocated() - before) / size)
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        del trainer
    assert held[0] > 1 and max(held[1:]) < 0.5
    assert losses[1] == losses[2] == pytest.approx(losses[0], rel=1e-2)


def test_the_weights_of_an_8b_model_on_the_gpu_are_named_in_under_a_second() -> None:
    """Every bit of 16 GB, summed on the device."""
    needs(20)
    tensors = {str(layer): torch.ones(58_720_256, dtype=torch.bfloat16, device="cuda") for layer in range(137)}
    first = tensors_digest(tensors)  # with the start of the kernels
    tensors["70"][12_345_678] = 0
    torch.cuda.synchronize()
    started = time.perf_counter()
    second = tensors_digest(tensors)
    assert time.perf_counter() - started < 1 and second != first


# ---- the memory plan


def planned_and_measured(tokens: int, shape: dict[str, int], adapters: bool, checkpoint: bool) -> tuple[int, int]:
    """Bytes that torch allocates at the most over two optimizer steps of two micro-batches each."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from fastdpo.build import build_policy
    from fastdpo.data import TokenPair
    from fastdpo.memory import PairLengths, plan_run
    from fastdpo.model import checkpointing

    config = fastdpo.DPOConfig(bf16=True, use_peft=adapters, gradient_checkpointing=checkpoint, report_to="none")
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.bfloat16)
    policy = build_policy(model, None, config, Ranks())
    part = tokens // 16
    lengths = PairLengths(2 * part, part, part)
    plan = plan_run(policy, None, config, lengths, packed=True)
    batch = pack([TokenPair([5] * 2 * part, [6] * part, [7] * part)] * 4).to("cuda")
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], fused=True)
    torch.cuda.reset_peak_memory_stats()
    with checkpointing(policy, None) if checkpoint else contextlib.nullcontext():
        for _ in range(2):
            for _ in range(2):
                policy(batch)[0].sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return plan.allocated(4 * lengths.tokens(True)), torch.cuda.max_memory_allocated()


SMALL = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 16}
ONE_B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}


@pytest.mark.parametrize("checkpoint", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("tokens", [2048, 8192])
@pytest.mark.parametrize("shape", [SMALL, ONE_B], ids=["small", "1B"])
def test_the_planned_peak_is_the_measured_one(shape, tokens, adapters, checkpoint, record_property) -> None:
    needs(8 if shape is SMALL else 70)
    shape = {**shape, "num_key_value_heads": 8, "vocab_size": 128256 if shape is ONE_B else 32000}
    planned, measured = planned_and_measured(tokens, shape, adapters, checkpoint)
    record_property("planned / measured", round(planned / measured, 3))
    record_property("MiB measured", round(measured / MiB))
    assert abs(planned - measured) <= 0.1 * measured, (planned / MiB, measured / MiB)
