"""The head's gradient with its small tiles left out, as cut-cross-entropy's filter does: how many are left, what that
does to the result, and what it can save.

With a frozen head dH = G W, where G = 1[y] - p. A tile of TILE tokens by TILE words in which no entry reaches epsilon
is not multiplied. Words may be sorted by their mean probability, so that the likely ones share tiles; the order is
taken from one half of the tokens and used on the other, as a run would use its last steps.

Legend: N tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.device import DEVICES
from benchmarks.explore import small
from benchmarks.flops import needed_flops
from benchmarks.heads import TILE, make_head
from benchmarks.models import MODELS
from benchmarks.run import LORA_RANK
from benchmarks.workload import PROFILES, build_model, pair_lengths
from fastdpo.batch import pack
from fastdpo.data import TokenPair
from fastdpo.model import Policy

EPSILONS = (2.0**-12, 2.0**-13, 2.0**-14, 2.0**-16)  # bf16 rounds 1 to 2^-9, and 2^-12 is cut-cross-entropy's
SHAPE = (512, 128_256, 256)  # of heads.py, narrow: D hardly matters to probabilities


def tiles(gradient: Tensor) -> Tensor:
    """(N, V) -> the largest size of an entry in each tile, (N / TILE, V / TILE), the last ones smaller."""
    return torch.nn.functional.max_pool2d(gradient.abs()[None, None], TILE, ceil_mode=True)[0, 0]


def filtered(gradient: Tensor, epsilon: float) -> tuple[Tensor, float]:
    """The gradient with zeros for tiles below epsilon, and the share of tiles that are left."""
    left = tiles(gradient) >= epsilon
    mask = left.repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)[: len(gradient), : gradient.shape[1]]
    return gradient * mask, left.double().mean().item()


def orders(probabilities: Tensor) -> dict[str, Tensor]:
    """Ways to number the words."""
    place, count = probabilities.device, probabilities.shape[1]
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(0)).to(place)
    by_mean = probabilities.mean(0).argsort(descending=True)
    return {"as numbered": torch.arange(count, device=place), "sorted": by_mean, "shuffled": shuffled}


def examined(what: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> list[dict[str, Any]]:
    """Every epsilon and order, on the second half of the tokens; errors are relative, in the Frobenius norm."""
    probabilities = (hidden.float() @ weight.float().T).softmax(1)
    first, rest = probabilities.chunk(2)
    entries = torch.arange(len(rest), device=rest.device), targets[len(first) :]
    gradient = -rest
    gradient[entries] += 1
    exact = (hidden[len(first) :].double() @ weight.double().T).softmax(1).neg_()
    exact[entries] += 1
    truth = exact @ weight.double()

    def error(approximate: Tensor, words: Tensor) -> float:
        found = approximate.bfloat16().double() @ weight[words].double()  # summed exactly: rounding of G alone
        return ((found.bfloat16().double() - truth).norm() / truth.norm()).item()

    rows = []
    for name, words in orders(first).items():
        for epsilon in (0.0, *EPSILONS):
            kept, share = filtered(gradient[:, words], epsilon)
            lost = (gradient[:, words] - kept).abs().sum(1).max().item()
            row = {"data": what, "words": name, "epsilon": epsilon, "tiles left": share, "most probability lost": lost}
            rows.append({**row, "error of dH": error(kept, words)})
    return rows


def small_head(pairs: list[TokenPair], options: Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden rows, head and targets of the small trained model on all responses."""
    device = DEVICES[options.device]
    model: Any = build_model(small.SHAPE, 4 * small.LONGEST, "float32", device.place)
    model.load_state_dict(small.learned(pairs, device)[0])
    batches = [pack([pair]).to(device.place) for pair in pairs]
    policy = Policy(model)
    with torch.no_grad():
        hidden = torch.cat([policy.hidden_rows(batch) for batch in batches])
    return hidden, model.lm_head.weight.detach(), torch.cat([batch.targets for batch in batches])


def bound(name: str, profile: str) -> dict[str, Any]:
    """What is saved of a step's needed FLOPs, reference included, if no tile were left."""
    model, pairs = MODELS[name], pair_lengths(PROFILES[profile], 256)
    scored = sum(pair.chosen + pair.rejected for pair in pairs)
    product = 2.0 * model.vocab_size * model.hidden_size * scored
    return {"model": name, "profile": profile, "dH of a step": product / needed_flops(pairs, model, LORA_RANK, True)}


def measure(options: Namespace) -> dict[str, list[dict[str, Any]]]:
    head = make_head(SHAPE, "bfloat16", DEVICES[options.device].place)
    rows = examined("heads.py", head.hidden, head.weight, head.targets)
    rows += examined("small model", *small_head(small.encode(small.texts(options.data)), options))
    bounds = [bound(name, profile) for name in ("llama-3.1-8b", "llama-3.2-1b") for profile in PROFILES]
    return {"tiles": rows, "bound": bounds}
