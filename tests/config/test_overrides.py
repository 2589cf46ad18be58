"""An override of a text field is that text; of any other field, YAML without its traps."""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from dmoe.cli.common import load_arguments, split
from dmoe.config.errors import ConfigError
from dmoe.config.load import load, load_text, to_yaml
from dmoe.config.schema import Config

TEXTS = {
    "leading zero": ("data.source=0123", "0123"),
    "hexadecimal": ("data.source=0x10", "0x10"),
    "a glob": ("data.source=*.py", "*.py"),
    "a mapping to YAML": ("train.sample_prompt=def f(x):", "def f(x):"),
    "a list to YAML": ("train.sample_prompt=[1, 2", "[1, 2"),
    "a comment to YAML": ("data.source=a #b", "a #b"),
    "a tag to YAML": ("train.sample_prompt=!important", "!important"),
    "true": ("data.source=true", "true"),
    "an equals sign": ("data.source=runs/lr=0.1/text", "runs/lr=0.1/text"),
    "nothing, in quotes": ("train.sample_prompt=''", ""),
    "white space": ("train.sample_prompt=  x ", "  x "),
    "double quotes": ('train.sample_prompt="def "', "def "),
    "an escape": (r'train.sample_prompt="a\nb"', "a\nb"),
    "single quotes": ("train.sample_prompt='it''s'", "it's"),
    "one quote": ("train.sample_prompt='tis", "'tis"),
    "two quoted words": ('train.sample_prompt="a" or "b"', '"a" or "b"'),
    "null of a text": ("data.source=null", "null"),
    "null of an optional text": ("train.run_dir=null", None),
    "quoted null": ('train.run_dir="null"', "null"),
    "number or text": ("parallel.ep=4", 4),
    "text or number": ("parallel.ep=auto", "auto"),
}


def value_of(config: Config, override: str) -> Any:
    return reduce(getattr, override.partition("=")[0].split("."), config)


@pytest.mark.parametrize("name", TEXTS)
def test_text_is_taken_literally(name: str) -> None:
    """As YAML, 0123 is 83, a star begins an alias, and a colon at the end makes a mapping."""
    override, expected = TEXTS[name]
    config = load(None, [override])
    assert value_of(config, override) == expected
    assert load_text(to_yaml(config), "resolved.yaml") == config, (
        "and it survives the run's resolved.yaml"
    )


def test_the_file_is_kept_as_given_with_the_overrides_after_it(tmp_path: Path) -> None:
    """Without a line break at its end, an override could join the file's last line."""
    file = tmp_path / "small.yaml"
    file.write_text("moe: {num_experts: 4}\ntrain:\n  run_dir: here", encoding="utf-8")
    _, given = load_arguments([str(file), "moe.top_k=1", "train.steps=3"])
    assert given.splitlines()[-3:] == [
        "  run_dir: here",
        "# override: moe.top_k=1",
        "# override: train.steps=3",
    ]
    assert load_text(given, "config.yaml").train.run_dir == "here"


def test_an_override_cannot_leave_its_comment() -> None:
    """A line break in a prompt must not end the comment in the run's config.yaml."""
    _, given = load_arguments(["train.sample_prompt=a\nmodel: {dim: 3}"])
    assert load_text(given, "config.yaml") == Config()


def test_a_load_leaves_nothing_for_the_next() -> None:
    """The schema is built once per process: what one config holds must not be in another."""
    changed = load(
        None, ["moe.top_k=1", "tracking.trackers=[]", "optim.groups={router: {lr: 2.0}}"]
    )
    assert changed.moe.top_k == 1
    load(None).tracking.trackers.append("mine")
    assert load(None) == Config()


def test_the_first_argument_may_be_a_file_with_an_equals_sign(tmp_path: Path) -> None:
    file = tmp_path / "lr=0.1.yaml"
    assert split([str(file), "moe.top_k=1"]) == (None, [str(file), "moe.top_k=1"])
    file.write_text("optim: {lr: 0.1}", encoding="utf-8")
    assert split([str(file), "moe.top_k=1"]) == (str(file), ["moe.top_k=1"])
    assert load_arguments([str(file)])[0].optim.lr == 0.1


def test_a_second_file_is_refused() -> None:
    for arguments in (["a.yaml", "b.yaml"], ["moe.top_k=1", "b.yaml"]):
        with pytest.raises(ConfigError, match=r"argument=b\.yaml: .* put CONFIG first"):
            split(arguments)
