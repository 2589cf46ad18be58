"""No environment variable that accelerate reads changes a number of a step.

`ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4 dmoe train` divided every gradient by 4 in silence, and
`dmoe verify` stayed green, since both of its sides called the same `backward`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState

from dmoe.config.errors import ConfigError
from dmoe.config.launch_env import FOREIGN_LAUNCHERS, PREFIXES, VARIABLES, clear_environment
from dmoe.distributed import accelerate_env, local_ranks
from dmoe.distributed.accelerate_env import make_accelerator
from dmoe.distributed.init import ProcessInfo, init_distributed
from dmoe.train.engine import build_engine
from dmoe.train.step import compute_gradients, training_batches
from tests.cli.commands import SMALL, dmoe, refused, train_lines
from tests.distributed.accelerate_reads import variables_read
from tests.ranks import run_ranks
from tests.tiny import VOCAB, tiny

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Checked by `read_launch_env`."""
TRANSPORT = ("OMP_NUM_THREADS", "NCCL_P2P_DISABLE", "NCCL_IB_DISABLE")
"""How fast, not what: the user's own."""
NEVER_READ = {
    "CLEARML_PROJECT CLEARML_TASK": "trackers that dmoe does not use",
    "MLFLOW_EXPERIMENT_NAME MLFLOW_NESTED_RUN MLFLOW_RUN_ID MLFLOW_TAGS": "the same",
    "NODE_RANK NPROC TPU_NAME PJRT_DEVICE": "the notebook launcher",
    "systemdrive": "Windows",
}
KEPT = {*LAUNCHER, *TRANSPORT, *" ".join(NEVER_READ).split()}
VALUES = ("4", "true", "bf16")
"""A number, a flag and a precision. `meta` is a device, refused by torch only in a step."""
ALONE = ProcessInfo(0, 1, 0, torch.device("cpu"))


Step = tuple[float, list[torch.Tensor]]
"""Loss and gradients."""


def engine_step() -> Step:
    """Compute the gradients of a tiny model as a training step does."""
    config = tiny("train.global_batch=2", "model.layers=1", "moe.num_experts=2")
    engine = build_engine(config, init_distributed("cpu"), VOCAB)
    data = engine.task.open_data().train
    totals = compute_gradients(engine, training_batches(data, engine, 0))
    return totals.loss_sum, [
        parameter.grad.clone()
        for parameter in engine.model.parameters()
        if parameter.grad is not None
    ]


def accelerator_step() -> Step:
    """Compute the gradients of one matrix with everything of accelerate that dmoe uses: in 2 ms."""
    accelerator = make_accelerator(ALONE, "fp32")
    matrix = torch.nn.Linear(3, 2, bias=False)
    torch.nn.init.constant_(matrix.weight, 0.1)
    model = accelerator.prepare_model(matrix, evaluation_mode=True)
    accelerator.prepare_optimizer(torch.optim.AdamW(matrix.parameters(), fused=True))
    loss = model(torch.tensor([[0.3, 0.7, 1.1]], device=accelerator.device)).square().sum()
    accelerator.backward(loss)
    assert matrix.weight.grad is not None
    return loss.item(), [matrix.weight.grad]


def steps_that_differ(
    take_step: Callable[[], Step], environments: Mapping[str, Mapping[str, str]]
) -> dict[str, str]:
    """Return the environments whose step raises or has another bit, and how."""

    def step() -> Step:
        AcceleratorState._reset_state(reset_partial_state=True)
        return take_step()

    with mock.patch.dict(os.environ):
        clear_environment()
        (loss, grads), found = step(), {}
        assert grads
        for name, environment in environments.items():
            with mock.patch.dict(os.environ, environment):
                try:
                    other_loss, others = step()
                except Exception as error:
                    found[name] = f"{type(error).__name__}: {error}"
                    continue
                same = len(grads) == len(others) and all(map(torch.equal, grads, others))
                if loss != other_loss or not same:
                    found[name] = "other numbers"
    return found


def removed() -> list[str]:
    """Return the variables that accelerate reads and dmoe removes."""
    return sorted(variables_read() - KEPT)


def test_the_variables_are_found_in_accelerate_s_sources() -> None:
    """If accelerate reads them in another way one day, the next tests must not become empty."""
    found = variables_read()
    assert len(found) > 100
    assert {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
        "ACCELERATE_FP8_MARGIN",
        "FSDP_OFFLOAD_PARAMS",
        "MEGATRON_LM_TP_DEGREE",
        "PMI_SIZE",
        "FORK_LAUNCHED",
        "LOCAL_RANK",
    } <= found


def test_each_is_removed_or_known_to_be_harmless() -> None:
    """A new version of accelerate that reads one more is red here."""
    read = variables_read()
    left = {name for name in read if not (name.startswith(PREFIXES) or name in VARIABLES)}
    assert left == KEPT


def test_no_variable_changes_a_backward() -> None:
    """One backward under each of them with each value has the bits of a clean environment."""
    environments = {f"{name}={value}": {name: value} for name in removed() for value in VALUES}
    assert len(environments) > 300
    assert steps_that_differ(accelerator_step, environments) == {}


