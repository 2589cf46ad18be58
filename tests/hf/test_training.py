"""A published model in the trainer: one process equals two ranks; each rank reads its own experts."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from torch import Tensor

import dmoe
from dmoe.config.errors import ConfigError
from dmoe.config.load import load
from dmoe.config.schedule import learning_rate
from dmoe.config.schema import Config
from dmoe.data import open_data
from dmoe.distributed.init import init_distributed
from dmoe.runs.directory import RunDir
from dmoe.train.checkpointer import Checkpointer
from dmoe.train.engine import build_engine
from dmoe.train.step import train_step, training_batches
from dmoe.train.step_guard import StepGuard
from dmoe.verify.capture import Capture, state_arrays
from tests.hf.families import tiny
from tests.ranks import run_ranks

pytestmark = pytest.mark.ranks

STEPS = 3
BALANCED = "moe.balance.switch_level=global"
CASES = {
    "mixtral": [BALANCED, "moe.capacity.factor=1.0", "moe.capacity.group=global"],
    "gpt_oss": [BALANCED, "moe.capacity.factor=0.75", "moe.capacity.group=sequence"],
    "deepseek_v3": ["moe.balance.switch=0", "moe.balance.bias=0.01"],
    "ernie4_5_moe": ["moe.balance.switch=0", "moe.balance.bias=0.01"],
}
SETTINGS = {
    "ddp": [],
    "recompute": ["train.recompute=true"],
    "fsdp": ["parallel.mode=fsdp"],
    "whole": [],
    "copies": ["parallel.placement.copies=2"],
    "padded": ["moe.exchange=padded", "parallel.mode=fsdp"],
}
"""Of two ranks; they change no number."""
ON_RANKS = (
    "mixtral-ddp",
    "gpt_oss-ddp",
    "deepseek_v3-ddp",
    "mixtral-recompute",
    "mixtral-whole",
    "gpt_oss-padded",
    "gpt_oss-copies",
    "ernie4_5_moe-fsdp",
)
SAVED = ("mixtral-ddp", "ernie4_5_moe-fsdp")


@dataclass
class Trained:
    """What a run of a few steps gave."""

    losses: list[float]
    norms: list[float]
    kept: list[list[int]]
    state: Capture
    read: int = 0
    """Elements of experts that were read from the files."""
    error: str = ""
    """Of plain DDP, and of files that lack an expert."""


def config_of(folder: Path, family: str, *more: str) -> Config:
    small = [
        f"model.source={folder / family}",
        "data.tokenizer=bytes",
        "data.source=synthetic:zipf",
        "data.seq_len=16",
        "train.steps=10",
        "train.global_batch=8",
        "train.precision=fp32",
        "train.device=cpu",
        "optim.warmup=0",
        "optim.lr=0.001",
    ]
    return load(None, [*small, *CASES.get(family, ()), *more])


def train(config: Config, folder: Path, *, resume: bool = False, save: bool = False) -> Trained:
    """Train from the source, or go on after the checkpoint in `folder`."""
    AcceleratorState._reset_state(reset_partial_state=True)
    process, data = init_distributed("cpu"), open_data(config.data, config.train.seed)
    with counted_reads() as read:
        engine = build_engine(config, process, data.tokenizer.vocab_size)
    checkpoints = Checkpointer(engine, data, RunDir(folder), StepGuard(config.guard))
    found = Trained([], [], [], {}, sum(read))
    first = checkpoints.resume() if resume else 0
    for step in range(first, first + STEPS):
        rate = learning_rate(step, config.train.steps, config.optim)
        result = train_step(engine, training_batches(data.train, engine, step), rate)
        found.losses.append(result.totals.loss_sum)
        found.norms.append(result.grad_norm)
        found.kept += [layer.kept_counts for layer in result.totals.layers]
    if save:
        checkpoints.save(STEPS)
    found.state = state_arrays(engine)
    engine.close()
    return found


class counted_reads:
    """Counts the elements of experts that transformers reads from its files by slices."""

    def __enter__(self) -> list[int]:
        from transformers.distributed.sharding_utils import DtensorShardOperation

        read: list[int] = []
        original = DtensorShardOperation.shard_tensor

        def shard_tensor(self: Any, *args: Any, **kwargs: Any) -> Tensor | None:
            part: Tensor | None = original(self, *args, **kwargs)
            read.append(0 if part is None else part.numel())
            return part

        self.patch = patch.object(DtensorShardOperation, "shard_tensor", shard_tensor)
        self.patch.start()
        return read

    def __exit__(self, *error: object) -> None:
        self.patch.stop()


def whole_files() -> AbstractContextManager[object]:
    """Read all experts on every rank, as before transformers 5.23 and from FP8 files."""
    return patch("dmoe.hf.load._reading_own_experts", lambda kind, group: (kind, {}))


def on_two_ranks(rank: int, world: int, folder: Path) -> dict[str, Trained]:
    found: dict[str, Trained] = {}
    for case in ON_RANKS:
        family, _, setting = case.partition("-")
        config = config_of(folder, family, *SETTINGS[setting])
        with whole_files() if setting == "whole" else nullcontext():
            found[case] = train(config, folder / case, save=case in SAVED)
    found["mixtral-ddp"].error = without_dmoe(rank)
    try:
        train(config_of(folder, "lacking"), folder / "none")
    except ConfigError as error:
        found["lacking"] = Trained([], [], [], {}, error=str(error))
    return found


def on_one(rank: int, world: int, folder: Path) -> dict[str, Trained]:
    """Train each family, then go on after the checkpoints of two ranks and of this process."""
    found = {
        family: train(config_of(folder, family), folder / family, save=family != "gpt_oss")
        for family in CASES
    }
    for name in ("mixtral", "mixtral-ddp", "ernie4_5_moe", "ernie4_5_moe-fsdp"):
        config = config_of(folder, name.partition("-")[0])
        found[f"{name}, resumed"] = train(config, folder / name, resume=True)
    return found


def without_dmoe(rank: int) -> str:
    """Train a moefied model in plain DDP, as a trainer of others would; return the error."""
    model: Any = dmoe.moefy(tiny("mixtral", torch.float32))
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    ids = torch.randint(3, 97, (2, 8), generator=torch.Generator().manual_seed(rank))
    try:
        wrapped(input_ids=ids, labels=ids, use_cache=False)
    except ConfigError as error:
        return str(error)
    return "trained wrong in silence"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Trained]]:
    folder = tmp_path_factory.mktemp("published")
    for family in CASES:
        tiny(family, torch.float32, vocab_size=256).save_pretrained(folder / family)
    lacking = tiny("mixtral", torch.float32, vocab_size=256)
    lacking.save_pretrained(folder / "lacking")
    file = folder / "lacking" / "model.safetensors"
    tensors = load_file(file)
    del tensors[next(name for name in tensors if "experts.7.w2" in name)]
    save_file(tensors, file, metadata={"format": "pt"})
    two = run_ranks(2, on_two_ranks, folder, timeout=300)
    (one,) = run_ranks(1, on_one, folder, timeout=300)
    found = {name: [trained] for name, trained in one.items()}
    return found | {name: [rank[name] for rank in two] for name in two[0]}


@pytest.mark.parametrize("case", ON_RANKS)
def test_two_ranks_train_as_one(runs: dict[str, list[Trained]], case: str) -> None:
    (one,), (two, _) = runs[case.partition("-")[0]], runs[case]
    np.testing.assert_allclose(two.losses, one.losses, rtol=2e-6)
    np.testing.assert_allclose(two.norms, one.norms, rtol=2e-5)
    assert two.kept == one.kept
    assert two.state.keys() == one.state.keys()
    for key, array in one.state.items():
        if not key.startswith("exp_avg"):
            np.testing.assert_allclose(two.state[key], array, atol=2e-4, err_msg=key)


@pytest.mark.parametrize("family", CASES)
def test_a_rank_reads_its_own_experts_only(runs: dict[str, list[Trained]], family: str) -> None:
    """Half of the elements of the experts at EP = 2, and each rank the other half."""
    stacks = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")
    experts = [
        array.size
        for key, array in runs[family][0].state.items()
        if key.startswith("model.")
        and ".experts." in key
        and key.endswith(stacks)
        and "shared" not in key
    ]
    assert len(experts) >= 2
    (ranks,) = [
        runs[case]
        for case in ON_RANKS
        if case in (f"{family}-ddp", "ernie4_5_moe-fsdp") and case.startswith(family)
    ]
    for rank in ranks:
        assert rank.read == sum(experts) // 2
    assert runs[family][0].read == 0, "one process reads everything at once"


def test_the_bias_of_the_choice_is_moved(runs: dict[str, list[Trained]]) -> None:
    state = runs["deepseek_v3"][0].state
    (bias,) = (value for key, value in state.items() if key.endswith("e_score_correction_bias"))
    again = runs["deepseek_v3-ddp"][1].state
    (other,) = (value for key, value in again.items() if key.endswith("e_score_correction_bias"))
    np.testing.assert_array_equal(bias, other)
    assert len(np.unique(np.round(np.diff(bias), 6))) > 1


def test_checkpoints_go_on_at_another_ep_size(runs: dict[str, list[Trained]]) -> None:
    """Written by two ranks, in DDP and FSDP2, and read by one that has all experts."""
    for family, name in (("mixtral", "mixtral-ddp"), ("ernie4_5_moe", "ernie4_5_moe-fsdp")):
        expected, resumed = runs[f"{family}, resumed"][0], runs[f"{name}, resumed"][0]
        np.testing.assert_allclose(resumed.losses, expected.losses, rtol=2e-6)
        assert resumed.kept == expected.kept


def test_plain_ddp_around_a_moefied_model_is_an_error(runs: dict[str, list[Trained]]) -> None:
    """It would average the experts of different ranks, and count no expert twice in the norm."""
    for rank in runs["mixtral-ddp"]:
        assert "plain DDP gives wrong gradients" in rank.error


def test_files_that_lack_an_expert_of_one_rank_are_an_error_on_both(
    runs: dict[str, list[Trained]],
) -> None:
    """Rank 1 alone read the damaged expert and ended; rank 0 ended in a traceback of gloo."""
    for rank in runs["lacking"]:
        assert "on rank 1: lacks model.layers." in rank.error
        assert rank.error.count("model.source=") == 1
