"""patch(model): the kernels of `fastdpo_kernels` inside of a transformers or peft model, for any training loop.

Forwards are bound on module instances, by the rows of `architectures`; no class, module or function of transformers
changes, and `unpatch` takes the forwards away again. A bound forward holds no module but its own and reads weights,
adapters and modes from it at each call: copies compute with their own weights, adapters may come, go, be merged and
switched off. An attention forward is transformers' own code over a copy of its globals in which the rotary function is
ours; it runs on a view of its module that answers for LoRA and 4-bit projections.

Each class of patched modules compares itself at its first call with the unpatched one, on a few rows of its input, and
raises where they differ by more than rounding (`first_use.py`). No gradient is recorded and no
random number drawn for that, nothing of the model changes meanwhile, and no hook sees it: a module with hooks inside is
left to the next of its class. 4-bit layers that bitsandbytes itself reads wrongly have nothing to be compared with.

Not supported: double backward and the transforms of torch.func. Both raise.

What torch.compile traces is the unpatched model, in one graph as before: the compiler fuses norms, rotations and gated
units itself, and our launches would break its graph.

torch.nn.DataParallel shares a model's bound methods among its replicas, so it takes unpatched models only; DDP is fine.

Legend: T tokens, D columns.
"""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, activations

from fastdpo.architectures import FAMILIES, Block, Family, Gated, Left, Norm, Rotary
from fastdpo.first_use import CHECKED_ROWS, Checks, few_rows
from fastdpo.messages import show_messages
from fastdpo.projections import bound_by_others, is_linear, projection, refusal, touched, wider, worth_it
from fastdpo.quantized import keep_unpacked, misread_layers
from fastdpo_kernels.glu import glu
from fastdpo_kernels.lora import Projection, lora_linear, lora_mlp, lora_qkv
from fastdpo_kernels.rms_norm import rms_norm
from fastdpo_kernels.rope import rope

logger = logging.getLogger(__name__)

_bound: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # modules that have our forward, whatever has wrapped it since
KINDS = ("rms_norm", "glu", "rope", "lora_qkv", "lora_mlp", "lora")


@dataclass(frozen=True)
class PatchReport:
    """What `patch` found and did.

    `families`: rows of the table that the model has modules of, () for an unknown family. `counts`: modules by kind
    (KINDS) as the model stands now; lora_qkv counts attentions whose three projections are one, lora_mlp gated MLPs of
    frozen projections (of those under glu), lora other projections. `left_alone`: reason -> names of modules.
    `bound`: how many forwards this call bound; 0 where the model was patched before.
    """

    families: tuple[str, ...]
    counts: dict[str, int]
    left_alone: dict[str, list[str]]
    bound: int

    def __str__(self) -> str:
        if not self.families:
            return f"nothing patched: {next(iter(self.left_alone), 'no module of a known family')}"
        counts = ", ".join(f"{kind} {count}" for kind, count in self.counts.items() if count)
        done = "patched" if self.bound else "patched already, nothing changed"
        left = "; ".join(f"{len(names)} x {why}" for why, names in self.left_alone.items())
        return f"{done}: {' + '.join(self.families)}: {counts or 'nothing'}" + (f"; left alone: {left}" if left else "")


def patch(model: nn.Module) -> PatchReport:
    """Binds our forwards on the model's modules and says what it did; see the module docstring.

    Takes any transformers or peft model, before or after adapters are added, quantised or not. A family without a row
    stays as it is but for modules of families that have one, and the report says so; it also names what stands where
    the family has other modules. Patching twice changes nothing, and counts anew. Hooks on a module inside are heeded;
    those on every module (torch's register_module_forward_hook) do not see layers that are fused. bitsandbytes is kept
    from packing 4-bit weights for the CPU, which makes later gradients wrong, and that stays after `unpatch`. Raises
    ValueError, before anything changes, where transformers has none of the classes or attributes that the model's row
    names, and for weights that were packed already.
    """
    show_messages()
    report = _bind(model)
    logger.info("%s", report)
    return report


@contextmanager
def patched(models: Iterable[nn.Module]) -> Iterator[list[PatchReport]]:
    """Within it these models are patched; one that came patched stays so afterwards. Keeps none of them alive."""
    reports: list[tuple[Callable[[], nn.Module | None], PatchReport]] = []
    try:
        reports += ((weakref.ref(model), _bind(model)) for model in models)
        del models
        yield [report for _, report in reports]
    except BaseException:
        for failure in _unpatch_all(reports):  # what is raised already matters more
            logger.warning("%s", failure)
        raise
    if failures := _unpatch_all(reports):
        raise failures[0]