def test_no_variable_changes_a_training_step() -> None:
    """All of them at once, with each value, in the real step. (A world size above 1 is refused.)"""
    environments = {
        value: dict.fromkeys(set(removed()) - FOREIGN_LAUNCHERS.keys(), value) for value in VALUES
    }
    assert steps_that_differ(engine_step, environments) == {}


def test_a_backward_would_differ_if_the_variables_were_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The tests above can fail: without the removal they see what each of these does."""
    monkeypatch.setattr(accelerate_env, "clear_environment", list)
    monkeypatch.setattr(accelerate_env, "check_accelerator", lambda *_: None)
    left = {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
        "ACCELERATE_USE_MEGATRON_LM": "true",
        "ACCELERATE_DYNAMO_BACKEND": "bf16",
        "PMI_SIZE": "4",
    }
    environments = {name: {name: value} for name, value in left.items()}
    found = steps_that_differ(accelerator_step, environments)
    assert found.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS") == "other numbers"
    assert found.keys() == left.keys() - {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS"}


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "would divide the gradients"),
        ("ACCELERATE_TORCH_DEVICE", "meta", "another device"),
    ],
)
def test_what_accelerate_was_built_as_is_checked(
    name: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if a variable were left, or had another name one day."""
    monkeypatch.setattr(accelerate_env, "clear_environment", list)
    monkeypatch.setenv(name, value)
    with pytest.raises(AssertionError, match=words):
        make_accelerator(ALONE, "fp32")


@pytest.mark.ranks
def test_all_of_them_at_once_from_the_start_of_the_process(tmp_path: Path) -> None:
    """Some are read when accelerate or torch is imported, so in a process of its own."""
    arguments = ("train", *SMALL, "data.source=synthetic:zipf", "train.eval_every=0")
    assert dmoe(*arguments, "train.run_dir=clean", cwd=tmp_path).returncode == 0
    dirty = dict.fromkeys(removed(), "1")
    dirty |= {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "ACCELERATE_LOG_LEVEL": "error"}
    dirty |= {"ONEDNN_DEFAULT_FPMATH_MODE": "BF16", "ACCELERATE_MIXED_PRECISION": "bf16"}
    result = dmoe(*arguments, "train.run_dir=dirty", cwd=tmp_path, **dirty)
    assert result.returncode == 0, result.stderr[-2000:]
    for key in ("loss", "grad_norm"):
        values = [
            [line[key] for line in train_lines(tmp_path / run).values()]
            for run in ("clean", "dirty")
        ]
        assert values[0] == values[1], key


@pytest.mark.ranks
def test_verify_s_ranks_do_not_follow_the_environment(tmp_path: Path) -> None:
    """Every gradient was divided by 4 on both sides, so they were equal: red without the removal,
    since the reference uses neither accelerate nor its `backward`."""
    result = dmoe(
        *("verify", *SMALL, "--worlds", "1,2"),
        cwd=tmp_path,
        ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4",
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]


@pytest.mark.parametrize(("given", "expected"), [(None, "1"), ("3", "3")])
def test_numpy_has_one_thread_in_the_ranks(
    given: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each dot product of `dmoe verify` waited for a second thread that had no core."""
    name, seen = local_ranks.BLAS_THREADS, list[str | None]()
    monkeypatch.delenv(name, raising=False)
    if given is not None:
        monkeypatch.setenv(name, given)
    started = lambda: seen.append(os.environ.get(name))  # noqa: E731
    monkeypatch.setattr(local_ranks.forkserver, "ensure_running", started)
    local_ranks._start_fork_server()
    assert seen == [expected]
    assert os.environ.get(name) == given, "the process that starts them keeps its own"


def test_a_transport_that_gloo_has_not_is_refused(tmp_path: Path) -> None:
    """TCP_TLS in a build without TLS was a traceback of `makeDeviceForHostname`.

    In a process of its own: gloo reads the variable once, so the tests after it failed too.
    """
    result = dmoe(*("train", *SMALL, "--ranks", "1"), cwd=tmp_path, GLOO_DEVICE_TRANSPORT="nosuch")
    refused(result, "GLOO_DEVICE_TRANSPORT=nosuch: this torch's gloo has no such transport")


def error_at_debug_detail(rank: int, world: int) -> str:
    with mock.patch.dict(os.environ, TORCH_DISTRIBUTED_DEBUG="DETAIL"):
        try:
            engine_step()
        except ConfigError as error:
            return str(error)
    return ""


@pytest.mark.ranks
def test_a_debug_level_at_which_ddp_crashes_is_refused() -> None:
    """`TORCH_DISTRIBUTED_DEBUG=DETAIL dmoe train --ranks 2` ended with code 139, without a word."""
    for error in run_ranks(2, error_at_debug_detail):
        assert error.startswith("TORCH_DISTRIBUTED_DEBUG=DETAIL: must be OFF or INFO")
