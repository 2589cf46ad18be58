"""Modules become weights: one vector over the modules, written into the frozen matrices (task arithmetic), or averaged among
themselves.

    merge:    W <- W + sum over m of weight[m] * delta_m        (Ilharco et al. 2023; LoRA's own merge for one module)
    average:  theta <- sum over m of weight[m] * theta_m        (model soups, Wortsman et al. 2022; AdaMix, Wang et al. 2022)

A merged network costs what the bare one does, and computes what the mixture with these constant weights computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dmoe.config.errors import ConfigError
from dmoe.modular.aggregation import WeightedSum
from dmoe.modular.attach import detach, adapter_layers
from dmoe.modular.banks import Scale, SparseDelta
from dmoe.modular.banks.base import AdapterBank
from dmoe.modular.layer import AdapterLayer
from dmoe.modular.routing import ConstantRouter


def merge(model: nn.Module, weights: Sequence[float]) -> None:
    """Write all modules into the core with these weights, one for each module, and take them off.

    Works for LowRank, SparseDelta and Scale beside a Linear. The core is another one afterwards, with another hash.
    Raises: ConfigError where a place cannot be merged; then nothing has changed.
    """
    found = adapter_layers(model)
    merged = {name: _merged_weight(model, name, layer, weights) for name, layer in found.items()}
    with torch.no_grad():
        for name, (weight, bias) in merged.items():
            place = model.get_submodule(name)
            assert isinstance(place, nn.Linear)
            place.weight.copy_(weight)
            if bias is not None:
                place.bias.copy_(bias)
    detach(model)


def _merged_weight(
    model: nn.Module, name: str, layer: AdapterLayer, weights: Sequence[float]
) -> tuple[Tensor, Tensor | None]:
    place, bank = model.get_submodule(name), layer.experts
    _check_weights(name, bank, weights)
    if not isinstance(place, nn.Linear):
        raise ConfigError(
            "merge",
            name,
            f"is a {type(place).__name__}, no Linear",
            "keep its modules, or average them",
        )
    if also := [other for other in _modules_with_weight(model, place.weight) if other is not place]:
        allowed = f"shares its weight with a {type(also[0]).__name__}, which would be changed too"
        raise ConfigError("merge", name, allowed, "untie them, or keep its modules")
    wide = torch.promote_types(place.weight.dtype, torch.float32)
    weight_OI, bias = place.weight.detach().to(wide), place.bias
    if isinstance(bank, Scale):
        factor_O = 1 + torch.stack(
            [w * (bank.l[m].detach().to(wide) - 1) for m, w in enumerate(weights)]
        ).sum(0)
        return weight_OI * factor_O.unsqueeze(1), None if bias is None else bias.detach() * factor_O
    for m, w in enumerate(weights):
        weight_OI = weight_OI + w * bank.weight_delta(m).t().to(wide)
    return weight_OI, None


def _modules_with_weight(model: nn.Module, weight: Tensor) -> list[nn.Module]:
    """The modules whose parameter it is: several, where weights are tied."""
    return [
        module
        for module in model.modules()
        if any(own is weight for own in module.parameters(recurse=False))
    ]


def average(model: nn.Module, weights: Sequence[float]) -> None:
    """Leave one module in every bank, the weighted sum of the parameters of all, which every token visits with weight 1.

    Works for every bank but SparseDelta with random places. Parameter averaging: modules without a common start do not fit each other.
    Raises: ConfigError where a bank cannot be averaged; then nothing has changed.
    """
    for name, layer in adapter_layers(model).items():
        _check_weights(name, layer.experts, weights)
        if isinstance(layer.experts, SparseDelta) and layer.experts.mask == "random":
            raise ConfigError(
                "average",
                name,
                "has its numbers at other places in every module",
                "merge it, or use mask=magnitude",
            )
    for layer in adapter_layers(model).values():
        bank = layer.experts
        mean = {name: _weighted_mean(value.detach(), weights) for name, value in bank.named_parameters()}
        bank.replace_tensors({name: mean.get(name, value[:1].clone()) for name, value in bank.stacked_tensors().items()})
        bank.num_experts = 1
        layer.router = ConstantRouter([1.0], layer.layer).to(next(bank.parameters()).device)
        layer.aggregation = WeightedSum(bank.width, layer.aggregation.router_dim, 1)


def _weighted_mean(stack_MX: Tensor, weights: Sequence[float]) -> Tensor:
    weight_M = torch.tensor(weights, dtype=stack_MX.dtype, device=stack_MX.device)
    mean_X: Tensor = torch.tensordot(weight_M, stack_MX, dims=1)
    return mean_X.unsqueeze(0)


def _check_weights(name: str, bank: AdapterBank, weights: Sequence[float]) -> None:
    if len(weights) != bank.num_modules:
        allowed = f"must have one weight for each of the {bank.num_modules} modules at {name}"
        raise ConfigError("weights", list(weights), allowed, f"give {bank.num_modules} numbers")
    if not bank.holds_all_modules:
        raise ConfigError(
            "weights",
            list(weights),
            f"{name} holds a part of its modules only",
            "merge before sharding",
        )
