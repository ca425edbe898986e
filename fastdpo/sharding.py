"""FSDP2: each process holds a share of every weight, gradient and optimizer state, and what it computes with is
gathered a block at a time (torch's `fully_shard`; Zhao et al., arXiv:2304.11277).

A transformer block is a unit. What is left, embeddings, last norm and LM head, is one with the policy around it, which
is so gathered once a pass and not once a chunk of the head. Outside of a pass all parameters are DTensors.

Every pass takes all processes: whatever decides whether one is made, they decide together. Files hold whole tensors, so
that a run goes on with any number of processes, sharded or not.

torch's part is imported where it is used: it takes two seconds, which others need not wait for.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn

logger = logging.getLogger(__name__)

ELEMENTWISE = ("Adam", "AdamW", "SGD", "RMSprop", "Adagrad")  # of torch.optim: right on a share of a tensor


# Of `fsdp_config`: what has an effect, and what is refused with a reason of its own
FSDP_SETTINGS = ("version", "auto_wrap_policy", "transformer_layer_cls_to_wrap", "reshard_after_forward")
FSDP_SETTINGS += ("cpu_ram_efficient_loading",)
FSDP_REFUSED = ("activation_checkpointing", "cpu_offload", "min_num_params")


def asked_plugin(fsdp_args: Mapping[str, Any] | None) -> FullyShardedDataParallelPlugin | None:
    """What `accelerate launch` or the option `fsdp` asks for, None where neither does; `fsdp_args` are transformers' of
    the option. Raises ValueError for FSDP1 and for settings that would have no effect.
    """
    launched = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")
    if not launched and not fsdp_args:
        return None
    version = int((fsdp_args or {}).get("fsdp_version", os.environ.get("FSDP_VERSION", "1")))
    if version != 2:
        raise ValueError(f"FSDP version {version} was asked for, and fastdpo shards by FSDP2: set fsdp_version to 2")
    plugin = FullyShardedDataParallelPlugin(**(fsdp_args or {}))
    from torch.distributed.fsdp import CPUOffloadPolicy

    given = {name: getattr(plugin, name) for name in ("activation_checkpointing", "ignored_modules", "min_num_params")}
    given["cpu_offload"] = isinstance(plugin.cpu_offload, CPUOffloadPolicy)
    instead = {
        "activation_checkpointing": "set gradient_checkpointing=True, which checkpoints the same blocks",
        "cpu_offload": "weights stay on the GPUs: start more processes, or train adapters",
        "ignored_modules": "leave it out: everything is sharded",
        "min_num_params": "leave it out, or set transformer_layer_cls_to_wrap: units are transformer blocks",
    }
    for name, advice in instead.items():
        if given[name]:
            raise ValueError(f"FSDP's {name} was asked for, which is not available: {advice}")
    return plugin


def shard(policy: Any, plugin: Any, equalise: Callable[[nn.Module], None], device: torch.device) -> None:
    """Moves a policy's weights to the device, unit by unit, and leaves this process its share of them. `equalise` makes
    a module what it is in the first process, which alone needs to have loaded it.

    Gradients are summed over processes, not averaged. Raises ValueError for a model whose blocks are not known, and for
    quantised weights.
    """
    model = policy.model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    quantized = [name for name, parameter in model.named_parameters() if not parameter.is_floating_point()]
    if quantized:
        raise ValueError(
            f"{quantized[0]} is quantised, and FSDP2 shards 16 and 32 bit weights only: configure accelerate for "
            "MULTI_GPU, where every process holds all of the quantised weights, or load the model without quantisation"
        )
    blocks = _blocks(model, plugin)
    kinds = ", ".join(sorted({type(block).__name__ for block in blocks}))
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    # blocks are gathered in the dtype that autocast computes in: half the traffic where masters are fp32
    narrow = MixedPrecisionPolicy(policy.autocast, torch.float32, cast_forward_inputs=False)
    whole = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for unit in (*blocks, policy):
        _move(unit, device)
        equalise(unit)
        if unit is policy:
            fully_shard(unit, mesh=mesh, mp_policy=whole)
        else:
            fully_shard(unit, mesh=mesh, mp_policy=narrow, reshard_after_forward=bool(plugin.reshard_after_forward))
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    policy.shares = _count_shares(policy)
    policy.register_forward_hook(_reshard_without_gradient)
    logger.info("FSDP2: %d blocks (%s) and what is around them, a share each", len(blocks), kinds)


def _count_shares(policy: nn.Module) -> int:
    return sum(is_sharded(parameter) for parameter in policy.parameters())


def check_at_rest(policy: Any) -> None:
    """Raises RuntimeError where an error has ended an earlier pass: FSDP2 does not go on from there."""
    if _count_shares(policy) != policy.shares:
        raise RuntimeError(
            "an error ended an earlier pass of this model, and FSDP2 does not go on from there: load it and build "
            "the trainer again; resume_from_checkpoint=True goes on from the last checkpoint"
        )


def _move(unit: nn.Module, device: torch.device) -> None:
    """What is not sharded yet; `unit.to` would make tensors anew, shares among them. What this process did not read has
    room there, no more.
    """

    def moved(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)

    for parameter in unit.parameters():
        if parameter.is_meta:
            torch.utils.swap_tensors(parameter, nn.Parameter(moved(parameter), parameter.requires_grad))
        elif not is_sharded(parameter):
            parameter.data = moved(parameter.data)
    for module in unit.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = moved(buffer)


def _reshard_without_gradient(policy: Any, inputs: Any, outputs: Any) -> None:
    """No backward comes that would do it, and somebody may look at the parameters, or change them."""
    if not torch.is_grad_enabled():
        for module in policy.modules():  # with reshard_after_forward=False blocks, too
            if hasattr(module, "reshard"):
                module.reshard()


def _blocks(model: Any, plugin: FullyShardedDataParallelPlugin) -> list[Any]:
    """The modules of the classes asked for, by default those that transformers would not split over devices."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = plugin.transformer_cls_names_to_wrap or list(base._no_split_modules or ())
    found = [module for module in model.modules() if type(module).__name__ in names]
    missing = set(names) - {type(module).__name__ for module in found}
    if missing and plugin.transformer_cls_names_to_wrap:
        raise ValueError(f"transformer_layer_cls_to_wrap names {sorted(missing)}, which the model does not have")
    if not found:
        raise ValueError(
            f"{type(base).__name__} does not say which modules its blocks are: name their class as FSDP's "
            "transformer_layer_cls_to_wrap"
        )
    return found


