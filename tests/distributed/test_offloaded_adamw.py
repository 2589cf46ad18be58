"""Moments in the memory of the host: the bits of torch's AdamW, on ranks and over checkpoints."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dmoe.checkpoint import save_load
from dmoe.config.errors import ConfigError
from dmoe.distributed.full_tensors import on_device_of
from dmoe.distributed.gradients import decide_step, folds_clip, step_as_decided
from dmoe.distributed.init import init_distributed
from dmoe.distributed.optimizers.offloaded_adamw import OffloadedAdamW, padded, slot_numbers
from dmoe.runs.directory import RunDir
from dmoe.train import engine as engine_file
from dmoe.train import optimizer as optimizer_file
from dmoe.train.checkpointer import load_training_state, train_state
from dmoe.train.engine import Engine, build_engine, offloads
from dmoe.train.evaluation.checkpoint import _config_for
from dmoe.train.step import compute_gradients, train_step, training_batches, update
from dmoe.verify.capture import Capture, _next_places, state_arrays
from tests.ranks import run_ranks
from tests.tiny import VOCAB, tiny

BUCKET = 192
"""Smaller than a matrix, and no multiple of one."""


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    """Return a matrix, a transposed one, a vector, a number, one without elements."""
    torch.manual_seed(0)
    values = [torch.randn(37, 11), torch.randn(9, 40).t(), torch.randn(70), torch.randn(())]
    return [nn.Parameter(value.to(dtype)) for value in (*values, torch.empty(0, 3))]


def optimizers(dtype: torch.dtype, bucket: int) -> tuple[torch.optim.Optimizer, OffloadedAdamW]:
    """Return torch's and ours, each with parameters of its own in two groups."""

    def groups() -> list[dict[str, Any]]:
        all_of = parameters(dtype)
        return [
            {"params": all_of[:1], "weight_decay": 0.1},
            {"params": all_of[1:], "weight_decay": 0.0},
        ]

    betas = (0.9, 0.95)
    torch_one = torch.optim.AdamW(groups(), lr=0.01, betas=betas, eps=1e-8, fused=True)
    return torch_one, OffloadedAdamW(groups(), 0.01, betas, 1e-8, bucket)


