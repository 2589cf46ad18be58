"""The experts that another bias would have selected, from a trace with the scores of all experts.

    step t:    experts = the router's own selection by (recorded scores + b_t)
    b_(t+1)  = `updated_bias`(b_t, choices of the global batch), the controller of training

b is 0 at the first step of the trace, as it is at the first step of a run. Routers are built from
the config and called without their gate (`LearnedRouter.select`), so that groups, top-p and budgets
select as in training. Selected in the same way are the next experts of `overflow: next_choice`.

The scores stay those of the trace: tokens that go to other experts would have taught the network
other scores. Exact is what a model with these hidden states does.

Letters: N tokens of a step, L MoE layers, E experts, K experts per token, S next experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dmoe.config.errors import ConfigError
from dmoe.config.expert_shapes import count_zero_cost, expert_shapes, multiply_adds
from dmoe.config.plugins import label, parse
from dmoe.config.router_kinds import router_spec
from dmoe.config.schema import Config, RouterConfig
from dmoe.moe.load_balancing import updated_bias
from dmoe.moe.routers import LearnedRouter, build_router
from dmoe.moe.routers.base import RouterModule
from dmoe.moe.routing import BatchShape, TokenContext
from dmoe.replay.part import NONE
from dmoe.simulation.trace import ALL, FIELD, Trace

TOKENS = 1 << 16
"""Tokens that are selected for at a time."""
WITH_CAPACITY = BatchShape(capacity=1)
"""Makes routers return next experts; how many slots there are does not matter to them."""


@dataclass(frozen=True)
class Reselected(Trace):
    """A trace of scores whose experts are selected again."""

    source: Trace
    config: Config
    """Its routers select, by `moe.balance`."""
    is_own: bool
    """Every step must have the recorded choices: `moe.balance` is that of the run."""
    bias_SLE: dict[int, Tensor] = field(default_factory=dict)
    """float32 [L, E] by step."""
    last: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    """Experts and next experts of the step that was read last."""

    @property
    def has_next_choices(self) -> bool:
        return True

    def choices(self, step: int, samples: slice = ALL) -> np.ndarray:
        return self._selected(step)[0][self._tokens(samples)]

    def next_choices(self, step: int, samples: slice = ALL) -> np.ndarray:
        return self._selected(step)[1][self._tokens(samples)]

    @cached_property
    def routers(self) -> list[LearnedRouter]:
        """One per layer, without a gate."""
        moe, spec, routers = self.config.moe, self.spec, []
        for layer in range(spec.layers):
            router = build_router(moe.router, 1, spec.experts, spec.top_k, layer)
            assert isinstance(router, LearnedRouter), "the others were refused"
            set_expert_costs(router, self.config)
            routers.append(router)
        return routers

    def bias_LE(self, step: int) -> Tensor:
        """Return the bias of a step, float32 [L, E]: moved by the choices of those before it."""
        balance, first = self.config.moe.balance, self.steps[0]
        if not self.bias_SLE:
            self.bias_SLE[first] = torch.zeros(self.spec.layers, self.spec.experts)
        if not balance.bias:
            return self.bias_SLE[first]
        for before in range(max(s for s in self.bias_SLE if s <= step), step):
            count_LE = torch.from_numpy(self.counts(before).sum(0))
            pairs = zip(self.bias_SLE[before], count_LE, strict=True)
            moved = [updated_bias(b_E, c_E, balance.bias, balance.recenter) for b_E, c_E in pairs]
            self.bias_SLE[before + 1] = torch.stack(moved)
        return self.bias_SLE[step]

    def _tokens(self, samples: slice) -> slice:
        first, end, _ = samples.indices(self.spec.global_batch)
        return slice(first * self.spec.seq_len, end * self.spec.seq_len)

    def _selected(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the experts of a step, int64 [N, L, K], and the next ones, [N, L, S]."""
        if step not in self.last:
            bias_LE, score_NLE = self.bias_LE(step), self.all_scores(step)
            parts = [
                self._select(score_NLE[start : start + TOKENS], bias_LE)
                for start in range(0, len(score_NLE), TOKENS)
            ]
            experts, following = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
            self._check(step, experts)
            self.last.clear()
            self.last[step] = experts, following
        return self.last[step]

    @torch.no_grad()
    def _select(self, score_NLE: np.ndarray, bias_LE: Tensor) -> tuple[np.ndarray, np.ndarray]:
        experts, following = [], []
        for layer, router in enumerate(self.routers):
            score_TE = torch.from_numpy(score_NLE[:, layer].copy())
            router.bias_E.copy_(bias_LE[layer])
            context = TokenContext(valid_T=score_TE[:, 0] >= 0)
            # scores in place of logits: only weights are made of these, and no slot depends on them
            made = router.select(score_TE, score_TE, context, WITH_CAPACITY)
            experts.append(made.expert_TK.masked_fill(~made.is_selected_TK, NONE))
            none_TS = made.expert_TK[:, :0]
            following.append(none_TS if made.next_expert_TS is None else made.next_expert_TS)
        return torch.stack(experts, 1).numpy(), torch.stack(following, 1).numpy()

    def _check(self, step: int, expert_NLK: np.ndarray) -> None:
        """Refuse scores of another router: the run started with a bias of 0."""
        if not self.is_own and step > 0:
            return
        if (expert_NLK != self.source.choices(step)).any():
            allowed = (
                f"has other choices in step {step + 1} than its scores and the config's moe.router "
                f"and moe.balance.bias={self.config.moe.balance.bias:g} give"
            )
            fix = "use the config of its run, and record from its first step"
            raise ConfigError(FIELD, self.path, allowed, fix)


