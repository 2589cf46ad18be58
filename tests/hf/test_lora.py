"""LoRA on linear layers and fused experts: the numbers of peft at EP = 1 and 2, and its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dmoe
from dmoe.checkpoint import save
from dmoe.config.errors import CheckpointError, ConfigError
from dmoe.hf.lora import add_lora, is_lora, lora_places, merge_lora
from dmoe.hf.lora_peft import export_lora, load_lora, save_lora
from tests.hf.families import tiny
from tests.hf.tiny_hf import tokens
from tests.ranks import run_ranks

FAMILIES = ("mixtral", "gpt_oss", "deepseek_v3", "minimax_m2")
TARGETS = {"deepseek_v3": ("o_proj", "experts")}
MODES = {
    "mixtral": ("ddp", "fsdp"),
    "gpt_oss": ("ddp",),
    "deepseek_v3": ("fsdp",),
    "minimax_m2": ("ddp",),
}
RANK, ALPHA = 4, 6.0


def with_lora(family: str) -> Any:
    """Return a moefied model with LoRA, B drawn too, so that the factors matter."""
    model = dmoe.moefy(tiny(family, torch.float64))
    add_lora(model, RANK, ALPHA, TARGETS.get(family, ("q_proj", "v_proj", "experts")))
    generator = torch.Generator().manual_seed(7)
    for place in lora_places(model):
        b = getattr(place.module, place.b)
        b.data.copy_(0.1 * torch.randn(b.shape, generator=generator, dtype=b.dtype))
    return model


def peft_model(family: str, folder: Path) -> Any:
    """Load the saved factors with peft on an untouched model."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(tiny(family, torch.float64), folder, is_trainable=True)
    return model.train()


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def in_peft_layout(model: Any, values: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return arrays by the names of parameters as peft has them, by peft's names."""
    from dmoe.hf.lora_peft import peft_tensors

    def read(place: Any, factor: str) -> torch.Tensor:
        return torch.as_tensor(values[f"{place.module_name}.{factor}"])

    tensors = peft_tensors(lora_places(model), read)
    return {n.replace(".weight", ".default.weight"): t.numpy() for n, t in tensors.items()}


def train_on_ranks(rank: int, world: int, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for family in FAMILIES:
        for mode in MODES[family]:
            model = with_lora(family)
            parallel = dmoe.parallelize(model, ep=2, mode=mode)
            half = tokens().chunk(world)[rank]
            loss = loss_of(parallel, half)
            parallel.backward(loss)
            grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            full = {
                n: (g.full_tensor() if hasattr(g, "full_tensor") else g) for n, g in grads.items()
            }
            arrays = {n: g.numpy() for n, g in full.items()}
            save_lora(parallel, f"{folder}/{family}-{mode}")
            found[f"{family}-{mode}"] = loss.item(), parallel.clip_grad_norm_(1e9), arrays
    return found


@pytest.mark.ranks
def test_two_ranks_have_the_numbers_of_peft(tmp_path: Path) -> None:
    """Loss, norm, the gradient of every factor, and the saved directory."""
    from safetensors.torch import load_file

    results = run_ranks(2, train_on_ranks, str(tmp_path), timeout=120)
    for family in FAMILIES:
        model = with_lora(family)
        save_lora(model, tmp_path / family)
        theirs = peft_model(family, tmp_path / family)
        loss = loss_of(theirs, tokens())
        loss.backward()
        grads = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
        norm = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt().item()
        for mode in MODES[family]:
            ours = [result[f"{family}-{mode}"] for result in results]
            assert sum(one[0] for one in ours) / 2 == pytest.approx(loss.item(), abs=1e-9)
            assert ours[0][1] == pytest.approx(norm, rel=1e-9)
            whole = {
                n: np.concatenate([one[2][n] for one in ours]) if ".experts." in n else g
                for n, g in ours[0][2].items()
            }
            converted = in_peft_layout(model, whole)
            assert converted.keys() == grads.keys()
            for name, grad in grads.items():
                assert np.abs(converted[name] - grad.numpy()).max() < 1e-9, (family, mode, name)
            saved = load_file(tmp_path / f"{family}-{mode}" / "adapter_model.safetensors")
            expected = load_file(tmp_path / family / "adapter_model.safetensors")
            assert saved.keys() == expected.keys()
            assert all(torch.equal(saved[n], v) for n, v in expected.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_has_equal_logits_and_gives_the_adapter_back(family: str, tmp_path: Path) -> None:
    """Saved -> peft -> saved by peft -> loaded here; merged, the model computes the same."""
    model = with_lora(family)
    logits = model(input_ids=tokens(), use_cache=False).logits
    plain = tiny(family, torch.float64)(input_ids=tokens(), use_cache=False).logits
    assert (logits - plain).abs().max() > 1e-2
    save_lora(model, tmp_path / "ours")
    theirs = peft_model(family, tmp_path / "ours")
    assert (theirs(input_ids=tokens(), use_cache=False).logits - logits).abs().max() < 1e-10
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_lora(dmoe.moefy(tiny(family, torch.float64)), tmp_path / "theirs")
    assert torch.equal(again(input_ids=tokens(), use_cache=False).logits, logits)
    trained = {n for n, p in again.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in again.named_parameters() if is_lora(n)}
    merged = merge_lora(model)
    assert not any(is_lora(name) for name in merged.state_dict())
    assert (merged(input_ids=tokens(), use_cache=False).logits - logits).abs().max() < 1e-10


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    model = dmoe.moefy(tiny("mixtral"))
    with pytest.raises(ConfigError, match="matches no linear layer; there are"):
        add_lora(model, 2, targets=["query"])
    with pytest.raises(ConfigError, match="is not moefied"):
        add_lora(tiny("mixtral"), 2)
    with pytest.raises(ConfigError, match="must be a whole number"):
        add_lora(model, 0)
    with pytest.raises(ConfigError, match="has no LoRA"):
        save_lora(model, tmp_path / "x")
    with pytest.raises(ConfigError, match="has no LoRA"):
        merge_lora(model)
    with pytest.raises(CheckpointError, match="holds no adapter of peft"):
        load_lora(model, tmp_path)
    add_lora(model, 2)
    with pytest.raises(ConfigError, match="has LoRA already"):
        add_lora(model, 2)
    save_lora(model, tmp_path / "a")
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(config.read_text().replace('"bias": "none"', '"use_dora": true'))
    with pytest.raises(CheckpointError, match="use_dora=True is not supported"):
        load_lora(dmoe.moefy(tiny("mixtral")), tmp_path / "a")


def test_targets_may_overlap_and_a_refusal_leaves_the_model_alone() -> None:
    """`[q_proj, q_proj]` "matches no linear layer"; and the model was half frozen after a refusal.

    A number that is none, such as alpha=nan, was refused in YAML and taken in Python.
    """
    model = dmoe.moefy(tiny("mixtral"))
    for wrong, words in (
        ({"targets": ["q_proj", "query"]}, "matches no linear layer"),
        ({"alpha": float("nan")}, "must be a finite number"),
        ({"alpha": 0.0}, "must be greater than 0"),
        ({"alpha": "16"}, "must be a finite number"),
        ({"targets": 5}, "must be a list"),
    ):
        with pytest.raises(ConfigError, match=words):
            add_lora(model, 2, **wrong)
        assert all(p.requires_grad for p in model.parameters())
        assert not any(map(is_lora, model.state_dict()))
    add_lora(model, 3, targets=["q_proj", "self_attn.q_proj", "q_proj"])
    assert len(list(lora_places(model))) == model.config.num_hidden_layers
    one = add_lora(dmoe.moefy(tiny("mixtral")), 2, targets="experts")
    assert all(place.is_stack for place in lora_places(one))


def test_merging_leaves_frozen_what_was_frozen() -> None:
    """A second adapter was trained on a model that its user had frozen: all of it was trained."""
    model = dmoe.moefy(tiny("mixtral"))
    model.get_input_embeddings().requires_grad_(False)
    model.model.layers[0].mlp.experts.down_proj.requires_grad_(False)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    assert [*before.values()].count(False) == 2
    merge_lora(add_lora(model, 2))
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    add_lora(model, 2)  # and it can be done again
    assert all(is_lora(n) == p.requires_grad for n, p in model.named_parameters())


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"num_hidden_layers": 1}, r"layers\.1\.\S* is in the model only"),
        ({"num_local_experts": 6}, "has factors of another shape than the model's"),
        ({"hidden_size": 64}, "has factors of another shape than the model's"),
    ],
)
def test_an_adapter_of_another_base_leaves_the_model_alone(
    other: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """Six experts for eight were a traceback of `view`, and left the model frozen, with LoRA."""
    save_lora(add_lora(dmoe.moefy(tiny("mixtral", **other)), 2), tmp_path / "a")
    model = dmoe.moefy(tiny("mixtral"))
    with pytest.raises(CheckpointError, match=words):
        load_lora(model, tmp_path / "a")
    assert not any(map(is_lora, model.state_dict()))
    assert all(p.requires_grad for p in model.parameters())


def test_a_head_that_is_the_embedding_is_no_target() -> None:
    """Its factors were trained, and the export, which has no tensor of the head, left them out."""
    model = dmoe.moefy(tiny("mixtral", tie_word_embeddings=True))
    with pytest.raises(ConfigError, match="has the weight of the embedding"):
        add_lora(model, 2, targets=["lm_head"])
    add_lora(dmoe.moefy(tiny("mixtral")), 2, targets=["lm_head"])


def test_weights_that_were_trained_beside_the_factors_are_not_left_out(tmp_path: Path) -> None:
    """With `optim.trainable`, `--adapter` wrote the factors alone and lost trained weights."""
    model = tiny("mixtral", torch.float32)
    model.save_pretrained(tmp_path / "source")
    lora = {"rank": 2, "alpha": None, "targets": ["q_proj"]}
    state = add_lora(dmoe.moefy(model), 2, targets=["q_proj"]).state_dict()
    for pattern, fits in (("*.experts.*", False), ("*.lora_*", True)):
        config = {"model": {"lora": lora}, "optim": {"trainable": [pattern]}}
        named = {f"model.hf.{name}": value for name, value in state.items()}
        checkpoint = save(tmp_path / pattern[2:5], 1, named, {"config": config})
        if fits:
            assert export_lora(checkpoint, str(tmp_path / "source"), tmp_path / "out") == 4
            continue
        with pytest.raises(CheckpointError, match=r"trained hf\.model.*gate_up_proj too"):
            export_lora(checkpoint, str(tmp_path / "source"), tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"r": "2"}, "r=2 and lora_alpha=4.0 scale no adapter"),
        ({"lora_alpha": None}, "lora_alpha=None scale no adapter"),
        ([], "must hold a JSON object"),
        (None, "holds no adapter of peft"),
    ],
)
def test_an_adapter_that_is_damaged_is_refused(values: Any, words: str, tmp_path: Path) -> None:
    """Each ended in a traceback: of the config's values, of its kind, of a file cut off."""
    save_lora(add_lora(dmoe.moefy(tiny("mixtral")), 2), tmp_path / "a")
    config = tmp_path / "a" / "adapter_config.json"
    if values is None:
        file = tmp_path / "a" / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:100])
    else:
        content = json.loads(config.read_text())
        config.write_text(json.dumps(content | values if values else values))
    with pytest.raises(CheckpointError, match=words):
        load_lora(dmoe.moefy(tiny("mixtral")), tmp_path / "a")
