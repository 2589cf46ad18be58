"""A run graded by its plan: what the planner predicts of its own config, and what was measured.

The load is that of the run: of RUN/trace, or of the choices per expert that it logged, or balanced.
Only like is compared with like. A GPU's peak is that of tensors in both. On a CPU a run logs the
memory of its whole process, with Python, libraries and data, and the plan that of tensors: the two
are not compared. Time is that of a step without reading data, on the cluster of a file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from dmoe.config.errors import CheckpointError, ConfigError
from dmoe.config.expert_shapes import count_zero_cost
from dmoe.config.plugins import references
from dmoe.config.rules import batching, expert_parallel, moe_blocks
from dmoe.config.schema import Config
from dmoe.report.data_time import data_share
from dmoe.report.panels.plan import Grade, Quantity
from dmoe.report.run import Run, last_number, layers_of, summarize
from dmoe.runs.metrics_log import number
from dmoe.simulation.cluster import Cluster
from dmoe.simulation.dry_run import dry_run
from dmoe.simulation.load import Load, Regrouped, make_load
from dmoe.simulation.memory import memory
from dmoe.simulation.replay import Setting, replay_steps
from dmoe.simulation.selection import with_next_choices
from dmoe.simulation.step_time import step_time
from dmoe.simulation.trace import FOLDER, Trace, first_placement, open_trace

ASSIGNMENTS = 1 << 22
"""Assignments of a trace that the drops are predicted from; at least one step."""
PROCESS_MEMORY = (
    "on a CPU a run logs the memory of its whole process, and a plan counts tensors, so that the "
    "two are no comparison"
)


@dataclass(frozen=True)
class Graded:
    """A run with the number of its ranks, and the load of its plan."""

    run: Run
    config: Config
    world: int
    load: Load
    trace: Trace | None

    @property
    def ranks(self) -> int:
        """Ranks whose routing is that of the run, virtual ones included."""
        return self.world * self.config.parallel.virtual_ranks

    @property
    def shape(self) -> tuple[int, int]:
        """EP and micro-batch."""
        return (
            expert_parallel(self.config, self.world),
            batching(self.config, self.world).micro_batch,
        )


def grade(run: Run, cluster: Cluster | None) -> Grade:
    """Compare a run with the plan of its config on as many ranks.

    Args:
        run: that was read.
        cluster: of the machine that the run was on; None: no time is predicted.
    """
    if run.config is None or not run.train or number(run.start, "world") is None:
        return Grade("no plan, since config, ranks or steps of the run are not known.")
    if references(run.config):
        return Grade("no plan, since the config names code of its own, which a report never runs.")
    world, unread = int(run.start["world"]), ""
    try:
        try:
            trace = _trace(run)
        except (ConfigError, CheckpointError) as error:
            trace, unread = None, f" Its trace is left out: {_without_option(error)}."
        graded = Graded(run, run.config, world, _load(run, run.config, world, trace), trace)
        quantities = [*_memory_and_time(graded, cluster), *_drops(graded)]
    except ConfigError as error:
        return Grade(f"no plan: {error}.{unread}")
    machine = "" if cluster is None else f" on {cluster.name}"
    return Grade(f"planned{machine} with a load {graded.load.source}.{unread}", quantities)


def _trace(run: Run) -> Trace | None:
    """Return the trace of a run; None if it has none. Raises as `open_trace` does."""
    return open_trace(run.path, run.config) if (run.path / FOLDER).is_dir() else None


def _without_option(error: ConfigError | CheckpointError) -> str:
    """Return the sentence of an error without the option that a report has not."""
    if isinstance(error, ConfigError):
        return f"{error.value} {error.allowed}"
    return str(error)


def _load(run: Run, config: Config, world: int, trace: Trace | None) -> Load:
    if trace is not None:
        return make_load(config, world, choices=trace)
    moe = config.moe
    counts = [row.get("load") for line in run.train for row in layers_of(line).values()]
    known = [row[: moe.num_experts] for row in counts if isinstance(row, list) and any(row)]
    sizes = (moe.num_experts, moe.top_k, moe.capacity.factor, 0.0)
    if not known:
        return Load(*sizes, "that is balanced, since the run logged none")
    if any(len(row) != moe.num_experts for row in known):
        why = f"that is balanced, since the run logged none of {moe.num_experts} experts"
        return Load(*sizes, why)
    return Load(*sizes, "as the run logged it", np.array(known, float))


def _memory_and_time(graded: Graded, cluster: Cluster | None) -> Iterator[Quantity]:
    """Yield peak memory and time of a step, each with its measurement or why there is none."""
    run, config, load = graded.run, graded.config, graded.load
    device = run.start.get("device")
    outputs = number(run.start, "vocabulary")
    highest = round(float(load.ranks(*graded.shape).max()), 3)
    name = "peak memory of a rank"
    if device == "cpu":
        yield Quantity(name, "bytes", problem=PROCESS_MEMORY)
    elif device != "cuda":
        yield Quantity(name, "bytes", problem="the run did not record its device")
    name, speed = "time of a step", summarize(run).tokens_per_second
    tokens, last = last_number(run.train, "tokens"), run.train[-1]["step"]
    timed = cluster is not None and cluster.device == device and speed and tokens
    if cluster is None:
        fix = "give the file that dmoe plan --calibrate wrote: dmoe report RUN --cluster FILE"
        yield Quantity(name, "seconds", problem=f"no cluster is known; {fix}")
    elif cluster.device != device:
        problem = (
            f"the cluster is one of {cluster.device}, and the run was on {device or 'another'}"
        )
        yield Quantity(name, "seconds", problem=problem)
    if device != "cuda" and not timed:
        return
    precision = str(run.start.get("precision"))
    loads = {highest, load.mean_max(*graded.shape)} if timed else {highest}
    runs = {
        at: dry_run(
            config, graded.world, precision, cuda=device == "cuda", load=at,
            num_outputs=None if outputs is None else int(outputs),
        )
        for at in loads
    }  # fmt: skip
    if device == "cuda":
        measured = max(number(line, "memory") or 0.0 for line in run.train)
        yield Quantity("peak memory of a rank", "bytes", memory(runs[highest]).peak, measured)
    if timed:
        assert cluster is not None
        assert speed
        assert tokens
        planned = step_time(runs[load.mean_max(*graded.shape)], cluster, graded.shape[0])
        seconds = tokens / last / speed * (1 - (data_share(run.train) or 0.0))
        yield Quantity(name, "seconds", planned.total, seconds)


def _drops(graded: Graded) -> Iterator[Quantity]:
    """Yield the share of dropped assignments, in the steps that the run logged."""
    run, config = graded.run, graded.config
    if not moe_blocks(config):
        return
    name, trace = "dropped assignments", graded.trace
    logged = {
        line["step"]: rate for line in run.train if (rate := number(line, "drop_rate")) is not None
    }
    if trace is None:
        of_counts = graded.load.given_NE is not None
        if not logged:
            return
        predicted = graded.load.drop_rate(*graded.shape)
        words = "from logged counts, at least" if of_counts else "of a balanced load"
        yield Quantity(f"{name} ({words})", "share", predicted, fmean(logged.values()))
        return
    steps = sorted(logged.keys() & {step + 1 for step in trace.steps})
    spec = trace.spec
    each = spec.tokens_per_step * spec.layers * spec.top_k
    steps = steps[:: max(1, -(-len(steps) * each // ASSIGNMENTS))]
    if not steps:
        return
    indices = [step - 1 - trace.steps[0] for step in steps]
    source = with_next_choices(trace, config)
    few = Regrouped(trace.path, trace.parts, spec, source, indices)
    ep, micro_batch = graded.shape
    owned = first_placement(config, ep)
    setting = Setting(graded.ranks, ep, micro_batch, config.moe.capacity, owned=owned)
    zero_cost = count_zero_cost(config.moe.experts)
    rates = [
        1 - int(step.kept_L.sum()) / max(1, int(step.choices_L.sum()))
        for step in replay_steps(few, setting, zero_cost)
    ]
    words = f"{name} (of the trace, {len(steps)} steps)"
    yield Quantity(words, "share", fmean(rates), fmean(logged[step] for step in steps))


def grade_runs(runs: list[Run], cluster: Cluster | None) -> dict[str, Grade]:
    """Return the grade of each run, by its name."""
    return {run.name: grade(run, cluster) for run in runs}