def set_expert_costs(router: RouterModule, config: Config) -> None:
    """Give a router without a layer the costs of its experts, on which a budget depends.

    Raises:
        ConfigError: experts of one's own class, which only their layer knows.
    """
    moe, dim = config.moe, config.model.dim
    if parse(moe.experts.kind) is not None:
        if not router_spec(moe.router.kind).has_budget:
            return
        allowed = f"has costs that moe.router.kind={moe.router.kind} needs, and no layer is built"
        raise ConfigError("moe.experts.kind", moe.experts.kind, allowed, "use experts of dmoe")
    costs = [multiply_adds(shape, dim, dim, moe.experts.kind) for shape in expert_shapes(moe)]
    router.set_expert_costs([*costs, *[0] * count_zero_cost(moe.experts)])


def reselected(trace: Trace, config: Config, is_own: bool = False) -> Reselected:
    """Return a trace whose experts the config's routers and `moe.balance` select again.

    Args:
        trace: as it was recorded.
        config: a whole config.
        is_own: its `moe.balance` is that of the run, so that the choices must be the recorded ones.

    Raises:
        ConfigError: the trace has not the scores of all experts, or the selection is not known.
    """
    moe, kind, value = config.moe, config.moe.router.kind, f"{config.moe.balance.bias:g}"
    field, value = ("moe.capacity.overflow", "next_choice") if is_own else ("--bias", value)
    if not trace.has_all_scores:
        allowed = "selects by the scores of all experts, and the trace has not those"
        raise ConfigError(field, value, allowed, "record it with tracking.trace=scores")
    own = [label(kind)] if parse(kind) is not None or not router_spec(kind).ranks_experts else []
    if router_spec(kind).has_budget and parse(moe.experts.kind) is not None:
        own.append(label(moe.experts.kind))
    if config.model.source is not None:
        own.append(f"model.source={config.model.source}")
    if own:
        allowed = f"is replayed by dmoe's own routers that rank experts, not as {own[0]} selects"
        raise ConfigError(field, value, allowed, "leave it out")
    return Reselected(trace.path, trace.parts, trace.spec, trace, config, is_own)


def with_next_choices(trace: Trace, config: Config) -> Trace:
    """Return a trace that has next experts too, if the config wants them and its scores give them.

    Raises:
        ConfigError: as `reselected`; or there are zero-cost experts, which take offers for nothing.
    """
    if config.moe.capacity.overflow != "next_choice" or not trace.has_all_scores:
        return trace
    if count_zero_cost(config.moe.experts):
        allowed = "is not replayed with zero-cost experts"
        raise ConfigError("moe.capacity.overflow", "next_choice", allowed, "use drop")
    return trace if trace.has_next_choices else reselected(trace, config, is_own=True)


@dataclass(frozen=True)
class ForcedTrace(Trace):
    """The choices of a workload, one layer, computed when they are read: see `workload.py`."""

    router: RouterConfig

    @property
    def steps(self) -> range:
        return range(5 if self.router.workload == "W7" else 1)

    @cached_property
    def has_choices(self) -> bool:
        return True

    @cached_property
    def has_scores(self) -> bool:
        return False

    def choices(self, step: int, samples: slice = ALL) -> np.ndarray:
        spec = self.spec
        router = build_router(self.router, 1, spec.experts, spec.top_k, 0)
        shape = BatchShape(spec.global_batch, spec.global_batch)
        x_TD = torch.zeros(spec.tokens_per_step, 1)
        routing = router(x_TD, TokenContext(noise_key=(0, step)), shape)
        chosen_TK = routing.expert_TK.where(routing.is_selected_TK, NONE)
        chosen_NLK: np.ndarray = chosen_TK.view(-1, 1, spec.top_k).numpy()
        return chosen_NLK
