"""The base model and the other modules keep their bits when modules are trained or added."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from dmoe.config.errors import ConfigError
from dmoe.modular import (
    BANKS,
    Adapter,
    LoRA,
    adapter_context,
    adapter_layers,
    add_modules,
    attach,
    base_model_hash,
    detach,
    freeze,
    freeze_all_but,
    routed,
    select_trainable,
    table,
)
from dmoe.modular.aggregation import Concat
from tests.modular.nets import D, M, O, drawn, mlp, randomize


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, labels: torch.Tensor | None = None
) -> None:
    for step in range(3):
        optimizer.zero_grad()
        x = drawn(6, D, seed=step)
        with (
            adapter_context(model, label_T=labels) if labels is not None else adapter_context(model)
        ):
            model(x).square().sum().backward()
        optimizer.step()


def test_the_hash_is_of_the_base_model_only() -> None:
    model = mlp()
    before = base_model_hash(model)
    attach(model, "0", partial(LoRA, M), routed("top_k", M, 2))
    randomize(model)
    assert base_model_hash(model) == before
    detach(model)
    assert base_model_hash(model) == before == base_model_hash(mlp())


@pytest.mark.parametrize("change", ["a bit", "the dtype", "a shape", "a name", "a buffer"])
def test_the_hash_sees(change: str) -> None:
    model = mlp()
    model.register_buffer("mean", torch.zeros(3))
    before = base_model_hash(model)
    if change == "a bit":
        bits = model[2].bias.data.view(torch.int64)
        bits[0] ^= 1
    elif change == "the dtype":
        model[0].to(torch.bfloat16)
    elif change == "a shape":
        model[2].weight.data = model[2].weight.data.view(1, O, 8)
    elif change == "a name":
        model[2].other = model[2].weight
        del model[2].weight
    else:
        model.mean += 1
    assert base_model_hash(model) != before


def test_training_modules_does_not_change_the_base_model() -> None:
    model = mlp()
    attach(model, "[02]", partial(LoRA, M), routed("top_k", M, 2))
    before = freeze(model)
    bank = adapter_layers(model)["0"].experts
    start = bank.b.detach().clone()
    train(model, torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.1))
    assert base_model_hash(model) == before
    assert not torch.equal(bank.b, start)


@pytest.mark.parametrize(
    ("what", "core", "bank", "router"),
    [
        ("joint", True, True, True),
        ("modules", False, True, True),
        ("one_module", False, True, False),
        ("router", False, False, True),
    ],
)
def test_each_mode_trains_its_parts(what: str, core: bool, bank: bool, router: bool) -> None:
    model = mlp()
    layer = attach(model, "0", partial(LoRA, M), routed("top_k", M, 2))["0"]
    chosen = {id(parameter) for parameter in select_trainable(model, what)}
    assert (
        model[0].weight.requires_grad,
        layer.experts.a.requires_grad,
        layer.router.weight.requires_grad,
    ) == (
        core,
        bank,
        router,
    )
    assert chosen == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


def test_an_unknown_training_mode_is_refused() -> None:
    with pytest.raises(ConfigError, match="joint, modules, one_module, router"):
        select_trainable(mlp(), "everything")


@pytest.mark.parametrize("kind", ["low_rank", "adapter", "scale", "sparse_delta"])
def test_one_module_is_trained_and_the_others_keep_their_bits(kind: str) -> None:
    """AdamW's weight decay and old moments move a slice even with a zero gradient."""
    model = mlp()
    attach(model, "[02]", partial(BANKS[kind], M), table([[0], [1], [2], [3]], M))
    randomize(model)
    select_trainable(model, "modules")
    labels = torch.tensor([0, 1, 2, 3, 2, 2])
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.1)
    train(model, optimizer, labels)  # so that every module has moments
    before, core = (
        {n: p.detach().clone() for n, p in model.named_parameters()},
        base_model_hash(model),
    )
    end = freeze_all_but(model, 2, optimizer)
    train(model, optimizer, labels)
    for name, layer in adapter_layers(model).items():
        for parameter_name, parameter in layer.experts.named_parameters():
            old = before[f"{name}.modular.experts.{parameter_name}"]
            assert torch.equal(parameter[[0, 1, 3]], old[[0, 1, 3]])
            assert not torch.equal(parameter[2], old[2])
            assert not parameter.grad[[0, 1, 3]].any()
    assert base_model_hash(model) == core
    end()
    train(model, optimizer, labels)
    name, parameter = next(iter(adapter_layers(model)["0"].experts.named_parameters()))
    assert not torch.equal(parameter[0], before[f"0.modular.experts.{name}"][0])
    assert base_model_hash(model) == core


def test_an_unknown_module_cannot_be_trained() -> None:
    model = mlp()
    attach(model, "0", partial(LoRA, M), routed("top_k", M, 2))
    with pytest.raises(ConfigError, match="0 to 3"):
        freeze_all_but(model, M, torch.optim.SGD(model.parameters(), 0.1))


def test_adding_a_language_does_not_change_the_others_outputs() -> None:
    """Add a module, give it a label, train it alone: outputs of old labels are bit-identical."""
    model = mlp()
    attach(model, "[02]", partial(Adapter, 2, hidden=3), table([[0], [1]], 2))
    randomize(model)
    x, old = drawn(6, D), torch.tensor([0, 1, 0, 1, 0, 1])
    with adapter_context(model, label_T=old):
        before = model(x)
    assert add_modules(model) == range(2, 3)
    assert [layer.router.add_row([2]) for layer in adapter_layers(model).values()] == [2, 2]
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.1)
    freeze_all_but(model, 2, optimizer)
    new = torch.full((6,), 2)
    with adapter_context(model, label_T=new):
        untrained = model(x)
    train(model, optimizer, new)
    with adapter_context(model, label_T=old):
        assert torch.equal(model(x), before)
    with adapter_context(model, label_T=new):
        assert not torch.equal(model(x), untrained)


def test_refusing_to_add_modules_changes_nothing() -> None:
    model = mlp()
    attach(model, "[02]", partial(LoRA, M), routed("soft", M, M), Concat)
    with pytest.raises(ConfigError, match="Concat"):
        add_modules(model)
    assert all(layer.experts.num_modules == M for layer in adapter_layers(model).values())
    with pytest.raises(ConfigError, match="there must be a bank"):
        add_modules(mlp())
