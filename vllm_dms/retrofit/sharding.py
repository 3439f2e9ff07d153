"""A base that does not fit one GPU: each process holds a share of every layer's frozen weights, and
gathers a layer when it is needed (FSDP2). What is trained, the embedding and the head are whole in
each, so gradients, optimizer and states are what they are without."""

from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from .processes import Processes
from .recipe import Recipe


def check_shard(processes: Processes, recipe: Recipe, merged: bool) -> None:
    if processes.size == 1:
        raise ValueError(
            "--shard shares weights between processes, and there is one: start it with torchrun "
            "--nproc-per-node, or leave --shard out."
        )
    if recipe.train != "decisions" or merged:
        raise ValueError(
            "--shard is for frozen weights, of which none are written: it goes with --train "
            "decisions, --dialect adapter and without --merge."
        )


def shard(model: nn.Module, trained: Iterable[nn.Parameter], device: torch.device, size: int):
    """From a whole model on the CPU to this process's share of it on `device`, layer by layer."""
    mesh = init_device_mesh(device.type, (size,))
    inner, layers = model.model, model.model.layers
    inner.rotary_emb.to(device)
    whole = {p for name, p in model.named_parameters() if not name.startswith("model.layers.")}
    whole |= set(trained)
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    fully_shard(inner, mesh=mesh, ignored_params=whole)
    for module in (inner, *layers):
        module.forward = MethodType(_call, module)


def _call(module: nn.Module, function: Callable, *args):
    return function(module, *args)


def call(module: nn.Module, function: Callable, *args) -> Any:
    """function(module, *args); of a sharded module its weights are gathered meanwhile, and again
    for gradients."""
    if isinstance(module, FSDPModule):
        return module(function, *args)
    return function(module, *args)


def held(model: nn.Module) -> int:
    """Parameters that this process holds."""
    local = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return sum(p.numel() for p in local)
