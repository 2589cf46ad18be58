"""The start of a run as accelerate makes it on GPUs, executed on the CPU."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import state
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.testing._internal.distributed.fake_pg import FakeStore

import dmoe
from dmoe.config.errors import ConfigError
from dmoe.config.load import load
from dmoe.config.schema import Config
from dmoe.distributed import init, mesh
from dmoe.distributed.accelerate_env import make_accelerator
from dmoe.distributed.data_parallel import broadcast_weights
from dmoe.distributed.expert_parallel import expert_buffers, expert_parameters, shard_experts
from dmoe.distributed.init import ProcessInfo, init_distributed, shutdown
from dmoe.distributed.mesh import build_mesh
from dmoe.moe.layer import MoE, MoEOutput
from dmoe.train import run
from dmoe.train.engine import Engine, build_engine, resolve_precision
from dmoe.train.modular.attach import attach_modules
from dmoe.train.step import train_step, training_batches
from dmoe.train.tasks import task_of
from dmoe.verify.cases import prepare, shrink
from tests.tiny import VOCAB, tiny

CPU = ProcessInfo(0, 1, 0, torch.device("cpu"))


@pytest.fixture
def one_gpu_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One rank under a launcher; accelerate takes it for one of several on GPUs."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "0")
    monkeypatch.setattr(
        PartialState,
        "_prepare_backend",
        lambda self, cpu=False, sagemaker=False, backend=None: ("gloo", DistributedType.MULTI_GPU),
    )
    monkeypatch.setattr(
        PartialState, "set_device", lambda self: setattr(self, "device", torch.device("cpu"))
    )
    yield
    shutdown()


def steps(config: Config, process: ProcessInfo) -> tuple[Engine, list[float]]:
    engine = build_engine(config, process, VOCAB)
    data = engine.task.open_data()
    losses = [
        train_step(engine, training_batches(data.train, engine, step), 1e-3).totals.loss_sum
        for step in range(2)
    ]
    return engine, losses


CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").rglob("*.yaml"))
CASES: dict[str, Config] = {
    "ddp": tiny(),
    "fsdp": tiny("parallel.mode=fsdp"),
    "accumulation": tiny("train.micro_batch=2"),
    "frozen dense": tiny("modular.bank=low_rank", "modular.train=modules"),
}
"""Beside every shipped config, as narrow as `dmoe verify` runs it."""


def narrow(path: Path) -> Config:
    config = prepare(shrink(load(path, ["parallel.ep=1"])), 1)
    return replace(config, train=replace(config.train, global_batch=2))


@pytest.mark.parametrize("case", [*CASES, *(path.stem for path in CONFIGS)])
def test_one_rank_on_a_gpu_under_a_launcher_trains(
    case: str, request: pytest.FixtureRequest
) -> None:
    """`torchrun --nproc-per-node 1` on a GPU ended in `expected DDP, got Transformer`.

    accelerate wraps one process in DDP on CPUs, not on GPUs, so the same command worked wherever
    it was tested. dmoe wraps by itself, by the number of ranks.
    """
    config = CASES.get(case) or narrow(*(path for path in CONFIGS if path.stem == case))
    engine, expected = steps(config, CPU)
    engine.close()
    state.AcceleratorState._reset_state(reset_partial_state=True)
    request.getfixturevalue("one_gpu_rank")
    engine, losses = steps(config, init_distributed("cpu"))
    assert engine.process.in_group
    assert engine.accelerator.distributed_type is DistributedType.MULTI_GPU
    assert losses == expected
    assert losses[0] != losses[1]


@pytest.mark.usefixtures("one_gpu_rank")
def test_gpus_that_accelerate_refuses_are_refused_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its NotImplementedError came with a traceback from inside accelerate."""
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(PartialState, "set_device", lambda self: setattr(self, "device", cuda))
    monkeypatch.setattr(state, "check_cuda_p2p_ib_support", lambda: False)
    for name in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    process = init_distributed("cpu")
    with pytest.raises(ConfigError, match=r"NCCL_P2P_DISABLE.*NCCL_IB_DISABLE.*550"):
        make_accelerator(ProcessInfo(0, 1, 0, cuda, in_group=process.in_group), "fp32")


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_takes_bf16_only_where_the_gpu_multiplies_it(
    native: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default torch also says yes to GPUs that emulate it, such as V100 and T4."""
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: including_emulation or native,
    )
    assert resolve_precision("auto", torch.device("cuda", 0), 64) == expected


WARM_UPS = {
    "top_k": [],
    "hash": ["moe.router.kind=hash"],
    "fixed": ["moe.router.kind=fixed"],
    "noisy": ["moe.router.kind=noisy"],
    "classification": [
        *("train.task=classification", "data.source=synthetic:clusters", "data.seq_len=128"),
    ],
}


@pytest.mark.parametrize("case", WARM_UPS)
def test_the_warm_up_spreads_its_tokens_over_the_experts(case: str) -> None:
    """It was the worst case: equal tokens, so all of them on all ranks went to the same K experts.

    A model that trains could end for want of memory before its first step.
    """
    shares: list[float] = []

    def record(module: nn.Module, args: Any, output: object) -> None:
        if isinstance(module, MoE) and isinstance(output, MoEOutput):
            choice_E = output.stats.choice_E
            shares.append(float(choice_E.max()) / (float(choice_E.sum()) / module.router.top_k))

    config = tiny("train.global_batch=64", *WARM_UPS[case])
    outputs = task_of(config, None if case == "classification" else VOCAB).num_outputs
    hook = register_module_forward_hook(record)
    try:
        build_engine(config, CPU, outputs)
    finally:
        hook.remove()
    assert shares
    assert max(shares) < 0.9, "an expert gets every token"


@pytest.mark.parametrize("bank", ["none", "sparse_delta"])
def test_every_replica_starts_from_one_draw(bank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank draws on its own CPU, and hosts may differ in the last bits.

    DDP made the trained dense weights equal. Copies of experts, frozen weights and buffers were
    first compared at the first checkpoint, after the replicas had trained apart.
    """
    config = tiny(f"modular.bank={bank}", "modular.modules=4")
    dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=8)
    try:
        mesh = build_mesh(4, torch.device("cpu"))
        model = task_of(config, VOCAB).build_model()
        attach_modules(model, config)
        shard_experts(model, mesh)
        sent: dict[int, tuple[object, int]] = {}
        monkeypatch.setattr(
            dist,
            "broadcast",
            lambda tensor, group, group_src: sent.update({tensor.data_ptr(): (group, group_src)}),
        )
        broadcast_weights(model, mesh)
    finally:
        dist.destroy_process_group()
    experts = {*expert_parameters(model), *expert_buffers(model)}
    assert experts
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        group, source = sent[tensor.data_ptr()]
        assert source == 0
        assert (group is mesh.edp_group) == (name in experts), name


