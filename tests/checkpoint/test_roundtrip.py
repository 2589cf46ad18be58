"""One process: values are restored bit for bit; others are refused before a file is written."""

from __future__ import annotations

import pickle
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dmoe.checkpoint import load, read_manifest, save
from dmoe.checkpoint.validate import DTYPES
from dmoe.config.errors import CheckpointError
from tests.checkpoint.states import full_state, ones_like, states_equal

EXTRA = {
    "config": "abc",
    "tokens": 2**53 + 1,
    "loss": 0.1 + 0.2,
    "topology": {"world": 4, "ep": [1, None, True]},
    "é": "名",
}


def bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def random_bits(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Fill with any bit pattern, also NaNs with payloads, denormals and negative zeros."""
    if dtype == torch.bool:
        return torch.rand(shape) < 0.5
    size = torch.empty(shape, dtype=dtype)
    return torch.randint(0, 256, (size.nbytes,), dtype=torch.uint8).view(dtype).reshape(shape)


def test_a_full_state_and_extra_are_restored(tmp_path: Path) -> None:
    path = save(tmp_path, 100, full_state(), EXTRA)
    state = {name: ones_like(tensor) for name, tensor in full_state().items()}
    assert not states_equal(state, full_state())
    assert load(path, state) == EXTRA
    assert states_equal(state, full_state())
    assert path.name == "step-00000100"
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("dtype", [getattr(torch, name) for name in DTYPES.values()], ids=str)
@pytest.mark.parametrize(
    "shape", [(), (1,), (0,), (0, 4), (3, 0, 2), (7,), (3, 5), (1, 2, 3, 4)], ids=str
)
def test_every_dtype_and_shape_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    before = random_bits(shape, dtype)
    after = torch.zeros(shape, dtype=dtype)
    load(
        save(tmp_path, 1, {"t": before, "other": torch.ones(3)}, {}),
        {"t": after, "other": torch.zeros(3)},
    )
    assert torch.equal(bytes_of(before), bytes_of(after))


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=30).filter(
            lambda name: name.isprintable() and name != "__metadata__"
        ),
        st.tuples(
            st.lists(st.integers(0, 4), max_size=4).map(tuple),
            st.sampled_from(sorted(DTYPES.values())),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_any_printable_name(shapes: dict[str, tuple[tuple[int, ...], str]]) -> None:
    before = {
        name: random_bits(shape, getattr(torch, dtype)) for name, (shape, dtype) in shapes.items()
    }
    after = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    with tempfile.TemporaryDirectory() as root:
        load(save(Path(root), 0, before, {}), after)
    assert states_equal(after, before)


def test_strided_shared_expanded_and_parameter_tensors(tmp_path: Path) -> None:
    tied = torch.randn(5, 7)
    before = {
        "transposed": torch.randn(3, 4).t(),
        "tied.a": tied,
        "tied.b": tied,
        "tied.view": tied[1:3],
        "expanded": torch.randn(1, 3).expand(4, 3),
        "strided": torch.randn(10)[::2],
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
    }
    after = {name: torch.zeros(tensor.shape) for name, tensor in before.items()}
    after["parameter"] = torch.nn.Parameter(after["parameter"])
    after["transposed"] = torch.zeros(3, 4).t()
    load(save(tmp_path, 1, before, {}), after)
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    assert after["parameter"].requires_grad


def test_no_file_is_a_pickle(tmp_path: Path) -> None:
    """torch's default storage pickles `.metadata`; here all files are JSON or safetensors."""
    path = save(tmp_path, 1, full_state(), {})
    names = sorted(entry.name for entry in path.iterdir())
    assert names == ["manifest.json", "shard-00001-model-00001-of-00001.safetensors"]
    for name in names:
        with pytest.raises(Exception):  # noqa: B017, PT011 (pickle raises a dozen types)
            pickle.loads((path / name).read_bytes())  # noqa: S301


def test_a_subset_by_prefix(tmp_path: Path) -> None:
    path = save(tmp_path, 1, full_state(), {"a": 1})
    model = {
        name: ones_like(tensor)
        for name, tensor in full_state().items()
        if name.startswith("model.")
    }
    assert load(path, model, prefix="model.") == {"a": 1}
    assert states_equal(
        model, {name: tensor for name, tensor in full_state().items() if name.startswith("model.")}
    )
    with pytest.raises(CheckpointError, match=r"also holds 'optim\.experts"):
        load(path, model)
    with pytest.raises(CheckpointError, match="no tensor that starts with 'ema'"):
        load(path, model, prefix="ema")
    model.pop("model.embed")
    with pytest.raises(CheckpointError, match=r"also holds 'model\.embed'"):
        load(path, model, prefix="model.")


def drop(state: dict[str, Tensor]) -> None:
    del state["model.embed"]


def add(state: dict[str, Tensor]) -> None:
    state["model.new"] = torch.ones(1)


def transpose(state: dict[str, Tensor]) -> None:
    state["model.embed"] = torch.ones(3, 11)


def fewer_experts(state: dict[str, Tensor]) -> None:
    state["model.experts.w"] = state["model.experts.w"][:4]


def other_type(state: dict[str, Tensor]) -> None:
    state["optim.experts.w.exp_avg"] = state["optim.experts.w.exp_avg"].float()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"also holds 'model\.embed' \(1 names"),
        (add, r"lacks 'model\.new' \(1 names"),
        (transpose, r"'model\.embed' is float32\[11, 3\] in the checkpoint and float32\[3, 11\]"),
        (
            fewer_experts,
            r"'model\.experts\.w' is float32\[8, 3, 5\] in the checkpoint and float32\[4, 3, 5\]",
        ),
        (other_type, r"'optim\.experts\.w\.exp_avg' is bfloat16.*float32"),
    ],
)
def test_a_state_that_differs_is_refused_untouched(tmp_path: Path, change, message: str) -> None:
    path = save(tmp_path, 1, full_state(), {})
    state = {name: ones_like(tensor) for name, tensor in full_state().items()}
    change(state)
    before = {name: tensor.clone() for name, tensor in state.items()}
    with pytest.raises(CheckpointError, match=message):
        load(path, state)
    assert states_equal(state, before)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"x": 3}, "'x' is a int, not a tensor"),
        ({"x": torch.ones(2).to_sparse()}, "sparse"),
        ({"x": torch.ones(2, device="meta")}, "meta"),
        ({"x": torch.ones(2, dtype=torch.complex64)}, "'x' is complex64"),
        ({"__metadata__": torch.ones(2)}, "__metadata__"),
        ({"": torch.ones(2)}, "cannot name a tensor"),
        ({"a\nb": torch.ones(2)}, "cannot name a tensor"),
        ({7: torch.ones(2)}, "7 cannot name a tensor"),
        ({}, "no tensor to save"),
    ],
)
def test_values_that_cannot_be_restored_are_refused(
    tmp_path: Path, bad: dict, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path, 1, bad, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "extra",
    [{"a": (1, 2)}, {"a": float("nan")}, {1: 2}, {"a": torch.ones(1)}, {"a": b"x"}, [1], None],
)
def test_an_extra_that_is_not_plain_json_is_refused(tmp_path: Path, extra: object) -> None:
    with pytest.raises(CheckpointError, match="extra must be plain JSON"):
        save(tmp_path, 1, full_state(), extra)
    assert list(tmp_path.iterdir()) == []


def test_read_manifest_reads_no_tensor(tmp_path: Path) -> None:
    path = save(tmp_path, 5, full_state(), EXTRA)
    (path / "shard-00001-model-00001-of-00001.safetensors").unlink()
    found = read_manifest(path)
    assert (found.step, found.extra) == (5, EXTRA)
    assert found.tensors["model.experts.w"].shape == (8, 3, 5)
    assert found.tensors["optim.experts.w.exp_avg"].dtype == "bfloat16"
