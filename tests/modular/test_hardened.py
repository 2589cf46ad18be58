"""Regressions of adapter layers: calls that failed, most of them silently."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dmoe.config.errors import CheckpointError, ConfigError
from dmoe.modular import (
    Adapter,
    LoRA,
    Scale,
    SparseDelta,
    adapter_context,
    adapter_layers,
    attach,
    base_model_hash,
    constant,
    detach,
    export_peft,
    freeze_all_but,
    load_modules,
    merge,
    routed,
    save_modules,
    table,
)
from dmoe.modular.peft import read_peft
from dmoe.moe.routing import TokenContext
from tests.modular.nets import D, M, O, drawn, mlp, randomize

LOW, TOP = partial(LoRA, M, rank=2), routed("top_k", M, 2)


class Twice(nn.Module):
    """One submodule used twice, as tied layers are."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(D, D)
        self.again = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.first(x))


class Handed(nn.Sequential):
    """A model with a context argument, as dmoe's models have."""

    def forward(self, x: Tensor, context: TokenContext | None = None) -> Tensor:
        return super().forward(x)


class Tied(nn.Module):
    """A head whose weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, D), nn.Linear(D, 9, bias=False)
        self.head.weight = self.table.weight

    def forward(self, token: Tensor) -> Tensor:
        return self.head(self.table(token))


def test_a_refusal_at_the_second_target_leaves_nothing_at_the_first() -> None:
    """`magnitude` reads the target's weight; it did so after half of the layers were attached."""
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh())
    core = base_model_hash(model)
    with pytest.raises(ConfigError, match="reads the weight of a Linear"):
        attach(
            model,
            "[01]",
            partial(SparseDelta, M, mask="magnitude"),
            constant(*[1.0] * M),
            width=(D, D),
        )
    assert not adapter_layers(model)
    assert base_model_hash(model) == core


def test_an_embedding_has_no_input_vectors() -> None:
    """LoRA beside an embedding multiplied the ids, and failed in the first forward."""
    with pytest.raises(ConfigError, match="ids, not vectors"):
        attach(nn.Embedding(9, D), "", LOW, TOP)
    place = nn.Embedding(9, D)
    attach(place, "", partial(Scale, M), TOP)
    assert place(torch.tensor([[1, 2]])).shape == (1, 2, D)


def test_a_child_with_the_name_of_adapter_layers_is_refused() -> None:
    """The hash skips paths that contain `modular`: a child of that name was not hashed."""
    model = nn.Sequential(nn.Linear(D, D))
    model.add_module("modular", nn.Linear(D, D))
    with pytest.raises(ConfigError, match="is a name the model uses itself, at modular"):
        attach(model, "0", LOW, TOP)


def test_a_context_argument_is_valid_for_one_forward() -> None:
    """Labels of one forward were used in the next one, which had none."""
    model = Handed(nn.Linear(D, O)).double()
    attach(model, "0", LOW, table([[0], [1]], M))
    randomize(model)
    x = drawn(3, D)
    model(x, context=TokenContext(label_T=torch.tensor([0, 1, 1])))
    with pytest.raises(ValueError, match="label_T"):
        model(x)
    handed = model(x, context=TokenContext(label_T=torch.tensor([0, 1, 1])))
    with adapter_context(model, label_T=torch.tensor([1, 1, 1])):  # the caller's context stays
        assert not torch.equal(model(x), handed)
        assert torch.equal(model(x), model(x))


def test_a_model_can_be_copied_after_a_forward() -> None:
    """Torch refuses to copy the latest routing, whose tensors belong to an autograd graph."""
    model, x = mlp(), drawn(3, D)
    attach(model, "[02]", LOW, TOP)
    randomize(model)
    y = model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), y)
    assert adapter_layers(model)["0"].last_routing is not None
    detach(twin)
    assert torch.equal(twin(x), mlp()(x))
    assert torch.equal(model(x), y)


def test_a_submodule_used_twice_is_saved_once(tmp_path: Path) -> None:
    """It has two names in the model's state, and safetensors refuses tensors that share memory."""
    model, other = Twice().double(), Twice().double()
    other.load_state_dict(model.state_dict())
    for net in (model, other):
        attach(net, "first", LOW, TOP)
    randomize(model)
    save_modules(model, tmp_path / "m")
    load_modules(other, tmp_path / "m")
    assert torch.equal(other(drawn(3, D)), model(drawn(3, D)))


