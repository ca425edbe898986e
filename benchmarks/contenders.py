"""Who computes token log-probs of an LM head: fastdpo's methods, plain torch and the libraries, each as its own code
uses it.

A contender is a function that takes a Head and returns a Way, or raises Unavailable with the reason. Everything that a
library prepares once for a model belongs there; what it does in every step belongs in `compute`. Settings are each
library's defaults unless the row's name says otherwise. Libraries are imported when their turn comes: none is needed.

What each does, from its source (N rows, V vocabulary, D hidden size):

    torch           N x V logits and what autograd keeps of them
    torch.compile   the same, fused by inductor
    TRL             chunks of 4096 rows x 32768 tokens; the backward recomputes them and adds up in fp32
    Liger FLCE      chunks of rows by `chunk_mem_const`; with reduction="none" the backward recomputes them
    Liger FLSCE     Liger's per-token operator: CUTLASS kernels on Hopper, plain torch in chunks of 512 rows elsewhere
    CCE             one Triton kernel each way; the backward leaves out tiles whose gradients are below `filter_eps`
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.heads import Head

FULL_GRAPHS = 64  # of one compiled function, one for each shape and set of gradients: beyond torch's 8 it would give up


class Unavailable(Exception):
    """Why a contender cannot run here."""


@dataclass(frozen=True)
class Way:
    """One implementation on one head."""

    compute: Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden (N, D), weight (V, D), targets (N,) -> (N,)
    path: str  # which of its code runs on this device
    version: str  # of its package; empty for fastdpo, which the commit stands for
    sign: int = 1  # -1: it returns negative log-probs
    around: Callable[[], AbstractContextManager[None]] = nullcontext  # what a call, backward included, runs in


def _imported(module: str, package: str) -> tuple[Any, str]:
    """-> the module and the package's version; raises Unavailable where it is not installed."""
    try:
        return __import__(module, fromlist=["_"]), version(package)
    except (ModuleNotFoundError, PackageNotFoundError) as error:
        raise Unavailable(f"{package} is not installed ({error})") from None


def _needs_cuda(head: Head, what: str) -> None:
    if head.hidden.device.type != "cuda":
        raise Unavailable(f"{what} needs a GPU")


