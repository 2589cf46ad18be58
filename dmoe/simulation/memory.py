"""The whole step from a dry run of some of its blocks, and the memory of one rank through it.

Blocks with equal classes and parameter shapes do the same work on the same shapes, so their stages
are equal, but for the first ones and the last of a kind (what FSDP2 gathers ahead, the gradient of
the embedding). A dry run has those and one between; here the one between is repeated. The test
compares with the dry run of all blocks, byte by byte.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from dmoe.distributed.fake_world import Collective
from dmoe.distributed.optimizers.offloaded_adamw import slot_numbers
from dmoe.distributed.state_dict import MOMENTS
from dmoe.simulation.dry_run import DryRun
from dmoe.simulation.recording.kernel import Kernel
from dmoe.simulation.recording.recorder import Stage
from dmoe.simulation.state import StateBytes


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, by part. Parts are largest at different times; `peak` is at one time."""

    weights: int
    gradients: int
    moments: int
    copies: int
    """Most working copies of weights at one time: casts of autocast, and what FSDP2 gathers."""
    activations: int
    """Kept by the forward of one micro-batch for its backward, without working copies."""
    whole_gradients: int
    """Gradients that are kept between micro-batches: of all gathered weights, with fsdp."""
    peak: int
    """Most bytes live at one time."""
    peak_stage: str
    logits: int
    """Most that the output projection and the loss take at one time: logits and their gradients."""
    exchange: int
    """Rows that the largest all-to-all of a layer sends and receives."""
    dense_parameters: int
    expert_parameters: int
    host_moments: int = 0
    """In the memory of the host, with `optim.offload`; none of the others has them."""
    host_activations: int = 0
    """Of one micro-batch, in the memory of the host, with `train.offload=activations`."""

    @property
    def state(self) -> int:
        """Weights, gradients and moments: what no smaller batch makes smaller."""
        return self.weights + self.gradients + self.moments


def whole_step(run: DryRun) -> list[Stage]:
    """Return the stages of the step of the whole model, with at most two micro-batches."""
    shown, missing = _shown(run), _missing(run)
    typical = {run.kinds.index(kind, run.kinds.index(kind) + 1): n for kind, n in missing.items()}
    step = list[Stage]()
    for micro_batch in _micro_batches(run.stages):
        by_name = {stage.name: stage for stage in micro_batch}
        done = set[str]()
        for stage in micro_batch:
            phase, _, index = stage.name.partition(" ")
            if not index.isdecimal():
                # e.g. the casts of all weights, which autocast keeps until the forward ends
                more, copies = (
                    sum(
                        times * freed[f"{phase} {n}"]
                        for n, times in typical.items()
                        for phase in ("forward", "backward")
                    )
                    for freed in (stage.freed, stage.freed_copies)
                )
                left = stage.copies - copies
                step.append(replace(stage, delta=stage.delta - more, copies=left))
            elif phase not in done:
                done.add(phase)
                order = shown if phase == "forward" else list(reversed(shown))
                step += [by_name[f"{phase} {n}"] for n in order if f"{phase} {n}" in by_name]
    return step


def _micro_batches(stages: list[Stage]) -> list[list[Stage]]:
    """Split the stages of a step after each backward."""
    parts: list[list[Stage]] = [[]]
    for stage in stages:
        parts[-1].append(stage)
        if stage.name == "update":
            parts.append([])
    return parts[:-1]


def _shown(run: DryRun) -> list[int]:
    """Return which block of the run stands for each block of the model.

    The last of a kind stands for itself; so do the first ones, and the one before the last for all
    others.
    """
    places: dict[str, list[int]] = {}
    for index, kind in enumerate(run.kinds):
        places.setdefault(kind, []).append(index)
    total, seen, shown = Counter(run.all_kinds), Counter[str](), []
    for kind in run.all_kinds:
        place, number = places[kind], seen[kind]
        seen[kind] += 1
        is_last = seen[kind] == total[kind]
        shown.append(place[-1] if is_last else place[min(number, len(place) - 2)])
    return shown


def _missing(run: DryRun) -> Counter[str]:
    """Return how many blocks of each kind were not run."""
    return Counter(run.all_kinds) - Counter(run.kinds)


