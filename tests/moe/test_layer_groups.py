"""Virtual ranks and sequences: one call over several groups is several calls."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dmoe.config.schema import BalanceConfig, CapacityConfig
from dmoe.moe.layer import MoEOutput
from dmoe.moe.routing import TokenContext
from tests.moe.layers import close, gradients, make, objective, tokens_of

RANKS = 3
LIMITS = CapacityConfig(factor=0.7)


def objective_of_all(shares: list[MoEOutput]) -> torch.Tensor:
    """`objective` of the whole batch: it is a sum over tokens and over shares."""
    whole = torch.cat([share.y for share in shares])
    return objective(
        replace(
            shares[0],
            y=whole,
            aux={name: sum(share.aux[name] for share in shares) for name in shares[0].aux},
        )
    )


def separate(
    x: torch.Tensor, context: TokenContext, **options: object
) -> tuple[list[MoEOutput], dict[str, torch.Tensor]]:
    """The batch in RANKS calls, gradients summed; the share of each call's loss is 1/RANKS."""
    layer = make(**options)  # type: ignore[arg-type]
    outputs = []
    for part in range(RANKS):
        piece = x.detach()[2 * part : 2 * part + 2].clone().requires_grad_()
        valid_T = None if context.valid_T is None else context.valid_T.view(RANKS, -1)[part]
        output = layer(piece, replace(context, valid_T=valid_T))
        outputs.append(
            replace(output, aux={name: value / RANKS for name, value in output.aux.items()})
        )
    objective_of_all(outputs).backward()
    total = {name: parameter.grad for name, parameter in layer.named_parameters()}
    assert all(gradient is not None for gradient in total.values())
    return outputs, total  # type: ignore[return-value]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("exchange", ["packed", "padded"])
@pytest.mark.parametrize("level", ["micro_batch", "sequence"])
def test_virtual_ranks_equal_separate_calls(masked: bool, exchange: str, level: str) -> None:
    x = tokens_of(2 * RANKS, 5)
    context = (
        TokenContext(valid_T=torch.arange(2 * RANKS * 5) % 7 != 3) if masked else TokenContext()
    )
    options = {
        "capacity": LIMITS,
        "exchange": exchange,
        "balance": BalanceConfig(switch_level=level),
    }  # type: ignore[arg-type]
    together, gradient = gradients(make(virtual_ranks=RANKS, **options), x, context)
    apart, gradient_apart = separate(x, context, **options)

    assert torch.equal(together.plan.keep_TK, torch.cat([output.plan.keep_TK for output in apart]))  # type: ignore[arg-type, misc]
    assert not bool(together.plan.keep_TK.all())  # type: ignore[union-attr]
    close(together.y, torch.cat([output.y for output in apart]))
    for name, value in together.aux.items():
        close(value, sum(output.aux[name] for output in apart))
    close(together.stats.as_vector(), sum(output.stats.as_vector() for output in apart))
    close({name: value for name, value in gradient.items() if name != "x"}, gradient_apart)


def test_virtual_ranks_change_the_drops() -> None:
    """Otherwise the test above proves nothing."""
    x = tokens_of(2 * RANKS, 5)
    one, many = (make(capacity=LIMITS, virtual_ranks=ranks)(x) for ranks in (1, RANKS))
    assert not torch.equal(one.plan.keep_TK, many.plan.keep_TK)


@pytest.mark.parametrize("virtual_ranks", [1, 2, 4])
def test_sequence_drops_do_not_depend_on_the_ranks(virtual_ranks: int) -> None:
    x = tokens_of(4, 9)
    limits = CapacityConfig(factor=0.6, group="sequence")
    whole = make(capacity=limits, virtual_ranks=virtual_ranks)(x)
    each = [make(capacity=limits)(sequence.unsqueeze(0)) for sequence in x]
    assert torch.equal(whole.plan.keep_TK, torch.cat([output.plan.keep_TK for output in each]))
    close(whole.y, torch.cat([output.y for output in each]))
