"""Attaching to the reference transformer, any nn.Module and a Hugging Face model; detaching."""

from __future__ import annotations

import copy
import re
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from dmoe.config.errors import ConfigError
from dmoe.config.schema import BalanceConfig
from dmoe.modular import (
    Adapter,
    LoRA,
    Scale,
    SparseDelta,
    adapter_context,
    adapter_layers,
    attach,
    constant,
    detach,
    initialize,
    module_losses,
    routed,
    table,
)
from dmoe.modular.aggregation import Gated, Mean, Stacked, WeightedSum
from dmoe.moe.routing import TokenContext
from tests.modular.nets import D, M, O, drawn, hugging_face, mlp, randomize, transformer

LOW = partial(LoRA, M, rank=2)
TOP = routed("top_k", M, 2)
TOKENS = torch.arange(32).view(2, 16) % 40


def logits(model: nn.Module) -> Tensor:
    return model(TOKENS).logits


@pytest.mark.parametrize(
    ("make", "pattern", "count"),
    [
        (partial(transformer, "model.moe_every=0"), "*.attention.w_*", 4),
        (partial(transformer, "model.moe_every=0"), "*.feed_forward", 2),
        (transformer, "*.feed_forward", 2),
        (transformer, re.compile(r"blocks\.1\.attention\.w_out"), 1),
        (hugging_face, "*.[qv]_proj", 4),
        (hugging_face, re.compile(r".*\.mlp\.(up|down)_proj"), 4),
    ],
)
@pytest.mark.parametrize("bank", [LOW, partial(Adapter, M, hidden=3)], ids=["low_rank", "adapter"])
def test_attach_and_detach_leave_every_bit(
    make: object, pattern: str, count: int, bank: object
) -> None:
    model = make()  # type: ignore[operator]
    names, before = list(model.state_dict()), copy.deepcopy(model.state_dict())
    plain = logits(model)
    made = attach(model, pattern, bank, TOP)  # type: ignore[arg-type]
    assert list(made) == list(adapter_layers(model))
    assert len(made) == count
    assert torch.equal(logits(model), plain), "fresh modules changed the network"
    randomize(model)
    changed = logits(model)
    assert (changed - plain).abs().max() > 1e-3
    changed.sum().backward()
    assert all(
        parameter.grad is not None
        for layer in made.values()
        for parameter in layer.experts.parameters()
    )
    assert detach(model) == made
    assert list(model.state_dict()) == names
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model), plain)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_target_computes_the_formula() -> None:
    """One module for every token: y = f(x) + scale x A B, in the middle of a network."""
    model = mlp()
    attach(model, "2", partial(LoRA, 1, rank=2, alpha=6.0), constant(1.0))
    randomize(model)
    x, bank = drawn(3, D), adapter_layers(model)["2"].experts
    hidden = model[0](x).relu()
    expected = hidden @ model[2].weight.t() + model[2].bias + 3.0 * (hidden @ bank.a[0] @ bank.b[0])
    torch.testing.assert_close(model(x), expected)


def test_labels_reach_the_modules_by_argument_and_by_context_manager() -> None:
    """By a `TokenContext` argument or `adapter_context`; labels per token or per sequence."""
    model = transformer()
    attach(model, "*.attention.w_out", LOW, table([[0], [1, 2], [3]], M))
    randomize(model)
    by_token = torch.tensor([2, 1]).repeat_interleave(16)
    handed = model(TOKENS, context=TokenContext(label_T=by_token)).logits
    detach(model)
    attach(model, "*.attention.w_out", LOW, table([[0], [1, 2], [3]], M))
    randomize(model)
    for labels in (by_token, torch.tensor([2, 1])):
        with adapter_context(model, label_T=labels):
            assert torch.equal(model(TOKENS).logits, handed)
    with pytest.raises(ValueError, match="label_T"):
        model(TOKENS)


def test_a_context_argument_replaces_the_one_before() -> None:
    model = transformer()
    attach(model, "*.attention.w_out", LOW, table([[0], [1]], M))
    randomize(model)
    out = [
        model(TOKENS, context=TokenContext(label_T=torch.full((32,), label))).logits
        for label in (0, 1, 0)
    ]
    assert torch.equal(out[0], out[2])
    assert not torch.equal(out[0], out[1])


