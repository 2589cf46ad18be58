"""The optimizer of a run, its parameter groups, and the matrices that Muon updates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from dmoe.config.errors import ConfigError
from dmoe.config.expert_shapes import GATED
from dmoe.config.plugin_loader import construct, plugin_class
from dmoe.config.schema import OptimConfig
from dmoe.distributed.expert_parallel import expert_locations
from dmoe.distributed.optimizers.muon import Muon, Parts
from dmoe.distributed.optimizers.offloaded_adamw import OffloadedAdamW
from dmoe.distributed.optimizers.rounded_adamw import RoundedAdamW
from dmoe.distributed.state_dict import MOMENTS
from dmoe.hf.moefy import moefied_layers
from dmoe.models.attention import Attention
from dmoe.moe.experts import Experts, FeedForward

NO_DECAY = (
    "norm",
    "embedding",
    "router",
    "constant",
    "modular.experts.l",
    "modular.experts.vector",
    "embed_tokens",
    "bias",
    "A_log",
)
"""Parts of the names of parameters without weight decay, beside all vectors. The last three are of
published models: their embedding, biases stacked per expert, decay rates of a state space."""


def build_optimizer(
    model: nn.Module, config: OptimConfig, *, ep_rank: int = 0, seed: int = 0
) -> torch.optim.Optimizer:
    """Build the optimizer of `optim.kind`; weight decay applies to matrices only.

    Without decay: vectors, norms, embeddings, routers, constant experts, scaling modules (at zero
    they would switch the network off) and prompts. The fused implementation needs all parameters
    of a group on one device mesh, so what FSDP2 shards over different ranks is in groups of its
    own. Beside torch's keys a group has `moments`, the names of its state tensors, and `lr_scale`,
    its learning rate as a share of that of the run.

    `ep_rank` and `seed` are of the rounding of `optim.moments=bf16`.

    Raises:
        ConfigError: a pattern of `optim.groups` that matches no parameter, or nothing to train.
    """
    check_name_patterns(model, config.groups, "optim.groups")
    own = plugin_class(config.kind, "optim.kind")
    matrices = muon_matrices(model) if config.kind == "muon" else {}
    routers = {id(p) for layer in moefied_layers(model) for p in layer.router.parameters()}
    """Of published models, which have other names for them."""
    params: dict[tuple[Any, ...], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            given = next((v for p, v in config.groups.items() if fnmatchcase(name, p)), {})
            no_decay = parameter.ndim < 2 or any(part in name for part in NO_DECAY)
            no_decay = no_decay or id(parameter) in routers
            weight_decay = given.get("weight_decay", 0.0 if no_decay else config.weight_decay)
            scale = given.get("lr", config.lr) / config.lr
            device_mesh = getattr(parameter, "device_mesh", None)
            key = (device_mesh, weight_decay, scale, name in matrices, matrices.get(name))
            params.setdefault(key, []).append(parameter)
    if not params:
        allowed = "leaves no parameter to train, with the other settings that freeze some"
        fix = "name others, or set moe.router.freeze=false"
        raise ConfigError("optim.trainable", config.trainable, allowed, fix)
    groups = [
        {
            "params": group,
            "weight_decay": weight_decay,
            "lr_scale": scale,
            "moments": ("momentum_buffer",) if is_muon else getattr(own, "MOMENTS", MOMENTS),
            **({"parts": parts} if is_muon else {}),
        }
        for (_, weight_decay, scale, is_muon, parts), group in params.items()
    ]
    if own is not None:
        made: torch.optim.Optimizer = construct(
            config.kind,
            "optim.kind",
            groups,
            config.lr,
            options=config.options,
            base=torch.optim.Optimizer,
            methods=("MOMENTS",),
        )
        return made
    betas = (config.beta1, config.beta2)
    if config.kind == "muon":
        return Muon(groups, config.lr, betas, config.eps, config.momentum)
    if config.moments == "bf16":
        return RoundedAdamW(groups, config.lr, betas, config.eps, model, ep_rank, seed)
    if config.offload:
        return OffloadedAdamW(groups, config.lr, betas, config.eps)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)


def check_name_patterns(model: nn.Module, patterns: Iterable[str], field: str) -> None:
    """Refuse a pattern that matches no parameter. Raises ConfigError, for the field `field`."""
    names = [*dict(model.named_parameters()), *expert_locations(model)]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            allowed = f"matches no parameter; they are called e.g. {', '.join(names[:3])}"
            raise ConfigError(field, pattern, allowed, "a * stands for any text")


def muon_matrices(model: nn.Module) -> dict[str, Parts]:
    """Return the matrices that Muon updates, by name, with their parts.

    Those of attention, feed-forwards and experts, but for a head of experts, which is the output.
    """
    return {
        name: parts
        for path, module in model.named_modules()
        if not path.startswith("head")
        for name, parts in _matrices(module, path)
    }


def _matrices(module: nn.Module, path: str) -> Iterator[tuple[str, Parts]]:
    """Yield the matrices of one module; linear layers have theirs transposed."""
    if isinstance(module, Attention):
        heads, shared = module.num_heads * module.head_dim, module.num_kv_heads * module.head_dim
        yield f"{path}.w_qkv.weight", (-2, (heads, shared, shared))
        yield f"{path}.w_out.weight", None
    elif isinstance(module, FeedForward):
        yield f"{path}.w_in.weight", _halves(module.kind, -2, module.w_in.weight.shape[0])
        yield f"{path}.w_out.weight", None
    elif isinstance(module, Experts):
        for name, weight in module.named_parameters():
            is_last = name == "w_out" or name.endswith(f".w{_last(module, name)}")
            width = weight.shape[-1]
            yield f"{path}.{name}", None if is_last else _halves(module.kind, -1, width)


def _last(experts: Experts, name: str) -> int:
    """Return the index of the last matrix of the heterogeneous expert that `name` is of."""
    expert = name.partition(".")[0]
    return len(experts.matrices[int(expert)]) - 1 if expert.isdigit() else 0


def _halves(kind: str, dim: int, width: int) -> Parts:
    return (dim, (width // 2, width // 2)) if kind in GATED else None
