"""Every field of the config reaches the training: another value gives other weights or losses.

`dmoe verify` compares with a truth that reads the same config. A field that both sides leave at its
default, or a seed that is not passed on, is equal on both: `verify` did not see the seed left out of
the call that draws the weights, and `optim.eps` out of that of AdamW only with another value.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from dmoe.config.plugin_loader import load_plugins
from dmoe.config.schedule import learning_rate
from dmoe.config.schema import Config, ModelConfig, MoEConfig, OptimConfig
from dmoe.distributed.init import init_distributed
from dmoe.train.engine import build_engine
from dmoe.train.evaluation import evaluate
from dmoe.train.step import train_step, training_batches
from tests.ranks import run_ranks
from tests.tiny import VOCAB, tiny

pytestmark = pytest.mark.ranks

KINDS = Path(__file__).parents[1] / "own_kinds.py"
CLASSES = "train.task=classification data.source=synthetic:clusters data.streams=[a,b]"
LIMITED = "moe.capacity.factor=1"
GROUPED = "moe.router.kind=group_limited moe.router.groups=4 moe.router.topk_groups=2"
ADAPTIVE = "moe.router.kind=adaptive moe.top_k=4 moe.router.renormalize=false"
BUDGET = "moe.router.kind=budget moe.top_k=8 moe.router.renormalize=false moe.router.budget=0.4"
HOT_RANK = "moe.router.kind=workload moe.router.workload=W2"
BASES = {
    "model.dense_dim=20": "model.dense_first=1",
    "model.fusion=gated": CLASSES,
    "model.head=experts": CLASSES,
    "model.stream_dropout=0.5": f"{CLASSES} model.fusion=gated",
    "moe.router.weights_from=chosen": "moe.router.renormalize=false",
    "moe.router.groups=2": GROUPED,
    "moe.router.topk_groups=1": GROUPED,
    "moe.router.top_p=0.2": ADAPTIVE,
    "moe.router.k_min=3": f"{ADAPTIVE} moe.router.top_p=0.1",
    "moe.router.min_weight=0.13": BUDGET,
    "moe.router.budget=0.2": BUDGET,
    "moe.router.per=sequence": BUDGET,
    "moe.router.workload=W2": "moe.router.kind=workload",
    "moe.router.ranks=4": HOT_RANK,
    "moe.router.hot=3": HOT_RANK,
    "moe.capacity.min_capacity=50": LIMITED,
    "moe.capacity.group=sequence": LIMITED,
    "moe.capacity.priority=score": LIMITED,
    "moe.capacity.renormalize=true": LIMITED,
    "moe.capacity.overflow=next_choice": LIMITED,
    "moe.capacity.pool=4": LIMITED,
    "moe.capacity.pool_floor=0": f"{LIMITED} moe.capacity.pool=4",
    "moe.balance.load=0.1": "moe.router.kind=noisy",
    "moe.balance.recenter=false": "moe.balance.bias=0.01",
    "moe.experts.shared_dim=20": "moe.experts.shared=1",
    "optim.decay_fraction=0.9": "optim.schedule=wsd",
    'moe.router.options={"offset":1}': f"moe.router.kind={KINDS}:Position",
    "moe.balance.own=0.5": f"moe.balance.kind={KINDS}:Entropy moe.balance.own=0.1",
    'moe.balance.options={"scale":3}': f"moe.balance.kind={KINDS}:Entropy moe.balance.own=0.1",
    'moe.experts.options={"power":3}': f"moe.experts.kind={KINDS}:Squared",
    'optim.options={"beta1":0.1}': f"optim.kind={KINDS}:Lion",
    'optim.schedule_options={"period":2}': f"optim.schedule={KINDS}:Sawtooth",
    "optim.momentum=0.5": "optim.kind=muon",
}
"""What must be set for another value of a field to have a meaning."""
CHANGES = [
    *BASES,
    'optim.trainable=["*.experts.*"]',
    "train.seed=1",
    "model.dim=64",
    "model.layers=3",
    "model.heads=4",
    "model.kv_heads=1",
    "model.head_dim=8",
    "model.moe_every=2",
    "model.dense_first=1",
    "model.qk_norm=false",
    "model.tie_embeddings=false",
    "model.rope_base=100",
    "model.norm_eps=0.01",
    "model.init_std=0.1",
    "moe.num_experts=4",
    "moe.top_k=3",
    "moe.expert_dim=16",
    "moe.router.kind=noisy",
    "moe.router.score=sigmoid",
    "moe.router.renormalize=false",
    "moe.router.scale=2",
    "moe.router.jitter=0.1",
    "moe.capacity.factor=1",
    "moe.capacity.eval_factor=1",
    "moe.balance.switch=0.1",
    "moe.balance.switch_level=sequence",
    "moe.balance.z=0.1",
    "moe.balance.importance=0.1",
    "moe.balance.usage_std=0.1",
    "moe.balance.bias=0.01",
    f"moe.balance.kind={KINDS}:Entropy moe.balance.own=0.1",
    "moe.router.freeze=true",
    "moe.experts.kind=geglu",
    "optim.kind=muon",
    'optim.groups={"*.experts.*":{"lr":0.001}}',
    "moe.experts.shared=1",
    "moe.experts.shapes=[[24],[24],[24],[24],[8],[8],[8],[8]]",
    "moe.experts.zero=1",
    "moe.experts.copy=1",
    "moe.experts.constant=1",
    "optim.lr=0.001",
    "optim.beta1=0.8",
    "optim.beta2=0.99",
    "optim.eps=1e-3",
    "optim.weight_decay=0.5",
    "optim.moments=bf16",
    "optim.clip=0.01",
    "optim.schedule=linear",
    "optim.warmup=3",
    "optim.min_lr_ratio=0.5",
]
NO_CHANGE = {
    "moe.exchange": "the same result in another way",
    "moe.kernels": "the same result by other kernels: tests/moe/test_triton_kernels.py",
    "moe.router.allow_future_leak": "a permission",
    "moe.replay.record": "only writes: test_replay.py",
    "moe.replay.from_": "read by the trainer, not by a step: test_replay.py",
    "moe.balance.pooled": "of a published model: tests/hf/test_pooled_loss.py",
    "optim.offload": "the same bits, on a GPU: tests/distributed/test_offloaded_adamw.py",
    "model.source": "another network: tests/hf/test_training.py",
    "model.lora.rank": "of a published model: tests/hf/test_fine_tuning.py",
    "model.lora.alpha": "of a published model: tests/hf/test_fine_tuning.py",
    "model.lora.targets": "of a published model: tests/hf/test_fine_tuning.py",
}


def outcome(config: Config) -> list[Any]:
    """Return the weights before and after three steps, and the losses of an evaluation."""
    AcceleratorState._reset_state(reset_partial_state=True)
    num_outputs = 4 if config.train.task == "classification" else VOCAB
    config = load_plugins(config)
    engine = build_engine(config, init_distributed("cpu"), num_outputs)
    data = engine.task.open_data()
    before = [float(p.detach().double().abs().sum()) for p in engine.model.parameters()]
    for step in range(3):
        rate = learning_rate(step, config.train.steps, config.optim)
        train_step(engine, training_batches(data.train, engine, step), rate)
    state = [*engine.model.parameters(), *engine.model.buffers()]
    after = [float(tensor.detach().double().abs().sum()) for tensor in state]
    loss = evaluate(engine, data).loss
    engine.close()
    return [before, after, loss]


def outcomes(rank: int, world: int) -> dict[str, list[Any]]:
    torch.set_num_threads(1)
    bases = {"", *BASES.values()}
    runs = bases | {f"{BASES.get(change, '')} {change}" for change in CHANGES}
    return {
        run.strip(): outcome(tiny("train.steps=5", "optim.warmup=1", *run.split())) for run in runs
    }


@pytest.fixture(scope="module")
def results() -> dict[str, list[Any]]:
    (found,) = run_ranks(1, outcomes, timeout=180)
    return found


@pytest.mark.parametrize("change", CHANGES)
def test_another_value_changes_the_training(change: str, results: dict[str, list[Any]]) -> None:
    base = BASES.get(change, "")
    assert results[f"{base} {change}".strip()] != results[base]


def test_the_seed_draws_other_weights(results: dict[str, list[Any]]) -> None:
    """Another seed also reads other samples, which would hide that the weights are the same."""
    drawn = [n for n, value in enumerate(results[""][0]) if value != round(value)]
    assert len(drawn) > 8
    assert all(results["train.seed=1"][0][n] != results[""][0][n] for n in drawn)


def test_no_field_is_forgotten() -> None:
    """A new field of these sections needs a line above."""

    def names(section: object, prefix: str) -> list[str]:
        found = []
        for f in fields(section):  # type: ignore[arg-type]
            value = getattr(section, f.name)
            path = f"{prefix}.{f.name}"
            found += names(value, path) if is_dataclass(value) else [path]
        return found

    sections = {"model": ModelConfig(), "moe": MoEConfig(), "optim": OptimConfig()}
    known = {change.partition("=")[0] for change in CHANGES} | NO_CHANGE.keys()
    every = [name for prefix, section in sections.items() for name in names(section, prefix)]
    assert [name for name in every if name not in known] == []
