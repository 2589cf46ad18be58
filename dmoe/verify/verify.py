"""Run the cases on gloo ranks and compare every quantity with the reference."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from safetensors.numpy import load_file, save_file

from dmoe.checkpoint import save_load
from dmoe.config.errors import CheckpointError
from dmoe.config.rules import check
from dmoe.config.schema import Config
from dmoe.distributed.init import init_distributed
from dmoe.distributed.local_ranks import RankError, run_ranks
from dmoe.train import checkpointer
from dmoe.train.engine import Engine, build_engine
from dmoe.verify import ties
from dmoe.verify.capture import Capture, capture, final_state, state_arrays
from dmoe.verify.cases import Case, plan_cases, prepare, reference_case, shrink
from dmoe.verify.causes import likely_cause
from dmoe.verify.compare import QUANTITIES, Difference, compare, compare_exactly, tolerance
from dmoe.verify.naive import adapters, layer

VOCAB_SIZE = 256
TIMEOUT = 120.0
Patch = Callable[[], None]


@dataclass(frozen=True)
class Row:
    """Largest difference of one quantity over all cases."""

    quantity: str
    ok: bool
    size: float
    """Relative difference; for exact quantities the number of entries that differ."""
    tolerance: float
    case: str
    where: str
    cause: str


@dataclass(frozen=True)
class Report:
    """Result of `verify`."""

    rows: list[Row]
    cases: list[str]
    refused: dict[str, str]
    undecided: dict[str, str]
    """Float32 only: cases with a tie, and its description. Quantities that follow are in no row."""
    dtype: str
    seconds: float

    @property
    def ok(self) -> bool:
        """Return True if no quantity differs."""
        return all(row.ok for row in self.rows)

    @property
    def first(self) -> Row | None:
        """Return the first difference in order of cause and effect."""
        return next((row for row in self.rows if not row.ok), None)


@dataclass(frozen=True)
class _Job:
    """Arguments of the functions that run in the ranks."""

    config: Config
    cases: list[tuple[int, Case]]
    folder: Path
    dtype: str
    patch: Patch | None
    setup: Patch | None


@dataclass(frozen=True)
class _Findings:
    """Differences and ties of some cases."""

    differences: list[tuple[Case, Difference]] = field(default_factory=list)
    undecided: dict[str, str] = field(default_factory=dict)

    def __add__(self, other: _Findings) -> _Findings:
        return _Findings(self.differences + other.differences, self.undecided | other.undecided)


@dataclass(frozen=True)
class _RankFindings:
    """Differences that one rank found in one case; `routing` is None if it broke the rules."""

    differences: list[Difference]
    routing: list[ties.UnitDifference] | None


def verify(
    config: Config,
    worlds: Sequence[int] = (1, 2, 4),
    *,
    dtype: str = "float64",
    full: bool = False,
    patch: Patch | None = None,
    setup: Patch | None = None,
) -> Report:
    """Compare every allowed (world, EP, exchange, mode) with one process and the naive layer.

    A difference raises no error: see the report.

    Args:
        config: checked for one process.
        worlds: numbers of ranks; each is started once.
        dtype: of weights and arithmetic; float64 (tolerance 1e-10) or float32 (1e-5).
        full: keep the config's widths; default: the narrow form of `shrink`.
        patch: called in every rank of the cases before anything is built, not in the reference;
            tests add a bug with it.
        setup: called before `patch`, and in the reference too; tests make a special case with it.

    Raises:
        ConfigError: the config cannot run at all.
    """
    start = time.monotonic()
    groups = math.lcm(*worlds) * config.parallel.virtual_ranks
    base = prepare(config if full else shrink(config), groups)
    reference = reference_case(groups)
    check(reference.config(base), 1)
    plan = plan_cases(base, list(worlds), groups)
    with tempfile.TemporaryDirectory() as name:
        job = _Job(base, list(enumerate(plan.cases)), Path(name), dtype, patch, setup)
        found = _run_all(job, reference, worlds)
    rows = [_row(quantity, found.differences, dtype) for quantity in QUANTITIES]
    compared = [row for row in rows if row is not None]
    cases = [str(case) for case in plan.cases]
    return Report(compared, cases, plan.refused, found.undecided, dtype, time.monotonic() - start)


def _run_all(job: _Job, reference: Case, worlds: Sequence[int]) -> _Findings:
    run_ranks(1, _record_reference, job, reference, timeout=TIMEOUT)
    found = _Findings()
    for world in worlds:
        cases = [(index, case) for index, case in job.cases if case.world == world]
        found += _run_world(replace(job, cases=cases), world)
    saved = [(i, case) for i, case in job.cases if (job.folder / f"{i}.safetensors").exists()]
    job = replace(job, cases=saved)
    (loaded,) = run_ranks(1, _load_checkpoints, job, reference, timeout=TIMEOUT)
    return found + _Findings(
        [(case, difference) for (_, case), difference in zip(saved, loaded, strict=True)]
    )


def _run_world(job: _Job, world: int) -> _Findings:
    """Run all cases in one start of the ranks; if that fails, start the ranks for each case.

    A crash in one case then does not hide the results of the others.
    """
    quantity = "every rank finishes"
    try:
        ranks: list[list[_RankFindings]] = run_ranks(world, _compare_cases, job, timeout=TIMEOUT)
    except RankError as error:
        if len(job.cases) > 1:
            separate = (_run_world(replace(job, cases=[case]), world) for case in job.cases)
            return sum(separate, _Findings())
        last_line = str(error).strip().splitlines()[-1]
        failure = Difference(quantity, last_line, math.inf, exact=True)
        return _Findings([(job.cases[0][1], failure)])
    found = _Findings()
    for (_, case), results in zip(job.cases, zip(*ranks, strict=True), strict=True):
        found += _merge_ranks(case, results)
        found.differences.append((case, Difference(quantity, "", 0.0, exact=True)))
    return found


def _merge_ranks(case: Case, ranks: Sequence[_RankFindings]) -> _Findings:
    """Merge the findings of all ranks, without the quantities that follow from a tie."""
    tie = ties.find_tie([rank.routing for rank in ranks])
    omitted = ties.affected_quantities(tie.step) if tie else ()
    found = [
        (case, difference)
        for rank in ranks
        for difference in rank.differences
        if difference.quantity not in omitted
    ]
    return _Findings(found, {str(case): str(tie)} if tie else {})


def _record_reference(rank: int, world: int, job: _Job, reference: Case) -> None:
    if job.setup is not None:
        job.setup()
    engine = _build(job, reference)
    found = capture(engine, decisions=job.dtype == "float32")
    save_file(found, job.folder / "reference.safetensors")
    save_load.save(job.folder / "reference", 1, checkpointer.training_state(engine), {})


def _compare_cases(rank: int, world: int, job: _Job) -> list[_RankFindings]:
    _apply_patches(job)
    expected = load_file(job.folder / "reference.safetensors")
    return [_compare_case(rank, world, job, index, case, expected) for index, case in job.cases]


def _compare_case(
    rank: int, world: int, job: _Job, index: int, case: Case, expected: Capture
) -> _RankFindings:
    engine = _build(job, case)
    actual = capture(engine, decisions=job.dtype == "float32")
    found = compare(actual, expected, rank, world)
    found.append(_compare_checkpoints(engine, job, index, actual, expected))
    engine.close()
    groups = world * case.virtual_ranks
    routing = ties.first_differences(actual, expected, rank, job.config, groups)
    return _RankFindings(found, routing)


def _compare_checkpoints(
    engine: Engine, job: _Job, index: int, actual: Capture, expected: Capture
) -> Difference:
    """Save a checkpoint for `_load_checkpoints`, load the reference's, and compare every bit."""
    quantity = "checkpoint written by 1, read here"
    try:
        save_load.save(
            job.folder / str(index),
            1,
            checkpointer.training_state(engine),
            {},
            group=engine.mesh.control_group,
        )
        if engine.process.is_main:
            save_file(final_state(actual), job.folder / f"{index}.safetensors")
        checkpointer.load_training_state(engine, job.folder / "reference" / "step-00000001")
    except CheckpointError as error:
        return Difference(quantity, str(error), math.inf, finding="refused")
    return compare_exactly(quantity, state_arrays(engine), final_state(expected))


