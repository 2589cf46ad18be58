"""Other libraries compute the layer's outputs and gradients, or are named as left out."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from dmoe.bench.contender import CannotCompare
from dmoe.bench.layer import DTYPES, difference, ours
from dmoe.bench.libraries import LIBRARIES, OVER_RANKS
from dmoe.bench.more_libraries import _group_size
from dmoe.moe.layer import MoE
from tests.cli.commands import dmoe, run_in_process

MODULES = {"st-moe": "st_moe_pytorch", "deepspeed-autoep": "deepspeed"}
TINY = ("--tokens", "64", "--dim", "16", "--hidden", "16", "--experts", "4", "--rounds", "1")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", LIBRARIES)
def test_a_library_computes_the_same_layer(name: str, dtype: str) -> None:
    """Output, gradient of the input and of all weights; skipped where it is not installed."""
    pytest.importorskip(MODULES.get(name, name), exc_type=ImportError)
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(1, 96, 32, generator=generator).to(DTYPES[dtype]) for _ in range(2))
    layer = MoE(32, 24, 8, 3).to(DTYPES[dtype])
    try:
        theirs = LIBRARIES[name](layer, x, grad).results()
    except CannotCompare as error:
        pytest.skip(f"{name} {error}")
    assert theirs.keys() == {"y", "x", "router", "in", "out"}
    difference(ours(layer, x, grad).results(), theirs, dtype)
    theirs["x"] = theirs["x"].roll(1, dims=1)
    with pytest.raises(SystemExit, match="do not compute the same"):
        difference(ours(layer, x, grad).results(), theirs, dtype)


def test_libraries_that_are_not_installed_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the output, not on stderr alone; `--libraries` chooses among them."""
    for name in ("transformers", "deepspeed.moe.layer", "torchtitan.models.common.moe"):
        monkeypatch.setitem(sys.modules, name, None)
    chosen = ("--libraries", "transformers,deepspeed,torchtitan")
    more = ("--dtype", "fp32", "--no-counts")
    found = run_in_process("bench", "layer", *TINY, *chosen, *more, cwd=tmp_path)
    assert "peak_mb" not in found.stdout
    line = next(text for text in found.stdout.splitlines() if text.startswith("left_out: "))
    for name in ("transformers", "deepspeed", "torchtitan"):
        assert f"{name} is not installed (" in line
    assert "st-moe" not in line
    none = run_in_process("bench", "layer", *TINY, "--workload", "W2", "--json", cwd=tmp_path)
    assert json.loads(none.stdout)["left_out"].startswith("all libraries: they choose")


@pytest.mark.parametrize("command", ["layer", "exchange"])
def test_an_unknown_library(command: str, tmp_path: Path) -> None:
    wrong = dmoe("bench", command, "--libraries", "transformers,fastmoe", cwd=tmp_path)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    known = ", ".join(LIBRARIES if command == "layer" else OVER_RANKS)
    says = f"--libraries=transformers,fastmoe: must be names out of {known}, separated by commas"
    assert says in wrong.stderr


def test_the_groups_of_tokens_are_as_few_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 tokens of 2 experts: the first half chooses 0 and 1, the second 2 and 3."""
    expert_TK = torch.tensor([[0, 1]] * 4 + [[2, 3]] * 4)
    assert _group_size(expert_TK, 4) == (8, 4)
    monkeypatch.setattr("dmoe.bench.more_libraries.GROUP_BYTES", 0)
    assert _group_size(expert_TK, 4) == (1, 4)
    assert _group_size(torch.zeros(12, 1, dtype=torch.int64), 4) == (3, 4)
