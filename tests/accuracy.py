"""The rule that every kernel is held to: at most twice the error of plain torch in the same dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_errs_at_most_twice(name: str, ours: Tensor, torchs: Tensor, truth: Tensor) -> None:
    """In maximum and in root mean square against `truth` in fp64, but for a unit in the last place of the largest."""
    assert ours.shape == truth.shape, f"{name}: {tuple(ours.shape)}, expected {tuple(truth.shape)}"
    if not truth.numel():
        return
    floor = torch.finfo(ours.dtype).eps * truth.abs().max()
    error, allowed = (ours.double() - truth).abs(), (torchs.double() - truth).abs()
    for kind, mine, theirs in (
        ("maximum", error.max(), allowed.max()),
        ("rms", error.square().mean().sqrt(), allowed.square().mean().sqrt()),
    ):
        assert mine <= 2 * theirs + floor, f"{name}: {kind} error {mine:.2e}, torch's {theirs:.2e}, one ulp {floor:.2e}"
