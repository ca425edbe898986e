"""Which layout a model takes, proven and not listed.

Many families accept a custom attention function and silently do without it: ALiBi, attention classes of their own,
dropped keyword arguments, recurrent layers. So two small pairs go through the model itself and through both layouts
before training. Packed runs where every layer called our attention and the log-probs are the model's own; padded, with
the reason said, where they are not. Where the dtype of the run goes to another attention backend than the probe's
fp32, both are tried.

Legend: P pairs, T tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastdpo.attention import Calls, CannotPack, packed_calls
from fastdpo.attention_backends import PACKABLE, Facts, Refused, choose
from fastdpo.batch import LEAST_SHARED, PreferenceBatch, emptied, encode_decode, pack, pad
from fastdpo.data import TokenPair
from fastdpo.images import TOKEN_TYPES, Processing, collate
from fastdpo.model import Policy, backbone, base_model, input_embedding
from fastdpo.quantized import states_of_8_bits, without_outliers
from fastdpo.sharding import is_sharded

# Rounding of two right computations of a logit, relative to the largest one: a wrong mask or position moves a trained
# model's log-probs by far more. fp64 as fp32: many families compute norms, rotations or softmax in fp32 anyway.
ROUNDING = {torch.float64: 2e-5, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}


Collation = Callable[[Sequence[TokenPair], Sequence[bytes]], PreferenceBatch]


@dataclass(frozen=True)
class Layout:
    """How pairs become batches, and why so."""

    packed: bool
    reason: str
    pad_token_id: int = 0
    attention: tuple[Facts, ...] = ()  # packed: what the backend of each kind of layer is chosen by, in the run's dtype
    make: Collation | None = None  # of models that take neither
    shared: bool = False  # packed: pairs share what they begin alike with, too

    def collate(self, pairs: Sequence[TokenPair], keys: Sequence[bytes] = ()) -> PreferenceBatch:
        if self.make is not None:
            return self.make(pairs, keys)
        if any(pair.images is not None for pair in pairs):
            raise ValueError(
                "the trainer was built with rows of text alone, and these show images: give it a train_dataset or an "
                "eval_dataset that has some"
            )
        if self.packed:
            return pack(pairs, keys, LEAST_SHARED if self.shared else None)
        return pad(pairs, keys, self.pad_token_id)

    def empty(self) -> PreferenceBatch:
        """Without pairs, for a process that takes part in what others do."""
        return emptied(self.collate([TokenPair([0], [0], [0])]))

    def tokens(self, pair: TokenPair) -> int:
        """What a pair costs in this layout: its prompt once, or two rows of its longer side."""
        if self.packed:
            return pair.length
        return 2 * (len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)))


def find_layout(
    policy: Policy, pad_token_id: int = 0, processing: Processing | None = None, shown: Sequence[TokenPair] = ()
) -> Layout:
    """Tries both layouts on two pairs; the model's mode, attention and random state are as before afterwards.

    With `processing` the model sees images, and `shown` are pairs of the run that have some: they are tried, too.

    Raises ValueError where even the padded layout does not give the model's own log-probs, or where tokens see later
    ones.
    """
    rows = input_embedding(policy.model).weight.shape[0]
    pairs = probe_pairs(rows if processing is None else min([rows, *processing.image_tokens])) + list(shown)
    training, autocast = policy.training, policy.autocast
    # what is sharded comes in the dtype that computes, and FlashAttention 2 takes no fp32
    fp32 = all(p.dtype == torch.float32 and not is_sharded(p) for p in policy.parameters() if p.is_floating_point())
    sharper = fp32 and autocast is not None and policy.asked_attention != "flash_attention_2"
    make = _encoder_decoder(policy, pad_token_id) if base_model(policy.model).config.is_encoder_decoder else None
    if processing is not None:
        known = inspect.signature(backbone(base_model(policy.model)).forward).parameters
        types = [name for name in TOKEN_TYPES if name in known]
        make = partial(collate, processing=processing, pad_token_id=pad_token_id, types=types)
    policy.eval()
    try:
        # what LLM.int8 takes for an outlier depends on all of a batch: a causal model would look like an encoder
        with torch.no_grad(), without_outliers(policy):
            policy.autocast = None if sharper else autocast
            reason, seen = _try_layouts(policy, pairs, pad_token_id, make)
            policy.autocast = autocast
            if sharper and not reason:
                there, seen = seen, tuple(replace(facts, dtype=autocast) for facts in seen)
                if any(choose(one)[0] != choose(other)[0] for one, other in zip(there, seen, strict=True)):
                    reason, seen = _try_layouts(policy, pairs, pad_token_id)  # the run's own backend, if less sharply
    finally:
        policy.train(training)
        policy.autocast = autocast
    return Layout(not reason, reason or "every attention layer takes packed segments", pad_token_id, seen, make)


def _encoder_decoder(policy: Policy, pad_token_id: int) -> Collation:
    """Raises ValueError for a model whose decoder begins otherwise than with one fixed token."""
    model: Any = base_model(policy.model)
    start = model.config.decoder_start_token_id
    if start is None:
        raise ValueError(
            f"{type(model).__name__} does not say how its decoder begins: set decoder_start_token_id in its config"
        )
    labels = torch.tensor([[3, 4, 5], [5, 4, 3]], device=input_embedding(model).weight.device)
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)  # M2M-100 shifts in its forward only
    shifted = shift(labels=labels).tolist() if shift else [[start, 3, 4], [start, 5, 4]]
    if shifted != [[start, 3, 4], [start, 5, 4]]:
        raise ValueError(
            f"the decoder of {type(model).__name__} begins by its labels (with {shifted[0][0]} for 3 4 5), and only "
            "one fixed decoder_start_token_id is supported: give another encoder-decoder"
        )
    return partial(encode_decode, pad_token_id=pad_token_id, start_token_id=start)


def _try_layouts(
    policy: Policy, pairs: Sequence[TokenPair], pad_token_id: int, make: Collation | None = None
) -> tuple[str, tuple[Facts, ...]]:
    """-> why not to pack, "" where nothing is against it, and the kinds of attention calls that packing makes."""
    expected, tolerance = _model_logps(policy, pairs, make)
    batch = make(pairs, ()) if make else pad(pairs, pad_token_id=pad_token_id)
    noise = _check_padded(policy, batch, expected, tolerance)
    if batch.decoder_input_ids is not None:
        return "an encoder-decoder: a prompt is encoded once, its responses are rows of the decoder", ()
    if make:
        return "positions and masks go by the images of each row", ()
    if policy.asked_attention not in PACKABLE:
        return f"attn_implementation={policy.asked_attention!r} takes padded batches only", ()
    with packed_calls() as calls:
        packed = pack(pairs, least_shared=1)
        reason = _why_not_packed(policy, packed, expected, min(tolerance, max(4 * noise, tolerance / 4)), calls)
    return reason, tuple(dict.fromkeys(calls.facts))


def probe_pairs(vocabulary: int) -> list[TokenPair]:
    """Two small pairs: ragged, one of them with a one-token response, and alike in two tokens."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda count: torch.randint(min(3, vocabulary - 1), vocabulary, (count,), generator=generator).tolist()  # noqa: E731
    first = TokenPair(draw(5), draw(4), draw(3))
    return [first, TokenPair([*first.prompt[:2], *draw(1)], draw(1), draw(6))]


