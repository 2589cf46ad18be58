"""`moe.kernels=triton` where no Triton and no GPU is: what computes, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dmoe
from dmoe import MoE
from dmoe.config.errors import ConfigError
from dmoe.distributed.expert_parallel import check_row_kernels
from dmoe.distributed.init import init_distributed
from dmoe.moe import kernels
from dmoe.runs.directory import RunDir
from dmoe.simulation.dry_run import dry_run
from dmoe.simulation.memory import totals
from dmoe.train.engine import build_engine
from dmoe.train.evaluation.checkpoint import evaluate_run
from dmoe.train.restore import restore_model
from tests.tiny import VOCAB, tiny

TRITON = "moe.kernels=triton"


@pytest.fixture(autouse=True)
def no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)


def test_a_cpu_computes_with_the_kernels_of_torch() -> None:
    x, outputs = torch.randn(2, 6, 8), []
    for name in ("torch", "triton"):
        layer = MoE(8, 12, 4, 2, kernels=name)
        outputs.append(layer(x).y)
    assert torch.equal(*outputs)


def test_training_is_refused_on_a_cpu_and_evaluation_is_not() -> None:
    config = tiny(TRITON)
    with pytest.raises(
        ConfigError, match=r"moe\.kernels=triton.*trains on cpu.*moe\.kernels=torch"
    ):
        build_engine(config, init_distributed("cpu"), VOCAB)
    build_engine(config, init_distributed("cpu"), VOCAB, is_trained=False)


def test_a_gpu_without_triton_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match=r"not installed here; pip install 'dmoe\[kernels\]'"):
        kernels.check_kernels("triton", torch.device("cuda"))
    with pytest.raises(ConfigError, match="not installed here"):
        kernels.activate("relu", torch.ones(1, 1))


def test_a_run_of_a_gpu_is_evaluated_on_a_cpu(tmp_path: Path) -> None:
    """What only a GPU can do was refused by everything that loads the run: Triton's kernels, and
    the exchange by a library."""
    run = dmoe.train(tiny("train.steps=2", f"train.run_dir={tmp_path / 'run'}"), quiet=True)
    path = RunDir(Path(run.path))
    expected = evaluate_run(path).evaluation.loss
    settings = path.path / "resolved.yaml"
    text = settings.read_text(encoding="utf-8")
    for ours, gpus in (
        ("kernels: torch", "kernels: triton"),
        ("library: torch", "library: deep_ep"),
        ("device: cpu", "device: auto"),
    ):
        assert text.count(ours) == 1, ours
        text = text.replace(ours, gpus)
    settings.write_text(text, encoding="utf-8")
    assert evaluate_run(path).evaluation.loss == expected
    assert restore_model(path).config.moe.kernels == "triton"


def test_a_plan_for_gpus_counts_them() -> None:
    """It asked for Triton on the machine that plans."""
    names: dict[str, set[str]] = {}
    for setting in ("moe.kernels=torch", TRITON):
        config = tiny("train.device=auto", setting)
        run = dry_run(config, 1, "bf16", cuda=True, num_outputs=VOCAB)
        names[setting] = {kernel.name for kernel in totals(run)[0]}
    own = {"gather_rows", "sum_rows", "sum_rows_backward", "activate", "activate_backward"}
    assert own <= names[TRITON]
    assert not own & names["moe.kernels=torch"]


def test_a_dispatcher_with_rows_of_its_own_is_refused() -> None:
    """`dmoe.parallelize` passed by the rule of configs, and torch moved the rows in silence."""
    from dmoe.distributed.exchange.once_per_rank import OncePerRank

    layer: Any = MoE(8, 12, 4, 2, kernels="triton")
    check_row_kernels(layer)
    layer.packed = OncePerRank.__new__(OncePerRank)
    with pytest.raises(ConfigError, match=r"moe\.kernels=triton: does not know the rows"):
        check_row_kernels(layer)
