"""Run the cases on gloo ranks and compare every quantity with the reference."""

from __future__ import annotations

import gc
import math
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from safetensors.numpy import load_file, save_file

from dmoe.checkpoint import save_load
from dmoe.config.errors import CheckpointError
from dmoe.config.plugin_loader import load_plugins
from dmoe.config.rules import check
from dmoe.config.schema import Config
from dmoe.distributed.init import init_distributed
from dmoe.distributed.local_ranks import RankError, run_ranks
from dmoe.train import checkpointer
from dmoe.train.engine import Engine, build_engine, warm_up
from dmoe.verify import differences, published, ties
from dmoe.verify.capture import (
    capture,
    capture_reference,
    final_state,
    low_precision_state,
    state_arrays,
)
from dmoe.verify.cases import Case, plan_cases, prepare, reference_case, shrink
from dmoe.verify.causes import Report, make_row
from dmoe.verify.compare import compare
from dmoe.verify.decisions import Capture, tie_scores
from dmoe.verify.differences import QUANTITIES, Difference, compare_exactly
from dmoe.verify.findings import Findings, RankFindings, merge_ranks
from dmoe.verify.naive import adapters, layer, model
from dmoe.verify.naive import published as naive_published

__all__ = ["Report", "verify"]

VOCAB_SIZE = 256
FLOAT32_EPSILON = 1e-6
"""Least `optim.eps` in float32: AdamW divides by |gradient| + eps, so with less, the rounding of a
gradient near 0 (an expert of few rows) becomes a different step: 1.9e-4 in the next output."""
TIMEOUT = 120.0
Patch = Callable[[], None]


@dataclass(frozen=True)
class _Job:
    """Arguments of the functions that run in the ranks."""

    config: Config
    cases: list[tuple[int, Case]]
    folder: Path
    dtype: str
    patch: Patch | None
    setup: Patch | None


