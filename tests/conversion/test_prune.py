"""Experts of least load are left out or merged; the function is kept where it can be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import dmoe
from dmoe.checkpoint import save
from dmoe.config.errors import CheckpointError, ConfigError
from dmoe.config.schema import BalanceConfig, Config, ExpertsConfig, RouterConfig
from dmoe.conversion.prune import copy_experts, largest, logged_loads, match_units, prune
from dmoe.distributed.mesh import ParallelMesh
from dmoe.distributed.state_dict import model_state
from dmoe.moe.layer import MoE
from dmoe.runs.directory import RunDir
from dmoe.train.restore import restore_model
from dmoe.train.tasks import task_of
from tests.cli.commands import run_in_process
from tests.tiny import tiny

D, F, E, K = 8, 6, 6, 2


def layers(keep: int, kind: str = "swiglu", **router: object) -> tuple[MoE, MoE]:
    made = []
    for experts in (E, keep):
        layer = MoE(
            D,
            F,
            experts,
            K,
            router=RouterConfig(**router),
            experts=ExpertsConfig(kind=kind, zero=1),
            balance=BalanceConfig(bias=0.01),
        )
        layer.initialize(0, 0.5)
        made.append(layer.eval().double())
    return made[0], made[1]


def expert(layer: MoE, e: int, x_TD: Tensor) -> Tensor:
    """Compute one expert by its formula."""
    hidden = x_TD @ layer.experts.w_in[e]
    if layer.experts.kind == "swiglu":
        gate, up = hidden.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up @ layer.experts.w_out[e]
    return torch.nn.functional.gelu(hidden) @ layer.experts.w_out[e]


def test_the_experts_that_stay_and_their_rows_are_those_of_the_old_layer() -> None:
    """Tokens whose choice stays have the old output; the bias and the zero expert stay too."""
    old, new = layers(4, score="sigmoid")
    old.router.get_buffer("bias_E").copy_(torch.arange(7.0).double() / 100)
    kept = [0, 2, 3, 5]
    copy_experts(old, new, kept)
    x_TD = torch.randn(200, D, dtype=torch.float64, generator=torch.manual_seed(0))
    rows = torch.tensor([*kept, 6])
    before, after = old(x_TD), new(x_TD)
    stays = torch.isin(before.routing.expert_TK, rows).all(1)
    assert 20 < int(stays.sum()) < 180
    assert torch.equal(rows[after.routing.expert_TK][stays], before.routing.expert_TK[stays])
    torch.testing.assert_close(after.y[stays], before.y[stays], rtol=1e-12, atol=1e-12)
    assert torch.equal(new.router.get_buffer("bias_E"), old.router.get_buffer("bias_E")[rows])


@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
def test_copies_in_another_order_of_units_merge_into_themselves(kind: str) -> None:
    """Merging finds the permutation: a plain mean of the weights would be another function."""
    old, new = layers(2, kind)
    width = old.experts.w_out.shape[1]
    with torch.no_grad():
        row = old.router.get_parameter("weight")
        for e in range(2, E):
            home, order = e % 2, torch.randperm(width, generator=torch.manual_seed(e))
            halves = old.experts.w_in[home].unflatten(1, (-1, width))[..., order].flatten(1)
            old.experts.w_in[e].copy_(halves)
            old.experts.w_out[e].copy_(old.experts.w_out[home][order])
            row[e] = row[home] * e
    load_E = torch.tensor([9.0, 8, 1, 2, 3, 4, 5], dtype=torch.float64)
    copy_experts(old, new, [0, 1], load_E)
    x_TD = torch.randn(20, D, dtype=torch.float64, generator=torch.manual_seed(0))
    for e in (0, 1):
        torch.testing.assert_close(expert(new, e, x_TD), expert(old, e, x_TD))


def test_a_merged_expert_is_the_mean_by_load() -> None:
    old, new = layers(2)
    with torch.no_grad():
        for e in range(E):
            old.experts.w_in[e] = old.experts.w_in[0] * (1 + e)
            old.experts.w_out[e] = old.experts.w_out[0] * (1 + e)
            old.router.get_parameter("weight")[e, 0] = 100.0 if e != 1 else -100.0
    load_E = torch.tensor([50.0, 60, 10, 20, 20, 0, 7], dtype=torch.float64)
    copy_experts(old, new, [0, 1], load_E)
    factor = (50 * 1 + 10 * 3 + 20 * 4 + 20 * 5) / 100
    torch.testing.assert_close(new.experts.w_in[0], old.experts.w_in[0] * factor)
    torch.testing.assert_close(new.experts.w_out[1], old.experts.w_out[1])


def test_units_are_matched_by_the_largest_cosine() -> None:
    unit_UX = torch.randn(9, 20, generator=torch.manual_seed(0))
    order = torch.randperm(9, generator=torch.manual_seed(1))
    assert torch.equal(match_units(unit_UX[order], unit_UX * 3), order)


def test_largest_load_with_ties_to_the_lower_id() -> None:
    assert largest(torch.tensor([3.0, 9, 3, 1, 3]), 3) == [0, 1, 2]


def run_of(path: Path, *overrides: str) -> RunDir:
    """Return a run with a checkpoint of step 5 and logged loads, without the training."""
    config: Config = tiny("train.eval_sequences=4", *overrides)
    run, model = RunDir(path), task_of(config).build_model()
    run.create(None)
    run.write_config(config, "")
    save(run.checkpoints, 5, model_state(model, ParallelMesh()), {"step": 5})
    lines = [
        {"event": "train", "step": step, "time": 0.0, "layers": [{"load": load} for load in loads]}
        for step, loads in ((5, LOADS), (6, [[0] * 8, [0] * 8]))
    ]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


LOADS = [[1, 9, 2, 8, 3, 7, 0, 0], [5, 5, 5, 5, 0, 0, 0, 0]]


@pytest.mark.parametrize("merge", [False, True])
def test_a_pruned_run_is_trained_on(merge: bool, tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", "moe.balance.bias=0.01")
    result = prune(run, tmp_path / "new", 4, merge=merge)
    assert result.kept == [[1, 3, 4, 5], [0, 1, 2, 3]]
    assert result.load_kept == pytest.approx([27 / 30, 1.0])
    assert result.parameters == result.parameters_before - 2 * 4 * (3 * 32 * 24 + 32)
    old, new = restore_model(run).model, restore_model(RunDir(tmp_path / "new")).model
    assert len(new.moe_layers()[0].experts.w_in) == 4
    same = torch.equal(new.moe_layers()[0].experts.w_in[0], old.moe_layers()[0].experts.w_in[1])
    assert same is not merge
    assert torch.equal(new.get_parameter("embedding.weight"), old.get_parameter("embedding.weight"))
    assert result.loss != result.loss_before
    config = restore_model(RunDir(tmp_path / "new")).config
    trained = dmoe.train(config, quiet=True)
    assert trained.metrics.of("train")


def test_what_cannot_be_pruned_is_refused(tmp_path: Path) -> None:
    cases = {
        "moe.router.kind=hash moe.router.renormalize=false moe.top_k=1": "another rule than the",
        "model.moe_every=0": "has no experts",
        "modular.bank=adapter modular.modules=2": "modular.bank=adapter: has modules",
    }
    for number, (overrides, words) in enumerate(cases.items()):
        run = run_of(tmp_path / f"run {number}", *overrides.split())
        with pytest.raises((ConfigError, CheckpointError), match=words):
            prune(run, tmp_path / "new", 4)
    run = run_of(tmp_path / "run")
    for keep in (1, 8):
        with pytest.raises(ConfigError, match=rf"--keep={keep}: must be from moe.top_k=2 to 7"):
            prune(run, tmp_path / "new", keep)
    assert not (tmp_path / "new").exists()
    with pytest.raises(CheckpointError, match="has logged no load up to step 4"):
        logged_loads(run, 4, 2, 8)


def test_the_commands(tmp_path: Path) -> None:
    """Export, import, prune: what they print, and one line with exit code 2 for a mistake."""
    run_of(tmp_path / "run")
    done = run_in_process("checkpoint", "export", "run", "--to", "hf", cwd=tmp_path)
    assert (done.returncode, "it is a Qwen3MoeForCausalLM" in done.stdout) == (0, True), done
    given = ("data.source=synthetic:zipf", "data.seq_len=16", "train.run_dir=back")
    done = run_in_process("checkpoint", "import", "hf", *given, cwd=tmp_path)
    assert (done.returncode, "train it with: dmoe train --resume" in done.stdout) == (0, True), done
    command = ("checkpoint", "prune", "run", "--keep", "4", "--merge", "--to", "new")
    done = run_in_process(*command, cwd=tmp_path)
    assert done.returncode == 0, done
    for words in ("4 experts stay in each MoE layer, the others are merged", "layer 0: experts 1,"):
        assert words in done.stdout
    done = run_in_process(*command, cwd=tmp_path)
    assert (done.returncode, "holds a run with checkpoints" in done.stderr) == (2, True)
    done = run_in_process(
        "checkpoint", "export", "back", "--to", "x", "--dtype", "int8", cwd=tmp_path
    )
    assert (done.returncode, "must be float32, bfloat16" in done.stderr) == (2, True)
