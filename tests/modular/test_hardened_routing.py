"""Regressions of routing to modules and aggregation: zero rows, labels, left padding, growing."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from dmoe.config.errors import ConfigError
from dmoe.modular import (
    AGGREGATIONS,
    Adapter,
    LoRA,
    Prompt,
    SparseDelta,
    adapter_context,
    adapter_layers,
    add_modules,
    attach,
    constant,
    load_modules,
    routed,
    save_modules,
    table,
)
from dmoe.modular.aggregation.fixed import sequence_weights
from dmoe.modular.aggregation.learned import attention_weights
from dmoe.modular.routing import TableRouter
from dmoe.modular.routing.learned import sequence_context, sequence_mean
from dmoe.moe.routing import DispatchPlan, TokenContext
from tests.modular.nets import D, M, O, drawn, mlp

LOW, TOP = partial(LoRA, M, rank=2), routed("top_k", M, 2)


def test_growing_is_all_or_nothing_and_can_be_done_twice() -> None:
    """A router refused after others had grown, whose banks then lacked a module."""
    model = mlp()
    attach(model, "0", LOW, TOP)
    attach(model, "2", LOW, routed("hash", M, 1))
    with pytest.raises(ConfigError, match="HashRouter"):
        add_modules(model)
    assert adapter_layers(model)["0"].router.num_experts == M
    model, once = mlp(), mlp()
    for net in (model, once):
        attach(
            net, "[02]", partial(SparseDelta, M, density=0.3), routed("soft", M, M, per="sequence")
        )
    add_modules(model)
    assert list(add_modules(model)) == [M + 1]
    add_modules(once, 2)
    for name, value in model.state_dict().items():
        assert torch.equal(value, once.state_dict()[name]), name
    assert model(drawn(2, 3, D)).shape == (2, 3, O)


def test_a_loaded_table_keeps_its_rows_when_one_is_added(tmp_path: Path) -> None:
    """Loading changes only the buffer: a new row restored the rows from before the load."""
    model, other = mlp(), mlp()
    attach(model, "0", LOW, table([[3], [2]], M))
    attach(other, "0", LOW, table([[0], [1]], M))
    save_modules(model, tmp_path / "m")
    load_modules(other, tmp_path / "m")
    router = adapter_layers(other)["0"].router
    assert isinstance(router, TableRouter)
    router.add_row([1])
    assert router.module_LK.tolist() == [[3], [2], [1]]


def test_a_negative_label_is_refused() -> None:
    """-1 selected the last row. Padding may have any label, since its row is not used."""
    router = table([[0], [1]], M)(D, 0)
    with pytest.raises(IndexError):
        router(drawn(2, D), TokenContext(label_T=torch.tensor([0, -1])))
    padded = TokenContext(label_T=torch.tensor([1, -100]), valid_T=torch.tensor([True, False]))
    assert router(drawn(2, D), padded).selected_TK.tolist() == [[True], [False]]
    by_task = routed("top_k", M, 2, per="task", labels=2)(D, 0)
    by_task.initialize(0, 0, 1.0)
    assert by_task(drawn(2, D), padded).selected_TK.tolist() == [[True, True], [False, False]]


def test_left_padding_is_not_the_first_token() -> None:
    """Batches for generation are padded on the left, so the first token was padding."""
    x, valid = drawn(8, D), torch.tensor([False, False, True, True, True, True, False, False])
    assert torch.equal(sequence_mean(x, valid, 2, first=1), x[[2, 4]])
    context = TokenContext(label_T=torch.tensor([-1, -1, 3, 3, 5, 5, -1, -1]), valid_T=valid)
    assert sequence_context(context, 2).label_T.tolist() == [3, 5]


def test_a_choice_without_a_prior_does_not_change_the_others() -> None:
    """It had the largest score, so the others' weights underflowed in float32."""
    score, prior = torch.tensor([[0.0, 80.0, 1.0]]), torch.tensor([[1.0, 0.0, 1.0]])
    got = attention_weights(score, prior, torch.ones(1, 3, dtype=torch.bool))
    e = 1 / (1 + torch.tensor(1.0).exp())
    torch.testing.assert_close(got, torch.tensor([[float(e), 0.0, 1 - float(e)]]))


@pytest.mark.parametrize("aggregation", sorted(AGGREGATIONS))
@pytest.mark.parametrize("bank", ["adapter", "prompt"])
def test_no_sequences_at_all(aggregation: str, bank: str) -> None:
    """A rank may have no rows in a step; -1 in a shape is undefined for zero rows."""
    if bank == "prompt" and aggregation == "stacked":
        pytest.skip("stacking needs modules that read and write one width")
    model = mlp()
    made = partial(Adapter, M) if bank == "adapter" else partial(Prompt, M, length=2)
    router = (
        constant(*[0.25] * M)
        if aggregation in ("mean", "gated")
        else routed("top_k", M, 2, per="sequence")
    )
    attach(model, "0", made, router, AGGREGATIONS[aggregation])
    x = torch.zeros(0, 5, D, dtype=torch.float64)
    y = model(x)
    assert y.shape == (0, 5, O)
    y.sum().backward()
    for context in (
        None,
        TokenContext(
            valid_T=torch.zeros(0, dtype=torch.bool), label_T=torch.zeros(0, dtype=torch.int64)
        ),
    ):
        with adapter_context(model, context):
            assert model(x).shape == (0, 5, O)


def test_the_mean_of_weights_is_over_the_tokens_that_were_routed() -> None:
    """Against numbers computed by hand: the reference calls the same function."""
    expert = torch.tensor([[0], [2], [2], [1]])
    weight = torch.tensor([[0.5], [1.0], [0.25], [7.0]], dtype=torch.float64)
    keep = torch.tensor([[True], [True], [True], [False]])
    got = sequence_weights(DispatchPlan(expert, weight, keep, num_experts=3), 2)
    assert got.tolist() == [[0.25, 0.0, 0.5], [0.0, 0.0, 0.25]]
