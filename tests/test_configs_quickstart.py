"""configs/quickstart.yaml has the defaults; the dense config has the same active parameters."""

from __future__ import annotations

from pathlib import Path

import torch

from dmoe.config.load import load
from dmoe.config.schema import Config
from dmoe.models.transformer import Transformer

CONFIGS = Path(__file__).parents[1] / "configs"


def active_parameters(config: Config) -> int:
    with torch.device("meta"):
        return Transformer(config.model, config.moe, 256).num_parameters().active


def test_the_defaults_are_the_quickstart() -> None:
    assert load(CONFIGS / "quickstart.yaml") == load()


def test_the_dense_config_has_the_same_active_parameters_without_routers() -> None:
    sparse, dense = load(CONFIGS / "quickstart.yaml"), load(CONFIGS / "quickstart_dense.yaml")
    routers = sparse.model.layers * sparse.moe.num_experts * sparse.model.dim
    assert active_parameters(sparse) == active_parameters(dense) + routers
    assert (sparse.train, sparse.optim, sparse.data) == (dense.train, dense.optim, dense.data)
