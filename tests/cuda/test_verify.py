"""`dmoe verify --device cuda` as far as it goes without a GPU."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from dmoe.config.errors import ConfigError
from dmoe.config.schema import Config
from dmoe.distributed import local_ranks
from dmoe.distributed.expert_parallel import expert_locations, shard_experts
from dmoe.distributed.full_tensors import gather_full
from dmoe.distributed.init import init_distributed
from dmoe.distributed.mesh import build_mesh
from dmoe.moe import rng
from dmoe.moe.routing import BatchShape, TokenContext
from dmoe.train.engine import build_engine
from dmoe.train.tasks import task_of
from dmoe.verify import verify as verification
from dmoe.verify.capture import capture, noise_from_cpu
from dmoe.verify.cases import plan_cases, prepare, reference_case, shrink
from tests.cli.commands import refused, run_in_process
from tests.tiny import VOCAB, tiny


def verify_config(*overrides: str) -> Config:
    return prepare(shrink(tiny("moe.capacity.factor=1.25", *overrides)), 2)


def test_without_a_gpu_it_is_refused_in_a_sentence(tmp_path: Path) -> None:
    """No command could prove a run on GPUs: the only test of one was to train."""
    words = "--device=cuda: no GPU is visible; use --device cpu"
    refused(run_in_process("verify", "--device", "cuda", cwd=tmp_path), words)


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(
        ConfigError, match=r"--worlds=1,2,4: each rank needs a GPU, and 2 are visible; use 1,2"
    ):
        verification.verify(tiny(), [1, 2, 4], device="cuda")


def test_the_cases_run_on_gpus_and_the_reference_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rank n has GPU n and NCCL; checkpoints of the GPUs are read by the process on the CPU."""
    started: list[tuple[int, str, str]] = []
    built: list[tuple[str, str]] = []

    def run_ranks(
        world: int, function: Any, job: Any, *more: Any, timeout: float, device: str = "cpu"
    ) -> Any:
        started.append((world, function.__name__, device))
        built.extend(
            (case.config(job.config).train.device, case.config(job.config).parallel.backend)
            for _, case in job.cases
        )
        if device == "cuda":
            raise KeyboardInterrupt

    monkeypatch.setattr(verification, "run_ranks", run_ranks)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(KeyboardInterrupt):
        verification.verify(tiny(), [1, 2], device="cuda")
    assert started == [(1, "_record_reference", "cpu"), (1, "_compare_cases", "cuda")]
    assert set(built) == {("cuda", "nccl")}
    reference = reference_case(2).config(verify_config())
    assert (reference.train.device, reference.parallel.backend) == ("cpu", "gloo")
    assert "2 ranks EP=2 padded ddp on cuda" in map(
        str, plan_cases(verify_config(), [1, 2], 2, "cuda").cases
    )


def test_a_rank_on_a_gpu_joins_nccl_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    sent: list[tuple[bool, Any]] = []
    devices: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setattr(
        dist,
        "init_process_group",
        lambda backend, **more: calls.append({"backend": backend, **more}),
    )
    monkeypatch.setattr(dist, "barrier", lambda: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(local_ranks.gc, "freeze", lambda: None)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    sender: Any = type("Sender", (), {"send": staticmethod(sent.append)})
    for device in ("cuda", "cpu"):
        arguments = (1, 2, 60.0, device, lambda rank, world: (rank, world), ())
        local_ranks._rank_main(sender, "/nonexistent", *arguments)  # type: ignore[arg-type]
    assert sent == [(False, (1, 2))] * 2
    gpu = torch.device("cuda", 1)
    assert [(call["backend"], call["device_id"]) for call in calls] == [
        ("nccl", gpu),
        ("gloo", None),
    ]
    assert devices == [gpu]


@pytest.fixture
def host_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse `numpy` of a tensor that `cpu` has not just returned, as a tensor of a GPU does."""
    real_cpu, real_numpy = Tensor.cpu, Tensor.numpy

    def cpu(self: Tensor) -> Tensor:
        copy = real_cpu(self).clone()
        copy.is_copy = True  # type: ignore[attr-defined]
        return copy

    def numpy(self: Tensor, **more: Any) -> Any:
        assert hasattr(self, "is_copy"), "can't convert a CUDA tensor to numpy"
        return real_numpy(self, **more)

    monkeypatch.setattr(Tensor, "cpu", cpu)
    monkeypatch.setattr(Tensor, "numpy", numpy)


@pytest.mark.usefixtures("host_reads")
@pytest.mark.parametrize("overrides", [[], ["modular.bank=low_rank"]], ids=str)
def test_a_capture_copies_to_the_host_first(overrides: list[str]) -> None:
    """It read the tensors of layers in place, which raises on a GPU."""
    config = reference_case(2).config(verify_config(*overrides))
    assert capture(build_engine(config, init_distributed("cpu"), VOCAB), decisions=True)


def test_an_expert_of_another_rank_arrives_on_this_ranks_device() -> None:
    """NCCL broadcasts into memory of the GPU; the buffer was on the CPU."""
    config = tiny("moe.experts.shapes=[[8],[16],[8],[16],[8],[16],[8],[16]]", "moe.num_experts=8")
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        mesh = build_mesh(2, torch.device("cpu"))
        with torch.device("meta"):
            model = task_of(config, VOCAB).build_model()
        shard_experts(model, mesh)
        full = gather_full(dict(model.named_parameters()), set(), mesh, expert_locations(model))
    finally:
        dist.destroy_process_group()
    assert len(full) > len(list(model.named_parameters()))
    assert {value.device.type for value in full.values()} == {"meta"}


def test_noise_is_drawn_on_the_cpu_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's generator gives other numbers for the same key, so routers with noise would differ."""
    devices: list[str] = []
    real = rng.generator

    def generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
        devices.append(str(device))
        return real(*key)

    monkeypatch.setattr(rng, "generator", generator)
    package = Path(rng.__file__).parents[1]
    users = [
        p for p in package.rglob("*.py") if "import keyed_noise" in p.read_text(encoding="utf-8")
    ]
    modules = {
        import_module(".".join(("dmoe", *p.relative_to(package).with_suffix("").parts)))
        for p in users
        if p.parent.name != "verify"
    }
    assert len(modules) >= 3
    context, shape = TokenContext(noise_key=(0, 0)), BatchShape(2)
    arguments = (torch.randn, "noise", torch.empty(4, 3), 3, 0, context, shape)
    expected = rng.keyed_noise(*arguments)
    for module in modules:
        devices.clear()
        with noise_from_cpu():
            drawn = module.keyed_noise(*arguments)
            elsewhere = module.keyed_noise(
                *arguments[:2], torch.empty(4, 3, device="meta"), *arguments[3:]
            )
        assert torch.equal(drawn, expected)
        assert devices == ["cpu"] * 4
        assert elsewhere.device.type == "meta"
        assert module.keyed_noise is rng.keyed_noise
