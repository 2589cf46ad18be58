"""`dmoe.MoE` and `build_router` refuse what a config file may not say, by the same rules.

`RouterConfig(score="Softmax")` routed by sigmoid, `CapacityConfig(priority="prob")` by position,
and `factor=-1` kept 4 of 128 choices: a dataclass of Python keeps whatever it is given, and only the
config of a run was checked.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dmoe import MoE
from dmoe.config.errors import ConfigError
from dmoe.config.load import load
from dmoe.config.rules import check
from dmoe.config.schema import (
    BalanceConfig,
    CapacityConfig,
    Config,
    ExpertsConfig,
    ModelConfig,
    MoEConfig,
    RouterConfig,
)
from dmoe.models.transformer import Transformer
from dmoe.modular import module_losses, routed
from dmoe.moe.routers import build_router
from tests.config.refusals import REFUSALS

SIZES: dict[str, Any] = {"dim": 8, "expert_dim": 4, "num_experts": 4, "top_k": 2}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "another case": ({"router": RouterConfig(score="Softmax")}, "did you mean softmax"),  # type: ignore[arg-type]
    "unknown kind": ({"router": RouterConfig(kind="topk")}, "did you mean top_k"),  # type: ignore[arg-type]
    "priority": ({"capacity": CapacityConfig(1.0, priority="prob")}, "position or score"),  # type: ignore[arg-type]
    "overflow": ({"capacity": CapacityConfig(1.0, overflow="reroute")}, "drop or next_choice"),  # type: ignore[arg-type]
    "negative factor": ({"capacity": CapacityConfig(factor=-1)}, "greater than 0"),
    "factor NaN": ({"capacity": CapacityConfig(factor=float("nan"))}, "a finite number"),
    "factor inf": ({"capacity": CapacityConfig(factor=float("inf"))}, "a finite number"),
    "factor True": ({"capacity": CapacityConfig(factor=True)}, "a finite number"),
    "text as number": ({"balance": BalanceConfig(z="0.1")}, "'0.1': must be a finite number"),  # type: ignore[arg-type]
    "level": ({"balance": BalanceConfig(switch_level="batch")}, "sequence or micro_batch"),  # type: ignore[arg-type]
    "negative coefficient": ({"balance": BalanceConfig(switch=-0.01)}, "must not be negative"),
    "text as switch": ({"router": RouterConfig(renormalize="no")}, "true or false"),  # type: ignore[arg-type]
    "load without noise": ({"balance": BalanceConfig(load=0.1)}, "noise"),
    "bias without choice": (
        {"router": RouterConfig(kind="hash"), "balance": BalanceConfig(bias=0.1)},
        "makes none",
    ),
    "activation": ({"experts": ExpertsConfig(kind="silu")}, "swiglu"),  # type: ignore[arg-type]
    "shapes": ({"experts": ExpertsConfig(shapes=[[1.5]] * 4)}, "a list"),  # type: ignore[list-item]
    "a mapping": ({"router": {"kind": "top_k"}}, "a RouterConfig"),
    "another section": ({"router": CapacityConfig()}, "a RouterConfig"),
    "exchange": ({"exchange": "Padded"}, "packed or padded"),
    "padded": ({"exchange": "padded"}, "capacity.factor"),
    "no width": ({"dim": 0}, "dim=0: must be 1 or more"),
    "no output": ({"out_dim": 0}, "out_dim=0"),
    "width as float": ({"dim": 8.0}, "dim=8.0: must be a whole number"),
    "no hidden width": ({"expert_dim": 0}, "expert_dim=0: must be 1 or more"),
    "no experts": ({"num_experts": 0, "top_k": 0}, "num_experts=0"),
    "top_k as float": ({"top_k": 2.0}, "top_k=2.0: must be a whole number"),
    "virtual ranks": ({"virtual_ranks": 0}, "virtual_ranks=0"),
    "negative layer": ({"layer": -1}, "layer=-1"),
    "negative seed": ({"seed": -1}, "seed=-1"),
    "next choice without capacity": (
        {"capacity": CapacityConfig(overflow="next_choice")},
        "capacity.factor",
    ),
    "a budget that buys nothing": (
        {"router": RouterConfig(kind="budget", renormalize=False, budget=0.01)},
        "nothing would ever run",
    ),
    "a field that the kind does not read": ({"router": RouterConfig(top_p=0.3)}, "leave"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused(name: str) -> None:
    options, words = WRONG[name]
    with pytest.raises(ConfigError, match=r"=.*: .+; .+") as caught:
        MoE(**{**SIZES, **options})
    assert words in str(caught.value)
    assert not caught.value.field.startswith("moe."), "named as the arguments are"


OF_A_MODEL = ("allow_future_leak", "model.dense_dim", "model.fusion", "a column of labels")
"""Refusals that are not of the layer alone: a layer cannot know that its model is causal."""


def _in_python(name: str) -> bool:
    case = REFUSALS[name]
    settings = [override.partition("=")[0] for override in case.overrides]
    return case.field.startswith("moe.") and all(key.startswith("moe.") for key in settings)


@pytest.mark.parametrize("name", filter(_in_python, REFUSALS))
def test_refused_in_yaml_is_refused_in_python(name: str) -> None:
    """One set of rules: every refusal of a config's section `moe` is one of `MoE.from_config`."""
    try:
        config = load(None, REFUSALS[name].overrides)
    except ConfigError:
        return  # a type that YAML cannot even carry this far
    with pytest.raises(ConfigError) as in_yaml:
        check(config)
    if any(words in str(in_yaml.value) for words in OF_A_MODEL):
        return
    with torch.device("meta"), pytest.raises(ConfigError) as in_python:
        MoE.from_config(config.moe, config.model.dim)
    assert in_python.value.field == in_yaml.value.field.removeprefix("moe.")