def test_a_copy_calls_its_own_modules() -> None:
    model = mlp()
    attach(model, "0", LOW, TOP)
    randomize(model)
    twin, x = copy.deepcopy(model), drawn(3, D)
    before = model(x)
    with torch.no_grad():
        adapter_layers(twin)["0"].experts.b.zero_()
    assert torch.equal(model(x), before)
    assert not torch.equal(twin(x), before)


def test_modules_of_a_bfloat16_network_are_float32() -> None:
    model = mlp(torch.bfloat16)
    layer = attach(model, "0", LOW, TOP)["0"]
    randomize(model)
    y = model(drawn(3, D, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.experts.a.dtype == layer.experts.a.grad.dtype == torch.float32


class Reads(nn.Module):
    """A parent that reads its child's weight without calling the child."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(D, O)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.inner.weight)


def test_modules_that_are_never_called_are_reported() -> None:
    """A hook is not called where the weight is read directly: training would change nothing."""
    model = Reads()
    attach(model, "inner", LOW, TOP)
    with pytest.raises(RuntimeError, match="modules at inner changed nothing"):
        model(torch.randn(2, D))


@pytest.mark.parametrize(
    ("pattern", "bank", "router", "aggregation", "word"),
    [
        ("*.nothing", LOW, TOP, WeightedSum, "blocks.0.attention.w_qkv"),
        ("*.feed_forward.w_in", LOW, TOP, WeightedSum, "attach to blocks.0.feed_forward itself"),
        ("*.attention_norm", LOW, TOP, WeightedSum, "width="),
        ("*.w_out", LOW, routed("top_k", M + 1, 2), WeightedSum, "4 modules of the bank"),
        ("*.attention.w_out", LOW, TOP, Stacked, "read the frozen output"),
        ("*.attention.w_out", LOW, TOP, Mean, "would not be trained"),
        (
            "*.attention.w_out",
            LOW,
            routed("top_k", M, 2, per="sequence"),
            Gated,
            "would not be trained",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_attached(
    pattern: str, bank: object, router: object, aggregation: object, word: str
) -> None:
    model = transformer("model.moe_every=0")
    with pytest.raises(ConfigError, match=re.escape(word)):
        attach(model, pattern, bank, router, aggregation)  # type: ignore[arg-type]
    assert adapter_layers(model) == {}


def test_a_target_takes_one_bank() -> None:
    model = mlp()
    attach(model, "0", LOW, TOP)
    with pytest.raises(ConfigError, match="has modules already"):
        attach(model, "[02]", partial(Scale, M), TOP)
    assert list(adapter_layers(model)) == ["0"]


def test_balance_losses_of_the_modules_are_those_of_the_layer() -> None:
    """E * sum f_e P_e of the latest routing, and the gradient reaches the router."""
    model = mlp()
    layer = attach(model, "0", LOW, TOP)["0"]
    randomize(model)
    model(drawn(12, D))
    loss = module_losses(model, BalanceConfig(switch=0.01, z=0.0))["0"]["switch"]
    share_E = (
        torch.bincount(layer.last_routing.expert_TK.flatten(), minlength=M)
        / layer.last_routing.expert_TK.numel()
    )
    torch.testing.assert_close(
        loss, (M * share_E * layer.last_routing.score_TE.mean(0)).sum(), check_dtype=False
    )
    loss.backward()
    assert layer.router.weight.grad.any()


@pytest.mark.parametrize(
    "router",
    [TOP, table([[0], [1, 2]], M), constant(0.1, 0.2, 0.3, 0.4)],
    ids=["top_k", "table", "constant"],
)
@pytest.mark.parametrize(
    "bank",
    [LOW, partial(SparseDelta, M, density=0.2, mask="magnitude")],
    ids=["low_rank", "magnitude"],
)
def test_modules_on_the_meta_device_are_initialized_with_the_weights(
    bank: object, router: object
) -> None:
    """Tables and positions are buffers, which must be restored after `to_empty` like weights."""
    direct, late = mlp(), mlp()
    attach(direct, "[02]", bank, router, seed=4)  # type: ignore[arg-type]
    core = {name: value.clone() for name, value in late.state_dict().items()}
    late.to("meta")
    attach(late, "[02]", bank, router)  # type: ignore[arg-type]
    late.to_empty(device="cpu")
    late.load_state_dict(core, strict=False)
    initialize(late, 4)
    expected = direct.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in late.state_dict().items())
