"""`moefy`: make the MoE blocks of a live transformers model dmoe's own layers.

A block is any module that holds a stack of `experts` called with (x, index, weights), the contract
of `use_experts_implementation` in transformers 5. Nothing is copied: parameters, names, router,
attention and shared experts stay. `facts.py` lists what differs between the families.

Letters: B sequences, S positions, T = B*S tokens, E experts, K experts per token.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from dmoe.config.errors import ConfigError
from dmoe.config.published import FIX, REFUSED
from dmoe.config.rules.capacity import check_pool
from dmoe.config.rules.published import check_published_moe
from dmoe.config.schema import BalanceConfig, CapacityConfig, MoEConfig, ParallelConfig
from dmoe.config.schema.constraints import check_bounds, check_field, check_type, check_types
from dmoe.hf.adapters import (
    MIXINS,
    SwigluExperts,
    check_adapted,
    count_zero_cost,
    freeze_indexers,
    trim_identities,
)
from dmoe.hf.experts import MoefiedExperts, stacked_parameters
from dmoe.hf.facts import BlockFacts, bias_as_buffer, block_facts, find_bias
from dmoe.hf.layer import Forward, MoefiedLayer
from dmoe.hf.recording import record_forwards, weighted_losses
from dmoe.moe.base_layer import MoELayer
from dmoe.moe.constants import IndexRanges
from dmoe.moe.dispatch import PackedLocal
from dmoe.moe.inputs import MaskAgreement
from dmoe.moe.interfaces import NoComm
from dmoe.moe.load_balancing import PendingCounts
from dmoe.moe.padded_slots import PaddedLocal

NO_BALANCE = BalanceConfig(switch=0.0, z=0.0)
OWN_NAMES = {*MoefiedLayer.__annotations__, *MoELayer.__annotations__}
"""Attributes that dmoe sets on a block."""
SHARED_NAMES = frozenset({"experts", "router", "num_experts", "top_k"})
"""Those of them that blocks have already, with the same meaning."""


def moefy(
    model: nn.Module,
    capacity: CapacityConfig | None = None,
    balance: BalanceConfig | None = None,
    *,
    exchange: str = "packed",
    virtual_ranks: int = 1,
) -> nn.Module:
    """Make every MoE block of a transformers model a dmoe layer, in place; return the model.

    Logits, loss and gradients stay those of transformers, to float rounding. In training the
    model's `loss` then contains the auxiliary losses of `balance`; without labels, add
    `dmoe.hf.auxiliary_loss(model)`. `dmoe.hf.forward_of(model)` has the counts of the latest
    forward. Positions that a 2-D `attention_mask` marks as padding are not routed and not counted.

    Args:
        model: a model of transformers with its weights, or on the meta device.
        capacity: expert capacity; default dropless.
        balance: auxiliary losses and bias; default none. `balance.bias` moves the bias that the
            family's router has (`e_score_correction_bias`).
        exchange: `packed` or `padded`, as in `dmoe.MoE`.
        virtual_ranks: as in `dmoe.MoE`.

    Raises:
        ConfigError: a model without MoE blocks, or with one that dmoe does not know.
    """
    capacity = CapacityConfig() if capacity is None else capacity
    balance = NO_BALANCE if balance is None else balance
    check_settings(capacity, balance, exchange, virtual_ranks)
    found = [_checked(model, *block) for block in find_blocks(model)]
    for _, experts, _, _ in found:
        check_pool(capacity, len(experts.down_proj))
    biased = [_has_bias(block, experts, facts) for block, experts, facts, _ in found]
    if balance.bias and not any(biased):
        why = f"moves a bias of the choice, and {type(found[0][2].router).__name__} has none"
        raise ConfigError("moe.balance.bias", balance.bias, why, "use balance.switch")
    record = Forward()
    trim_identities(model)
    freeze_indexers(model)
    for index, (block, experts, facts, top_k) in enumerate(found):
        num_experts, num_zero_cost = len(experts.down_proj), count_zero_cost(block)
        kinds: tuple[Any, Any] = type(block), type(experts)
        own = MIXINS.get(kinds[0].__name__, (MoefiedLayer, MoefiedExperts))
        experts.__class__ = _mixed(own[1], kinds[1])
        experts.__dict__ |= {"owner": (block,), "num_all_experts": num_experts, "first_expert": 0}
        layer: Any = block
        layer.__class__ = _mixed(own[0], kinds[0], not hasattr(block, "router"))
        layer.facts, layer.record = facts, record
        layer.layer, layer.num_zero_cost = index, num_zero_cost
        layer.num_experts = num_experts + num_zero_cost
        layer.top_k, layer.virtual_ranks = top_k, virtual_ranks
        layer.capacity, layer.balance = capacity, balance
        layer.placement = experts.placement(1)
        layer.cost_E = (*experts.cost, *[0.0] * num_zero_cost)
        layer.names_E = (
            *(f"expert {e}" for e in range(num_experts)),
            *(f"zero-cost {z}" for z in range(num_zero_cost)),
        )
        layer.packed, layer.comm, layer.masks = PackedLocal(), NoComm(), MaskAgreement()
        layer.ranges = IndexRanges()
        layer.padded = PaddedLocal() if exchange == "padded" else None
        layer.pending_counts = PendingCounts() if balance.bias and biased[index] else None
        facts.logits.register_forward_hook(layer.keep_logits)
        if balance.bias:
            bias_as_buffer(block, facts.router, layer.num_experts)
    record_forwards(model, record)
    return model


def _checked(
    model: nn.Module, name: str, block: nn.Module, experts: Any
) -> tuple[nn.Module, Any, BlockFacts, int]:
    """Return block, experts, facts and K of a block that can be moefied; nothing is changed.

    Raises:
        ConfigError: dmoe does not know it, or it has attributes of the same names.
    """
    config = _text_config(model)
    facts = block_facts(block, name, config)
    check_adapted(block, name)
    if not issubclass(MIXINS.get(type(block).__name__, (None, object))[1], SwigluExperts):
        _check_experts(experts, f"{name}.experts")
    taken = sorted((OWN_NAMES - SHARED_NAMES) & {*vars(block), *dict(block.named_children())})
    if taken:
        why = f"has attributes of its own that dmoe would overwrite: {', '.join(taken)}"
        raise ConfigError("model", name, why, "train this model without dmoe")
    return block, experts, facts, experts_per_token(facts.router, config, name)


def _has_bias(block: nn.Module, experts: Any, facts: BlockFacts) -> bool:
    choices = len(experts.down_proj) + count_zero_cost(block)
    return find_bias(block, facts.router, choices) is not None


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module, Any]]:
    """Return name, block and experts of every MoE block of a transformers model, in order.

    Raises:
        ConfigError: there is none, or the model is moefied already.
    """
    kind = type(model).__name__
    if not isinstance(model, nn.Module):
        why, fix = "must be a model of transformers", "give the model itself, not its name"
        raise ConfigError("model", kind, why, fix)
    if any(isinstance(module, MoefiedLayer) for module in model.modules()):
        raise ConfigError("model", kind, "is moefied already", "call moefy once")
    blocks = []
    for name, module in model.named_modules():
        experts = getattr(module, "experts", None)
        if isinstance(experts, nn.Module) and _is_stack(experts):
            blocks.append((name, module, experts))
    if not blocks:
        family = getattr(getattr(model, "config", None), "model_type", None)
        if (why := REFUSED.get(str(family))) is not None:
            raise ConfigError("model", f"{kind} ({family})", why, FIX)
        why = "has no MoE block of transformers 5 (a module `experts` with stacked weights)"
        raise ConfigError("model", kind, why, "give a mixture-of-experts model")
    return blocks


def moefied_layers(model: nn.Module) -> list[MoefiedLayer]:
    """Return the layers that `moefy` has made, in order."""
    return [module for module in model.modules() if isinstance(module, MoefiedLayer)]


def forward_of(model: nn.Module) -> Forward:
    """Return the record of the model's latest forward.

    `model` may be in `dmoe.parallelize` or another wrapper.
    """
    layers = moefied_layers(model)
    if not layers:
        raise ConfigError("model", type(model).__name__, "is not moefied", "call dmoe.moefy first")
    return layers[0].record


def auxiliary_loss(model: nn.Module) -> Tensor:
    """Return the weighted sum of the auxiliary losses of the latest forward, over all layers.

    It is this rank's share: as `dmoe.MoE` returns it.
    """
    layers, record = moefied_layers(model), forward_of(model)
    if not record.layers:
        return torch.zeros((), device=next(model.parameters()).device)
    return weighted_losses(layers, record)


def experts_per_token(router: nn.Module, config: object, name: str) -> int:
    """Return K of a block: the router's or the config's."""
    for owner in (router, config):
        for field in ("top_k", "num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"):
            value = getattr(owner, field, None)
            if type(value) is int and value > 0:
                return value
            if isinstance(value, list) and value and len({*value}) == 1:
                return int(value[0])
    raise ConfigError("model", name, "does not say how many experts a token takes", "set top_k")


def _is_stack(experts: nn.Module) -> bool:
    down = getattr(experts, "down_proj", None)
    return isinstance(down, nn.Parameter) and down.ndim == 3


def _check_experts(experts: Any, name: str) -> None:
    """Refuse experts that are not called with (x, index, weights), or of unequal stacks."""
    missing = [n for n in ("has_gate", "has_bias", "is_transposed") if not hasattr(experts, n)]
    if missing:
        why = "are not of the form that dmoe computes (`use_experts_implementation`)"
        fix = "train this model without dmoe"
        raise ConfigError("model", f"{name} ({type(experts).__name__})", why, fix)
    sizes = {n: len(p) for n, p in stacked_parameters(experts).items()}
    if len({*sizes.values()}) != 1:
        why = f"has stacks of different numbers of experts: {sizes}"
        raise ConfigError("model", name, why, "check the model's config")


def check_settings(
    capacity: CapacityConfig,
    balance: BalanceConfig,
    exchange: str = MoEConfig.exchange,
    virtual_ranks: int = 1,
) -> None:
    """Raise ConfigError for settings of another type, out of bounds, or of no published model."""
    check_type("capacity", capacity, CapacityConfig)
    check_type("balance", balance, BalanceConfig)
    check_field(ParallelConfig, "virtual_ranks", "virtual_ranks", virtual_ranks)
    packing: Any = exchange
    config = MoEConfig(capacity=capacity, balance=balance, exchange=packing)
    check_types(config, "moe.")
    check_bounds(config, "moe.")
    check_published_moe(config)


@cache
def _mixed(mixin: Any, kind: Any, names_router: bool = False) -> type:
    """Return the class `kind` with `mixin` in front; `names_router` gives it `router`."""
    names: dict[str, Any] = {"__module__": kind.__module__, "__doc__": kind.__doc__}
    if names_router:
        names["router"] = property(lambda block: block.facts.router)
    return type(f"Moefied{kind.__name__}", (mixin, kind), names)


def _text_config(model: nn.Module) -> object:
    """Return the config of the language model: of a composed one, a part."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config