def _unpatch_all(reports: list[tuple[Callable[[], nn.Module | None], PatchReport]]) -> list[ValueError]:
    """-> what went wrong, after every model had its turn."""
    failures = []
    for alive, report in reports:
        if report.bound and (model := alive()) is not None:
            try:
                unpatch(model)
            except ValueError as failure:
                failures.append(failure)
    return failures


def _bind(model: nn.Module) -> PatchReport:
    _check_is_module(model)
    found = list(_pieces(model))
    families = tuple(dict.fromkeys(name for name, *_ in found))
    whole = {_row(type(module)) for module in model.modules() if isinstance(module, PreTrainedModel)}
    for name in families:
        if name in whole:
            _check_promises(name, FAMILIES[name], [module for row, _, module, _ in found if row == name], model)
    keep_unpacked(model)
    if misread := misread_layers(model):
        logger.warning(
            "bitsandbytes reads %d 4-bit layers wrongly on this CPU, such as %s: their rows end amid a block of "
            "scales; fused ones are read right, others and the unpatched model's are not",
            len(misread),
            misread[0],
        )
    checks, left, bound = Checks(), _LeftAlone(), 0
    forwards: dict[tuple[type, Any], Callable] = {}
    for _, name, module, piece in found:
        if _is_ours(vars(module).get("forward")):
            continue
        if why := _why_not(module, piece):
            left.add(why, name)
            continue
        if (key := (type(module), piece)) not in forwards:
            forwards[key] = _forward(type(module), piece, checks)
        vars(module)["forward"] = MethodType(forwards[key], module)
        _bound.add(module)
        bound += 1
    _say_what_is_not_the_rows(model, families, whole, left)
    return PatchReport(families, _count(model, found, left), left.names, bound)


def unpatch(model: nn.Module) -> None:
    """Takes our forwards away: the model computes as before `patch`. Nothing happens to a model that was not patched.

    Raises ValueError, before anything changes, where something else has wrapped one of them since.
    """
    _check_is_module(model)
    for name, module in model.named_modules():
        own = vars(module)
        for key, value in own.items():
            if key != "forward" and _is_ours(value):
                raise ValueError(
                    f"the patched forward of {name} ({type(module).__name__}) is now under {key!r}, as when accelerate "
                    "adds a hook: remove that first, then call unpatch again"
                )
        if module in _bound and "forward" in own and not _is_ours(own["forward"]):
            raise ValueError(
                f"{name} ({type(module).__name__}) was given another forward after patch, which may call the patched "
                "one: give it back the one that it had, then call unpatch again"
            )
    for module in model.modules():
        if _is_ours(vars(module).get("forward")):
            del vars(module)["forward"]
        _bound.discard(module)


def is_patched(model: nn.Module) -> bool:
    return any(_is_ours(vars(module).get("forward")) for module in model.modules())


# Finding


def _pieces(model: nn.Module) -> Iterator[tuple[str, str, nn.Module, Any]]:
    """-> the name of the row, of the module, the module, and what its class is in that row."""
    for name, module in model.named_modules():
        if (piece := _piece(type(module))) is not None:
            yield _row(type(module)), name, module, piece


def _row(cls: type) -> str:
    """The row of the modeling file that a class comes from, "" where there is none."""
    path = cls.__module__.split(".")
    if path[:2] != ["transformers", "models"] or path[2:] != [path[-2], f"modeling_{path[-2]}"]:
        return ""
    return path[2] if path[2] in FAMILIES else ""


def _piece(cls: type) -> Any:
    row = _row(cls)
    return FAMILIES[row].classes.get(cls.__name__) if row else None


def _check_promises(row: str, family: Family, modules: list[nn.Module], model: nn.Module) -> None:
    there = vars(sys.modules[f"transformers.models.{row}.modeling_{row}"])
    broken = sorted(family.classes.keys() - family.some - there.keys())
    broken += [one for module in modules for one in _broken(type(module), module)]
    if broken:
        raise ValueError(
            f"the row {row!r} of fastdpo.architectures promises {', '.join(dict.fromkeys(broken))}, and this "
            f"{type(model).__name__} has none: its version of transformers is written otherwise; train unpatched, or "
            "correct the row"
        )