def test_a_file_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No folder gave the library's traceback; a full disk left a partial file."""
    model = mlp()
    attach(model, "0", LOW, TOP)
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_modules(model, tmp_path / "no folder" / "m")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save_modules(model, tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_a_tied_weight_is_not_merged_into() -> None:
    """The embedding was changed with the head, without an error."""
    model = Tied()
    attach(model, "head", partial(LoRA, 1), constant(1.0))
    randomize(model)
    before = model.table.weight.clone()
    with pytest.raises(ConfigError, match="shares its weight with a Embedding"):
        merge(model, [1.0])
    assert torch.equal(model.table.weight, before)
    assert adapter_layers(model)
    shared = Twice()
    attach(shared, "first", partial(LoRA, 1), constant(1.0))
    merge(shared, [1.0])  # one submodule with two names


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.parts(x)


def test_nested_targets() -> None:
    """A block and its child: each has its modules, and detaching restores both."""
    model, x = nn.Sequential(Block(), nn.Linear(O, O).double()), drawn(4, D)
    bare, core = model(x), base_model_hash(model)
    attach(model, "0.parts.2", LOW, TOP)
    attach(model, "0", partial(Adapter, M), TOP, width=(D, O))
    randomize(model)
    with_both = model(x)
    assert sorted(adapter_layers(model)) == ["0", "0.parts.2"]
    assert base_model_hash(model) == core
    assert (with_both - bare).abs().max() > 1e-3
    assert all(layer.last_routing is not None for layer in adapter_layers(model).values())
    detach(model)
    assert torch.equal(model(x), bare)


class Part(Tensor):
    """A tensor subclass, as FSDP2's parameters are."""


def test_one_module_of_a_bank_split_by_fsdp_cannot_be_trained() -> None:
    """Under FSDP2 with replicas of the modules it ended in torch's error about mixed tensors."""
    model = mlp()
    bank = attach(model, "0", LOW, TOP)["0"].experts
    bank.a = nn.Parameter(bank.a.data.as_subclass(Part))
    with pytest.raises(ConfigError, match=r"parallel\.mode=fsdp: splits the modules at 0"):
        freeze_all_but(model, 1, torch.optim.AdamW(bank.parameters()))
    assert model[0].weight.requires_grad


def test_a_sequential_takes_no_modules() -> None:
    """A Sequential calls all its children, so it called the adapter layer with one argument."""
    with pytest.raises(ConfigError, match="treat the adapter layer as a member"):
        attach(mlp(), "", partial(Adapter, M), TOP, width=(D, O))


class Named(nn.Module):
    """`head`, and a block whose child has that name too."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(D, D)
        self.block = nn.ModuleDict({"head": nn.Sequential(nn.Linear(D, D))})

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block["head"](x))


def test_an_export_names_its_targets_and_no_others(tmp_path: Path) -> None:
    """peft matches endings of names: `head` also matched `block.head`, which is not a Linear."""
    peft = pytest.importorskip("peft", reason="peft is not installed: it is what reads the export")
    model = Named()
    bare = copy.deepcopy(model)
    attach(model, "head", partial(LoRA, 1, rank=2, alpha=5.0), constant(1.0))
    randomize(model)
    export_peft(model, 0, tmp_path)
    x = torch.randn(3, D)
    expected = model(x)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(bare, tmp_path)(x), expected)
    place = nn.Linear(D, D)
    attach(place, "", LOW, TOP)
    with pytest.raises(ConfigError, match="has no name"):
        export_peft(place, 0, tmp_path)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("init_lora_weights", "pissa"), ("alora_invocation_tokens", [3]), ("use_qalora", True)],
)
def test_an_unsupported_adapter_is_not_imported(
    setting: str, value: object, tmp_path: Path
) -> None:
    """PiSSA changes the base model, an activated adapter needs tokens: read as LoRA."""
    model = mlp(torch.float32)
    attach(model, "0", partial(LoRA, 1, rank=2), constant(1.0))
    export_peft(model, 0, tmp_path)
    read_peft(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {setting: value}))
    with pytest.raises(CheckpointError, match=setting):
        read_peft(tmp_path)


def test_the_hash_includes_the_dtype() -> None:
    """Zeros are the same bytes in every dtype of four bytes."""
    model, other = nn.Module(), nn.Module()
    model.register_buffer("count", torch.zeros(3, dtype=torch.float32))
    other.register_buffer("count", torch.zeros(3, dtype=torch.int32))
    assert base_model_hash(model) != base_model_hash(other)