def fastdpo(head: Head, method: str, stats: tuple[str, ...] = (), workspace_bytes: int | None = None) -> Way:
    from fastdpo_kernels.linear_logps import linear_logps

    if method != "torch":
        _needs_cuda(head, f"method={method!r}")
    paths = {
        "streamed": "chunks of rows: cuBLAS products, a Triton kernel along each row",
        "fused": "Triton kernels, products included",
        "torch": "chunks of rows in plain torch",
    }

    def compute(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return linear_logps(hidden, weight, targets, method=method, stats=stats, workspace_bytes=workspace_bytes)[0]

    return Way(compute, paths[method], "")


def torch_cross_entropy(head: Head) -> Way:
    """The leanest plain torch: logits and log-probs stay in the dtype of the model."""

    def compute(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(hidden @ weight.T, targets, reduction="none")

    dtype = str(head.hidden.dtype).removeprefix("torch.")
    return Way(compute, f"eager, logits and log-probs in {dtype}", torch.__version__, sign=-1)


def fastdpo_pointers(head: Head) -> Way:
    """The fused method without tensor descriptors, on a GPU that it takes them on."""
    from fastdpo_kernels import launch

    way = fastdpo(head, "fused")
    usual = launch.fused_config
    device = launch.device_of(head.hidden.device)
    if not usual(head.hidden.dtype, device, True).logits.descriptors:
        raise Unavailable("fused takes pointers here by itself")

    def without_descriptors(*given: Any) -> launch.FusedConfig:
        config = usual(*given)
        return launch.FusedConfig(*(replace(getattr(config, one.name), descriptors=False) for one in fields(config)))

    @contextmanager
    def around() -> Iterator[None]:
        launch.fused_config = without_descriptors
        try:
            yield
        finally:
            launch.fused_config = usual

    return replace(way, path=f"{way.path}, tiles by pointers", around=around)


def _log_softmax(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    log_probs = (hidden @ weight.T).float().log_softmax(-1)
    return log_probs.gather(1, targets[:, None])[:, 0]


def torch_log_softmax(head: Head) -> Way:
    """The careful plain torch: log-softmax of fp32 logits, as transformers' loss takes it."""
    return Way(_log_softmax, "eager, logits cast to fp32", torch.__version__)


def torch_compile(head: Head) -> Way:
    """The careful one again: inductor fuses the cast and the softmax into its passes over the logits."""
    config: Any = torch._dynamo.config  # pyright: ignore[reportAttributeAccessIssue]
    config.recompile_limit = FULL_GRAPHS
    compiled = torch.compile(_log_softmax, fullgraph=True, dynamic=False)
    return Way(compiled, "inductor, one full graph for each shape", torch.__version__)


def torch_linear_cross_entropy(head: Head) -> Way:
    """torch's own operator in chunks, from 2.13 on."""
    operator, options = getattr(F, "linear_cross_entropy", None), getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if operator is None or options is None:
        raise Unavailable(f"torch {torch.__version__} has no F.linear_cross_entropy with options")
    chosen = options()

    def compute(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return operator(hidden, weight, targets, reduction="none", options=chosen)

    return Way(compute, "eager, in chunks by its default options", torch.__version__, sign=-1)


def trl_chunked(head: Head, outputs: tuple[str, ...] = ("log_probs",)) -> Way:
    """As trl.trainer.utils.add_fused_lm_head calls it; its reference model asks for log_probs alone."""
    kernels, number = _imported("trl.kernels.chunked_logprob", "trl")
    utils, _ = _imported("trl.trainer.utils", "trl")
    width = utils._CHUNKED_LOGPROB_CHUNK_SIZE

    def compute(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return kernels.ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, width, None, 1.0, outputs)[0]

    along = "a Triton kernel" if kernels._use_triton(head.hidden.device) else "plain torch"
    return Way(compute, f"chunks of {kernels.TOKEN_CHUNK_SIZE} x {width}, {along} along each row", number)


def liger_flce(head: Head, chunk_mem_const: int = 1) -> Way:
    """liger_fused_linear_cross_entropy; `chunk_mem_const` is its ratio of logits to hidden rows in elements."""
    _needs_cuda(head, "Liger's fused_linear_cross_entropy")
    functional, number = _imported("liger_kernel.transformers.functional", "liger-kernel")
    function = functional.LigerFusedLinearCrossEntropyFunction
    rows, vocabulary, width = head.shape
    parts = -(-vocabulary // (chunk_mem_const * width))
    chunk = min(rows, 1 << (-(-rows // parts) - 1).bit_length())  # its own rule: the next power of 2

    def compute(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return functional.liger_fused_linear_cross_entropy(
            hidden, weight, targets, reduction="none", chunk_mem_const=chunk_mem_const
        )

    return Way(compute, f"{function.__module__}, chunks of {chunk} rows", number, sign=-1)


def liger_flsce(head: Head) -> Way:
    """Without its check of the targets, which waits for the device and which its documentation lets one turn off."""
    ops, number = _imported("liger_kernel.ops", "liger-kernel")
    module, _ = _imported("liger_kernel.ops.fused_linear_scaled_cross_entropy", "liger-kernel")
    os.environ["LIGER_SCALED_CE_SM90_VALIDATE_TARGETS"] = "0"
    try:
        chosen = module._resolve_implementation(head.hidden.device)
    except ImportError as error:
        raise Unavailable(f"on this GPU it needs a package that is not installed: {error}") from None

    def compute(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return ops.LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, targets)

    fallback = chosen is module._FusedLinearPPOFallbackFunction
    note = f", plain torch in chunks of {module._FALLBACK_CHUNK_SIZE} rows" if fallback else ""
    return Way(compute, chosen.__name__ + note, number, sign=-1)


def cut_cross_entropy(head: Head, filter_eps: str | None = "high") -> Way:
    """linear_cross_entropy; filter_eps="high" is its default (eps / 32 of the dtype), None computes every tile."""
    _needs_cuda(head, "cut-cross-entropy's default implementation")
    package, number = _imported("cut_cross_entropy", "cut-cross-entropy")
    implementation = package.linear_cross_entropy.__module__

    def compute(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return package.linear_cross_entropy(
            hidden, weight, targets, reduction="none", filter_eps=filter_eps, impl="cce"
        )

    return Way(compute, f"{implementation}, impl=cce (Triton), filter_eps={filter_eps}", number, sign=-1)


DPO_STATS = ("entropy", "mean_logit", "is_top1")  # what a DPO step logs, of the policy
TRL_DPO_OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")  # the same, as TRL's DPOTrainer asks for it

# In the order of their turns. cut-cross-entropy comes last: should it reach for memory that is not its own, as it has
# been reported to, the GPU answers nobody after it.
CONTENDERS: dict[str, Callable[[Head], Way]] = {
    "fastdpo streamed": partial(fastdpo, method="streamed"),
    "fastdpo streamed, 64 MiB": partial(fastdpo, method="streamed", workspace_bytes=2**26),  # an 8 GB card's
    "fastdpo fused": partial(fastdpo, method="fused"),
    "fastdpo fused, pointers": fastdpo_pointers,
    "fastdpo torch": partial(fastdpo, method="torch"),
    "torch cross_entropy": torch_cross_entropy,
    "torch log_softmax": torch_log_softmax,
    "torch.compile": torch_compile,
    "torch linear_cross_entropy": torch_linear_cross_entropy,
    "TRL chunked": trl_chunked,
    "fastdpo streamed, statistics": partial(fastdpo, method="streamed", stats=DPO_STATS),
    "TRL chunked, statistics": partial(trl_chunked, outputs=TRL_DPO_OUTPUTS),
    "Liger FLCE": liger_flce,
    "Liger FLCE, chunk_mem_const=8": partial(liger_flce, chunk_mem_const=8),
    "Liger FLSCE": liger_flsce,
    "CCE": cut_cross_entropy,
    "CCE, filter_eps=None": partial(cut_cross_entropy, filter_eps=None),
}
# Whom the aims compare; these have their turns at every shape before the others have any.
AIMED_AT = ("fastdpo streamed", "fastdpo streamed, 64 MiB", "fastdpo fused", "TRL chunked", "Liger FLCE", "Liger FLSCE")
OWN = "fastdpo"  # contenders whose failure is an error


def is_own(name: str) -> bool:
    return name.startswith(OWN)