def verify(
    config: Config,
    worlds: Sequence[int] = (1, 2, 4),
    *,
    dtype: str = "float64",
    device: str = "cpu",
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
        device: of the cases, `cpu` (gloo) or `cuda` (NCCL); the reference is always on the CPU.
        full: keep the config's widths; default: the narrow form of `shrink`.
        patch: called in every rank of the cases before anything is built, not in the reference;
            tests add a bug with it.
        setup: called before `patch`, and in the reference too; tests make a special case with it.

    Raises:
        ConfigError: the config cannot run at all, or there are too few GPUs.
    """
    start, groups = time.monotonic(), math.lcm(*worlds) * config.parallel.virtual_ranks
    config = load_plugins(config)
    published.check(config, dtype)
    with tempfile.TemporaryDirectory() as name:
        small = config if full else published.shrink(shrink(config), Path(name) / "source")
        if dtype == "float32":
            optim = small.optim
            small = replace(small, optim=replace(optim, eps=max(optim.eps, FLOAT32_EPSILON)))
        base, reference = prepare(small, groups), reference_case(groups)
        check(reference.config(base), 1)
        plan = plan_cases(base, list(worlds), groups, device)
        if config.parallel.exchange.wire != "full":
            why = "rows are compared in full, as `verify` computes in full precision"
            plan.refused[f"parallel.exchange.wire={config.parallel.exchange.wire}"] = why
        if config.parallel.exchange.library != "torch":
            why = "rows are sent by torch: `verify` computes in float64, which the library does not"
            plan.refused[f"parallel.exchange.library={config.parallel.exchange.library}"] = why
        job = _Job(base, list(enumerate(plan.cases)), Path(name), dtype, patch, setup)
        found = _run_all(job, reference, worlds)
    rows = [row for name in QUANTITIES if (row := make_row(name, found.differences, dtype))]
    cases = [str(case) for case in plan.cases]
    return Report(rows, cases, plan.refused, found.undecided, dtype, time.monotonic() - start)


def _run_all(job: _Job, reference: Case, worlds: Sequence[int]) -> Findings:
    try:
        run_ranks(1, _record_reference, job, reference, timeout=TIMEOUT)
    except RankError as error:
        return Findings([(reference, differences.failure_of(str(error)))])
    found = Findings()
    for world in worlds:
        cases = [(index, case) for index, case in job.cases if case.world == world]
        found += _run_world(replace(job, cases=cases), world)
    saved = [(i, case) for i, case in job.cases if (job.folder / f"{i}.safetensors").exists()]
    job, row = replace(job, cases=saved), "checkpoint written here, read by 1"
    try:
        (loaded,) = run_ranks(1, _load_checkpoints, job, reference, timeout=TIMEOUT)
    except RankError as error:
        loaded = [(reference, differences.failure_of(str(error), row))]
    return found + Findings(loaded)


def _run_world(job: _Job, world: int) -> Findings:
    """Run all cases in one start of the ranks; if that fails, start the ranks for each case.

    A crash in one case then does not hide the results of the others; a hang would cost the time
    limit in each, so after one the rest is not started. If no case fails alone, the failure of all
    of them together is reported.
    """
    found = Findings()
    if not job.cases:
        return found
    index, case = job.cases[0]
    try:
        ranks = run_ranks(world, _compare_cases, job, timeout=TIMEOUT, device=case.device)
    except RankError as error:
        failure = differences.failure_of(str(error))
        if len(job.cases) == 1 or "in time" in failure.where:
            written = job.folder.glob(f"{index}-*.json")
            seen = [RankFindings(differences.read(path), None) for path in written]
            return merge_ranks(case, seen, job.dtype) + Findings([(case, failure)])
        for single in job.cases:
            # what the start that failed has saved would be in the way
            shutil.rmtree(job.folder / str(single[0]), ignore_errors=True)
            found += _run_world(replace(job, cases=[single]), world)
            if "in time" in found.differences[-1][1].where:
                break
        if not any(difference.is_red(job.dtype) for _, difference in found.differences):
            found.differences.append((case, failure))
        return found
    for (_, case), results in zip(job.cases, zip(*ranks, strict=True), strict=True):
        found += merge_ranks(case, results, job.dtype)
        found.differences.append((case, Difference("every rank finishes", "", 0.0, exact=True)))
    return found


def _record_reference(rank: int, world: int, job: _Job, reference: Case) -> None:
    if job.setup is not None:
        job.setup()
    for case in (reference, replace(reference, tied=True)):
        if case.tied and not any(planned.tied for _, planned in job.cases):
            continue
        engine = _build(job, case)
        found = capture_reference(engine, decisions=job.dtype == "float32")
        save_file(found, job.folder / f"{_reference_name(case)}.safetensors")
        state = checkpointer.train_state(engine)
        save_load.save(job.folder / _reference_name(case), 1, state, {})


def _reference_name(case: Case) -> str:
    return "tied reference" if case.tied else "reference"


def _compare_cases(rank: int, world: int, job: _Job) -> list[RankFindings]:
    _apply_patches(job)
    with _heap_left_out():
        return [_compare_case(rank, world, job, index, case) for index, case in job.cases]


@contextmanager
def _heap_left_out() -> Iterator[None]:
    """Keep what lives now, such as all modules, out of the garbage collection inside.

    The end of an engine collects; going through the modules was a third of a case's time.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _compare_case(rank: int, world: int, job: _Job, index: int, case: Case) -> RankFindings:
    expected = load_file(job.folder / f"{_reference_name(case)}.safetensors")
    engine = _build(job, case)
    actual = capture(engine, decisions=job.dtype == "float32")
    mixtures = engine.model.moe_layers()
    layers = [n for n, m in engine.model.named_modules() if m in mixtures]
    found = compare(actual, expected, rank, world, layers)
    differences.write(job.folder / f"{index}-{rank}.json", found)
    found.append(_compare_checkpoints(engine, job, index, case, actual, expected))
    engine.close()
    routing = ties.first_differences(actual, expected, rank, job.config, world * case.virtual_ranks)
    return RankFindings(found, routing)


def _compare_checkpoints(
    engine: Engine, job: _Job, index: int, case: Case, actual: Capture, expected: Capture
) -> Difference:
    """Save a checkpoint for `_load_checkpoints`, load the reference's, and compare every bit.

    An unexpected exception leaves the other ranks in a collective, so it ends the process; its
    message names the quantity, for `failure_of`, and the earlier differences are in a file.
    """
    quantity = "checkpoint written here, read by 1"
    try:
        folder, group = job.folder / str(index), engine.mesh.control_group
        with engine.contiguous_experts():
            save_load.save(folder, 1, checkpointer.train_state(engine), {}, group=group)
        if engine.process.is_main:
            save_file(final_state(actual), job.folder / f"{index}.safetensors")
        quantity = "checkpoint written by 1, read here"
        path = job.folder / _reference_name(case) / "step-00000001"
        checkpointer.load_training_state(engine, path)
        return compare_exactly(quantity, state_arrays(engine), final_state(expected))
    except CheckpointError as error:
        return Difference(quantity, str(error), math.inf, finding="refused")
    except Exception as error:
        raise RuntimeError(f"[{quantity}] {error!r}") from error


def _load_checkpoints(
    rank: int, world: int, job: _Job, reference: Case
) -> list[tuple[Case, Difference]]:
    """Load the checkpoint of every case into one process and compare every bit.

    Every exception is a row. The same process trains in bf16 and looks at the dtypes.
    """
    _apply_patches(job)
    quantity, found = "checkpoint written here, read by 1", list[tuple[Case, Difference]]()
    engine = _build(job, reference)
    for index, case in job.cases:
        try:
            checkpointer.load_training_state(engine, job.folder / str(index) / "step-00000001")
            saved = load_file(job.folder / f"{index}.safetensors")
            difference = compare_exactly(quantity, state_arrays(engine), saved)
        except CheckpointError as error:
            difference = Difference(quantity, str(error), math.inf, finding="refused")
        except Exception:
            difference = differences.failure_of(traceback.format_exc(), quantity)
        found.append((case, difference))
    quantity, case = "float32 under bf16", Case(1, 1, reference.virtual_ranks, "packed", "ddp")
    config = replace(job.config, train=replace(job.config.train, precision="bf16"))
    try:
        names = low_precision_state(_build(replace(job, config=config, dtype="float32"), case))
        difference = Difference(quantity, ", ".join(names[:1]), float(len(names)), exact=True)
    except Exception:
        difference = differences.failure_of(traceback.format_exc(), quantity)
    return [*found, (case, difference)]


def _apply_patches(job: _Job) -> None:
    for change in filter(None, (job.setup, job.patch)):
        change()


def _build(job: _Job, case: Case) -> Engine:
    # one process builds many engines; accelerate expects one
    AcceleratorState._reset_state(reset_partial_state=True)
    process, dtype = init_distributed(case.device), getattr(torch, job.dtype)
    # All ranks are on one host: as if each EP group were on two.
    process = replace(process, host_size=max(1, case.ep // 2))
    config = load_plugins(case.config(job.config))
    engine = build_engine(config, process, VOCAB_SIZE, dtype, is_trained=False)
    # before the first forward: routers of transformers that compute in float32 fail on float64
    published.compute_in_float64(engine.model)
    warm_up(engine)
    if case.naive:
        for part in (layer, model, adapters):
            part.install(engine.model)
        model.read_settings(engine.model, engine.config)
        naive_published.install(engine.model, engine.config)
    adapters.randomize(engine)
    if case.tied:
        tie_scores(engine)
    return engine
