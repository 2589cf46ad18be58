"""`dmoe verify` on code of the user's own: against its reference, which finds a wrong one, or without."""

from __future__ import annotations

from pathlib import Path

import pytest

from dmoe.config.load import load
from dmoe.config.schema import Config
from dmoe.verify.verify import verify
from tests.verify.test_verify import SHORT, lines

pytestmark = pytest.mark.ranks

EXAMPLE = Path(__file__).parents[2] / "examples" / "nearest_router.py"
KINDS = Path(__file__).parents[1] / "own_kinds.py"
MEAN = ("x_TD[:, None] - self", "x_TD[:, None] + x_TD.mean(0) - self")


def config(*overrides: str) -> Config:
    return load(None, [*SHORT, *overrides])


def test_every_kind_of_ones_own_is_verified_against_its_reference() -> None:
    """About 20 s."""
    report = verify(
        config(
            *(f"moe.router.kind={EXAMPLE}:Nearest", "moe.router.options.power=2"),
            *("moe.balance.bias=0.01", "moe.capacity.factor=1.0", "moe.experts.shared=1"),
            *(f"moe.experts.kind={KINDS}:Squared", f"optim.kind={KINDS}:Lion", "optim.lr=0.001"),
            *(f"moe.balance.kind={KINDS}:Entropy", "moe.balance.own=0.05"),
            *(f"optim.schedule={KINDS}:Sawtooth", "optim.schedule_options.period=3"),
        ),
        worlds=[2],
    )
    assert report.ok, lines(report)
    assert not [field for field in report.refused if field.startswith(("moe.", "optim."))]


def test_a_router_without_reference_is_compared_with_one_process_and_that_is_said() -> None:
    data = (f"data.source={KINDS}:Squares", "data.source_options.count=9")
    report = verify(config(f"moe.router.kind={KINDS}:Position", *data), worlds=[2])
    assert report.ok, lines(report)
    assert "own_kinds.py:Position has no reference" in report.refused["moe.router.kind"]


@pytest.mark.parametrize(
    ("right", "wrong", "quantity"),
    [
        ("self.power / 2)", "self.power / 2) * 1.001", "router scores"),
        (MEAN[0], MEAN[1], "router scores"),
    ],
    ids=["another formula than the reference", "a mean over the tokens of a rank"],
)
def test_a_wrong_router_is_found(tmp_path: Path, right: str, wrong: str, quantity: str) -> None:
    source = EXAMPLE.read_text()
    assert right in source
    (tmp_path / "wrong.py").write_text(source.replace(right, wrong))
    report = verify(config(f"moe.router.kind={tmp_path / 'wrong.py'}:Nearest"), worlds=[2])
    assert report.first is not None
    assert report.first.quantity == quantity, lines(report)


def test_a_router_that_mixes_tokens_is_found_without_a_reference(tmp_path: Path) -> None:
    """One process sees all tokens, a rank its own: a mean over them differs."""
    source = EXAMPLE.read_text().replace("def reference", "def unused")
    source = source.replace(*MEAN)
    (tmp_path / "mixing.py").write_text(source)
    report = verify(config(f"moe.router.kind={tmp_path / 'mixing.py'}:Nearest"), worlds=[2])
    assert report.first is not None
    assert report.first.quantity == "router scores", lines(report)


def test_muon_own_groups_and_a_frozen_router_at_every_ep_and_mode() -> None:
    """The truth has the singular values of every expert's matrix; about 30 s."""
    groups = "optim.groups={'*.attention.*': {lr: 0.001}, '*.experts.*': {weight_decay: 0.3}}"
    report = verify(
        config(
            *("optim.kind=muon", "model.kv_heads=2", groups, "optim.schedule=inverse_sqrt"),
            "moe.router.freeze=true",
        ),
        worlds=[4],
    )
    assert report.ok, lines(report)
