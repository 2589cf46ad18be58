"""How unequally the router loads the ranks: what a step waits for, and what memory must hold.

From an assumed spread of the experts' loads, from a recorded trace, or from a forced workload; the
latter two by the replay (`replay.py`), with the capacity and the copies of the config.

Letters: E experts, P = EP ranks, W ranks, K experts per token, N (micro-batch, layer) pairs, S
positions per sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from dmoe.config.errors import ConfigError
from dmoe.config.expert_shapes import count_choices, count_zero_cost
from dmoe.config.rules import moe_blocks
from dmoe.config.rules.workload import check_workload
from dmoe.config.schema import CapacityConfig, Config, PlacementConfig, RouterConfig
from dmoe.moe.placement import ExpertPlacement
from dmoe.replay.part import ChoiceSpec
from dmoe.simulation.replay import Setting, StepTraffic, replay_steps
from dmoe.simulation.selection import ForcedTrace, with_next_choices
from dmoe.simulation.trace import ALL, Trace, first_placement, rows_of_ranks

DRAWS = 512
ASSIGNMENTS = 1 << 21
"""Assignments of a trace that a layout is judged by, about a second; at least one micro-batch."""
FORCED_TOKENS = 1 << 16
"""Tokens of a workload at a time, where no capacity depends on their number."""


@dataclass(frozen=True)
class Load:
    """Loads of experts: log-normal with standard deviation `sigma` of their logarithm, or given."""

    experts: int
    top_k: int
    capacity: float | None
    sigma: float = 0.0
    source: str = "balanced"
    given_NE: np.ndarray | None = None
    """Choices of each expert in each micro-batch and layer, if they are known."""

    @cached_property
    def share_NE(self) -> np.ndarray:
        """Load of each expert over the mean, in `DRAWS` layers and steps."""
        if self.given_NE is not None:
            given: np.ndarray = self.given_NE / np.maximum(self.given_NE.mean(1, keepdims=True), 1)
            return given
        generator = np.random.default_rng(0)
        drawn = np.exp(self.sigma * generator.standard_normal((DRAWS, self.experts)))
        # an expert gets at most one row per token
        share: np.ndarray = drawn / drawn.mean(1, keepdims=True)
        capped: np.ndarray = np.minimum(share, self.experts / self.top_k)
        return capped

    @property
    def kept_NE(self) -> np.ndarray:
        """The same after drops: an expert computes at most `capacity` times the mean."""
        return self.share_NE if self.capacity is None else np.minimum(self.share_NE, self.capacity)

    @property
    def is_recorded(self) -> bool:
        """Whether it has the choices of tokens, which copies and pools are judged by."""
        return False

    def answers(self, micro_batch: int) -> bool:
        """Return whether it is known for a micro-batch of all ranks."""
        return True

    def drop_rate(self, ep: int = 1, micro_batch: int = 1) -> float:
        """Return the share of the assignments that have no slot."""
        return float(1 - self.kept_NE.sum() / max(1e-12, self.share_NE.sum()))

    def ranks(self, ep: int, micro_batch: int = 1) -> np.ndarray:
        """Return the rows of the rank with the most over the rows of a balanced router, [N]."""
        if ep == 1 or self.experts % ep:
            return np.ones(1)
        per_rank: np.ndarray = self.kept_NE.reshape(len(self.kept_NE), ep, -1).mean(2)
        most: np.ndarray = per_rank.max(1) / min(1.0, self.capacity or 1.0)
        return most

    def mean_max(self, ep: int, micro_batch: int = 1) -> float:
        """Return the load of the slowest rank, in the mean: each layer waits for it."""
        return round(float(self.ranks(ep, micro_batch).mean()), 3)

    def quantile(self, share: float, ep: int, micro_batch: int = 1) -> float:
        """Return the load of the slowest rank that `share` of the layers do not exceed."""
        return round(float(np.quantile(self.ranks(ep, micro_batch), share, method="higher")), 3)

    def p99(self, ep: int, micro_batch: int = 1) -> float:
        """Return the load that one layer in a hundred exceeds."""
        return self.quantile(0.99, ep, micro_batch)

    def worst(self, ep: int) -> float:
        """Return the load if all tokens go to the experts of one rank."""
        most = min(float(ep), self.experts / self.top_k)
        return most if self.capacity is None else min(most, self.capacity) / min(1, self.capacity)


def contiguous(ep: int) -> ExpertPlacement | None:
    """Return that experts are in equal runs."""
    return None


@dataclass(frozen=True)
class ReplayedLoad(Load):
    """Loads of recorded or forced choices, of each layout by the replay."""

    world: int = 1
    choices: Trace | RouterConfig = field(default_factory=RouterConfig)
    limit: CapacityConfig = field(default_factory=CapacityConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    seq_len: int = 1
    zero_cost: int = 0
    virtual: int = 1
    """Virtual ranks of each rank: each has a micro-batch, and a capacity group, of its own."""
    owned: Callable[[int], ExpertPlacement | None] = contiguous
    """Where experts are, by EP: see `replay.first_placement`."""
    seen: dict[tuple[int, int], list[StepTraffic]] = field(default_factory=dict)

    @property
    def is_recorded(self) -> bool:
        return True

    @property
    def ranks_held(self) -> int:
        """Ranks whose routing is computed, virtual ones included."""
        return self.world * self.virtual

    def answers(self, micro_batch: int) -> bool:
        choices = self.choices
        if not isinstance(choices, Trace):
            return True
        return choices.spec.global_batch * len(choices.steps) >= self.ranks_held * micro_batch

    def changed(self, limit: CapacityConfig, placement: PlacementConfig) -> ReplayedLoad:
        """Return the load of the same choices under another capacity, and with copies."""
        return replace(self, capacity=limit.factor, limit=limit, placement=placement, seen={})

    def traffic(self, ep: int, micro_batch: int) -> list[StepTraffic]:
        """Replay the choices in a layout. Raises ConfigError: they cannot answer it."""
        if (ep, micro_batch) not in self.seen:
            trace, ranks = self._read(ep, micro_batch)
            setting = Setting(ranks, ep, micro_batch, self.limit, self.placement, self.owned(ep))
            self.seen[ep, micro_batch] = list(replay_steps(trace, setting, self.zero_cost))
        return self.seen[ep, micro_batch]

    def _read(self, ep: int, micro_batch: int) -> tuple[Trace, int]:
        """Return the choices, one micro-batch of all ranks per step, and the number of ranks."""
        if isinstance(self.choices, Trace):
            samples = self.ranks_held * micro_batch
            return regroup(self.choices, samples, ASSIGNMENTS), self.ranks_held
        seq_len, ranks = self.seq_len, ep * self.virtual  # the groups of ranks are alike
        if self.capacity is None:
            seq_len = min(seq_len, max(64, FORCED_TOKENS // (ranks * micro_batch)))
        spec = ChoiceSpec("", 0, ranks * micro_batch, seq_len, 1, self.experts, self.top_k)
        return ForcedTrace(Path(self.source), [], spec, self.choices), ranks

    def drop_rate(self, ep: int = 1, micro_batch: int = 1) -> float:
        steps = self.traffic(ep, micro_batch)
        made = sum(int(step.choices_L.sum()) for step in steps)
        return 1 - sum(int(step.kept_L.sum()) for step in steps) / max(1, made)

    def ranks(self, ep: int, micro_batch: int = 1) -> np.ndarray:
        if ep == 1:
            return np.ones(1)
        steps, spec = self.traffic(ep, micro_batch), self._read(ep, micro_batch)[0].spec
        computed = spec.top_k * (self.experts - self.zero_cost) / self.experts
        held = self.virtual * micro_batch * spec.seq_len
        balanced = held * computed * min(1.0, self.capacity or 1.0)
        most: np.ndarray = np.concatenate([self._rows(step).max(2).ravel() for step in steps])
        relative: np.ndarray = most / balanced
        return relative

    def _rows(self, step: StepTraffic) -> np.ndarray:
        """Return the rows that each rank's experts compute, of all its virtual ranks, [A, L, W]."""
        accumulation, layers, ranks, ep = step.sent_ALWP.shape
        shape = (accumulation, layers, ranks // self.virtual, self.virtual, ep)
        return rows_of_ranks(step.sent_ALWP.reshape(shape).sum(3))


@dataclass(frozen=True)
class Regrouped(Trace):
    """A trace whose samples, in their order, are cut into steps of another size."""

    source: Trace
    steps_read: Sequence[int]

    @property
    def steps(self) -> Sequence[int]:
        return self.steps_read

    @property
    def has_next_choices(self) -> bool:
        return self.source.has_next_choices

    def choices(self, step: int, samples: slice = ALL) -> np.ndarray:
        return self._joined(self.source.choices, step, samples)

    def scores(self, step: int, samples: slice = ALL) -> np.ndarray:
        return self._joined(self.source.scores, step, samples)

    def all_scores(self, step: int, samples: slice = ALL) -> np.ndarray:
        return self._joined(self.source.all_scores, step, samples)

    def next_choices(self, step: int, samples: slice = ALL) -> np.ndarray:
        return self._joined(self.source.next_choices, step, samples)

    def counts(self, step: int, samples: slice = ALL) -> np.ndarray:
        return self._joined(self.source.counts, step, samples)

    def _joined(
        self, read: Callable[[int, slice], np.ndarray], step: int, samples: slice
    ) -> np.ndarray:
        first, end, _ = samples.indices(self.spec.global_batch)
        place, end = (step * self.spec.global_batch + n for n in (first, end))
        of_source, found = self.source.spec.global_batch, list[np.ndarray]()
        while place < end:
            index, start = divmod(place, of_source)
            stop = min(of_source, start + end - place)
            found.append(read(self.source.steps[index], slice(start, stop)))
            place += stop - start
        return found[0] if len(found) == 1 else np.concatenate(found)


def regroup(trace: Trace, samples: int, most: int) -> Regrouped:
    """Cut a trace into steps of `samples`, and read at most about `most` assignments of it.

    Steps of another size than the run's join samples of consecutive steps, or divide one. Those
    that are read are evenly spread; there is at least one.

    Raises:
        ConfigError: the trace has fewer samples.
    """
    spec = replace(trace.spec, global_batch=samples)
    total = trace.spec.global_batch * len(trace.steps)
    if total < samples:
        allowed = f"has {total:,} sequences, and all ranks together take {samples:,} at a time"
        fix = "record more steps, or use fewer ranks or a smaller train.micro_batch"
        raise ConfigError("--trace", trace.path, allowed, fix)
    steps, each = total // samples, spec.tokens_per_step * spec.layers * spec.top_k
    read = min(steps, max(1, most // each))
    chosen = [n * steps // read for n in range(read)]
    return Regrouped(trace.path, trace.parts, spec, trace, chosen)


def make_load(
    config: Config, world: int, sigma: float = 0.0, choices: Trace | RouterConfig | None = None
) -> Load:
    """Return the load of a config's experts.

    Args:
        config: a whole config.
        world: W, each with `parallel.virtual_ranks`.
        sigma: of log-normal loads; 0: balanced.
        choices: a trace, or a router of kind `workload`, in place of `sigma`.

    Raises:
        ConfigError: a workload that the experts cannot have, a model without experts.
    """
    moe = config.moe
    if choices is None:
        source = f"log-normal with sigma {sigma:g}" if sigma else "balanced"
        return Load(moe.num_experts, moe.top_k, moe.capacity.factor, sigma, source)
    sizes = (count_choices(moe), moe.top_k, moe.capacity.factor)
    if isinstance(choices, Trace):
        choices, source = with_next_choices(choices, config), f"of the trace {choices.path}"
    else:
        if not moe_blocks(config):
            allowed = "loads experts, and the model has none"
            raise ConfigError("--workload", choices.workload, allowed, "leave it out")
        check_workload(choices, sizes[0], moe.top_k)
        source = (
            f"of workload {choices.workload}, made for {choices.ranks} ranks, hot {choices.hot:g}"
        )
    return ReplayedLoad(
        *sizes, 0.0, source, None, world, choices, moe.capacity, config.parallel.placement,
        config.data.seq_len, count_zero_cost(moe.experts), config.parallel.virtual_ranks,
        partial(first_placement, config),
    )  # fmt: skip
