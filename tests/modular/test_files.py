"""Module files: round trip, refusals, and that a refusal changes nothing."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from dmoe.config.errors import CheckpointError
from dmoe.modular import (
    Adapter,
    LoRA,
    SparseDelta,
    adapter_layers,
    attach,
    base_model_hash,
    inspect_modules,
    load_modules,
    routed,
    save_modules,
    table,
)
from dmoe.modular.aggregation import Attention
from dmoe.modular.files import module_state
from tests.modular.nets import M, drawn, mlp, randomize

TABLE = table([[0], [1, 2]], M)


def attached(
    bank: object = None, seed: int = 0, places: str = "[02]", router: object = None
) -> nn.Module:
    model = mlp()
    attach(
        model,
        places,
        bank or partial(LoRA, M, rank=2),
        router or routed("top_k", M, 2),
        Attention,
        seed=seed,
    )  # type: ignore[arg-type]
    return model


def test_a_round_trip_keeps_every_bit(tmp_path: Path) -> None:
    for bank in (partial(LoRA, M, rank=2), partial(SparseDelta, M, density=0.2)):
        one, other = attached(bank), attached(bank, seed=9)
        randomize(one)
        save_modules(one, tmp_path / "modules.safetensors")
        load_modules(other, tmp_path / "modules.safetensors")
        x = drawn(5, 6)
        assert torch.equal(one(x), other(x))
        assert all(
            torch.equal(value, module_state(other)[name])
            for name, value in module_state(one).items()
        )
        assert list(tmp_path.iterdir()) == [tmp_path / "modules.safetensors"]


def test_a_file_is_listed_without_a_model(tmp_path: Path) -> None:
    model = attached(router=TABLE)
    save_modules(model, tmp_path / "m")
    saved = inspect_modules(tmp_path / "m")
    assert saved.base_model == base_model_hash(model)
    assert saved.targets["0"] == {
        "bank": "LoRA",
        "router": "TableRouter",
        "aggregation": "Attention",
        "modules": M,
        "parameters": sum(p.numel() for p in adapter_layers(model)["0"].experts.parameters()),
    }
    with safe_open(tmp_path / "m", framework="pt") as file:
        assert all(".modular." in name for name in file.keys())  # noqa: SIM118 (not a dict)


def other_core(tmp_path: Path) -> nn.Module:
    model = attached()
    with torch.no_grad():
        model[0].bias[0] += 1e-9
    return model


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (other_core, "belongs to another base model"),
        (lambda _: attached(places="0"), "has modules at 0, 2, the model at 0"),
        (lambda _: attached(partial(Adapter, M)), "LoRA"),
        (lambda _: attached(router=TABLE), "TopKRouter"),
        (lambda _: attached(partial(LoRA, M, rank=3)), r"\[4, 6, 2\] in the file"),
        (lambda _: mlp(), "no target"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(
    make: object, word: str, tmp_path: Path
) -> None:
    model = attached()
    randomize(model)
    save_modules(model, tmp_path / "m")
    other = make(tmp_path)  # type: ignore[operator]
    before = {name: value.clone() for name, value in module_state(other).items()}
    with pytest.raises(CheckpointError, match=word) as refusal:
        load_modules(other, tmp_path / "m")
    assert "\n" not in str(refusal.value)
    assert all(torch.equal(value, before[name]) for name, value in module_state(other).items())


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    model = attached()
    save_modules(model, tmp_path / "m")
    content = (tmp_path / "m").read_bytes()
    (tmp_path / "cut").write_bytes(content[: len(content) // 2])
    (tmp_path / "text").write_text("no tensors")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "foreign")
    for name in ("cut", "text", "foreign", "missing"):
        with pytest.raises(CheckpointError, match=name):
            load_modules(model, tmp_path / name)


def test_a_part_of_a_bank_is_loaded_and_never_saved(tmp_path: Path) -> None:
    whole, part = attached(), attached(seed=9)
    randomize(whole)
    core = base_model_hash(part)
    save_modules(whole, tmp_path / "m")
    for layer in adapter_layers(part).values():
        layer.shard(2, 1)
    load_modules(part, tmp_path / "m", base_model=core)
    for name, layer in adapter_layers(part).items():
        for stack, value in layer.experts.stacked_tensors().items():
            assert torch.equal(
                value, adapter_layers(whole)[name].experts.stacked_tensors()[stack][2:]
            )
    with pytest.raises(CheckpointError, match="only part of the modules"):
        save_modules(part, tmp_path / "other")


def test_a_model_without_modules_has_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no modules"):
        save_modules(mlp(), tmp_path / "m")


def test_a_file_with_a_class_name_of_an_earlier_version_is_loaded(tmp_path: Path) -> None:
    """The bank `LowRank` was renamed to `LoRA`; files that people have name the old class."""
    one, other = attached(), attached(seed=9)
    randomize(one)
    save_modules(one, tmp_path / "new")
    raw = (tmp_path / "new").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + size].replace(b'\\"LoRA\\"', b'\\"LowRank\\"').rstrip()
    assert b"LowRank" in header
    (tmp_path / "old").write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + size :])
    load_modules(other, tmp_path / "old")
    assert torch.equal(one(drawn(5, 6)), other(drawn(5, 6)))