def is_sharded(value: Any) -> bool:
    """Whether it is a DTensor."""
    return hasattr(value, "full_tensor")


def shapes_of(policy: Any) -> Any:
    """A policy that is not sharded yet, without its weights: what the memory plan goes by."""
    memo: dict[int, Any] = {}
    for parameter in policy.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    return copy.deepcopy(policy, memo | {id(b): torch.empty_like(b, device="meta") for b in policy.buffers()})


def gathered_bytes(policy: Any, plugin: Any) -> int:
    """Of units that are whole at one time, beside the shares: what is around the blocks, and of blocks the one that
    computes, the one that is fetched ahead and the buffer that it comes in; gradients of what trains, in fp32.
    """
    blocks = _blocks(policy.model, plugin)
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    around = [parameter for parameter in policy.parameters() if id(parameter) not in inside]
    largest = max(blocks, key=lambda block: sum(p.numel() for p in block.parameters()))
    size = policy.autocast.itemsize if policy.autocast else 0
    block = sum(p.numel() * (size or p.itemsize) + 4 * p.numel() * p.requires_grad for p in largest.parameters())
    return sum(p.nbytes + 4 * p.numel() * p.requires_grad for p in around) + 3 * block


def share_of(value: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return value.to_local() if is_sharded(value) else value  # type: ignore[operator]


def whole(value: Any) -> Any:
    """A tensor as it is in one process, from the shares of all, which call this together; anything else as it is."""
    return value.full_tensor() if is_sharded(value) else value


@torch.no_grad()
def fill_from_first(parameters: Mapping[str, Tensor], saved: Mapping[str, Tensor] | None) -> None:
    """Sharded parameters from whole tensors by the same names, which the first process has; all call this."""
    for name, parameter in parameters.items():
        value = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        if saved is not None:
            value.copy_(saved[name])
        torch.distributed.broadcast(value, src=0)
        parameter.copy_(share_like(value, parameter))


def share_like(value: Tensor, parameter: Tensor) -> Tensor:
    """What a sharded parameter holds of a whole tensor that every process has; the tensor itself for others."""
    if not is_sharded(parameter):
        return value
    from torch.distributed.tensor import distribute_tensor

    target: Any = parameter
    value = value.to(parameter.device)
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)


def whole_tree(values: Any, keep: bool) -> Any:
    """Nested dicts and lists with whole tensors, on the CPU; where not `keep`, DTensors are gathered and dropped."""
    if isinstance(values, dict):
        return {key: whole_tree(value, keep) for key, value in values.items()}
    if isinstance(values, list):
        return [whole_tree(value, keep) for value in values]
    if not is_sharded(values):
        return values
    gathered = values.full_tensor()
    return gathered.cpu() if keep else None


def shard_optimizer_state(state: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """A whole state dict, as it fits an optimizer over sharded parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    by_number = dict(zip(numbers, parameters, strict=False))

    def fitted(value: Any, parameter: Tensor) -> Any:
        matches = isinstance(value, Tensor) and value.shape == parameter.shape and value.dim() > 0
        return share_like(value, parameter) if matches else value

    moments = {
        number: {name: fitted(value, by_number[number]) for name, value in values.items()}
        for number, values in state["state"].items()
        if number in by_number
    }
    return {**state, "state": moments}


def check_optimizer(optimizer: Any) -> None:
    """Raises ValueError for an optimizer that does not compute share by share what it would of whole tensors."""
    kind = type(optimizer)
    if not kind.__module__.startswith("torch.optim") or kind.__name__ not in ELEMENTWISE:
        raise ValueError(
            f"{kind.__name__} does not update shares of tensors: under FSDP2 take optim='adamw_torch_fused' (its "
            "states are sharded, too), another one of torch's, or let every process hold the whole model (MULTI_GPU)"
        )
