"""Second derivatives and torch.func's transforms: right, or refused in one sentence."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import dmoe
from dmoe.config.errors import ConfigError
from dmoe.config.schema import BalanceConfig, CapacityConfig, ExpertsConfig
from dmoe.models.attention import apply_rotary, rotary_table
from dmoe.models.cross_entropy import linear_token_losses
from dmoe.models.layers import RMSNorm
from dmoe.moe.experts import FeedForward
from dmoe.moe.experts.activation import swiglu
from dmoe.moe.routers.projection import project, renormalized_softmax
from tests.moe.layers import DIM, close, make, tokens_of

RIGHT = {"_Rotate", "RowProduct", "_RenormalizedSoftmax"}
"""Functions whose backward can be differentiated: `gradgradcheck` below."""


def backwards() -> dict[str, bool]:
    """Every class of the product derived from `Function`, and whether its backward refuses."""
    found = {}
    for path in Path(dmoe.__file__).parent.rglob("*.py"):
        text = path.read_text()
        if "(Function)" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef) and "Function" in map(ast.unparse, node.bases):
                methods = {m.name: m for m in node.body if isinstance(m, ast.FunctionDef)}
                decorators = [ast.unparse(d) for d in methods["backward"].decorator_list]
                found[node.name] = "first_derivative_only" in decorators
    return found


def test_every_function_says_what_its_second_derivative_is() -> None:
    """An exchange sent a gradient without its graph: a second derivative through it was zero."""
    found = backwards()
    assert len(found) > 15
    assert {name for name, refuses in found.items() if not refuses} == RIGHT


def test_second_derivatives_that_are_right() -> None:
    logit_TE = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    expert_TK = logit_TE.topk(2).indices

    def weights(logit_TE: Tensor) -> Tensor:
        return renormalized_softmax(logit_TE, logit_TE.softmax(-1), expert_TK)[0]

    assert torch.autograd.gradgradcheck(weights, (logit_TE,))
    weight_ED = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(project, (logit_TE, weight_ED))
    rotary = rotary_table(3, 4, 100.0, torch.float64, torch.device("cpu"))
    x_BSHA = torch.randn(1, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: apply_rotary(x, rotary).square(), (x_BSHA,))


def _losses(x_TD: Tensor) -> Tensor:
    weight_VD = torch.ones(5, DIM, dtype=torch.float64)
    target_BS = torch.arange(len(x_TD)).unsqueeze(0) % 5
    return linear_token_losses(x_TD.unsqueeze(0), weight_VD, target_BS, False).loss_sum


PADDED: dict[str, Any] = {"capacity": CapacityConfig(factor=1.0), "exchange": "padded"}
REFUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "packed": lambda x: make()(x).y.sum(),
    "padded": lambda x: make(**PADDED)(x).y.sum(),
    "shapes": lambda x: make(experts=ExpertsConfig(shapes=[[4], [], [3, 3], [2], [4]]))(x).y.sum(),
    "losses": lambda x: make(balance=BalanceConfig(switch=0.1, z=0.1))(x).aux["z"],
    "dense": lambda x: FeedForward("swiglu", DIM, 4, DIM).double()(x).sum(),
    "activation": lambda x: swiglu(x).sum(),
    "norm": lambda x: RMSNorm(DIM, 1e-6).double()(x).sum(),
    "cross-entropy": _losses,
}


@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused(name: str) -> None:
    """The gradient of a sum has no graph, so `once_differentiable` lets it pass: a penalty on the
    gradient was a constant, and that of RMSNorm wrong. torch said "mul(): functions with out=..."
    of the experts."""
    x = tokens_of(4)
    assert torch.autograd.grad(REFUSED[name](x), x)[0].isfinite().all()
    with pytest.raises(ConfigError, match=r"create_graph=True: .* no second derivative; call"):
        torch.autograd.grad(REFUSED[name](x), x, create_graph=True)


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], object]] = {
    "vmap": lambda layer, x: torch.vmap(layer)(x.unsqueeze(0)),
    "grad": lambda layer, x: torch.func.grad(lambda x: layer(x).sum())(x),
    "jvp": lambda layer, x: torch.func.jvp(layer, (x,), (x,)),
    "jacrev": lambda layer, x: torch.func.jacrev(layer)(x),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("grad", [False, True])
def test_transforms_are_refused(name: str, grad: bool) -> None:
    """torch asked for a `setup_context` of a class that no user has heard of."""
    layer, x = make(), tokens_of(4).detach()
    with (
        torch.set_grad_enabled(grad),
        pytest.raises(ConfigError, match=r"torch.func=.*: cannot transform a MoE layer"),
    ):
        TRANSFORMS[name](lambda x: layer(x).y, x)


@pytest.mark.parametrize("grad", [False, True])
def test_forward_mode_is_refused(grad: bool) -> None:
    layer, x = make(), tokens_of(4).detach()
    with (
        torch.set_grad_enabled(grad),
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="forward mode AD"),
    ):
        layer(forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.parametrize("shapes", [[], [[4], [], [3, 3], [2], [4]]])
def test_a_layer_takes_weights_of_a_call(shapes: list[list[int]]) -> None:
    """`functional_call` with tensors that are no parameters: experts of different shapes raised
    "`w0` is not an nn.Parameter"."""
    layer = make(experts=ExpertsConfig(**({"shapes": shapes} if shapes else {})))
    x = tokens_of(4)
    others = {name: p.detach() * 0.5 for name, p in layer.named_parameters()}
    for other in others.values():
        other.requires_grad_()
    found = torch.func.functional_call(layer, others, (x,)).y
    found.square().sum().backward()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(others[name])
    expected = layer(x).y
    close(found, expected)
    expected.square().sum().backward()
    for name, parameter in layer.named_parameters():
        close(others[name].grad, parameter.grad)