@pytest.mark.parametrize(
    "config",
    [
        replace(Config(), moe=MoEConfig(router=RouterConfig(score="Softmax"))),  # type: ignore[arg-type]
        replace(Config(), model=ModelConfig(dim=8.5)),  # type: ignore[arg-type]
        replace(Config(), model=ModelConfig(rope_base=float("nan"))),
    ],
)
def test_a_run_of_python_dataclasses_is_checked_too(config: Config) -> None:
    with pytest.raises(ConfigError):
        check(config)


def test_other_constructors_of_the_public_api() -> None:
    """Models, routers and modules are built from the same dataclasses."""
    with pytest.raises(ConfigError, match=r"model.norm_eps=nan"):
        Transformer(ModelConfig(norm_eps=float("nan")), MoEConfig(), 16)
    with pytest.raises(ConfigError, match=r"model.dim=10: must be divisible"):
        Transformer(ModelConfig(dim=10), MoEConfig(), 16)
    with pytest.raises(ConfigError, match=r"kind=topk: .*did you mean top_k"):
        build_router(RouterConfig(kind="topk"), 8, 4, 2, 0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"score=Sigmoid: .*did you mean sigmoid"):
        routed("top_k", 4, 2, score="Sigmoid")(8, 0)
    with pytest.raises(ConfigError, match=r"config=Config: must be a MoEConfig"):
        MoE.from_config(Config(), 8)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"balance.bias=0.1: is no loss"):
        module_losses(MoE(**SIZES), BalanceConfig(bias=0.1))


def test_arguments_that_the_documents_show_are_accepted() -> None:
    shapes = ExpertsConfig(kind="relu", shapes=[[], [50], [64, 32]], zero=1)
    MoE(100, 0, 3, 4, out_dim=10, experts=shapes)
    MoE(8, 4, 4, 2, capacity=CapacityConfig(factor=1), balance=BalanceConfig(switch=0))