def _broken(cls: type, module: nn.Module) -> list[str]:
    """What its row says of a module that is not so."""
    piece = _piece(cls)
    broken = [f"{cls.__name__}.{name}" for name in _attributes(piece) if not hasattr(module, name)]
    if isinstance(piece, Block) and piece.rotary and not _calls(cls, piece.rotary.function):
        broken.append(f"{cls.__name__}.forward calling {piece.rotary.function}")
    return broken


def _say_what_is_not_the_rows(model: nn.Module, families: tuple[str, ...], whole: set[str], left: _LeftAlone) -> None:
    """Puts the family itself, classes made from a row's, and those that a model has nothing of, among what is left."""
    if not families:
        left.add(f"{_family_name(model)} has no row in fastdpo.architectures: it trains unpatched", "")
    for row in families:
        if row not in whole:
            left.add(f"{_family_name(model)} has no row in fastdpo.architectures: patched is what it has of {row}", "")
    present: set[str] = set()
    for name, module in model.named_modules():
        known = next((one for one in type(module).__mro__ if _piece(one) is not None), None)
        if known is not None:
            present.add(known.__name__)
            if known is not type(module):
                left.add(f"{type(module).__name__} computes in its own way, not as {known.__name__}", name)
    for family in (FAMILIES[row] for row in sorted(whole - {""})):
        for absent in sorted(family.classes.keys() - family.some - present):
            left.add(f"no {absent}: what stands in its place computes in its own way", "")


def _attributes(piece: Any) -> tuple[str, ...]:
    if isinstance(piece, Norm):
        return (piece.eps, piece.weight) if piece.weight else (piece.eps,)
    if isinstance(piece, Gated):
        return piece.projections if piece.fixed else (*piece.projections, piece.activation)
    return piece.qkv if isinstance(piece, Block) else ()


def _calls(cls: type, name: str) -> bool:
    forward = cls.forward  # type: ignore[attr-defined]
    return isinstance(forward, FunctionType) and name in forward.__code__.co_names and name in forward.__globals__


def _why_not(module: nn.Module, piece: Any) -> str:
    if isinstance(piece, Left):
        return piece.why
    if broken := _broken(type(module), module):
        return f"no {broken[0]}"
    if bound_by_others(module):
        return "a forward bound by others"
    if isinstance(piece, Gated) and _activation(module, piece) is None:
        act = getattr(module, piece.activation)
        why = touched(act) if isinstance(act, nn.Module) else ""
        return f"{piece.activation} has {why}" if why else f"{type(act).__name__} has no kernel"
    return ""


def _activation(module: nn.Module, piece: Gated) -> str | None:
    """The activation's name in `fastdpo_kernels.glu`; None where it is another, or has hooks."""
    if piece.fixed:
        return piece.activation
    act: Any = getattr(module, piece.activation)
    if isinstance(act, nn.Module) and touched(act):
        return None
    inner = getattr(act, "act", None)
    if isinstance(act, (nn.SiLU, activations.SiLUActivation)):
        return "silu"
    if isinstance(act, activations.GELUActivation) and inner is nn.functional.gelu:
        return "gelu"
    if isinstance(act, activations.GELUTanh) and not isinstance(inner, MethodType):
        return "gelu_tanh"
    return None


def _family_name(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))


def _check_is_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}, expected a transformers or peft model")


# Forwards


def _is_ours(value: Any) -> bool:
    return isinstance(value, MethodType) and getattr(value.__func__, "fastdpo_patch", False)


def _forward(cls: Any, piece: Any, checks: Checks) -> Callable:
    ours = {Norm: _norm_forward, Gated: _gated_forward, Block: _block_forward}[type(piece)](cls, piece, checks)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return cls.forward(self, *args, **kwargs)
        return ours(self, *args, **kwargs)

    forward.fastdpo_patch = True  # type: ignore[attr-defined]
    return forward


def _norm_forward(cls: Any, piece: Norm, checks: Checks) -> Callable:
    def normed(self: Any, x: Tensor) -> Tensor:
        weight = getattr(self, piece.weight) if piece.weight else None
        return rms_norm(x, weight, getattr(self, piece.eps), offset=piece.offset, round_first=piece.round_first)

    def forward(self: Any, x: Tensor) -> Tensor:
        if checks.due("rms_norm", (cls,), x, self):
            checks.compare("rms_norm", (cls,), normed, cls.forward, self, few_rows(x))
        return normed(self, x)

    return forward


