"""Every refusal of the tables: one sentence with field, value, what is allowed, and the fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from dmoe.config.errors import ConfigError
from dmoe.config.load import load
from dmoe.config.rules import check, check_router
from dmoe.config.schema import RouterConfig
from dmoe.moe.routers import build_router
from tests.config.attacks import ATTACKS
from tests.config.refusals import REFUSALS


@pytest.mark.parametrize("name", REFUSALS)
def test_refused(name: str) -> None:
    case = REFUSALS[name]
    with pytest.raises(ConfigError, match=r": .+; .+") as caught:
        check(load(None, case.overrides), case.world)
    error, message = caught.value, str(caught.value)
    assert error.field == case.field, message
    assert message == f"{error.field}={error.value}: {error.allowed}; {error.fix}"
    for word in case.words:
        assert word in message
    assert len(message) < 300
    assert message.isprintable()


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, words = ATTACKS[name]
    monkeypatch.chdir(tmp_path)
    Path("attack.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load("attack.yaml")
    message = str(caught.value)
    for word in ("attack.yaml", *words):
        assert word in message
    assert len(message) < 300
    assert message.isprintable()


def test_builders_of_layers_refuse_too() -> None:
    with pytest.raises(ValueError, match=r"groups=3: must divide .*=8; use one of \[1, 2, 4, 8\]"):
        build_router(RouterConfig(kind="group_limited", groups=3), 16, 8, 2, 0)
    with pytest.raises(
        ConfigError, match=r"has no meaning for moe.router.kind=hash, only for top_k, noisy"
    ):
        check_router(RouterConfig(kind="hash", jitter=0.1), 8, 2)


def test_reason_and_fix_are_named() -> None:
    with pytest.raises(ConfigError, match=r"later tokens.*allow_future_leak=true"):
        check(load(None, ["moe.router.kind=expert_choice"]))


def test_renamed_errors_keep_their_parts() -> None:
    error = ConfigError("moe.top_k", 3, "must be at most moe.num_experts=2", "use 2")
    renamed = error.renamed({"moe.top_k": "modular.top_k", "moe.num_experts": "modular.modules"})
    assert str(renamed) == "modular.top_k=3: must be at most modular.modules=2; use 2"
    assert (renamed.field, renamed.value) == ("modular.top_k", 3)
