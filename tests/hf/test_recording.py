"""What a moefied model notes of a forward, however transformers' users call it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dmoe
from dmoe.config.schema import BalanceConfig, CapacityConfig
from dmoe.hf import auxiliary_loss, forward_of, moefied_layers
from tests.hf.families import tiny

BALANCE = BalanceConfig(switch=0.1, z=0.01)


def ids(sequences: int = 4, length: int = 16) -> Tensor:
    return torch.randint(3, 97, (sequences, length), generator=torch.Generator().manual_seed(1))


def first_positions(count: int) -> Tensor:
    """Return a mask of the first positions of each sequence."""
    return (torch.arange(16) < count).long().expand(4, 16)


def model_of(family: str = "mixtral", **more: Any) -> Any:
    return dmoe.moefy(tiny(family), **{"balance": BALANCE, **more})


def counted(model: nn.Module) -> int:
    """Return the tokens that the last layer has counted."""
    return int(forward_of(model).layers[-1].stats.choice_E.sum()) // 2


def test_a_mask_without_its_name_is_a_mask() -> None:
    """`model(ids, mask)` routed the padding and counted it: only the keyword was read."""
    model = model_of()
    model(ids(), first_positions(8))
    assert counted(model) == 4 * 8


def test_a_tuple_has_the_loss_of_the_object() -> None:
    """With `return_dict=False` the auxiliary losses were left out of it without a word."""
    model = model_of()
    expected = model(input_ids=ids(), labels=ids()).loss
    loss = model(input_ids=ids(), labels=ids(), return_dict=False)[0]
    assert torch.equal(loss, expected)
    assert float((loss - model.eval()(input_ids=ids(), labels=ids()).loss).detach()) > 0.1


def test_the_base_model_alone_is_a_forward_too() -> None:
    """A trainer with a loss of its own calls `model.model`.

    Layers then were added to the last forward: memory grew with its graph, the auxiliary loss was
    that of all forwards so far, and padding was routed.
    """
    model = model_of()
    model(input_ids=ids(), attention_mask=first_positions(8))
    expected = auxiliary_loss(model)
    for _ in range(3):
        model.model(input_ids=ids(), attention_mask=first_positions(8))
    assert len(forward_of(model).layers) == 2
    assert counted(model) == 4 * 8
    assert torch.equal(auxiliary_loss(model), expected)
    block = moefied_layers(model)[1]
    for _ in range(3):
        block(torch.randn(1, 5, 32, dtype=torch.float64))
    assert len(forward_of(model).layers) == 2
    assert counted(model) == 5


def test_accumulated_forwards_have_the_auxiliary_losses_once() -> None:
    """With `num_items_in_batch` HF Trainer does not divide by the number of forwards: the auxiliary
    losses counted once per forward, four times in a step of four.
    """
    model, items = model_of(balance=BalanceConfig(switch=0, z=1.0)), ids()[:, 1:].numel()
    expected = model(input_ids=ids(), labels=ids(), num_items_in_batch=items).loss
    parts = [model(input_ids=i, labels=i, num_items_in_batch=items).loss for i in ids().split(1)]
    torch.testing.assert_close(sum(parts), expected)


def test_a_copy_after_a_forward_is_a_copy() -> None:
    """As a reference model or an average of weights is made; it raised, because of the graph."""
    model = model_of()
    loss = model(input_ids=ids(), labels=ids()).loss
    other = copy.deepcopy(model)
    assert not forward_of(other).layers
    again = other(input_ids=ids(), labels=ids()).loss
    again.backward()
    assert torch.equal(again, loss)
    assert all(parameter.grad is None for parameter in model.parameters())


def padded_by(count: int) -> Callable[[Any], Tensor]:
    def loss(model: Any) -> Tensor:
        mask = first_positions(count)
        labels = ids().masked_fill(mask == 0, -100)
        output = model(input_ids=ids(), attention_mask=mask, labels=labels, use_cache=False)
        found: Tensor = output.loss
        return found

    return loss


def evaluated(model: Any) -> Tensor:
    with torch.no_grad():
        model(input_ids=ids().view(8, 8), use_cache=False)
    return torch.zeros(())


@pytest.mark.parametrize(
    ("first", "second"),
    [(padded_by(8), padded_by(12)), (padded_by(16), evaluated), (padded_by(8), evaluated)],
)
def test_recomputation_after_another_forward_is_that_of_its_own(
    first: Callable[[Any], Tensor], second: Callable[[Any], Tensor]
) -> None:
    """Two losses with one backward, or an evaluation before it, as in preference training.

    The layers recomputed with the padding and the sequences of the latest forward.
    """
    gradients = []
    for recompute in (False, True):
        model = model_of(capacity=CapacityConfig(factor=0.75, group="sequence"))
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        (first(model) + second(model)).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name


def test_a_bias_is_moved_where_there_is_one() -> None:
    """DeepSeek-V4 chooses by token id in its first layers, and was refused for these."""
    model = model_of("deepseek_v4", balance=BalanceConfig(switch=0, z=0, bias=0.5))
    table, learned = moefied_layers(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(input_ids=ids(), labels=ids(), use_cache=False).loss.backward()
    for layer in (table, learned):
        layer.update_bias()
    moved = [n for n, value in model.state_dict().items() if not torch.equal(value, before[n])]
    assert moved == ["model.layers.1.mlp.gate.e_score_correction_bias"]
