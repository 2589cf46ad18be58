"""Banks: the grouped computation against one row at a time; sharding, adding, initialization."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dmoe.config.errors import ConfigError
from dmoe.modular import BANKS, Adapter, LoRA, Prompt, SparseDelta
from tests.modular.nets import D, M, O, banks, drawn
from tests.references.modular import bank_reference

KINDS = sorted(banks())
NEUTRAL = ["adapter", "low_rank", "parallel_adapter", "scale", "sparse_delta"]


def rows_of(kind: str, count: int, seed: int = 0) -> Tensor:
    bank = banks()[kind]
    return (
        torch.ones(count, 1, dtype=torch.float64)
        if bank.input_kind == "sequence"
        else drawn(count, bank.row_dim, seed=seed)
    )


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None)
@given(counts=st.lists(st.integers(0, 4), min_size=M, max_size=M))
def test_a_bank_equals_one_row_at_a_time(kind: str, counts: list[int]) -> None:
    results = []
    for fast in (True, False):
        bank = banks()[kind]
        rows = rows_of(kind, sum(counts)).requires_grad_()
        tokens_per_module = torch.tensor(counts)
        out = (
            bank(rows, tokens_per_module) if fast else bank_reference(bank, rows, tokens_per_module)
        )
        (out.sin().sum() + 0 * sum(p.sum() for p in bank.parameters()) + 0 * rows.sum()).backward()
        results.append([out, rows.grad, *(p.grad for p in bank.parameters())])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_groups_may_be_one_number_and_empty_slots_stay_zero(kind: str) -> None:
    bank, rows = banks()[kind], rows_of(kind, 3 * M)
    rows[2::3] = 0.0
    torch.testing.assert_close(bank(rows, 3), bank(rows, torch.full((M,), 3)))
    assert not bank(rows, 3)[2::3].any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_without_rows_has_a_zero_gradient(kind: str) -> None:
    """Zero, not None: the sum over a module's replicas is a collective that every rank enters."""
    bank = banks()[kind]
    bank(rows_of(kind, 3), torch.tensor([3, 0, 0, 0])).sum().backward()
    for parameter in bank.parameters():
        assert parameter.grad is not None
        assert not parameter.grad[1:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_computes_what_the_whole_bank_computes(kind: str) -> None:
    whole, part, counts = banks()[kind], banks()[kind], torch.tensor([2, 1, 3, 2])
    rows = rows_of(kind, 8)
    part.shard(2, 2)
    assert (part.first, part.local_modules, part.num_modules, part.holds_all_modules) == (
        2,
        2,
        M,
        False,
    )
    torch.testing.assert_close(part(rows[3:], counts[2:]), whole(rows, counts)[3:], rtol=0, atol=0)


@pytest.mark.parametrize("kind", sorted(BANKS))
def test_initial_weights_depend_on_the_module_id_only(kind: str) -> None:
    """The same weights in a bank of any size, on any rank, and added later."""
    large, small = BANKS[kind](6, D, O), BANKS[kind](4, D, O)
    for bank in (large, small):
        bank.initialize(11, 2)
    before = {name: value.detach().clone() for name, value in small.stacked_tensors().items()}
    assert small.add_modules(2) == range(4, 6)
    for name, value in small.stacked_tensors().items():
        assert torch.equal(value[:4], before[name])
        assert torch.equal(value, large.stacked_tensors()[name])
    part = BANKS[kind](6, D, O)
    part.shard(3, 2)
    part.initialize(11, 2)
    for name, value in part.stacked_tensors().items():
        assert torch.equal(value, large.stacked_tensors()[name][3:5])


@pytest.mark.parametrize("kind", NEUTRAL)
def test_a_new_module_changes_nothing(kind: str) -> None:
    bank = banks()[kind]
    bank.initialize(0, 0)
    assert not bank(rows_of(kind, 8), 2).any()


@pytest.mark.parametrize("kind", KINDS)
def test_averaged_parameters_are_those_of_one_module_with_the_sum(kind: str) -> None:
    """Weight 1 gives that module; mixtures equal a bank that holds the weighted sums."""
    bank, rows = banks()[kind], rows_of(kind, 6)
    alone_BM = torch.eye(M, dtype=torch.float64)[[2, 0]]
    expected = torch.cat([reference_of(bank, rows[:3], 2), reference_of(bank, rows[3:], 0)])
    torch.testing.assert_close(bank.forward_averaged(alone_BM, rows, 3), expected)
    mixed_BM = torch.tensor([[0.5, -1.0, 2.0, 0.25]], dtype=torch.float64)
    filled = banks()[kind]
    if isinstance(bank, SparseDelta):
        expected = rows @ sum(w * bank.weight_delta(m) for m, w in enumerate(mixed_BM[0].tolist()))
    else:
        with torch.no_grad():
            for name, value in filled.named_parameters():
                value[0] = sum(
                    w * bank.get_parameter(name)[m] for m, w in enumerate(mixed_BM[0].tolist())
                )
        expected = reference_of(filled, rows, 0)
    torch.testing.assert_close(bank.forward_averaged(mixed_BM, rows, 6), expected)


def reference_of(bank: nn.Module, rows: Tensor, module: int) -> Tensor:
    return torch.stack([bank.reference(row, module) for row in rows])


def test_magnitude_positions_are_those_of_the_largest_frozen_weights() -> None:
    frozen = nn.Linear(D, O).double()
    bank = SparseDelta(M, D, O, density=0.2, mask="magnitude")
    bank.bind(frozen)
    chosen = {(int(i) // O, int(i) % O) for i in bank.index[1]}
    ranked = sorted(
        ((d, o) for d in range(D) for o in range(O)),
        key=lambda place: -abs(float(frozen.weight.detach()[place[1], place[0]])),
    )
    assert chosen == set(ranked[: len(chosen)])
    assert len(chosen) == 6


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: LoRA(0, D, O), "modules"),
        (lambda: LoRA(2, D, O, rank=0), "rank"),
        (lambda: Adapter(2, D, O, activation="swiglu"), "activation"),
        (lambda: Adapter(2, D, O, input_kind="sequence"), "input_kind"),
        (lambda: SparseDelta(2, D, O, density=0.0), "density"),
        (lambda: SparseDelta(2, D, O, mask="lottery"), "mask"),
        (lambda: SparseDelta(2, D, O, mask="magnitude").bind(nn.ReLU()), "magnitude"),
        (lambda: Prompt(2, D, O, length=0), "length"),
        (lambda: Prompt(2, D, O, columns=(3, O + 1)), "columns"),
        (lambda: Adapter(2, D, O).weight_delta(0), "adds no matrix"),
    ],
)
def test_invalid_settings_are_refused(make: object, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        make()  # type: ignore[operator]
