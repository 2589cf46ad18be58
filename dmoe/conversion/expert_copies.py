"""Experts from a dense feed-forward: copies, parts of it, with a share re-initialised, with noise.

Copies (Komatsuzaki et al. 2022): expert_e = the feed-forward, for every e.

Parts (fine-grained; He et al. 2024, "Upcycling Large Language Models into Mixture of Experts"): the
hidden units are cut in G parts, and expert r G + g is part g of replica r, of width F / G:

    f(x) = sum_g f_g(x)

A token must take whole replicas, so the G rows of a replica's router are equal: equal logits are
neighbours in the order of scores, and the K experts of a token are all parts of K / G replicas. Its
weights w_r of the replicas are then spread over G equal ones, w_r / G, so w_out is multiplied by G:

    sum_r sum_g (w_r / G) G f_g(x) = f(x)        with sum_r w_r = 1

Drop (Nakamura et al. 2025, "Drop-Upcycling"): in each expert a share r of the hidden units, drawn
for it, starts anew: their columns of w_in (gate and up) and rows of w_out are drawn from a normal
distribution with mean and standard deviation of the entries that they replace.

Noise: N(0, (noise * std)^2) is added to every entry, std being that of the matrix.

Copies and parts keep the function. Drop and noise change it, and make experts differ at once.
Everything is keyed by (seed, layer, expert), so no draw depends on another.

Letters: D width, F hidden width, E experts, G parts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dmoe.config.errors import ConfigError
from dmoe.config.expert_shapes import GATED
from dmoe.models.base import Model
from dmoe.moe.experts import FeedForward, MLPExperts
from dmoe.moe.layer import MoE
from dmoe.moe.rng import generator


@dataclass(frozen=True)
class ExpertInit:
    """How experts start from a dense feed-forward."""

    split: int = 1
    """Parts G of a feed-forward; 1: each expert is all of it."""
    drop: float = 0.0
    """Share of the hidden units of each expert that is re-initialised."""
    noise: float = 0.0
    """Standard deviation of the noise, as a share of that of each matrix."""

    def __post_init__(self) -> None:
        """Raise ConfigError for numbers that mean nothing."""
        if self.split < 1:
            raise ConfigError("--split", self.split, "must be 1 or more", "use 1")
        if not 0 <= self.drop <= 1:
            raise ConfigError("--drop", self.drop, "must be between 0 and 1", "use 0.5")
        if not self.noise >= 0:
            raise ConfigError("--noise", self.noise, "must not be negative", "use 0.01")

    @property
    def keeps_function(self) -> bool:
        return not (self.drop or self.noise)


COPIES = ExpertInit()


@torch.no_grad()
def copy_weights(
    dense: Model, sparse: Model, init: ExpertInit = COPIES, seed: int = 0
) -> list[str]:
    """Make every expert from the dense feed-forward in its place, and copy all other weights.

    Routers are left as they are; with parts, their rows are repeated within each replica.

    Args:
        dense: its weights are read.
        sparse: its weights are set; the models must fit, as `check_upcycle` makes sure.
        init: how experts start.
        seed: key of what is drawn.

    Returns:
        The names of the MoE layers.
    """
    moe_layers = {name: layer for name, layer in sparse.named_modules() if isinstance(layer, MoE)}
    dense_weights = dict(dense.named_parameters())
    for name, layer in moe_layers.items():
        feed_forward, experts = dense.get_submodule(name), layer.experts
        assert isinstance(feed_forward, FeedForward)
        assert isinstance(experts, MLPExperts), "experts of one shape"
        _copy_parts(feed_forward, experts, init.split)
        if init.split > 1:
            rows_ED = layer.router.get_parameter("weight")
            rows_ED.copy_(rows_ED[:: init.split].repeat_interleave(init.split, 0))
        for e in range(experts.num_experts):
            random = generator(seed, "upcycling", layer.layer, e)
            _draw_anew(experts, e, init.drop, random)
            for matrix in (experts.w_in[e], experts.w_out[e]) if init.noise else ():
                matrix.add_(_normal(matrix, random) * (init.noise * matrix.std()))
    for name, parameter in sparse.named_parameters():
        if not name.startswith(tuple(f"{layer}." for layer in moe_layers)):
            parameter.copy_(dense_weights[name])
    return list(moe_layers)


def _copy_parts(feed_forward: FeedForward, experts: MLPExperts, split: int) -> None:
    """Copy part e mod G into expert e."""
    w_in, w_out = feed_forward.w_in.weight, feed_forward.w_out.weight
    halves = w_in.view(_halves(experts.kind), -1, w_in.shape[1])  # [gate and up, F, D]
    width = w_out.shape[1] // split
    for e in range(experts.num_experts):
        start = (e % split) * width
        part = halves[:, start : start + width].flatten(0, 1)
        experts.w_in[e].copy_(part.t())
        experts.w_out[e].copy_(w_out[:, start : start + width].t() * split)


def _draw_anew(experts: MLPExperts, e: int, share: float, random: torch.Generator) -> None:
    """Draw a share of the hidden units of an expert from the statistics of their own weights."""
    width = experts.w_out.shape[1]
    count = round(share * width)
    if not count:
        return
    units = torch.randperm(width, generator=random)[:count]
    w_in = experts.w_in[e].view(-1, _halves(experts.kind), width)  # [D, gate and up, F]
    for half in range(w_in.shape[1]):
        w_in[:, half, units] = _like(w_in[:, half, units], random)
    experts.w_out[e, units] = _like(experts.w_out[e, units], random)


def _halves(kind: str) -> int:
    return 2 if kind in GATED else 1


def _like(old: Tensor, random: torch.Generator) -> Tensor:
    """Return normal numbers with the mean and the standard deviation of `old`."""
    return old.mean() + _normal(old, random) * old.std(correction=0)


def _normal(like: Tensor, random: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=random, dtype=torch.float32).to(like)
