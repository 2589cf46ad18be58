"""Muon orthogonalises every expert's matrix on its own, whatever the number of ranks and sharding.

A stack of experts that is orthogonalised as one matrix, or the rows that a rank of FSDP2 happens to
hold, would train another model at each EP size, with a loss that looks as good.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from dmoe.config.schedule import learning_rate
from dmoe.config.schema import Config
from dmoe.distributed.init import init_distributed
from dmoe.distributed.optimizers import muon
from dmoe.runs.directory import RunDir
from dmoe.train.checkpointer import Checkpointer
from dmoe.train.engine import Engine, build_engine
from dmoe.train.optimizer import muon_matrices
from dmoe.train.step import compute_gradients, train_step, training_batches
from dmoe.train.step_guard import StepGuard
from dmoe.verify.capture import Capture, state_arrays
from tests.distributed.test_resume import STEPS, resume, train_and_save
from tests.ranks import run_ranks
from tests.tiny import VOCAB, tiny

MUON = ("optim.kind=muon", "optim.warmup=0", "model.kv_heads=1", "optim.lr=0.02")
CASES = [(mode, ep) for mode in ("ddp", "fsdp") for ep in (1, 2, 4)]
SHAPES = "moe.experts.shapes=[[], [6], [8], [8], [6, 4], [6], [8], [8]]"


def test_singular_values_come_near_one_and_zero_stays_zero() -> None:
    matrix_ERC = torch.randn(3, 7, 5, dtype=torch.float64)
    matrix_ERC[2] = 0
    result = muon.newton_schulz(matrix_ERC)
    singular = torch.linalg.svdvals(result[:2])
    assert 0.6 < float(singular.min()) <= float(singular.max()) < 1.3
    assert not result[2].any()
    assert torch.allclose(muon.newton_schulz(matrix_ERC.mT).mT, result, atol=1e-12)


def test_a_matrix_is_updated_as_torch_does() -> None:
    """torch's Muon multiplies in bfloat16, so the first two digits agree."""
    ours, theirs = (torch.nn.Parameter(torch.eye(6, 4)) for _ in range(2))
    group = {"params": [ours], "weight_decay": 0.1, "parts": None}
    optimizers = (
        muon.Muon([group], 0.1, (0.9, 0.95), 1e-8, 0.9),
        torch.optim.Muon(
            [theirs], 0.1, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"
        ),
    )
    for step in range(3):
        gradient = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    assert torch.allclose(ours, theirs, rtol=0, atol=0.01)


def naive_update(matrix: Tensor) -> Tensor:
    """0.2 sqrt(max(rows, columns)) U p(p(p(p(p(S))))) V^T of one matrix U S V^T."""
    left, singular, right = torch.linalg.svd(matrix, full_matrices=False)
    s = singular / (singular.square().sum().sqrt() + 1e-7)
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    return 0.2 * math.sqrt(max(matrix.shape)) * (left * s @ right)


