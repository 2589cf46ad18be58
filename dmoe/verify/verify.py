"""Runs the cases on real gloo ranks and says, quantity by quantity, whether they are the same training run."""

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
from dmoe.distributed import init as worlds_
from dmoe.distributed.local_ranks import RankError, run_ranks
from dmoe.train import checkpointer
from dmoe.train import engine as engines
from dmoe.train.engine import Engine
from dmoe.verify import ties
from dmoe.verify.capture import Capture, capture, state_arrays
from dmoe.verify.cases import Case, plan, reference
from dmoe.verify.causes import cause
from dmoe.verify.compare import QUANTITIES, Difference, compare, compare_exactly, tolerance
from dmoe.verify.naive import layer, modular
from dmoe.verify.shrink import prepare, shrink

VOCABULARY = 256
TIMEOUT = 120.0
Patch = Callable[[], None]


@dataclass(frozen=True)
class Row:
    """The worst of one quantity over all cases."""

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
    rows: list[Row]
    cases: list[str]
    refused: dict[str, str]
    undecided: dict[str, str]
    """Float32 only: cases with another choice, between scores closer than rounding, and the choice. What follows is in no row."""
    dtype: str
    seconds: float

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    @property
    def first(self) -> Row | None:
        """The first difference in the order of cause and effect."""
        return next((row for row in self.rows if not row.ok), None)


@dataclass(frozen=True)
class _Job:
    """What the ranks of one world do."""

    config: Config
    cases: list[tuple[int, Case]]
    folder: Path
    dtype: str
    patch: Patch | None
    setting: Patch | None


@dataclass(frozen=True)
class _Found:
    """What the ranks of some worlds found."""

    differences: list[tuple[Case, Difference]] = field(default_factory=list)
    undecided: dict[str, str] = field(default_factory=dict)

    def __add__(self, other: _Found) -> _Found:
        return _Found(self.differences + other.differences, self.undecided | other.undecided)


@dataclass(frozen=True)
class _Compared:
    """What one rank found in one case."""

    differences: list[Difference]
    routing: list[ties.Finding] | None


def verify(
    config: Config,
    worlds: Sequence[int] = (1, 2, 4),
    *,
    dtype: str = "float64",
    full: bool = False,
    patch: Patch | None = None,
    setting: Patch | None = None,
) -> Report:
    """Compare every allowed (world, EP, exchange, mode) with one process and the naive layer.

    Args:
        worlds: numbers of ranks; each is started once.
        dtype: of weights and arithmetic; float64 (tolerance 1e-10) or float32 (1e-5).
        full: keep the config's widths; default: the narrow form of `shrink`.
        patch: called in every rank before anything is built, but not for the truth: the tests break the code with it.
        setting: called before it, and for the truth too: the tests make a hard case with it.

    Raises ConfigError for a config that cannot run at all. Never raises for a difference: see the report.
    """
    began = time.monotonic()
    groups = math.lcm(*worlds) * config.parallel.virtual_ranks
    base = prepare(config if full else shrink(config), groups)
    truth = reference(groups)
    check(truth.config(base), 1)
    planned = plan(base, list(worlds), groups)
    with tempfile.TemporaryDirectory() as name:
        found = _run_all(
            _Job(base, list(enumerate(planned.cases)), Path(name), dtype, patch, setting),
            truth,
            worlds,
        )
    rows = [_row(quantity, found.differences, dtype) for quantity in QUANTITIES]
    shown = [row for row in rows if row is not None]
    cases = [str(case) for case in planned.cases]
    return Report(shown, cases, planned.refused, found.undecided, dtype, time.monotonic() - began)


def _run_all(job: _Job, truth: Case, worlds: Sequence[int]) -> _Found:
    run_ranks(1, _record_truth, job, truth, timeout=TIMEOUT)
    found = _Found()
    for world in worlds:
        found += _run_world(
            replace(job, cases=[(index, case) for index, case in job.cases if case.world == world]),
            world,
        )
    done = [
        (index, case) for index, case in job.cases if (job.folder / f"{index}.safetensors").exists()
    ]
    reread = run_ranks(1, _reread, replace(job, cases=done), truth, timeout=TIMEOUT)[0]
    return found + _Found(
        [(case, difference) for (_, case), difference in zip(done, reread, strict=True)]
    )


