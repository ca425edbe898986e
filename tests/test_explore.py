"""Explorations: emulations are what they are defined as, and what is counted equals closed forms."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import __main__ as benchmarks
from benchmarks.device import CPU
from benchmarks.explore import compiled, dequantise, float8, graphs, host, small, sparse
from benchmarks.explore.stepping import Stepping
from benchmarks.flops import needed_flops
from benchmarks.models import MODELS, quantised
from benchmarks.roofline import Ceilings
from benchmarks.workload import PROFILES, PairLengths, build_model, pair_lengths
from fastdpo.batch import pack
from fastdpo.data import TokenPair
from fastdpo.model import base_model


def multiplies_fp8() -> bool:
    ones = torch.ones(16, 16).to(float8.E4M3)
    try:
        torch._scaled_mm(ones, ones.T, torch.ones(16, 1), torch.ones(1, 16), out_dtype=torch.bfloat16)
    except (RuntimeError, ValueError):
        return False
    return True


needs_fp8 = pytest.mark.skipif(not multiplies_fp8(), reason="this torch multiplies no FP8 with scales a row on a CPU")
MODEL = MODELS["llama-3.1-8b"]
WEIGHTS = MODEL.num_hidden_layers * sum(i * o for i, o in MODEL.linears.values())


def codes(*shape: int, seed: int = 0) -> torch.Tensor:
    """Numbers that e4m3 has, each row's largest being its largest: small integers, and one 448."""
    values = torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()
    values[:, 0] = 448
    return values


def test_numbers_that_e4m3_has_are_rounded_to_themselves() -> None:
    values = codes(5, 16)
    rounded, scales = float8.rounded(values, float8.E4M3)
    assert torch.equal(rounded.float(), values)
    assert torch.equal(scales, torch.ones(5, 1))


def test_rounding_errs_by_half_a_step_of_3_bits() -> None:
    values = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    rounded, scales = float8.rounded(values, float8.E4M3)
    smallest = scales * 2.0**-10  # half of the smallest step, below the normal numbers
    error = (rounded.float() * scales - values).abs()
    assert (error <= (values.abs() * 2.0**-4).maximum(smallest) * 1.001).all()
    assert error.max() > 2.0**-6 * values.abs().max()


def test_a_row_of_zeros_stays_zero() -> None:
    assert float8.rounded(torch.zeros(2, 16), float8.E4M3)[0].float().abs().max() == 0


@needs_fp8
def test_products_of_numbers_that_e4m3_has_are_exact_both_ways() -> None:
    x, weight, gradient = codes(6, 32), codes(16, 32, seed=1), codes(6, 16, seed=2)
    leaf = x.clone().requires_grad_()
    result = float8.product(leaf, weight, float8.E4M3)
    result.backward(gradient.bfloat16())
    assert torch.equal(result, (x @ weight.T).bfloat16())
    assert leaf.grad is not None and torch.equal(leaf.grad, (gradient @ weight).bfloat16().float())


@needs_fp8
def test_scales_of_a_weights_rows_are_in_the_gradient() -> None:
    weight = codes(16, 32) * 2.0 ** torch.arange(16.0)[:, None]
    leaf = codes(6, 32).requires_grad_()
    float8.product(leaf, weight, float8.E4M3).backward(torch.eye(6, 16).bfloat16())
    assert leaf.grad is not None and torch.equal(leaf.grad, weight[:6].bfloat16().float())


def test_the_frozen_share_is_three_products_a_weight_but_for_the_first_inputs() -> None:
    pairs = pair_lengths(PROFILES["hh-rlhf"], 256)
    share, needed = float8.base_share(MODEL, "hh-rlhf")
    first = MODEL.hidden_size * (MODEL.hidden_size + 2 * MODEL.num_key_value_heads * MODEL.head_size)
    unread = sum(pair.prompt + 1 for pair in pairs) / sum(pair.tokens for pair in pairs)
    unread *= 3 * MODEL.hidden_size * MODEL.intermediate_size  # of the last block's MLP
    assert share * needed == pytest.approx(2.0 * (3 * (WEIGHTS - unread) - first))
    assert needed == pytest.approx(needed_flops(pairs, MODEL, 16, True) / sum(pair.tokens for pair in pairs))


