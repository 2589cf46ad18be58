"""Shipped configs are found by name, from a clone and from a wheel, and copied.

From a wheel, errors advised configs/quickstart.yaml, which was not in it.
"""

from __future__ import annotations

import shutil
import sysconfig
import tomllib
from pathlib import Path

import pytest

from dmoe.cli import common, configs
from dmoe.config import shipped
from dmoe.config.errors import ConfigError
from dmoe.config.load import load

ROOT = Path(__file__).parents[2]
FILES = {path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.yaml")}


def test_every_config_has_a_name_and_a_title(capsys: pytest.CaptureFixture[str]) -> None:
    assert {f"{name}.yaml" for name in shipped.list_shipped()} == set(map(str, FILES))
    for name, path in shipped.list_shipped().items():
        text = shipped.title(path)
        assert text
        assert not text.startswith("#"), name


@pytest.mark.parametrize("name", ["switch", "switch.yaml", "configs/switch.yaml"])
def test_a_shipped_config_is_used_by_its_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config, text = common.load_arguments([name, "moe.num_experts=16"])
    assert config.moe.top_k == 1
    assert text.startswith("# What it shows:")
    Path("switch").write_text("moe: {top_k: 3}")
    assert common.load_arguments(["switch"])[0].moe.top_k == 3


def test_copy_writes_a_new_file_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    configs.copy("modular/adapter")
    assert load("adapter.yaml") == load(ROOT / "configs/modular/adapter.yaml")
    with pytest.raises(ConfigError, match=r"FILE=adapter.yaml: exists; name another"):
        configs.copy("modular/adapter")
    with pytest.raises(ConfigError, match=r"FILE=none/x.yaml: cannot be written"):
        configs.copy("switch", Path("none/x.yaml"))
    with pytest.raises(ConfigError, match="did you mean mixtral_8x7b"):
        configs.copy("mixtral")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter.yaml"]


def test_a_wheel_holds_all_of_them_and_finds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for target, patterns in project["tool"]["setuptools"]["data-files"].items():
        (tmp_path / target).mkdir(parents=True)
        for path in (path for pattern in patterns for path in ROOT.glob(pattern)):
            shutil.copy(path, tmp_path / target)
    monkeypatch.setattr(shipped, "ROOT", tmp_path / "lib/site-packages")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    shipped.list_shipped.cache_clear()
    try:
        found = shipped.list_shipped()
    finally:
        shipped.list_shipped.cache_clear()
    assert {f"{name}.yaml" for name in found} == set(map(str, FILES))
    assert found["seeds/soft"] == tmp_path / "share/dmoe/configs/seeds/soft.yaml"
