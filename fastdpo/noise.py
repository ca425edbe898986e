"""Noise on the embeddings of training passes (NEFTune, arXiv:2310.05914; `neftune_noise_alpha`).

Uniform within alpha / sqrt(L * D), where L is the length of the pair's longer sequence: what transformers takes for
one pair, whose two rows are padded to it, and here for every pair, in whatever batch it comes. Packed, the two
responses see one noisy prompt, as they share its tokens. The noise of a pair depends on the seed, the step and its
tokens, so that the two passes of a loss that couples pairs see the same, and so does a step that is done again in
smaller micro-batches (padded, where rows get another width, it is drawn anew). The reference and evaluations never see
any: in TRL the reference does, where it is the policy without its adapters.

Legend: P pairs, R rows, T tokens of a row, D embedding size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from fastdpo.batch import PreferenceBatch
from fastdpo.model import Policy, base_model


@dataclass(frozen=True)
class EmbeddingNoise:
    alpha: float
    seed: int
    step: Callable[[], int]

    def __call__(self, batch: PreferenceBatch, embedded: Tensor) -> Tensor:
        """-> noise for `embedded`, (R, T, D)."""
        return (self._packed if batch.segments is not None else self._padded)(batch, embedded).to(embedded.dtype)

    def _packed(self, batch: PreferenceBatch, embedded: Tensor) -> Tensor:
        assert batch.segments is not None
        if batch.segments.crowded:
            raise ValueError(
                "pairs share tokens here, and noise on embeddings is a pair's own: set neftune_noise_alpha when the "
                "config is made, not in a trainer's args"
            )
        queries, keys = batch.segments.query_lengths, batch.segments.key_lengths
        parts = []
        for pair, (both, rejected) in enumerate(zip(queries[::2], queries[1::2], strict=True)):
            longer = max(keys[2 * pair], keys[2 * pair + 1])
            drawn = self._uniform(batch, pair, embedded, both + rejected)
            parts.append(drawn * (self.alpha / math.sqrt(longer * embedded.shape[-1])))
        return torch.cat(parts)[None]

    def _padded(self, batch: PreferenceBatch, embedded: Tensor) -> Tensor:
        assert batch.attention_mask is not None
        rows, width = embedded.shape[:2]
        of_pairs = torch.arange(rows, device=embedded.device)  # rows as pairs have them: with images chosen ones first
        of_pairs = (of_pairs.view(2, -1).T if batch.pairs else of_pairs.view(-1, 2)).flatten()
        longer = batch.attention_mask[of_pairs].sum(1).view(-1, 2).amax(1).repeat_interleave(2)  # (R,)
        drawn = torch.stack([self._uniform(batch, pair, embedded, 2, width) for pair in range(rows // 2)])
        drawn = drawn.flatten(0, 1) * (self.alpha / (longer * embedded.shape[-1]).sqrt())[:, None, None]
        return drawn[of_pairs.argsort()]

    def _uniform(self, batch: PreferenceBatch, pair: int, embedded: Tensor, *sizes: int) -> Tensor:
        """Within (-1, 1). Batches made by hand may have no keys: their pairs go by their place."""
        key = batch.keys[pair] if batch.keys else b"%d" % pair
        digest = blake2b(b"%d %d " % (self.seed, self.step()) + key, digest_size=8).digest()
        generator = torch.Generator(embedded.device).manual_seed(int.from_bytes(digest, "little") >> 1)
        return 2 * torch.rand(*sizes, embedded.shape[-1], generator=generator, device=embedded.device) - 1


@contextmanager
def noisy_embeddings(policy: Policy, alpha: float | None, seed: int, step: Callable[[], int]) -> Iterator[None]:
    """Within it, passes of `policy` in training mode have noise on their embeddings; nothing where alpha is None."""
    if alpha is None:
        yield
        return
    noise, batches = EmbeddingNoise(alpha, seed, step), []

    def note(module: Any, inputs: tuple[PreferenceBatch, ...]) -> None:
        batches[:] = inputs[:1]

    def add(module: Any, inputs: Any, embedded: Tensor) -> Tensor:
        return embedded + noise(batches[0], embedded) if policy.training else embedded

    hooks = [policy.register_forward_pre_hook(note)]
    hooks += [base_model(policy.model).get_input_embeddings().register_forward_hook(add)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
