"""The files in configs/ fit the schema, hold only changed values and have the published shapes.

Parameter counts are computed here independently of the model's code.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from dmoe.config.schema import Config

ROOT = Path(__file__).resolve().parents[2]
ALL = sorted((ROOT / "configs").rglob("*.yaml"))
FILES = [path for path in ALL if path.parent.name == "configs"]
HEADED = [path for path in FILES if not path.name.startswith("quickstart")]
MATRICES = {"swiglu": 3, "geglu": 3, "gelu": 2, "relu": 2}


def unlocked(node: DictConfig) -> DictConfig:
    """Remove the read-only flags of the frozen dataclasses."""
    OmegaConf.set_readonly(node, False)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none():
            unlocked(child)
    return node


def load(name: str | Path) -> DictConfig:
    """Load configs/NAME over the defaults."""
    merged = OmegaConf.merge(
        unlocked(OmegaConf.structured(Config)), OmegaConf.load(ROOT / "configs" / name)
    )
    assert isinstance(merged, DictConfig)
    return merged


def leaves(node: Any, path: str = "") -> dict[str, Any]:
    """List the dotted names of all values."""
    if isinstance(node, dict):
        return {
            k: v
            for key, child in node.items()
            for k, v in leaves(child, f"{path}.{key}" if path else key).items()
        }
    return {path: node}


def moe_blocks(config: DictConfig) -> int:
    """Count the MoE blocks: every n-th one after the first dense ones."""
    model = config.model
    return (model.layers - model.dense_first) // model.moe_every if model.moe_every else 0


def attention(config: DictConfig) -> int:
    """Count the Q, K, V and output matrices of one block, and its q/k norms."""
    model = config.model
    head_dim = model.head_dim or model.dim // model.heads
    kv_heads = model.kv_heads or model.heads
    return 2 * model.dim * head_dim * (model.heads + kv_heads) + 2 * head_dim * model.qk_norm


def count(config: DictConfig, vocabulary: int) -> tuple[int, int]:
    """Count (total, active) parameters; active counts K of the E routed experts."""
    model, moe = config.model, config.moe
    matrices = MATRICES[moe.experts.kind]
    expert = matrices * model.dim * moe.expert_dim
    shared = moe.experts.shared * matrices * model.dim * (moe.experts.shared_dim or moe.expert_dim)
    dense = (
        matrices
        * model.dim
        * (model.dense_dim or moe.top_k * moe.expert_dim + moe.experts.shared * moe.expert_dim)
    )
    sparse_blocks = moe_blocks(config)
    rest = vocabulary * model.dim * (1 if model.tie_embeddings else 2) + model.dim
    rest += (
        model.layers * (attention(config) + 2 * model.dim) + (model.layers - sparse_blocks) * dense
    )
    rest += sparse_blocks * (model.dim * moe.num_experts + shared)
    return (
        rest + sparse_blocks * moe.num_experts * expert,
        rest + sparse_blocks * moe.top_k * expert,
    )


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_a_config_fits_the_schema(path: Path) -> None:
    load(path)


@pytest.mark.parametrize("path", HEADED, ids=lambda path: path.name)
def test_a_config_holds_only_what_differs_from_the_defaults(path: Path) -> None:
    default = leaves(OmegaConf.to_container(OmegaConf.structured(Config)))
    given = leaves(OmegaConf.to_container(OmegaConf.load(path)))
    assert not {name: value for name, value in given.items() if default[name] == value}


@pytest.mark.parametrize("path", HEADED, ids=lambda path: path.name)
def test_a_config_says_what_it_is_and_needs(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    header = text[: re.search(r"^[a-z]", text, re.M).start()]  # type: ignore[union-attr]
    for word in ("Source:", "Needs:", "Parameters:", "Expect:"):
        assert word in header, f"{path.name} does not say {word}"


# Shapes as in the config.json of each model; a change of a default must not change them.
PUBLISHED: dict[str, dict[str, Any]] = {
    "switch.yaml": {
        "model.dim": 768,
        "model.layers": 12,
        "model.heads": 12,
        "model.moe_every": 2,
        "model.dense_first": 0,
        "model.norm_eps": 1e-6,
        "model.qk_norm": False,
        "model.tie_embeddings": True,
        "moe.num_experts": 8,
        "moe.top_k": 1,
        "moe.expert_dim": 3072,
        "moe.experts.kind": "relu",
        "moe.experts.shared": 0,
        "moe.capacity.factor": 1.25,
        "moe.capacity.group": "rank",
        "moe.capacity.priority": "position",
        "moe.router.score": "softmax",
        "moe.router.weights_from": "all",
        "moe.router.renormalize": False,
        "moe.balance.switch": 0.01,
        "moe.balance.z": 0.0,
    },
    "mixtral_8x7b.yaml": {
        "model.dim": 4096,
        "model.layers": 32,
        "model.heads": 32,
        "model.kv_heads": 8,
        "model.moe_every": 1,
        "model.dense_first": 0,
        "model.rope_base": 1e6,
        "model.norm_eps": 1e-5,
        "model.qk_norm": False,
        "model.tie_embeddings": False,
        "moe.num_experts": 8,
        "moe.top_k": 2,
        "moe.expert_dim": 14336,
        "moe.experts.kind": "swiglu",
        "moe.experts.shared": 0,
        "moe.capacity.factor": None,
        "moe.router.score": "softmax",
        "moe.router.weights_from": "chosen",
        "moe.balance.switch": 0.00125,
        "moe.balance.z": 0.0,
    },
    "olmoe_1b_7b.yaml": {
        "model.dim": 2048,
        "model.layers": 16,
        "model.heads": 16,
        "model.kv_heads": None,
        "model.moe_every": 1,
        "model.dense_first": 0,
        "model.rope_base": 1e4,
        "model.norm_eps": 1e-5,
        "model.qk_norm": True,
        "model.tie_embeddings": False,
        "model.init_std": 0.02,
        "moe.num_experts": 64,
        "moe.top_k": 8,
        "moe.expert_dim": 1024,
        "moe.experts.kind": "swiglu",
        "moe.experts.shared": 0,
        "moe.capacity.factor": None,
        "moe.router.score": "softmax",
        "moe.router.weights_from": "all",
        "moe.router.renormalize": False,
        "moe.balance.switch": 0.000625,
        "moe.balance.z": 0.0000625,
        "optim.lr": 4e-4,
        "optim.beta1": 0.9,
        "optim.beta2": 0.95,
        "optim.eps": 1e-8,
        "optim.weight_decay": 0.1,
        "optim.clip": 1.0,
        "optim.schedule": "cosine",
        "optim.warmup": 2000,
        "optim.min_lr_ratio": 0.1,
    },
    "qwen3_30b_a3b.yaml": {
        "model.dim": 2048,
        "model.layers": 48,
        "model.heads": 32,
        "model.kv_heads": 4,
        "model.head_dim": 128,
        "model.moe_every": 1,
        "model.dense_first": 0,
        "model.rope_base": 1e6,
        "model.norm_eps": 1e-6,
        "model.qk_norm": True,
        "model.tie_embeddings": False,
        "moe.num_experts": 128,
        "moe.top_k": 8,
        "moe.expert_dim": 768,
        "moe.experts.kind": "swiglu",
        "moe.experts.shared": 0,
        "moe.capacity.factor": None,
        "moe.router.score": "softmax",
        "moe.router.weights_from": "all",
        "moe.router.renormalize": True,
        "moe.balance.switch": 1.67e-4,
        "moe.balance.switch_level": "global",
        "moe.balance.z": 0.0,
    },
    "deepseek_moe_16b.yaml": {
        "model.dim": 2048,
        "model.layers": 28,
        "model.heads": 16,
        "model.kv_heads": None,
        "model.moe_every": 1,
        "model.dense_first": 1,
        "model.dense_dim": 10944,
        "model.rope_base": 1e4,
        "model.norm_eps": 1e-6,
        "model.qk_norm": False,
        "model.tie_embeddings": False,
        "model.init_std": 0.006,
        "moe.num_experts": 64,
        "moe.top_k": 6,
        "moe.expert_dim": 1408,
        "moe.experts.kind": "swiglu",
        "moe.experts.shared": 2,
        "moe.experts.shared_dim": None,
        "moe.capacity.factor": None,
        "moe.router.score": "softmax",
        "moe.router.weights_from": "all",
        "moe.router.renormalize": False,
        "moe.router.scale": 1.0,
        "moe.balance.switch": 0.001,
        "moe.balance.switch_level": "sequence",
        "moe.balance.z": 0.0,
        "optim.lr": 4.2e-4,
        "optim.beta1": 0.9,
        "optim.beta2": 0.95,
        "optim.weight_decay": 0.1,
        "optim.clip": 1.0,
        "optim.warmup": 2000,
        "optim.schedule": "wsd",
        "optim.decay_fraction": 0.2,
        "optim.min_lr_ratio": 0.1,
        "train.steps": 106449,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_shape_is_exact(name: str) -> None:
    config = load(name)
    found = {key: OmegaConf.select(config, key) for key in PUBLISHED[name]}
    assert found == PUBLISHED[name]


@pytest.mark.parametrize(
    ("name", "vocabulary", "total", "active"),
    [
        ("mixtral_8x7b.yaml", 32_000, 46.7e9, 12.9e9),
        ("olmoe_1b_7b.yaml", 50_304, 6.9e9, 1.3e9),
        ("qwen3_30b_a3b.yaml", 151_936, 30.5e9, 3.3e9),
        ("deepseek_moe_16b.yaml", 102_400, 16.4e9, 2.8e9),
    ],
)
def test_parameter_counts_are_the_published_ones(
    name: str, vocabulary: int, total: float, active: float
) -> None:
    found = count(load(name), vocabulary)
    assert found[0] == pytest.approx(total, rel=0.005)
    assert found[1] == pytest.approx(active, rel=0.02)


def test_switch_blocks_add_up_to_the_published_encoder_decoder() -> None:
    """google/switch-base-8 has 0.62B: two stacks, cross-attention in the decoder, one embedding."""
    config = load("switch.yaml")
    stack = count(config, vocabulary=0)[0]
    cross = config.model.layers * (attention(config) + config.model.dim)
    assert 2 * stack + cross + 32_128 * config.model.dim == pytest.approx(0.62e9, rel=0.01)


@pytest.mark.parametrize("path", HEADED, ids=lambda path: path.name)
def test_the_header_states_the_counts_with_bytes(path: Path) -> None:
    stated = re.search(
        r"# Parameters: ([\d.]+)([BM]) total, ([\d.]+)([BM]) active",
        path.read_text(encoding="utf-8"),
    )
    assert stated, f"{path.name} does not state its parameters"
    unit = {"B": 1e9, "M": 1e6}
    total, active = count(load(path.name), vocabulary=256)
    assert float(stated[1]) * unit[stated[2]] == pytest.approx(total, rel=0.015)
    assert float(stated[3]) * unit[stated[4]] == pytest.approx(active, rel=0.03)
