"""Half precision as on GPUs, executed on the CPU: the loss scale, and memory for casts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor

from dmoe.distributed.init import ProcessInfo
from dmoe.explain.cost import explain_size
from dmoe.explain.setting import resolve
from dmoe.moe.experts.grouped_mlp import MLPExperts
from dmoe.train.engine import Engine, build_engine
from dmoe.train.step import compute_gradients, forward, training_batches, update
from tests.tiny import VOCAB, tiny

CPU = ProcessInfo(0, 1, 0, torch.device("cpu"))


def scaled_engine() -> Engine:
    """An engine with a loss scale, which accelerate refuses on a CPU."""
    engine = build_engine(tiny(), CPU, VOCAB)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    engine.accelerator.scaler = scaler
    engine.optimizer = AcceleratedOptimizer(engine.optimizer.optimizer, scaler=scaler)
    engine.accelerator.unscale_gradients = lambda wrapper: scaler.unscale_(wrapper.optimizer)
    return engine


@pytest.mark.parametrize("fault", ["norm", "loss", "gradient"])
def test_a_refused_step_is_taken_by_nobody(fault: str) -> None:
    """torch's scaler asks whether a gradient is finite; dmoe also asks for the norm and the loss.

    The squares of finite gradients are infinite above 1.8e19. Such a step was refused, and then
    taken by the scaler. Only a gradient that is not finite lowers the scale.
    """
    engine = scaled_engine()
    data = engine.task.open_data()
    batches = training_batches(data.train, engine, 0)
    start = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    if fault == "gradient":
        engine.model.get_parameter("norm.weight").register_hook(
            lambda g: torch.full_like(g, torch.inf)
        )
    totals = compute_gradients(engine, batches)
    if fault == "norm":
        totals = replace(totals, squared_grad_norm=torch.inf)
    if fault == "loss":
        totals = replace(totals, loss_sum=torch.nan)
    assert not update(engine, totals, 1e-3).updated
    for name, parameter in engine.model.named_parameters():
        assert torch.equal(parameter, start[name]), name
    assert engine.accelerator.scaler.get_scale() == (512.0 if fault == "gradient" else 1024.0)
    if fault != "gradient":
        assert update(engine, compute_gradients(engine, batches), 1e-3).updated


@pytest.mark.parametrize("recompute", [False, True])
def test_the_copies_in_bf16_that_backward_needs_are_counted(
    recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameters take 18 bytes under bf16, not 16: each layer keeps its cast weights for backward.

    As on GPUs; on one CPU process experts are cast one by one, and no copy is kept.
    """
    monkeypatch.setattr(MLPExperts, "takes_tokens", False)
    config = tiny(
        "train.precision=bf16", "data.seq_len=17", f"train.recompute={str(recompute).lower()}"
    )
    engine = build_engine(config, CPU, VOCAB)
    shapes = {tuple(p.shape) for p in engine.model.parameters() if p.dim() > 1}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if (
            tensor.dtype == torch.bfloat16
            and {tuple(tensor.shape), tuple(tensor.mT.shape)} & shapes
        ):
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    batch = training_batches(engine.task.open_data().train, engine, 0)[0]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward(engine, batch, None)
    assert output.loss_sum is not None
    counted = explain_size(resolve(config, 1)).numbers["rank_bytes"]
    total = sum(kept.values())
    if recompute:
        assert counted["casts"] == 0
        assert total < counted["weights"] / 10
    else:
        assert 0.9 * counted["casts"] <= total <= counted["casts"]
    assert counted["total"] == sum(
        counted[key] for key in ("weights", "gradients", "moments", "casts")
    )