def test_outliers_leave_the_function_as_it_was() -> None:
    model: Any = build_model(small.SHAPE, 64, "float32", "cpu")
    ids = torch.arange(2, 34)[None]
    with torch.no_grad():
        expected = model(ids).logits
        model.load_state_dict(small.with_outliers(model.state_dict()))
        assert model.model.layers[0].input_layernorm.weight.max() == small.OUTLIER
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_rows_without_the_three_strings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a", "chosen": "b"}))
    with pytest.raises(ValueError, match="needs rows with prompt, chosen, rejected as strings"):
        small.texts(path)


def test_no_tile_is_left_out_at_epsilon_0_and_all_above_the_largest_entry() -> None:
    gradient = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    same, share = sparse.filtered(gradient, 0.0)
    assert torch.equal(same, gradient) and share == 1
    none, share = sparse.filtered(gradient, 1.01 * gradient.abs().max().item())
    assert none.abs().max() == 0 and share == 0


def test_a_tile_with_one_large_entry_is_left_whole_and_the_others_go() -> None:
    gradient = torch.full((256, 384), 1e-3)
    gradient[130, 5] = -1.0
    kept, share = sparse.filtered(gradient, 0.5)
    assert share == 1 / 6
    assert torch.equal(kept[128:, :128], gradient[128:, :128])
    assert kept.abs().sum().item() == pytest.approx(gradient[128:, :128].abs().sum().item())


def test_without_a_filter_the_error_is_that_of_bf16() -> None:
    hidden, weight = torch.randn(256, 16), torch.randn(256, 16)
    rows = sparse.examined("random", hidden.bfloat16(), weight.bfloat16(), torch.zeros(256, dtype=torch.int64))
    whole = [row for row in rows if row["epsilon"] == 0]
    assert {row["words"] for row in whole} == {"as numbered", "sorted", "shuffled"}
    assert all(row["tiles left"] == 1 and 1e-4 < row["error of dH"] < 2.0**-7 for row in whole)


@pytest.mark.parametrize("ratio", graphs.RATIOS)
def test_a_bucket_has_room_and_is_at_most_a_ratio_larger(ratio: float) -> None:
    for size in range(graphs.SMALLEST, 2000, 7):
        found = graphs.bucket(size, ratio)
        assert size <= found <= size * ratio + 1
        assert graphs.bucket(found, ratio) == found


def test_sizes_of_a_micro_batch_are_those_of_the_packed_tensors() -> None:
    lengths = [PairLengths(3, 4, 5), PairLengths(7, 2, 6)]
    batch = pack([TokenPair([2] * one.prompt, [3] * one.chosen, [4] * one.rejected) for one in lengths])
    assert batch.segments is not None
    shapes = batch.input_ids.numel(), len(batch.segments.key_index), len(batch.targets), len(batch.segments.key_lengths)
    assert graphs.sizes(lengths) == shapes


def test_graphs_gain_nothing_where_the_host_takes_no_time() -> None:
    found = graphs.case(MODEL, 0.0, "hh-rlhf", 8, 8192, 1.25)
    assert found["waiting for the host"] == 0
    assert found["speed"] == pytest.approx(1 / (1 + found["FLOPs wasted"]))
    assert 0 < found["FLOPs wasted"] < 0.25


def test_graphs_hide_a_host_that_takes_long() -> None:
    slow, slower = (graphs.case(MODEL, asking, "hh-rlhf", 8, 8192, 1.25)["speed"] for asking in (10.0, 20.0))
    assert slower == pytest.approx(2 * slow)


def test_dequantising_once_saves_a_pass_of_three_or_four() -> None:
    rates = Ceilings(flops=1e30, bytes=4e12)  # products are free but for their bytes
    for checkpointing, passes in ((False, 3), (True, 4)):
        found = dequantise.saving(MODELS[quantised("llama-3.1-8b")], 1, checkpointing, rates)
        once, product = found["dequantising once, ms"], 2 * WEIGHTS / 4e12 * 1e3
        assert once == pytest.approx(WEIGHTS * (2 + 0.5 + 1 / 64 + 4 / (64 * 256)) / 4e12 * 1e3)
        assert found["saved in the first epoch"] == pytest.approx(once / (passes * (once + product)), rel=1e-3)