def _sequence(pair: TokenPair, make: Collation | None) -> dict[str, Tensor]:
    """What the model's own forward takes for a pair's prompt and chosen response."""
    if make is None:
        return {"input_ids": torch.tensor([[*pair.prompt, *pair.chosen]])}
    batch = make([replace(pair, rejected=pair.chosen)], ())
    if batch.decoder_input_ids is None:  # both rows are alike, so there is no padding
        return {**batch.media, "input_ids": batch.input_ids}
    return {"input_ids": batch.input_ids, "decoder_input_ids": batch.decoder_input_ids[:1, : len(pair.chosen)]}


def _model_logps(policy: Policy, pairs: Sequence[TokenPair], make: Collation | None = None) -> tuple[Tensor, float]:
    """(N,) log-probs by the model's own forward, one sequence at a time, and how far off another one may be."""
    model = base_model(policy.model)
    device = input_embedding(model).weight.device
    values, largest = [], 1.0
    with torch.autocast(device.type, policy.autocast) if policy.autocast else nullcontext():
        for pair in pairs:
            for response in (pair.chosen, pair.rejected):
                inputs = {name: ids.to(device) for name, ids in _sequence(replace(pair, chosen=response), make).items()}
                logits = _logits(policy, inputs)
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                if not logits.isfinite().all():
                    kind = type(model).__name__
                    raise ValueError(f"{kind} gives logits that are not finite: {_broken_weights(model)}")
                _check_causal(policy, inputs, logits)
                largest = max(largest, float(logits.abs().max()))
                scored = logits if "decoder_input_ids" in inputs else logits[len(pair.prompt) - 1 : -1]
                targets = torch.tensor(response, device=device)
                values.append(scored.log_softmax(-1).gather(1, targets[:, None])[:, 0])
    precision = policy.autocast or min(
        (p.dtype for p in policy.parameters() if p.is_floating_point()), key=lambda d: d.itemsize
    )
    rounding = ROUNDING[precision]
    if states_of_8_bits(policy):  # bitsandbytes takes fp16 inputs, and an input may round to the next of 127 values
        rounding = max(rounding, ROUNDING[torch.float16])
    return torch.cat(values), rounding * largest