def test_deterministic_kernels_are_asked_for_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a GPU the backward of attention adds up in any order, unless torch is told otherwise."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    seen: list[tuple[bool, str | None]] = []

    def started(*args: object) -> run.EndedRun:
        seen.append(
            (
                torch.are_deterministic_algorithms_enabled(),
                os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
            )
        )
        return run.EndedRun(Path(), None, None)

    monkeypatch.setattr(run, "_train", started)
    try:
        run.train(tiny(), "")
        run.train(tiny("train.deterministic=true"), "")
        _, losses = steps(tiny("train.deterministic=true"), CPU)
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [(False, None), (True, ":4096:8")]
    state.AcceleratorState._reset_state(reset_partial_state=True)
    assert losses == steps(tiny(), CPU)[1]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
    ],
)
def test_blocks_of_gpu_memory_can_grow_unless_the_user_decides(
    given: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dropless layer has other sizes in every step, which leave holes between fixed blocks."""
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", *init.CUDA_ENVIRONMENT):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("NCCL_LAUNCH_ORDER_IMPLICIT", "0")
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    init.set_cuda_environment()
    assert os.environ["PYTORCH_ALLOC_CONF"] == expected
    assert os.environ["NCCL_LAUNCH_ORDER_IMPLICIT"] == "0"
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"


COLLECTIVES = {
    *("all_reduce", "all_gather", "all_to_all_single", "broadcast", "barrier", "new_group"),
    *("reduce_scatter_tensor", "all_gather_into_tensor", "gather", "full_tensor", "all_or_none"),
}


def test_no_collective_depends_on_the_rank() -> None:
    """NCCL launches collectives in the order of the host, so it must be the same on all ranks.

    `dist.new_group` counts: with a device it splits the world's communicator, which is collective.
    """
    package = Path(dmoe.__file__).parent
    found = []
    for path in sorted(
        p for d in ("distributed", "checkpoint") for p in (package / d).glob("*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.If) and depends_on_rank(node.test):
                calls = {
                    call.func.attr
                    for part in (*node.body, *node.orelse)
                    for call in ast.walk(part)
                    if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)
                }
                found += [f"{path.name}:{node.lineno} {name}" for name in calls & COLLECTIVES]
    assert not found


def depends_on_rank(test: ast.expr) -> bool:
    """Whether the condition names this rank; `ranks.rank in ...` of a group is such a name too."""
    names = {
        node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
        for node in ast.walk(test)
    }
    return bool(names & {"rank", "ep_rank", "edp_rank", "local_rank", "is_main", "get_rank"})


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Ranks of one machine, started in turn by this process; returns what starts their group."""
    calls: list[dict[str, Any]] = []
    store = dist.HashStore()
    monkeypatch.setattr(init, "rendezvous", lambda *args, **options: iter([(store, 0, 0)]))
    monkeypatch.setattr(
        dist,
        "init_process_group",
        lambda backend, **more: calls.append({"backend": backend, **more}),
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    return calls


def start_rank(
    monkeypatch: pytest.MonkeyPatch, rank: int, visible: int, backend: str = "auto", uuid: str = ""
) -> ProcessInfo:
    """Start rank `rank` of two, which sees `visible` GPUs."""
    launcher = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    launcher |= {"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(
            uuid=uuid or f"GPU-{rank if visible == 1 else device.index}"
        ),
    )
    other = str(1 - rank)
    store = next(iter(init.rendezvous()))[0]
    store.set(f"gpu/{other}", f"GPU-{other}")
    return init_distributed("cuda", backend)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_world_is_bound_to_the_ranks_gpu(
    rank: int, started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it every clean end warned ("using the device under current context").

    And each of five communicators was made by a rendezvous of its own, in its first collective.
    """
    process = start_rank(monkeypatch, rank, visible=2)
    assert process.device == torch.device("cuda", rank)
    assert started[0]["backend"] == "nccl"
    assert started[0]["device_id"] == process.device
    start_rank(monkeypatch, rank, visible=2, backend="gloo")
    assert started[1]["device_id"] is None


@pytest.mark.parametrize("rank", [0, 1])
def test_the_only_visible_gpu_is_the_ranks_own(
    rank: int, started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`srun --gpus-per-task=1` and Kubernetes show each rank one; "2 ranks and 1 GPUs" was said."""
    assert start_rank(monkeypatch, rank, visible=1).device == torch.device("cuda", 0)
    assert started[0]["device_id"] == torch.device("cuda", 0)


def test_two_ranks_on_one_gpu_are_refused_in_a_sentence(
    started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun with more ranks than GPUs; NCCL's own message is a traceback. gloo allows it."""
    with pytest.raises(ConfigError, match="ranks 0 and 1 see the same GPU; start one rank per GPU"):
        start_rank(monkeypatch, 1, visible=1, uuid="GPU-0")
    assert not started
    assert start_rank(monkeypatch, 1, 1, "gloo", uuid="GPU-0").device.index == 0
    monkeypatch.setattr(init, "_read_launch", lambda: init.LaunchEnv(3, 4, 4, 3))
    with pytest.raises(ConfigError, match="4 ranks on this machine and 2 GPUs visible"):
        start_rank(monkeypatch, 0, visible=2)


def test_small_sums_take_few_channels_of_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    """There were five communicators, each with memory for the channels of large messages.

    Sums in a layer and between passes are never in flight together, so they share one.
    """
    options = SimpleNamespace(config=SimpleNamespace(max_ctas=0), _timeout=None)
    monkeypatch.setattr(
        dist, "ProcessGroupNCCL", SimpleNamespace(Options=lambda: options), raising=False
    )
    real, made = dist.new_group, []

    def new_group(ranks: Any = None, pg_options: Any = None, **more: Any) -> Any:
        made.append(pg_options)
        return real(ranks, **more)

    dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=8)
    try:
        monkeypatch.setattr(dist, "new_group", new_group)
        build_mesh(4, torch.device("cpu"), 60.0)
        assert made == [None] * 8, "two rows, four columns, the sums, the checkpoints"
        made.clear()
        monkeypatch.setattr(dist, "get_backend", lambda group=None: "nccl")
        monkeypatch.setattr(mesh, "_new_cpu_group", lambda world_size, timeout: None)
        build_mesh(4, torch.device("cpu"), 60.0)
    finally:
        dist.destroy_process_group()
    assert made == [None] * 6 + [options]
    assert options.config.max_ctas == mesh.MAX_CONTROL_CTAS
    assert options._timeout.total_seconds() == 60.0