def memory(run: DryRun) -> Memory:
    """Return the memory of this rank through the step."""
    step, state = whole_step(run), state_of(run)
    missing = _missing_state(run)
    held = run.before + missing.weights + missing.moments + missing.buckets
    live, peak, peak_stage, kept = held, held, "", 0
    activations, copies, most_copies, between = 0, 0, 0, list[int]()
    on_host = most_on_host = 0
    for stage in step:
        if stage.name == "update":
            between.append(live)
        highest = stage.peak
        if stage.name == "update":  # whose buckets of moments are those of the blocks that were run
            whole, shown = state.host_moments, state.host_moments - missing.host_moments
            highest += bucket_bytes(whole) - bucket_bytes(shown)
        if live + highest > peak:
            peak, peak_stage = live + highest, stage.name
        most_copies = max(most_copies, copies + stage.copies_peak)
        live, copies = live + stage.delta, copies + stage.copies
        if "backward" not in stage.name:  # a block's input is saved before its own stage begins
            on_host += stage.host_bytes
        if stage.name.startswith("forward"):
            kept += stage.delta - stage.copies
        elif stage.name == "head":
            activations, most_on_host = max(activations, kept), max(most_on_host, on_host)
            kept = on_host = 0
    return Memory(
        state.weights,
        state.gradients,
        state.moments,
        most_copies,
        activations,
        between[0] - held if len(between) > 1 else 0,
        peak,
        peak_stage.partition(" ")[0] if "backward" not in peak_stage else "backward",
        max((stage.peak for stage in step if stage.name == "head"), default=0),
        max((c.buffers for stage in step for c in stage.collectives), default=0),
        state.dense_parameters,
        state.expert_parameters,
        state.host_moments,
        most_on_host,
    )


def bucket_bytes(host_moments: int) -> int:
    """Return what a step of the optimizer has on the device of float32 moments on the host."""
    return 4 * slot_numbers(host_moments // (4 * len(MOMENTS)))


def state_of(run: DryRun) -> StateBytes:
    """Return the state of the whole model on this rank."""
    counts = Counter([*run.all_kinds, ""])
    parts = [state * counts[kind] for kind, state in run.state_of_kind.items()]
    return sum(parts[1:], start=parts[0])


def _missing_state(run: DryRun) -> StateBytes:
    """Return the state of the blocks that were not run.

    Of its gradients only DDP's buckets exist when a step begins.
    """
    missing = _missing(run)
    parts = [state * missing[kind] for kind, state in run.state_of_kind.items() if kind]
    return sum(parts, start=StateBytes(0, 0, 0, 0, 0))


def totals(run: DryRun) -> tuple[Counter[Kernel], Counter[Collective]]:
    """Return all kernels and collectives of one optimizer step, with all its micro-batches."""
    kernels, collectives = Counter[Kernel](), Counter[Collective]()
    for stage, times in repeated(run):
        for kernel, count in stage.kernels.items():
            kernels[kernel] += count * times
        for collective, count in stage.collectives.items():
            collectives[collective] += count * times
    return kernels, collectives


def repeated(run: DryRun) -> list[tuple[Stage, int]]:
    """Return the stages of one optimizer step, with how often each is run.

    The first of two micro-batches stands for all but the last. Its "update" stage holds the begin
    of the second one, so what begins the step is run once.
    """
    parts = _micro_batches(whole_step(run))
    parts[-1] = [_with_missing(stage, run) for stage in parts[-1]]
    first = max(1, run.accumulation - 1)
    return [
        (stage, first if len(parts) > 1 and index == 0 and stage.name != "step" else 1)
        for index, part in enumerate(parts)
        for stage in part
    ]


def _with_missing(stage: Stage, run: DryRun) -> Stage:
    """Add to the end of a step the work on parameters of blocks that were not run.

    The update reads and writes every parameter of all blocks in few kernels, but for Muon's. DDP
    sums the dense gradients of all blocks in buckets that no block owns.
    """
    missing, all_state = _missing_state(run), state_of(run)
    if stage.name == "update" and missing:
        grown, times = all_state.weights / max(1, all_state.weights - missing.weights), 1.0
        if any(kernel.flops for kernel in stage.kernels):  # Muon, one matrix after the other
            grown, times = 1.0, len(run.all_kinds) / len(run.kinds)
        kernels = Counter[Kernel]()
        for kernel, count in stage.kernels.items():
            larger = kernel._replace(bytes=round(kernel.bytes * grown))
            kernels[larger] += round(count * times)
        return replace(stage, kernels=kernels)
    if stage.name == "embedding backward" and missing.buckets:
        sums = [c for c in stage.collectives if c.name == "all_reduce"]
        if sums:
            largest = max(sums, key=lambda c: c.sent)
            more = 2 * missing.buckets * (largest.ranks - 1) // largest.ranks
            return replace(
                stage, collectives=stage.collectives + Counter({largest._replace(sent=more): 1})
            )
    return stage