def _logits(policy: Policy, inputs: Mapping[str, Tensor]) -> Tensor:
    return policy.within(lambda: policy.model(**inputs, use_cache=False)).logits[0]


def _broken_weights(model: nn.Module) -> str:
    broken = [name for name, p in model.named_parameters() if p.is_floating_point() and not p.isfinite().all()]
    if not broken:
        return "its weights are finite, so what it computes overflows its dtype: set bf16=True or load it in float32"
    more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
    return f"{broken[0]}{more} of its weights hold NaN or infinity: load it anew, or take an earlier checkpoint"


def _check_causal(policy: Policy, inputs: dict[str, Tensor], logits: Tensor) -> None:
    *_, (generated, tokens) = inputs.items()
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % logits.shape[-1]
    again = _logits(policy, {**inputs, generated: changed}).to(logits.dtype)
    if not torch.allclose(again[:-1], logits[:-1], rtol=1e-2, atol=1e-3 * float(logits.abs().max())):
        raise ValueError(
            f"{type(base_model(policy.model)).__name__} lets a token see later ones (is it an encoder?): "
            "preference training needs a causal language model"
        )


def _check_padded(policy: Policy, batch: PreferenceBatch, expected: Tensor, tolerance: float) -> float:
    """-> the error of the padded layout, which is rounding."""
    error = _error(policy, batch, expected)
    if not error <= tolerance:
        raise ValueError(
            f"the log-probs that fastdpo computes for {type(base_model(policy.model)).__name__} differ from the "
            f"model's own by {error:.1e}, more than rounding ({tolerance:.0e}): its head or padding has a form that is "
            "not supported yet"
        )
    return error


def _why_not_packed(policy: Policy, batch: PreferenceBatch, expected: Tensor, tolerance: float, calls: Calls) -> str:
    model = base_model(policy.model)
    parameters: dict[str, Any] = dict(inspect.signature(backbone(model).forward).parameters)
    if "position_ids" not in parameters:
        return f"{type(model).__name__} takes no position ids"
    try:
        error = _error(policy, batch, expected)
    except CannotPack as refusal:
        return str(refusal)
    except (Refused, torch.OutOfMemoryError):
        raise
    except Exception as failure:  # any code may stumble over our keywords and the missing mask: that is the answer
        return f"{type(model).__name__} fails on a packed batch: {type(failure).__name__}: {failure}"
    config = model.config.get_text_config()
    layers, windows = config.num_hidden_layers, declared_windows(config)
    if calls.count != layers:
        return (
            f"{calls.count} of {layers} layers of {type(model).__name__} take part in transformers' attention interface"
        )
    if calls.windows != windows:  # the pairs are shorter than a real window, so log-probs would not show it
        return (
            f"{type(model).__name__} has windows or chunks {windows}, its attention function was given {calls.windows}"
        )
    if not error <= tolerance:
        return f"packed log-probs of {type(model).__name__} differ from the model's own by {error:.1e}"
    return ""


def declared_windows(config: Any) -> list[int]:
    """How far back each layer sees that does not see everything."""
    window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    if kinds := getattr(config, "layer_types", None):
        limits = {"sliding_attention": window or 0, "chunked_attention": chunk or 0}
        return [limits[kind] for kind in kinds if kind in limits]
    return [window] * config.num_hidden_layers if window else []


def _error(policy: Policy, batch: PreferenceBatch, expected: Tensor) -> float:
    logps, _ = policy(batch.to(expected.device))
    return float((logps - expected).abs().max())