def _gated_forward(cls: Any, piece: Gated, checks: Checks) -> Callable:
    def apart(self: Any, x: Tensor) -> Tensor:
        """The activation is ours, and each projection that is worth it."""
        activation: Any = _activation(self, piece)
        *ups, down = (_Projected(getattr(self, name), checks) for name in piece.projections)
        gate, up = (project(x) for project in ups) if len(ups) == 2 else ups[0](x).chunk(2, dim=-1)
        return down(glu(gate, up, activation))

    def fused(self: Any, x: Tensor) -> Tensor:
        three: Any = _projections(self, piece.projections, x)
        return lora_mlp(x, *three, _activation(self, piece))  # type: ignore[arg-type]

    def forward(self: Any, x: Tensor) -> Tensor:
        if (activation := _activation(self, piece)) is None:  # replaced or hooked since
            return cls.forward(self, x)
        now = _projections(self, piece.projections, x) if len(piece.projections) == 3 else None
        kind, compute = ("glu", apart) if now is None else ("lora_mlp", fused)
        what = (cls, activation, *_weights(now or ()))
        if checks.due(kind, what, x, self):
            checks.compare(kind, what, compute, cls.forward, self, few_rows(x))
        if now is None:
            return apart(self, x)
        gate, up, down = now
        return lora_mlp(x, gate, up, down, activation)

    return forward


def _block_forward(cls: Any, piece: Block, checks: Checks) -> Callable:
    function = _with_our_rotary(cls.forward, piece.rotary, checks) if piece.rotary else cls.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen = _View(self, piece.qkv, checks) if any(worth_it(m) for m in self.children()) else self
        return function(seen, *args, **kwargs)

    return forward


def _projections(module: nn.Module, names: tuple[str, ...], x: Tensor) -> list[Projection] | None:
    """All of them, or None."""
    found: list[Projection] = []
    for name in names:
        child = module._modules[name]
        if child is None or (one := projection(child, x)) is None:
            return None
        found.append(one)
    return found


def _weights(projections: Iterable[Projection]) -> tuple[type, ...]:
    return tuple(type(one.weight) for one in projections)


class _Projected:
    """A projection that runs fused where that is worth it, and otherwise as it does by itself."""

    def __init__(self, module: Any, checks: Checks, together: Callable[[Tensor], Tensor] | None = None) -> None:
        self.module, self.checks, self.together = module, checks, together

    def __call__(self, x: Tensor) -> Tensor:
        if self.together is not None:
            return self.together(x)
        if not worth_it(self.module) or (now := projection(self.module, x)) is None:
            return self.module(x)
        cls, base = type(self.module), type(self.module._modules.get("base_layer"))
        if self.checks.due("lora", (cls, base), x, self.module):
            fused: Callable = lambda module, x: lora_linear(x, projection(module, x))  # type: ignore[arg-type]  # noqa: E731
            self.checks.compare("lora", (cls, base), fused, cls.forward, self.module, few_rows(x))
        return lora_linear(x, now)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