def columns_of(name: str, weight: Tensor) -> tuple[int, list[int]]:
    """Return where the matrices of a parameter lie, of width 32, heads of 16 and swiglu."""
    if "w_qkv" in name:
        return 0, [32, 16, 16]
    dim = weight.ndim - 1 if "experts" in name else 0
    last = name.endswith(("w_out", "w_out.weight"))
    size = weight.shape[dim]
    return dim - (weight.ndim == 3), [size] if last else [size // 2, size // 2]


def naive_steps(rank: int, world: int, config: Config) -> Capture:
    """Train three steps in one process; matrices are updated by loops over experts."""
    engine = build_engine(config, init_distributed("cpu"), VOCAB, torch.float64)
    data = engine.task.open_data().train
    named = {
        name: p
        for name, p in engine.model.named_parameters()
        if name.endswith(("w_qkv.weight", "w_out.weight", "w_in.weight", "w_in", "w_out"))
    }
    assert named.keys() == muon_matrices(engine.model).keys()
    momentum = {name: torch.zeros_like(p) for name, p in named.items()}
    for step in range(3):
        totals = compute_gradients(engine, training_batches(data, engine, step))
        rate = learning_rate(step, config.train.steps, config.optim)
        factor = min(1.0, 1.0 / (math.sqrt(totals.squared_grad_norm) + 1e-6))
        after = {}
        for name, p in named.items():
            assert p.grad is not None
            gradient = p.grad * factor
            momentum[name] = 0.95 * momentum[name] + 0.05 * gradient
            ahead = 0.95 * momentum[name] + 0.05 * gradient
            dim, sizes = columns_of(name, p)
            matrices = ahead if p.ndim == 3 else [ahead]
            direction = [
                torch.cat([naive_update(part) for part in matrix.split(sizes, dim)], dim)
                for matrix in matrices
            ]
            after[name] = p.detach() * (1 - rate * 0.1) - rate * torch.stack(direction).view_as(p)
            p.grad = None  # so that the optimizer leaves it to this function
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        grads = [p.grad for p in engine.model.parameters() if p.grad is not None]
        torch._foreach_mul_(grads, factor)
        engine.optimizer.step()
        engine.optimizer.zero_grad()
        with torch.no_grad():
            for name, value in after.items():
                named[name].copy_(value)
    found = {f"model.{n}": p.detach().numpy() for n, p in engine.model.named_parameters()}
    return found | {f"momentum_buffer.{n}": m.numpy() for n, m in momentum.items()}


def steps(rank: int, world: int, configs: list[Config]) -> list[Capture]:
    """Train three steps of each config and return weights and moments in full."""
    found = []
    for config in configs:
        AcceleratorState._reset_state(reset_partial_state=True)
        engine = build_engine(config, init_distributed("cpu"), VOCAB, torch.float64)
        data = engine.task.open_data().train
        for step in range(3):
            rate = learning_rate(step, config.train.steps, config.optim)
            train_step(engine, training_batches(data, engine, step), rate)
        found.append(state_arrays(engine))
    return found


def compare(case: object, found: Capture, expected: Capture) -> None:
    for name, value in expected.items():
        difference = np.linalg.norm(found[name] - value) / (np.linalg.norm(value) or 1.0)
        assert difference < 1e-11, f"{case}: {name} differs by {difference:.1e}"


@pytest.mark.ranks
def test_the_update_is_the_naive_one_of_each_expert_at_every_ep_in_ddp_and_fsdp() -> None:
    """About 15 s. Red when `newton_schulz` flattens a stack, and when a shard is not gathered."""
    (expected,) = run_ranks(1, naive_steps, tiny(*MUON, "parallel.virtual_ranks=4"))
    configs = [tiny(*MUON, f"parallel.ep={ep}", f"parallel.mode={mode}") for mode, ep in CASES]
    ranks = run_ranks(4, steps, configs, timeout=120)
    for rank in (0, 3):
        for case, found in zip(CASES, ranks[rank], strict=True):
            compare(case, found, expected)
            assert not {n for n in found if n.startswith("exp_avg") and ".experts." in n}


@pytest.mark.ranks
def test_experts_of_different_shapes_and_odd_numbers_of_ranks() -> None:
    """Three ranks divide neither 8 experts nor a width of 32: FSDP2 shards unevenly."""
    shapes = [*MUON, SHAPES, "train.global_batch=12"]
    (expected,) = run_ranks(1, steps, [tiny(*shapes, "parallel.virtual_ranks=3")])
    configs = [
        tiny(*shapes, f"parallel.ep={ep}", f"parallel.mode={mode}")
        for mode, ep in (("ddp", 3), ("fsdp", 1), ("fsdp", 3))
    ]
    ranks = run_ranks(3, steps, configs, timeout=120)
    for rank in ranks:
        for found in rank:
            compare("shapes", found, expected[0])


@pytest.mark.ranks
def test_a_run_with_muon_resumes_at_another_ep_and_mode(tmp_path: Path) -> None:
    config = tiny(*MUON, "parallel.ep=4")
    saved, unbroken = run_ranks(4, train_and_save, config, tmp_path)[0]
    other = tiny(*MUON, "parallel.ep=1", "parallel.mode=fsdp", "parallel.virtual_ranks=2")
    loaded, losses = run_ranks(2, resume, other, tmp_path)[1]
    assert losses == pytest.approx(unbroken, rel=1e-5)
    assert loaded.keys() == saved.keys()
    for name in saved:
        assert np.array_equal(loaded[name], saved[name]), name


def test_moments_saved_by_another_optimizer_are_refused_by_name(tmp_path: Path) -> None:
    from dmoe.config.errors import CheckpointError
    from dmoe.data import open_data

    def checkpointer(config: Config) -> tuple[Engine, Checkpointer]:
        AcceleratorState._reset_state(reset_partial_state=True)
        data = open_data(config.data, config.train.seed)
        engine = build_engine(config, init_distributed("cpu"), VOCAB)
        return engine, Checkpointer(engine, data, RunDir(tmp_path), StepGuard(config.guard))

    _, saving = checkpointer(tiny())
    saving.save(STEPS)
    accepted = "checkpoint.accept_changes=[optim.kind,moe.router.freeze]"
    for change in ("optim.kind=muon", "moe.router.freeze=true"):
        with pytest.raises(CheckpointError, match=rf"{change[:8]}.*tensors do not fit"):
            checkpointer(tiny(change, accepted))[1].resume()