def _run_world(job: _Job, world: int) -> _Found:
    """All cases in one start of the ranks; if that fails, each in a start of its own, so that a crash does not hide the rest."""
    quantity = "every rank finishes"
    try:
        ranks: list[list[_Compared]] = run_ranks(world, _compare_cases, job, timeout=TIMEOUT)
    except RankError as error:
        if len(job.cases) > 1:
            return sum(
                (_run_world(replace(job, cases=[one]), world) for one in job.cases), _Found()
            )
        return _Found(
            [(job.cases[0][1], Difference(quantity, _last_line(error), math.inf, exact=True))]
        )
    found = _Found()
    for (_, case), compared in zip(job.cases, zip(*ranks, strict=True), strict=True):
        found += _of_case(case, compared)
        found.differences.append((case, Difference(quantity, "", 0.0, exact=True)))
    return found


def _of_case(case: Case, ranks: Sequence[_Compared]) -> _Found:
    """What all ranks found, without what follows from a tie."""
    tie = ties.decide([rank.routing for rank in ranks])
    omitted = ties.following(tie.step) if tie else ()
    found = [
        (case, difference)
        for rank in ranks
        for difference in rank.differences
        if difference.quantity not in omitted
    ]
    return _Found(found, {str(case): str(tie)} if tie else {})


def _record_truth(rank: int, world: int, job: _Job, truth: Case) -> None:
    if job.setting is not None:
        job.setting()
    engine = _build(job, truth)
    found = capture(engine, scores=job.dtype == "float32")
    save_file(found, job.folder / "truth.safetensors")
    save_load.save(job.folder / "truth", 1, checkpointer.training_state(engine), {})


def _compare_cases(rank: int, world: int, job: _Job) -> list[_Compared]:
    _patched(job)
    truth = load_file(job.folder / "truth.safetensors")
    return [_compare_case(rank, world, job, index, case, truth) for index, case in job.cases]


def _compare_case(
    rank: int, world: int, job: _Job, index: int, case: Case, truth: Capture
) -> _Compared:
    engine = _build(job, case)
    mine = capture(engine, scores=job.dtype == "float32")
    found = compare(mine, truth, rank, world)
    found.append(_round_trip(engine, job, index, mine, truth))
    engine.close()
    return _Compared(found, ties.judge(mine, truth, rank, job.config, world * case.virtual_ranks))


def _round_trip(engine: Engine, job: _Job, index: int, mine: Capture, truth: Capture) -> Difference:
    """Write this case's checkpoint for `_reread`, then load the reference's and compare every bit."""
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
            save_file(_finals(mine), job.folder / f"{index}.safetensors")
        checkpointer.load(engine, job.folder / "truth" / "step-00000001")
    except CheckpointError as error:
        return Difference(quantity, str(error), math.inf, finding="refused")
    return compare_exactly(quantity, state_arrays(engine), _finals(truth))


def _reread(rank: int, world: int, job: _Job, truth: Case) -> list[Difference]:
    """Load every case's checkpoint into one process."""
    _patched(job)
    engine, quantity, found = _build(job, truth), "checkpoint written here, read by 1", []
    for index, _ in job.cases:
        try:
            checkpointer.load(engine, job.folder / str(index) / "step-00000001")
        except CheckpointError as error:
            found.append(Difference(quantity, str(error), math.inf, finding="refused"))
            continue
        found.append(
            compare_exactly(
                quantity, state_arrays(engine), load_file(job.folder / f"{index}.safetensors")
            )
        )
    return found


def _patched(job: _Job) -> None:
    for change in (job.setting, job.patch):
        if change is not None:
            change()


def _build(job: _Job, case: Case) -> Engine:
    AcceleratorState._reset_state(
        reset_partial_state=True
    )  # one process builds many engines; accelerate expects one
    engine = engines.build(
        case.config(job.config),
        worlds_.init_distributed("cpu"),
        VOCABULARY,
        getattr(torch, job.dtype),
    )
    if case.naive:
        layer.install(engine.model)
        modular.install(engine.model)
    modular.stir(engine)
    return engine


def _finals(found: Capture) -> Capture:
    return {
        name.removeprefix("final/"): array
        for name, array in found.items()
        if name.startswith("final/")
    }


def _row(quantity: str, found: list[tuple[Case, Difference]], dtype: str) -> Row | None:
    own = [(case, difference) for case, difference in found if difference.quantity == quantity]
    if not own:
        return None
    case, worst = max(own, key=lambda pair: pair[1].size)
    allowed = 0.0 if worst.exact else tolerance(quantity, dtype)
    ok = worst.size <= allowed
    where = "" if ok else ", ".join(part for part in (worst.where, worst.finding) if part)
    return Row(
        quantity, ok, worst.size, allowed, str(case), where, "" if ok else cause(worst, case)
    )


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]
