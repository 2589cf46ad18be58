"""LoRA on a moefied model: linear layers and stacks of experts, sharded like the experts.

    linear:  y = W x + s B A x            A [r, in], B [out, r]
    expert:  y = W_e x + s B_e A_e x      A [E, r, in], B [E, out, r]        s = alpha / r

(Hu et al. 2021.) The factors of an expert are stacks beside its weights, so expert parallelism,
FSDP2, checkpoints and gradients treat them as they treat the experts. peft lays the same numbers
out in two matrices per stack, `lora_A [E*r, in]` with the expert as the slow index and
`lora_B [out, r*E]` with the expert as the fast one: see `lora_peft.py`. Cost of a forward: two
grouped products of width r per targeted stack; no weight of full size is built.

Letters: E experts, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe.config.errors import ConfigError
from dmoe.config.schema import LoraConfig
from dmoe.config.schema.constraints import check_field
from dmoe.hf.experts import FACTOR_A, FACTOR_B, stacked_weights
from dmoe.hf.moefy import moefied_layers
from dmoe.moe.rng import generator

DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "experts")
EXPERTS = "experts"
"""The target that means the weights of all experts."""
FROZEN = "frozen_before_lora"
"""Attribute of each module: names of its parameters that were frozen before `add_lora`."""


class LoraLinear:
    """Mixed into the class of a linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer and add the low-rank product."""
        own = cast(Any, self)
        plain: Tensor = F.linear(x, own.weight, own.bias)
        a, b = (getattr(own, name).to(x.dtype) for name in (FACTOR_A, FACTOR_B))
        added: Tensor = own.lora_scale * F.linear(F.linear(x, a), b)
        return plain + added


@dataclass(frozen=True)
class LoraPlace:
    """One weight with its factors."""

    module_name: str
    module: nn.Module
    weight: str
    """Name of the weight in the module."""
    a: str
    """Name of its factor A in the module; B likewise."""
    b: str
    scale: float

    @property
    def is_stack(self) -> bool:
        """Whether it is a stack of experts."""
        return self.weight != "weight"


def add_lora(
    model: nn.Module,
    rank: int,
    alpha: float | None = None,
    targets: Sequence[str] | None = None,
) -> nn.Module:
    """Add low-rank factors to a moefied model and freeze everything else, in place; return it.

    Before `dmoe.parallelize`, which shards the experts' factors with the experts. No parameter is
    renamed. A is drawn, B is zero: the model computes what it did.

    Args:
        model: a moefied model.
        rank: r.
        alpha: the product is scaled by alpha / r; default 2 r.
        targets: ends of the names of linear layers, and `experts` for the experts' weights.
            Default: those of DEFAULT_TARGETS that the model has.

    Raises:
        ConfigError: no rank, a target that matches nothing or a tied head, or a model that has
            LoRA already. The model is as before then.
    """
    if type(rank) is not int or rank < 1:
        raise ConfigError("rank", rank, "must be a whole number of 1 or more", "use 8")
    check_field(LoraConfig, "alpha", "alpha", alpha)
    if targets is None:
        targets = [t for t in DEFAULT_TARGETS if t == EXPERTS or _linears(model, t)]
    targets = [targets] if isinstance(targets, str) else targets
    given = list(targets) if isinstance(targets, Sequence) else targets
    check_field(LoraConfig, "targets", "targets", given)
    if not targets:
        raise ConfigError("targets", "[]", "names nothing to adapt", "use experts")
    layers = moefied_layers(model)
    if not layers:
        raise ConfigError("model", type(model).__name__, "is not moefied", "call dmoe.moefy first")
    if any(lora_places(model)):
        raise ConfigError("model", type(model).__name__, "has LoRA already", "call add_lora once")
    for layer in layers if EXPERTS in targets else ():
        if not layer.experts.has_peft_layout:
            allowed = "has stacks [E, in, out] that peft takes for [E, out, in]"
            fix = "name linear layers, such as q_proj"
            raise ConfigError(
                "model.lora.targets", EXPERTS, f"{type(model).__name__} {allowed}", fix
            )
    linears: dict[nn.Linear, None] = {}
    for target in targets:
        found = [] if target == EXPERTS else _linears(model, target)
        if not found and target != EXPERTS:
            names = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if _plain(m)})
            allowed = f"matches no linear layer; there are {', '.join(names)}, and {EXPERTS}"
            raise ConfigError("model.lora.targets", target, allowed, "name one of them")
        if any(module.weight is _embedding(model) for module in found):
            allowed = "has the weight of the embedding, which merged factors would change too"
            raise ConfigError("model.lora.targets", target, allowed, "leave it out")
        linears |= dict.fromkeys(found)
    scale = (2 * rank if alpha is None else alpha) / rank
    for module in model.modules():
        own = module.named_parameters(recurse=False)
        module.__dict__[FROZEN] = frozenset(n for n, p in own if not p.requires_grad)
    model.requires_grad_(False)
    for layer in layers if EXPERTS in targets else ():
        _add_to_experts(layer.experts, rank, scale)
    for module in linears:
        _add_to_linear(module, rank, scale)
    initialize_lora(model, 0)
    return model


def initialize_lora(model: nn.Module, seed: int) -> None:
    """Draw A, uniform in +-1 / sqrt(in) as peft does, and set B to zero.

    Drawn on the CPU, keyed by the seed, the name and the global id of the expert, so that it does
    not depend on ranks.
    """
    for place in lora_places(model):
        a, b = (getattr(place.module, name) for name in (place.a, place.b))
        if a.is_meta:
            continue
        with torch.no_grad():
            b.zero_()
            if not place.is_stack:
                a.copy_(_uniform(a, seed, "lora", place.module_name))
                continue
            first = getattr(place.module, "first_expert", 0)
            for own, rows in enumerate(a):
                key = (place.module_name, place.weight, first + own)
                rows.copy_(_uniform(rows, seed, "lora", *key))


def lora_places(model: nn.Module) -> Iterator[LoraPlace]:
    """Yield every weight that has factors, in the order of the modules and their weights."""
    for name, module in model.named_modules():
        scale = vars(module).get("lora_scale")
        if scale is None:
            continue
        if isinstance(module, nn.Linear):
            yield LoraPlace(name, module, "weight", FACTOR_A, FACTOR_B, scale)
            continue
        for weight in stacked_weights(module):
            yield LoraPlace(
                name, module, weight, f"{FACTOR_A}_{weight}", f"{FACTOR_B}_{weight}", scale
            )


def is_lora(name: str) -> bool:
    """Return whether a parameter of this name is a factor."""
    return name.rpartition(".")[2].startswith((FACTOR_A, FACTOR_B))


def delta(a: Tensor, b: Tensor, scale: float, *, is_transposed: bool) -> Tensor:
    """Return what the factors add to a weight of the shape [.., out, in], or transposed.

    Args:
        a: [r, in] or [E, r, in].
        b: [out, r] or [E, out, r].
        scale: alpha / r.
        is_transposed: whether the weight is [E, in, out].
    """
    product = scale * (b @ a)
    return product.transpose(-1, -2) if is_transposed else product


def merge_lora(model: nn.Module) -> nn.Module:
    """Add the products to the weights and remove the factors, in place; return the model.

    What was frozen before `add_lora` is frozen again; all other parameters require gradients. On
    every rank for its own experts; no collective. Not for what FSDP2 has sharded.

    Raises:
        ConfigError: the model has no LoRA.
    """
    if not any(lora_places(model)):
        raise ConfigError("model", type(model).__name__, "has no LoRA", "call add_lora first")
    for place in lora_places(model):
        a, b = (getattr(place.module, name) for name in (place.a, place.b))
        weight = getattr(place.module, place.weight)
        is_transposed = place.is_stack and bool(cast(Any, place.module).is_transposed)
        with torch.no_grad():
            weight += delta(a, b, place.scale, is_transposed=is_transposed).to(weight.dtype)
    remove_lora(model)
    return model


def remove_lora(model: nn.Module) -> None:
    """Undo `add_lora`, in place: no factors, and `requires_grad` as it was; weights stay."""
    for place in list(lora_places(model)):
        delattr(place.module, place.a)
        delattr(place.module, place.b)
    for module in model.modules():
        if vars(module).pop("lora_scale", None) is not None and isinstance(module, LoraLinear):
            cast(Any, module).__class__ = nn.Linear
        frozen = vars(module).pop(FROZEN, frozenset())
        for name, parameter in module.named_parameters(recurse=False):
            parameter.requires_grad_(name not in frozen)


def _linears(model: nn.Module, target: str) -> list[nn.Linear]:
    """Return the linear layers whose name ends with `target`."""
    return [
        module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and f".{name}".endswith(f".{target}")
    ]


def _embedding(model: Any) -> Tensor:
    return cast(Tensor, model.get_input_embeddings().weight)


def _plain(module: nn.Module) -> bool:
    return type(module) is nn.Linear


def _add_to_linear(module: nn.Linear, rank: int, scale: float) -> None:
    weight = module.weight
    setattr(module, FACTOR_A, nn.Parameter(weight.new_empty(rank, module.in_features)))
    setattr(module, FACTOR_B, nn.Parameter(weight.new_empty(module.out_features, rank)))
    module.__dict__["lora_scale"] = scale
    module.__class__ = _lora_linear()


def _add_to_experts(experts: Any, rank: int, scale: float) -> None:
    for name, weight in stacked_weights(experts).items():
        count, rows, columns = weight.shape
        in_dim, out_dim = (rows, columns) if experts.is_transposed else (columns, rows)
        a, b = weight.new_empty(count, rank, in_dim), weight.new_empty(count, out_dim, rank)
        setattr(experts, f"{FACTOR_A}_{name}", nn.Parameter(a))
        setattr(experts, f"{FACTOR_B}_{name}", nn.Parameter(b))
    experts.__dict__["lora_scale"] = scale


@cache
def _lora_linear() -> Any:
    return type("LoraLinear", (LoraLinear, nn.Linear), {"__module__": __name__})


def _uniform(like: Tensor, *key: int | str) -> Tensor:
    drawn = torch.rand(like.shape, generator=generator(*key), dtype=torch.float32)
    return (2 * drawn - 1) / math.sqrt(like.shape[-1])