def _load_checkpoints(rank: int, world: int, job: _Job, reference: Case) -> list[Difference]:
    """Load the checkpoint of every case into one process and compare every bit."""
    _apply_patches(job)
    engine, quantity, found = _build(job, reference), "checkpoint written here, read by 1", []
    for index, _ in job.cases:
        try:
            checkpointer.load_training_state(engine, job.folder / str(index) / "step-00000001")
        except CheckpointError as error:
            found.append(Difference(quantity, str(error), math.inf, finding="refused"))
            continue
        found.append(
            compare_exactly(
                quantity, state_arrays(engine), load_file(job.folder / f"{index}.safetensors")
            )
        )
    return found


def _apply_patches(job: _Job) -> None:
    for change in (job.setup, job.patch):
        if change is not None:
            change()


def _build(job: _Job, case: Case) -> Engine:
    # one process builds many engines; accelerate expects one
    AcceleratorState._reset_state(reset_partial_state=True)
    engine = build_engine(
        case.config(job.config),
        init_distributed("cpu"),
        VOCAB_SIZE,
        getattr(torch, job.dtype),
    )
    if case.naive:
        layer.install(engine.model)
        adapters.install(engine.model)
    adapters.randomize(engine)
    return engine


def _row(quantity: str, found: list[tuple[Case, Difference]], dtype: str) -> Row | None:
    own = [(case, difference) for case, difference in found if difference.quantity == quantity]
    if not own:
        return None
    case, worst = max(own, key=lambda pair: pair[1].size)
    allowed = 0.0 if worst.exact else tolerance(quantity, dtype)
    ok = worst.size <= allowed
    where = "" if ok else ", ".join(part for part in (worst.where, worst.finding) if part)
    return Row(
        quantity, ok, worst.size, allowed, str(case), where, "" if ok else likely_cause(worst, case)
    )