class _View:
    """A module as its own forward sees it during one call: projections are ours, all else is the module's."""

    def __init__(self, module: Any, qkv: tuple[str, ...], checks: Checks) -> None:
        vars(self).update(_module=module, _qkv=qkv, _checks=checks, _taken={})

    @property
    def __class__(self) -> Any:  # attention functions are given the view, and may ask what it is
        return type(self._module)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if name in self._qkv:
            return _Projected(value, self._checks, lambda x: self._project(name, x))
        return _Projected(value, self._checks) if isinstance(value, nn.Module) and is_linear(value) else value

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._module, name, value)

    def _project(self, name: str, x: Tensor) -> Tensor:
        """The first of the three computes all; the others take theirs if they are given the same x."""
        module, taken = self._module, self._taken
        if taken.get("x") is not x or name not in taken:
            worth = any(worth_it(module._modules[one]) for one in self._qkv)
            now = _projections(module, self._qkv, x) if worth else None
            if now is None:
                return _Projected(getattr(module, name), self._checks)(x)
            what = (type(module), *_weights(now))
            if self._checks.due("lora_qkv", what, x, module):
                fused: Callable = lambda module, x: lora_qkv(x, *_projections(module, self._qkv, x) or ())  # noqa: E731
                self._checks.compare("lora_qkv", what, fused, self._apart, module, few_rows(x))
            taken.update(zip((*self._qkv, "x"), (*lora_qkv(x, *now), x), strict=True))
        return taken.pop(name)

    def _apart(self, module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(getattr(module, name)(x) for name in self._qkv)


# Rotary positions


def _with_our_rotary(forward: FunctionType, rotary: Rotary, checks: Checks) -> Callable:
    """The same code, defaults and closure over a copy of its globals, in which the rotary function is ours."""
    names = {**forward.__globals__, rotary.function: _rotated(forward.__globals__[rotary.function], rotary, checks)}
    copy = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


def _rotated(original: Callable, rotary: Rotary, checks: Checks) -> Callable:
    tokens = 1 if rotary.table == "complex" else 2

    def ours(q: Tensor, k: Tensor, *table: Tensor) -> tuple[Tensor, Tensor]:
        return _rotate(rotary, q, k, *table)

    def rotated(q: Tensor, k: Tensor, *table: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        if options:  # other arguments than the families of the table pass
            return original(q, k, *table, **options)
        if checks.due("rope", (original,), q, None):
            few, length = [t[:1, :CHECKED_ROWS] for t in table], min(CHECKED_ROWS, q.shape[tokens])
            few_k = k[:1].narrow(tokens, 0, length)
            sliced = lambda function: lambda _, q: function(q, few_k, *few)  # noqa: E731
            few_q = q[:1].narrow(tokens, 0, length)
            checks.compare("rope", (original,), sliced(ours), sliced(original), None, few_q)
        return ours(q, k, *table)

    return rotated


def _rotate(rotary: Rotary, q: Tensor, k: Tensor, *table: Tensor) -> tuple[Tensor, Tensor]:
    form: dict[str, Any] = {"interleaved": rotary.interleaved, "upcast": rotary.upcast}
    if rotary.table == "complex":
        (angles,) = table
        q, k = rope(q.transpose(1, 2), k.transpose(1, 2), angles.real, angles.imag, by_pair=True, **form)
        return q.transpose(1, 2), k.transpose(1, 2)
    cos, sin = table
    if rotary.table == "doubled":
        cos, sin = (t[..., : t.shape[-1] // 2] for t in table)
    return rope(q, k, cos, sin, by_pair=rotary.table != "full", **form)


# What the report says


@dataclass
class _LeftAlone:
    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, why: str, name: str) -> None:
        self.names.setdefault(why, []).append(name)


def _count(model: nn.Module, found: list[tuple[str, str, nn.Module, Any]], left: _LeftAlone) -> dict[str, int]:
    """Modules by kind, as the model stands now; adds the projections that run by themselves to `left`."""
    counts: dict[str, int] = dict.fromkeys(KINDS, 0)
    inside: set[int] = set()
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    for _, name, module, piece in found:
        if not _is_ours(vars(module).get("forward")):
            continue
        counts["rms_norm"] += isinstance(piece, Norm)
        counts["glu"] += isinstance(piece, Gated)
        counts["rope"] += isinstance(piece, Block) and piece.rotary is not None
        if not isinstance(piece, Norm):
            _count_projections(name, module, piece, counts, left, dtype)
            inside |= {id(child) for child in module.children()}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and id(module) not in inside:
            left.add("LoRA outside of attention and MLP", name)
    return counts


def _count_projections(
    name: str, module: Any, piece: Any, counts: dict[str, int], left: _LeftAlone, dtype: torch.dtype
) -> None:
    children = {key: child for key, child in module.named_children() if is_linear(child)}
    whys = {key: refusal(child, training=True) or wider(child, dtype) for key, child in children.items()}
    for key, why in whys.items():
        if why:
            left.add(why, f"{name}.{key}")
    together = piece.projections if isinstance(piece, Gated) else piece.qkv
    fused = len(together) == 3 and not any(whys.get(key, "missing") for key in together)
    if isinstance(piece, Gated):
        counts["lora_mlp"] += fused
    else:
        fused = fused and any(worth_it(children[key]) for key in together)
        counts["lora_qkv"] += fused
    alone = children.keys() - set(together if fused else ())
    counts["lora"] += sum(worth_it(children[key]) and not whys[key] for key in alone)
