"""Merge modules into the weights of the base model (task arithmetic), or average their parameters.

    merge:    W <- W + sum over m of weight[m] * delta_m        (Ilharco et al. 2023; LoRA's merge)
    average:  theta <- sum over m of weight[m] * theta_m        (model soups, Wortsman et al. 2022;
                                                                 AdaMix, Wang et al. 2022)

A merged network costs what the network without modules costs, and computes what the mixture with
these constant weights computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dmoe.config.errors import ConfigError
from dmoe.modular.aggregation import WeightedSum
from dmoe.modular.attach import adapter_layers, detach
from dmoe.modular.banks import Scale, SparseDelta
from dmoe.modular.banks.base import AdapterBank
from dmoe.modular.layer import AdapterLayer
from dmoe.modular.routing import ConstantRouter


def merge(model: nn.Module, weights: Sequence[float]) -> None:
    """Merge all modules into the base model with one weight per module, and detach them.

    Works for LoRA, SparseDelta and Scale beside a Linear. The hash of the base model changes.

    Raises: ConfigError if a target cannot be merged. Then nothing is changed.
    """
    layers = adapter_layers(model)
    merged = {name: _merged_weight(model, name, layer, weights) for name, layer in layers.items()}
    with torch.no_grad():
        for name, (weight, bias) in merged.items():
            target = model.get_submodule(name)
            assert isinstance(target, nn.Linear)
            target.weight.copy_(weight)
            if bias is not None:
                target.bias.copy_(bias)
    detach(model)


def _merged_weight(
    model: nn.Module, name: str, layer: AdapterLayer, weights: Sequence[float]
) -> tuple[Tensor, Tensor | None]:
    """Return the weight [O, I] and, if it changes, the bias [O] of one target; at least float32."""
    target, bank = model.get_submodule(name), layer.experts
    _check_weights(name, bank, weights)
    if not isinstance(target, nn.Linear):
        allowed = f"is a {type(target).__name__}, not a Linear"
        raise ConfigError("merge", name, allowed, "keep its modules, or average them")
    tied = [m for m in _modules_with_weight(model, target.weight) if m is not target]
    if tied:
        allowed = f"shares its weight with a {type(tied[0]).__name__}, which would be changed too"
        raise ConfigError("merge", name, allowed, "untie them, or keep its modules")
    dtype = torch.promote_types(target.weight.dtype, torch.float32)
    weight_OI, bias = target.weight.detach().to(dtype), target.bias
    if isinstance(bank, Scale):
        factor_O = 1 + torch.stack(
            [w * (bank.l[m].detach().to(dtype) - 1) for m, w in enumerate(weights)]
        ).sum(0)
        return weight_OI * factor_O.unsqueeze(1), None if bias is None else bias.detach() * factor_O
    for m, w in enumerate(weights):
        weight_OI = weight_OI + w * bank.weight_delta(m).t().to(dtype)
    return weight_OI, None


def _modules_with_weight(model: nn.Module, weight: Tensor) -> list[nn.Module]:
    """Return the modules that own this parameter; several if weights are tied."""
    return [
        module
        for module in model.modules()
        if any(own is weight for own in module.parameters(recurse=False))
    ]


def average(model: nn.Module, weights: Sequence[float]) -> None:
    """Replace the modules of every bank by one, the weighted sum of their parameters.

    Every token uses it with weight 1. Works for every bank except SparseDelta with random
    positions. Averaging is meaningful only for modules that were trained from a common start.

    Raises: ConfigError if a bank cannot be averaged. Then nothing is changed.
    """
    layers = adapter_layers(model)
    for name, layer in layers.items():
        _check_weights(name, layer.experts, weights)
        if isinstance(layer.experts, SparseDelta) and layer.experts.mask == "random":
            allowed = "has its numbers at different positions in every module"
            raise ConfigError("average", name, allowed, "merge it, or use mask=magnitude")
    for layer in layers.values():
        bank = layer.experts
        means = {
            name: _weighted_mean(value.detach(), weights) for name, value in bank.named_parameters()
        }
        # buffers are equal in all modules (the positions of mask=magnitude): the first one is kept
        averaged = {
            name: means.get(name, value[:1].clone())
            for name, value in bank.stacked_tensors().items()
        }
        bank.replace_tensors(averaged)
        bank.num_experts = 1
        layer.router = ConstantRouter([1.0], layer.layer).to(next(bank.parameters()).device)
        layer.aggregation = WeightedSum(bank.width, layer.aggregation.router_dim, 1)


def _weighted_mean(value_MX: Tensor, weights: Sequence[float]) -> Tensor:
    weight_M = torch.tensor(weights, dtype=value_MX.dtype, device=value_MX.device)
    mean_X: Tensor = torch.tensordot(weight_M, value_MX, dims=1)
    return mean_X.unsqueeze(0)


def _check_weights(name: str, bank: AdapterBank, weights: Sequence[float]) -> None:
    if len(weights) != bank.num_modules:
        allowed = f"must have one weight for each of the {bank.num_modules} modules at {name}"
        raise ConfigError("weights", list(weights), allowed, f"give {bank.num_modules} numbers")
    if not bank.holds_all_modules:
        allowed = f"{name} holds only a shard of its modules"
        raise ConfigError("weights", list(weights), allowed, "merge before sharding")
