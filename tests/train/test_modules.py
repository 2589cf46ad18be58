"""Adapter modules in a run: base models, trained and frozen parts, equality over ranks."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from dmoe.checkpoint import save_load
from dmoe.config.errors import CheckpointError, ConfigError, NumbersError
from dmoe.config.rules import check, expert_parallel
from dmoe.config.schema import Config
from dmoe.distributed import init as worlds
from dmoe.distributed.state_dict import model_state
from dmoe.modular import adapter_layers, base_model_hash
from dmoe.train import engine as engines
from dmoe.train.engine import Engine
from dmoe.train.modular.base_model import load_base_model
from dmoe.train.modular.session import ModularSession, check_domains
from dmoe.train.step import train_step, training_batches
from tests.json_lines import json_lines
from tests.ranks import run_ranks
from tests.tiny import VOCAB, tiny

pytestmark = pytest.mark.ranks

LORA = (
    "modular.bank=low_rank",
    "modular.modules=4",
    "modular.routing=top_k",
    "modular.top_k=2",
    "modular.rank=2",
)


def build(config: Config) -> Engine:
    # one process builds many engines, but accelerate expects one
    AcceleratorState._reset_state(reset_partial_state=True)
    check(config, worlds.launched_world_size())
    return engines.build_engine(config, worlds.init_distributed("cpu"), VOCAB)


def steps(engine: Engine, count: int = 2) -> list[float]:
    data = engine.task.open_data()
    return [
        train_step(engine, training_batches(data.train, engine, s), 0.01).totals.loss_sum
        for s in range(count)
    ]


def saved(engine: Engine, root: Path, step: int = 3) -> Path:
    extra = {"config": asdict(engine.config)}
    return save_load.save(
        root,
        step,
        model_state(engine.model, engine.mesh),
        extra,
        group=engine.mesh.checkpoint_group,
    )


def lines(run: Path) -> list[dict[str, Any]]:
    return json_lines(run / "metrics.jsonl")


REFUSED = {
    "modular.rank=3": "without modules",
    "modular.bank=low_rank modular.hidden=3": "only for adapter",
    (
        "modular.bank=low_rank modular.modules=2 modular.routing=top_k modular.renormalize=true"
    ): r"modular\.top_k=1 makes every weight 1",
    "modular.bank=low_rank modular.routing=table": "must name the modules of each domain",
    "modular.bank=low_rank modular.routing=table modular.table=[[1]]": "from 0 to 0",
    "modular.bank=low_rank modular.weights=[1,2]": "one weight for each",
    "modular.bank=prompt modular.modules=2 modular.routing=soft": "reads the whole sequence",
    (
        "modular.bank=adapter modular.modules=2 modular.routing=soft modular.aggregation=mean"
    ): "learn nothing",
    "modular.bank=low_rank modular.train=router": "trains nothing",
    "modular.bank=low_rank modular.train=one_module parallel.mode=fsdp": "cuts modules into pieces",
    (
        "modular.bank=low_rank modular.modules=3 parallel.ep=2"
    ): r"modular\.modules=3: must be divisible by parallel\.ep=2",
    (
        "modular.bank=low_rank modular.modules=2 modular.routing=soft modular.per=task"
    ): "number of domains",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_invalid_settings_are_refused(overrides: str) -> None:
    with pytest.raises(ConfigError, match=REFUSED[overrides]):
        check(tiny(*overrides.split()), 2)


def test_expert_parallel_size_divides_the_modules() -> None:
    assert expert_parallel(tiny("modular.bank=low_rank"), 2) == 1
    assert expert_parallel(tiny("modular.bank=low_rank", "modular.modules=4"), 4) == 4
    assert (
        expert_parallel(tiny("modular.bank=low_rank", "modular.modules=2", "model.moe_every=0"), 4)
        == 2
    )


def test_a_pattern_without_matches_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"modular\.at=\*\.nothing"):
        build(tiny(*LORA, "modular.at=*.nothing"))


def test_every_domain_has_its_modules() -> None:
    config = tiny("modular.bank=low_rank", "modular.routing=table", "modular.table=[[0]]")
    check_domains(config, ["en"])
    with pytest.raises(ConfigError, match=r"none for domain 1 \(fr\)"):
        check_domains(config, ["en", "fr"])


@pytest.mark.parametrize("what", ["joint", "modules", "one_module", "router"])
def test_what_is_frozen_keeps_its_bits_and_the_rest_moves(what: str, tmp_path: Path) -> None:
    engine = build(tiny(*LORA, f"modular.train={what}"))
    for layer in adapter_layers(engine.model).values():
        torch.nn.init.normal_(layer.experts.b.data)  # so that the router matters
    session = ModularSession(engine, tmp_path, fresh=True)
    before = {name: value.clone() for name, value in engine.model.state_dict().items()}
    core = base_model_hash(engine.model)
    steps(engine)
    moved = {
        name
        for name, value in engine.model.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert any(".modular." not in name for name in moved) == (what == "joint")
    assert (base_model_hash(engine.model) == core) == (what != "joint")
    assert any(".experts.b" in name and ".modular." in name for name in moved) == (what != "router")
    assert any(".modular.router" in name for name in moved) == (what != "one_module")
    known, _ = session.finish()
    assert (
        known
        == {
            "joint": {},
            "modules": {"core_unchanged": True},
            "one_module": {"core_unchanged": True, "others_unchanged": True},
            "router": {"core_unchanged": True, "others_unchanged": True},
        }[what]
    )
    if what == "one_module":
        stack = engine.model.state_dict()["blocks.0.attention.w_out.modular.experts.b"]
        same = [
            torch.equal(a, b)
            for a, b in zip(
                stack, before["blocks.0.attention.w_out.modular.experts.b"], strict=True
            )
        ]
        assert same == [True, True, True, False]
    assert engine.model.num_parameters().trainable == sum(
        p.numel() for p in engine.model.parameters() if p.requires_grad
    )


@pytest.mark.parametrize("name", ["embedding.weight", "blocks.0.attention.w_out.modular.experts.b"])
def test_the_proof_sees_one_changed_number(name: str, tmp_path: Path) -> None:
    engine = build(tiny(*LORA, "modular.train=one_module"))
    session = ModularSession(engine, tmp_path, fresh=True)
    engine.model.state_dict()[name].view(-1)[0] += 1e-3
    with pytest.raises(NumbersError, match="have changed"):
        session.finish()


def test_the_bias_of_a_frozen_router_is_not_updated() -> None:
    """The bias update changes buffers, which `requires_grad` does not freeze."""
    engine = build(tiny(*LORA, "moe.balance.bias=0.1"))
    steps(engine, 1)
    assert not engine.model.moe_layers()[0].router.get_buffer("bias_E").any()
    assert (
        adapter_layers(engine.model)["blocks.0.attention.w_out"].router.get_buffer("bias_E").any()
    )


def test_a_run_with_more_modules_starts_from_the_present_ones(tmp_path: Path) -> None:
    core = build(tiny(*LORA))
    steps(core)
    old = core.model.state_dict()
    path = saved(core, tmp_path)
    more = build(tiny(*LORA, "modular.modules=6", "train.seed=1"))
    drawn = {name: value.clone() for name, value in more.model.state_dict().items()}
    load_base_model(more, path)
    assert base_model_hash(more.model) == base_model_hash(core.model)
    for name, value in more.model.state_dict().items():
        if ".modular." in name:
            assert torch.equal(value[:4], old[name]), name
        if ".modular.experts" in name:
            assert torch.equal(value[4:], drawn[name][4:]), name
    for overrides, match in {
        ("modular.modules=2",): "modules=2: the base model .* has 4 modules",
        ("modular.rank=4",): r"modular\.rank=4",
        ("moe.expert_dim=16",): r"moe\.expert_dim=16",
    }.items():
        with pytest.raises(ConfigError, match=match):
            load_base_model(build(tiny(*LORA, *overrides)), path)


def read(rank: int, world: int, path: Path, *overrides: str) -> dict[str, np.ndarray]:
    engine = build(tiny(*LORA, "modular.modules=8", *overrides))
    load_base_model(engine, path)
    session = ModularSession(engine, path, fresh=False)
    state = model_state(engine.model, engine.mesh)
    found = {
        n: (v.full_tensor() if hasattr(v, "full_tensor") else v).detach().numpy().copy()
        for n, v in state.items()
    }
    found["losses"] = np.array(steps(engine))
    assert session.finish()[0] == {"core_unchanged": True}
    return found


def test_two_ranks_load_a_base_model_of_one_and_train_equally(tmp_path: Path) -> None:
    path = saved(build(tiny(*LORA)), tmp_path)
    alone = read(0, 1, path)
    for mode in ("ddp", "fsdp"):
        for rank in run_ranks(2, read, path, f"parallel.mode={mode}"):
            assert rank.keys() == alone.keys()
            np.testing.assert_allclose(rank.pop("losses"), alone["losses"], rtol=1e-4)
            for name, value in rank.items():
                np.testing.assert_array_equal(value, alone[name], err_msg=name)


@pytest.mark.parametrize("bank", ["prompt", "prefix"])
def test_prefix_positions_are_internal(bank: str) -> None:
    """Losses, correctness, logits and per-token metrics have S positions per sequence."""
    engine = build(tiny(f"modular.bank={bank}", "modular.length=3"))
    input, target, *_ = engine.task.dummy_batch(2)
    output = engine.model.eval()(input, target, return_logits=True)
    assert output.logits.shape[:2] == input.shape
    assert len(output.loss_T) == len(output.correct_T) == input.numel()
    torch.testing.assert_close(output.loss_T.sum(), output.loss_sum)
    assert int(output.stats[0].choice_E.sum()) == 2 * (input.shape[1] + 3) * 2
    engine.model.train()
    assert len(set(steps(engine, 2))) == 2


def test_a_base_model_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    path = saved(build(tiny()), tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(CheckpointError, match="embedding"):
        load_base_model(
            engines.build_engine(tiny(*LORA), worlds.init_distributed("cpu"), 300), path
        )


def test_one_module_of_three_is_counted_as_trained() -> None:
    """The start of a run counted the whole bank as trained."""
    adapter = (
        "modular.bank=adapter",
        "modular.modules=3",
        "modular.hidden=2",
        "modular.at=*.attention.w_out",
    )
    engine = engines.build_engine(
        tiny(*adapter, "modular.train=one_module"), worlds.init_distributed("cpu"), VOCAB
    )
    session = ModularSession(engine, Path("unread"), fresh=True)
    before = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    for step in range(2):
        train_step(engine, training_batches(engine.task.open_data().train, engine, step), 0.01)
    moved = sum(int((p != before[name]).sum()) for name, p in engine.model.named_parameters())
    assert 0 < moved == session.num_trained(engine.model.num_parameters().trainable)
