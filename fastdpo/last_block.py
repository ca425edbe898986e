"""The last block's MLP on the rows that the LM head reads, and on no others.

Of a packed row's prompt the last block's keys and values are needed, by the queries of the responses; what comes after
its attention is not, but for each prompt's last token. So its MLP, most of a block, is given the scored rows alone, and
zeros stand where the others' answers would: nothing reads them. Log-probs and gradients are the same. A prompt of twice
a response's length is half of the tokens: 1.2% of a step of Llama-3.1-8B, 2.3% of Llama-3.2-1B's with its 16 blocks.

By hooks, on while a trainer is at work: a block's attention is told its segments at each call, in the second forward of
a checkpointed block, too. What is called without segments (generation, padded batches) computes everything. A block
that runs a second time in one forward would read the zeros: its model cannot be packed with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from fastdpo.attention import CannotPack
from fastdpo.batch import Segments
from fastdpo.model import Policy, backbone, balances_routers, base_model, block_lists
from fastdpo.projections import is_linear

ATTENTION = ("self_attn", "attn", "attention")  # what transformers calls it in its blocks, beside "mlp"


@contextmanager
def scored_rows_alone(policies: Iterable[Policy]) -> Iterator[None]:
    """Within it the last MLP of these policies' models computes scored rows alone, where a block has attention and then
    a `mlp` of linear layers. Keeps none of the models alive.
    """
    with ExitStack() as stack:
        for hook in (hook for policy in policies for hook in _hooks(policy)):
            stack.callback(hook.remove)
        del policies
        yield


def is_on(policy: Policy) -> bool:
    """Whether this policy's model is at it."""
    hooks = [hook for _, _, mlp in _last_block(policy) for hook in mlp._forward_hooks.values()]
    return any(isinstance(getattr(hook, "__self__", None), _ScoredRows) for hook in hooks)


def _last_block(policy: Policy) -> Iterator[tuple[nn.Module, nn.Module, nn.Module]]:
    """The block, its attention and its MLP. None of experts: what their routers are balanced by counts all tokens.

    Text comes last among towers that are as deep.
    """
    model = base_model(policy.model)
    if balances_routers(model) or model.config.is_encoder_decoder:
        return
    blocks = [*chain.from_iterable(block_lists(model)[-1:])]
    parts = dict(blocks[-1].named_children()) if blocks and isinstance(blocks[-1], GradientCheckpointingLayer) else {}
    mlp, attention = parts.get("mlp"), next((parts[name] for name in ATTENTION if name in parts), None)
    if mlp is None or attention is None:
        return
    if all(is_linear(part) or next(part.parameters(), None) is None for part in mlp.children()):
        yield blocks[-1], attention, mlp


def _hooks(policy: Policy) -> Iterator[Any]:
    if is_on(policy):
        return
    for block, attention, mlp in _last_block(policy):
        rows = _ScoredRows()
        yield backbone(base_model(policy.model)).register_forward_pre_hook(rows.start)
        yield block.register_forward_pre_hook(rows.begin)
        yield block.register_forward_hook(rows.end, always_call=True)
        yield attention.register_forward_pre_hook(rows.note, with_kwargs=True)
        yield mlp.register_forward_pre_hook(rows.select)
        yield mlp.register_forward_hook(rows.spread)


class _ScoredRows:
    """From an attention's call to the end of its MLP's."""

    noted: Segments | None = None
    taken: Segments | None = None  # by the MLP's call that is on
    again: bool = False  # it took rows in this forward already

    def start(self, model: nn.Module, inputs: Any) -> None:
        self.again = False

    def begin(self, block: nn.Module, inputs: Any) -> None:
        """Not before the second forward of a checkpointed block in transformers 5.23, which runs it without its hooks;
        5.17 with them.
        """
        self.noted = None

    def end(self, block: nn.Module, inputs: Any, output: Any) -> None:
        """Also after an error: what is called next has nothing to do with these segments."""
        self.noted = self.taken = None

    def note(self, attention: nn.Module, inputs: Any, options: Mapping[str, Any]) -> None:
        self.noted = options.get("segments")

    def select(self, mlp: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        self.taken, self.noted = self.noted if inputs else None, None
        if self.taken is None:
            return None
        if not _computes_again():
            if self.again:
                raise CannotPack("its last block runs twice in a forward: fused_kernels=False may pack it")
            self.again = True
        return inputs[0].index_select(1, self.taken.scored), *inputs[1:]

    def spread(self, mlp: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        segments, self.taken = self.taken, None
        if segments is None:
            return None
        whole = output.new_zeros(1, sum(segments.query_lengths), output.shape[-1])
        return whole.index_copy_(1, segments.scored, output)


def _computes_again() -> bool:
    """Within a backward, where checkpointed blocks have their second forward."""
    return torch._C._current_graph_task_id() != -1
