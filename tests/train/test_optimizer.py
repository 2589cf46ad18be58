"""Parameter groups with settings of their own, frozen routers, and what is said of Muon's memory."""

from __future__ import annotations

import math

import pytest
import torch

from dmoe.config.errors import ConfigError
from dmoe.config.rules import check
from dmoe.config.schedule import learning_rate
from dmoe.config.schema import Config
from dmoe.distributed.init import init_distributed
from dmoe.explain import explain
from dmoe.report.sentences import optimizer_sentences, routing_sentences
from dmoe.train.engine import Engine, build_engine
from dmoe.train.optimizer import muon_matrices
from dmoe.train.step import train_step, training_batches
from tests.tiny import VOCAB, tiny

OWN = "optim.groups={'*.router.*': {lr: 0.001, weight_decay: 0.3}, '*.experts.*': {lr: 0}}"


def trained(config: Config, steps: int = 2) -> tuple[Engine, dict[str, torch.Tensor]]:
    """Train, and return the engine and the weights before."""
    engine = build_engine(config, init_distributed("cpu"), VOCAB)
    before = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    data = engine.task.open_data().train
    for step in range(steps):
        rate = learning_rate(step, config.train.steps, config.optim)
        train_step(engine, training_batches(data, engine, step), rate)
    return engine, before


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_group_has_its_own_rate_and_decay_in_every_step(kind: str) -> None:
    config = tiny(OWN, f"optim.kind={kind}")
    check(config)
    engine, before = trained(config)
    rates = {}
    for group in engine.optimizer.param_groups:
        for name, parameter in engine.model.named_parameters():
            if any(parameter is member for member in group["params"]):
                rates[name] = (group["lr"], group["weight_decay"])
    rate = learning_rate(1, 10, config.optim)
    assert rates["blocks.0.feed_forward.router.weight"] == pytest.approx((rate / 4, 0.3))
    assert rates["blocks.0.feed_forward.experts.w_in"][0] == 0
    assert rates["blocks.0.attention.w_out.weight"] == (rate, 0.1)
    assert rates["norm.weight"] == (rate, 0)
    after = dict(engine.model.named_parameters())
    changed = {name for name, p in after.items() if not torch.equal(p, before[name])}
    assert changed == {name for name in after if ".experts." not in name}


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ("{router: {lr: 1}}", "matches no parameter"),
        ("{'*': {learning_rate: 1}}", "use one of them"),
        ("{'*': {lr: -1}}", "must not be negative"),
        ("{'*': {lr: x}}", "must be"),
        ("{'*': 3}", "must be"),
        ("[1]", "must be a mapping"),
        ("{1: {lr: 1}}", "must be a mapping"),
    ],
)
def test_groups_that_mean_nothing_are_refused(groups: str, message: str) -> None:
    """A pattern without a match would train with the settings that it was to replace."""

    def build() -> None:
        config = tiny(f"optim.groups={groups}")
        check(config)
        build_engine(config, init_distributed("cpu"), VOCAB)

    with pytest.raises(ConfigError, match=message) as refused:
        build()
    assert refused.value.field == "optim.groups"


def test_a_frozen_router_keeps_its_weights_and_all_others_train() -> None:
    config = tiny("moe.router.freeze=true")
    engine, before = trained(config)
    for name, parameter in engine.model.named_parameters():
        assert torch.equal(parameter, before[name]) == (".router." in name), name
    assert any("not trained" in text for text in routing_sentences(config))


@pytest.mark.parametrize("setting", ["moe.balance.bias=0.01", "moe.router.kind=hash"])
def test_a_frozen_router_has_no_bias_and_no_kind_without_weights(setting: str) -> None:
    with pytest.raises(ConfigError, match="freeze"):
        check(tiny("moe.router.freeze=true", setting))


def test_inverse_sqrt_peaks_after_the_warmup_and_ends_at_its_floor() -> None:
    optim = tiny("optim.schedule=inverse_sqrt", "optim.warmup=4", "optim.min_lr_ratio=0.1").optim
    rates = [learning_rate(step, 10, optim) / optim.lr for step in range(600)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[15] == pytest.approx(math.sqrt(4 / 16))
    assert rates[399] == pytest.approx(0.1)
    assert rates[500] == pytest.approx(0.1)


def test_explain_counts_one_moment_of_muon() -> None:
    """The bytes of a step's state, counted from the optimizer."""
    config = tiny("optim.kind=muon", "moe.router.freeze=true")
    engine, _ = trained(config, 1)
    held = sum(
        value.numel() * 4
        for state in engine.optimizer.state.values()
        for name, value in state.items()
        if name != "step"
    )
    sections = {section.key: section for section in explain(config, 1)}
    assert sections["size"].numbers["rank_bytes"]["moments"] == held
    assert muon_matrices(engine.model).keys() <= dict(engine.model.named_parameters()).keys()
    assert "Muon, momentum 0.95" in " ".join(optimizer_sentences(config))
    assert "0.001" in " ".join(optimizer_sentences(tiny(OWN)))


def test_explain_leaves_moments_on_the_host_out_of_the_sum() -> None:
    config = tiny("optim.offload=true")
    size = next(section for section in explain(config, 1) if section.key == "size")
    held = size.numbers["rank_bytes"]
    assert held["total"] == held["weights"] + held["gradients"] + held["casts"]
    assert held["moments"] == 2 * held["weights"]
    assert any("on the host, not in the sum" in sentence for sentence in size.sentences)
    assert "moments in the main memory of the host" in " ".join(optimizer_sentences(config))
