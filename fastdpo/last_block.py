"""The last block's MLP on the rows that the LM head reads, and on no others.

Of a packed row's prompt the last block's keys and values are needed, by the queries of the responses; what comes after
its attention is not, but for each prompt's last token. So its MLP, most of a block, is given the scored rows alone, and
zeros stand where the others' answers would: nothing reads them. Log-probs and gradients are the same. A prompt of twice
a response's length is half of the tokens: 1.2% of a step of Llama-3.1-8B, 2.3% of Llama-3.2-1B's with its 16 blocks.

By hooks, on while a trainer is at work: a block's attention is told its segments at each call, in the second forward of
a checkpointed block, too. What is called without segments (generation, padded batches) computes everything.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from fastdpo.batch import Segments
from fastdpo.model import Policy, balances_routers, base_model
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
    """The block, its attention and its MLP. None of experts: what their routers are balanced by counts all tokens."""
    model = base_model(policy.model)
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    parts = dict(blocks[-1].named_children()) if blocks and not balances_routers(model) else {}
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
        yield block.register_forward_pre_hook(rows.begin)
        yield attention.register_forward_pre_hook(rows.note, with_kwargs=True)
        yield mlp.register_forward_pre_hook(rows.select)
        yield mlp.register_forward_hook(rows.spread)


class _ScoredRows:
    """From an attention's call to the end of its MLP's."""

    noted: Segments | None = None
    taken: Segments | None = None  # by the MLP's call that is on

    def begin(self, block: nn.Module, inputs: Any) -> None:
        """Not before the second forward of a checkpointed block in transformers 5.23, which runs it without its hooks;
        5.17 with them.
        """
        self.noted = None

    def note(self, attention: nn.Module, inputs: Any, options: Mapping[str, Any]) -> None:
        self.noted = options.get("segments")

    def select(self, mlp: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        self.taken, self.noted = self.noted if inputs else None, None
        if self.taken is None:
            return None
        return inputs[0].index_select(1, self.taken.scored), *inputs[1:]

    def spread(self, mlp: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        segments, self.taken = self.taken, None
        if segments is None:
            return None
        whole = output.new_zeros(1, sum(segments.query_lengths), output.shape[-1])
        return whole.index_copy(1, segments.scored, output)