def test_dequantising_counts_for_less_in_longer_micro_batches() -> None:
    rates = Ceilings(790e12, 4.3e12)
    shares = [
        dequantise.saving(MODELS[quantised("mistral-7b")], tokens, False, rates)["saved in the first epoch"]
        for tokens in dequantise.TOKENS
    ]
    assert all(0.45 < after / before < 0.75 for before, after in pairwise(shares))


def test_views_and_allocations_are_not_counted_as_work() -> None:
    left = torch.ones(4, 4)
    with host.Counted() as counted:
        torch.mm(left, left.T).view(16).add(1.0)
        torch.promote_types(torch.empty(3).dtype, torch.float16)
    assert (counted.count, counted.products) == (2, 1)


def test_traffic_is_what_goes_in_and_out() -> None:
    left, right = torch.ones(8, 4), torch.ones(8, 4)
    with compiled.Traffic() as traffic:
        (left + right).t()
    assert traffic.moved == 3 * 8 * 4 * 4


def test_what_a_block_does_in_its_first_call_alone_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused kernels compare themselves with the module then, with all its weights."""
    run = Stepping(build_model(small.SHAPE, 64, "bfloat16", "cpu"))
    usual = compiled.of_block(run, 16, compiled=False)
    layer, calls = base_model(run.policy.model).model.layers[0], []
    forward = layer.forward

    def checking(*given: Any, **named: Any) -> Any:
        calls.append(0)
        if len(calls) == 1:
            forward(*given, **named)
        return forward(*given, **named)

    monkeypatch.setattr(layer, "forward", checking)
    assert compiled.of_block(run, 16, compiled=False) == usual and len(calls) == 2


@pytest.mark.parametrize(("device", "blocks"), [(CPU, "as they are"), (replace(CPU), "fused")], ids=["CPU", "another"])
def test_steps_are_called_by_the_blocks_that_ran(device: Any, blocks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU they were fused and called as they are."""
    fused: list[str] = []
    monkeypatch.setattr(compiled, "ROUNDS", 1)
    monkeypatch.setitem(MODELS, CPU.model, small.SHAPE)
    monkeypatch.setattr(compiled, "compiled_blocks", lambda *given: nullcontext())
    monkeypatch.setattr(compiled, "patched", lambda models: fused.append("fused") or nullcontext())
    monkeypatch.setattr(compiled, "pair_lengths", lambda profile, count: [PairLengths(4, 3, 3)])
    rows = compiled.stepped(device)
    assert [row["blocks"] for row in rows] == [*(fused or ["as they are"]), "compiled"] == [blocks, "compiled"]


@needs_fp8
def test_a_policy_that_is_its_reference_has_no_margin_in_fp8() -> None:
    torch.manual_seed(0)
    run = Stepping(build_model(small.SHAPE, 64, "bfloat16", "cpu"))
    layers = float8.attach(run.policy, float8.E4M3)
    batch = run.batch([TokenPair([2, 3, 4], [5, 6], [7, 8, 9])])
    assert all(isinstance(layer, nn.Linear) for layer in layers) and len(layers) == 7 * small.SHAPE.num_hidden_layers
    rewards = run.backward(batch).pairs.rewards
    assert rewards.abs().max() == 0
    with float8.detached(layers):
        plain = run.policy(batch.microbatches[0])[0]
    assert not torch.equal(plain, run.policy(batch.microbatches[0])[0])


def test_a_result_is_written_with_its_machine_and_versions(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "found.json"
    assert benchmarks.main(["explore", "dequantise", "--threads", "1", "--output", str(path)]) == 0
    found = json.loads(path.read_text())
    assert {"date", "commit", "machine", "versions", "tables"} <= set(found)
    assert "| mistral-7b-nf4 | 512 |" in capsys.readouterr().out


def test_what_trains_asks_for_pairs(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        benchmarks.main(["explore", "sparse"])
    assert "give them by --data FILE.jsonl" in capsys.readouterr().err
