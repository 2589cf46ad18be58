"""Every shipped config on fake CUDA tensors: torch's own device checks, without a GPU.

A tensor has the device `cuda` and no memory. Mixing it with one of the CPU raises, and so does
reading a value on the host, other than the reads that are known. Needs torch built with CUDA
(`pip install torch==2.13.0` from PyPI), so it is no part of CI: `pytest -m cuda_fake tests/cuda`.

Not covered: backward, which wants a driver (`test_every_config.py` runs it on the meta device).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from dmoe.config.schema import Config
from dmoe.distributed.expert_parallel import moe_layers
from dmoe.distributed.gradients import clip_grads_, squared_grad_norms
from dmoe.distributed.init import ProcessInfo
from dmoe.distributed.mesh import ParallelMesh
from dmoe.models.base import Model
from dmoe.train.engine import Engine
from dmoe.train.evaluation import evaluate
from dmoe.train.optimizer import build_optimizer
from dmoe.train.reduction import BatchCounts, Requests, pack
from dmoe.train.routing_analysis import RoutingProbe
from dmoe.train.step import forward, training_batches
from dmoe.train.step_metrics import StepRecorder
from dmoe.train.tasks import task_of
from dmoe.verify.capture import noise_from_cpu
from dmoe.verify.cases import prepare
from tests.cuda.test_every_config import CONFIGS, config_of, model_of

pytestmark = [
    pytest.mark.cuda_fake,
    pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA"),
]
GPU = torch.device("cuda", 0)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Host reads of CUDA tensors, which give twos (`item`: 0, no rank asks to stop).

    `bool` is not among them: a branch on a value raises.
    """
    found: list[str] = []

    def twos(tensor: Tensor) -> Any:
        two = 2.0 if tensor.is_floating_point() else 2
        return [twos(row) for row in tensor] if tensor.dim() else two

    def reading(owner: type, name: str, give: Any) -> None:
        real = getattr(owner, name)

        def read(tensor: Tensor) -> Any:
            if not tensor.is_cuda:
                return real(tensor)
            found.append(name)
            return give(tensor)

        monkeypatch.setattr(owner, name, read)

    reading(FakeTensor, "tolist", twos)
    reading(Tensor, "__int__", lambda tensor: 2)
    reading(Tensor, "item", lambda tensor: 0.0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    return found


@contextmanager
def autocast() -> Iterator[None]:
    """bf16 autocast of CUDA; `torch.autocast` switches itself off without a driver."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()


def engine_of(config: Config, model: Model) -> Engine:
    """The engine's parts that a forward, an optimizer step and an evaluation use."""
    mesh, model = ParallelMesh(), model.to_empty(device=GPU)
    return Engine(
        config,
        ProcessInfo(0, 1, 0, GPU),
        mesh,
        cast(Any, SimpleNamespace(micro_batch=2, accumulation=1)),
        "bf16",
        cast(Any, None),
        task_of(config, 256),
        model,
        cast(Any, SimpleNamespace(wrapped=model)),
        build_optimizer(model, config.optim),
        None,
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_step_and_an_evaluation(path: Path, reads: list[str]) -> None:
    """All tensors of a step are on the device, and nothing is read on the host but the totals."""
    config = prepare(config_of(path), 1)
    config = replace(config, train=replace(config.train, global_batch=2, eval_sequences=3))
    data = task_of(config, 256).open_data()
    model = model_of(config, ParallelMesh()).float()
    # the generator of a GPU needs a driver
    with FakeTensorMode(allow_non_fake_inputs=True), noise_from_cpu():
        take_step(engine_of(config, model), data, reads)


def take_step(engine: Engine, data: Any, reads: list[str]) -> None:
    (batch,) = training_batches(data.train, engine, 0)
    recorder = StepRecorder(engine, 0.0)
    with autocast():
        output = forward(engine, replace(batch, metrics_fn=recorder.metrics_fn), None)
    assert output.loss_sum is not None
    assert output.loss_sum.device == GPU
    # The rows that a layer keeps where their number varies, and those of each shape of experts.
    moe = engine.config.moe
    varies = moe.capacity.factor is not None or moe.router.kind != "top_k"
    varies |= engine.config.modular.bank != "none"
    allowed = len(moe_layers(engine.model)) * (varies + bool(moe.experts.shapes))
    assert len(reads) <= allowed, reads
    forward_reads = len(reads)
    for parameter in engine.model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
    recorder.collect([output])
    squares = squared_grad_norms(engine.model, engine.mesh)
    vector = pack(squares, [output], BatchCounts(1, 1, 100), Requests())
    assert vector.device == GPU
    assert vector.dtype == torch.float64
    assert len(reads) == forward_reads
    clip_grads_(engine.model, 2.0, 1.0)
    engine.optimizer.step()
    for parameter, state in engine.optimizer.state.items():
        assert {value.device for value in state.values()} == {GPU}, parameter.shape
    with autocast():
        evaluate(engine, data, probe=RoutingProbe(engine, data.domains))