def of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    held = [p for group in optimizer.param_groups for p in group["params"]]
    moments = [optimizer.state[p].get(k) for p in held for k in ("step", "exp_avg", "exp_avg_sq")]
    return [*held, *(moment for moment in moments if moment is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bucket", [64, BUCKET, 1 << 20])
def test_the_bits_are_those_of_torch_whatever_the_bucket(dtype: torch.dtype, bucket: int) -> None:
    """Clipped in the step, with a step that is skipped, and one without a gradient somewhere."""
    both = optimizers(dtype, bucket)
    assert [folds_clip(optimizer) for optimizer in both] == [dtype == torch.float32] * 2
    for step, norm in enumerate((5.0, 0.1, float("inf"), 2.0)):
        for optimizer in both:
            torch.manual_seed(step)
            members = [p for group in optimizer.param_groups for p in group["params"]]
            for number, p in enumerate(members):
                grad = torch.randn(p.shape, dtype=dtype)
                if step != 1 or optimizer is both[0]:  # once in other strides than autograd's
                    grad = torch.empty_like(p).copy_(grad)
                p.grad = None if (step, number) == (3, 0) else grad
            sums = torch.tensor([norm**2, 0.0, 1.0]).double()
            decision = decide_step(sums, 1.0)
            if dtype == torch.float64:  # the scale is for float32
                decision = decision._replace(grad_scale=None)
            step_as_decided(optimizer, decision)
        for ours, theirs in zip(of(both[1]), of(both[0]), strict=True):
            assert ours.stride() == theirs.stride()
            assert torch.equal(ours, theirs), step
    assert {float(both[1].state[p]["step"]) for p in members} == {2.0, 3.0}


def test_a_bucket_bounds_what_is_on_the_device() -> None:
    """A matrix larger than it is moved in parts; two of each moment, whatever there is."""
    _, ours = optimizers(torch.float32, BUCKET)
    ours.allocate_moments()
    (vectors,) = ours._vectors
    total = sum(padded(p.numel()) for p in vectors.places)
    assert vectors.memory.numel() == 2 * total
    assert len(vectors.buckets) == -(-total // BUCKET) > 3
    slots = vectors.slots()
    assert sum(part.numel() for slot in slots for part in slot) == slot_numbers(total, BUCKET)
    assert slot_numbers(total, BUCKET) == 4 * BUCKET
    assert slot_numbers(total, 1 << 20) == 2 * total
    for p in vectors.places:
        pieces = [piece for b in vectors.buckets for piece in b.pieces if piece.parameter is p]
        assert sum(piece.end - piece.start for piece in pieces) == p.numel()


def test_it_is_refused_on_a_cpu() -> None:
    config = tiny("optim.offload=true")
    with pytest.raises(ConfigError, match=r"optim\.offload=True: needs a GPU"):
        offloads(config, torch.device("cpu"))
    assert not offloads(config, torch.device("cuda"))


def test_an_evaluation_on_a_cpu_needs_no_offload(tmp_path: Path) -> None:
    """A run of GPUs is evaluated anywhere."""
    config = tiny("optim.offload=true", "train.offload=activations")
    evaluated = _config_for(config, RunDir(tmp_path), init_distributed("cpu"), None)
    assert not offloads(evaluated, torch.device("cpu"))


def test_a_moment_goes_to_the_device_of_its_weight_for_a_collective() -> None:
    value = torch.randn(3)
    assert on_device_of(nn.Parameter(torch.randn(3, device="meta")), value).device.type == "meta"
    assert torch.equal(on_device_of(nn.Parameter(torch.randn(3)), value), value)


def engine_of(*overrides: str) -> Engine:
    return build_engine(tiny("optim.clip=0.05", *overrides), init_distributed("cpu"), VOCAB)


def allow_on_cpu(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(engine_file, "offloads", lambda config, device: False)
    patch.setattr(optimizer_file, "OffloadedAdamW", partial(OffloadedAdamW, bucket=BUCKET))


def steps(engine: Engine, first: int, last: int) -> list[float]:
    """Train: the first step of them as the trainer does, one that is skipped, ordinary ones."""
    data, losses = engine.task.open_data().train, []
    for step in range(first, last):
        batches = training_batches(data, engine, step)
        if step == first:
            totals = compute_gradients(engine, batches, take_at=1e-3)
            assert totals.taken
            losses.append(update(engine, totals, 1e-3).totals.loss_sum)
        elif step == first + 1:
            totals = compute_gradients(engine, batches)
            assert not update(engine, totals, 1e-3, apply=False).updated
        else:
            totals = train_step(engine, batches, 1e-3).totals
            losses.append(totals.loss_sum)
            if engine.placement is not None:
                engine.placement.plan = _next_places
                engine.placement.after_step(step + 1, totals.kept_LE, last=False)
                assert not engine.placement.is_contiguous
    return losses


PERIODIC = "parallel.placement.kind=periodic parallel.placement.every=1"
MODES = (f"parallel.mode=ddp parallel.ep=2 {PERIODIC}", "parallel.mode=fsdp parallel.ep=1")


def both_ways(rank: int, world: int, folder: Path) -> list[list[Any]]:
    """Train without and with offload, save, load into a new engine with it, and train on."""
    torch.set_num_threads(1)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        allow_on_cpu(patch)
        for n, mode in enumerate(MODES):
            results = []
            for more in ("optim.offload=false", "optim.offload=true"):
                engine, path = engine_of(*mode.split(), more), folder / f"{n}{more[-5:]}"
                losses = steps(engine, 0, 3)
                with engine.contiguous_experts():
                    state, group = train_state(engine), engine.mesh.control_group
                    save_load.save(path, 3, state, {}, group=group)
                engine.close()
                engine = engine_of(*mode.split(), more)
                load_training_state(engine, path / "step-00000003")
                loaded = state_arrays(engine)
                results.append([losses, loaded, steps(engine, 3, 6), state_arrays(engine)])
                inner: Any = engine.optimizer
                assert isinstance(inner.optimizer, OffloadedAdamW) == ("true" in more)
                engine.close()
            found.append(results)
    return found


def same(ours: Capture, theirs: Capture) -> None:
    assert ours.keys() == theirs.keys()
    assert any(name.startswith("exp_avg_sq.") and "experts" in name for name in ours)
    for name, value in theirs.items():
        assert (ours[name] == value).all(), name


@pytest.mark.ranks
def test_ranks_train_save_and_resume_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DDP with EP 2 and FSDP2; the files of a checkpoint are equal, and one rank loads them."""
    for found in run_ranks(2, both_ways, tmp_path, timeout=120):
        for without, offloaded in found:
            assert offloaded[0] == without[0]
            same(offloaded[1], without[1])
            assert offloaded[2] == without[2]
            same(offloaded[3], without[3])
    allow_on_cpu(monkeypatch)
    for n in range(len(MODES)):
        paths = [tmp_path / f"{n}{end}" / "step-00000003" for end in ("false", "=true")]
        files = [
            {name: entry.sha256 for name, entry in save_load.read_manifest(path).files.items()}
            for path in paths
        ]
        assert files[0] == files[1]
        states = []
        for setting, path in zip(("false", "true"), paths, strict=True):
            engine = engine_of(f"optim.offload={setting}", "parallel.virtual_ranks=2")
            load_training_state(engine, path)
            states.append((state_arrays(engine), deepcopy(steps(engine, 3, 6))))
        same(states[1][0], states[0][0])
        assert states[1][1] == states[0][1]
