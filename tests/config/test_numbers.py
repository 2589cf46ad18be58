"""A value is never read as another one: numbers are decimal or refused, nothing may be empty.

`train.seed=010` was seed 8, `train.steps=0600` was 384 steps (YAML 1.1 reads them as octal), and
`optim.clip=$UNSET` switched clipping off, each without a word.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import pytest

from dmoe.config.errors import ConfigError
from dmoe.config.load import load, load_text, to_yaml
from dmoe.config.schema import Config

OTHER_NOTATIONS = {
    "octal": "train.seed=010",
    "octal with a 6": "train.steps=0600",
    "a leading zero": "train.steps=09",
    "separators": "train.steps=1_000",
    "hexadecimal": "train.steps=0x10",
    "binary": "train.steps=0b11",
    "a sign": "train.steps=+5",
    "sexagesimal": "train.steps=1:30",
    "quoted": "train.steps='0600'",
    "digits of another script": "train.steps=٣٠",
    "full-width digits": "train.steps=\N{FULLWIDTH DIGIT SIX}\N{FULLWIDTH DIGIT ZERO}",
    "a float": "optim.lr=01.5",
    "a float with separators": "optim.lr=1_0.5",
    "a float with a sign": "optim.lr=+0.1",
    "a sexagesimal float": "optim.lr=1:30.5",
    "an optional number": "train.micro_batch=010",
    "a number or a word": "parallel.ep=02",
    "in a list": "train.profile_steps=[010]",
    "in a list of lists": "moe.experts.shapes=[[010]]",
    "in a list of floats": "modular.weights=[0_5]",
    "in a section": "moe={top_k: 01}",
    "a switch": "train.deterministic=010",
    "an optional switch": "modular.renormalize=01",
    "an exponent for an integer": "train.steps=1e3",
    "a fraction for an integer": "train.steps=600.0",
}


@pytest.mark.parametrize("name", OTHER_NOTATIONS)
def test_another_notation_is_refused(name: str) -> None:
    override = OTHER_NOTATIONS[name]
    with pytest.raises(ConfigError) as on_command_line:
        load(None, [override])
    section, _, rest = override.partition("=")[0].partition(".")
    value = override.partition("=")[2]
    text = f"{section}:\n  {rest}: {value}\n" if rest else f"{section}: {value}\n"
    with pytest.raises(ConfigError) as in_file:
        load_text(text, "my.yaml")
    assert on_command_line.value.field == in_file.value.field
    assert "my.yaml" in str(in_file.value)


DECIMAL = {
    "train.seed=10": 10,
    "train.seed=0": 0,
    "optim.lr=1e-3": 0.001,
    "optim.lr=2E-3": 0.002,
    "optim.lr=.5": 0.5,
    "optim.lr=1.": 1.0,
    "optim.lr=1": 1.0,
    "optim.clip=null": None,
    "optim.clip=~": None,
    "parallel.ep=2": 2,
    "train.profile_steps=[10, 20]": [10, 20],
    "train.steps='600'": 600,
    "train.deterministic=yes": True,
    "train.run_dir=010": "010",
    "data.source=1_000": "1_000",
}


@pytest.mark.parametrize("override", DECIMAL)
def test_decimal_numbers_and_texts_are_what_is_written(override: str) -> None:
    config = load(None, [override])
    found: Any = reduce(getattr, override.partition("=")[0].split("."), config)
    assert found == DECIMAL[override]
    assert type(found) is type(DECIMAL[override])
    assert load_text(to_yaml(config), "resolved.yaml") == config


def test_every_default_survives_its_own_yaml() -> None:
    assert load_text(to_yaml(Config()), "resolved.yaml") == Config()


@pytest.mark.parametrize(
    "override",
    [
        "optim.clip=",
        "optim.clip= ",
        "optim.clip=# none",
        "moe.capacity.factor=",
        "train.run_dir=",
        "data.source=",
        "train.sample_prompt=",
        "tracking.trackers=",
        "train.deterministic=",
        "moe=",
        "moe.router={score: }",
    ],
)
def test_an_empty_value_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=r"empty|no value"):
        load(None, [override])


@pytest.mark.parametrize(
    "text",
    ["optim:\n  clip:\n", "optim: {clip: }", "train: {profile_steps: [1, ]}\nmoe:", "optim:"],
)
def test_an_empty_value_in_a_file_is_refused(text: str) -> None:
    """A template whose variable is not set leaves `clip:` without a value, which YAML reads as null."""
    with pytest.raises(ConfigError, match="an empty value is not allowed"):
        load_text(text, "my.yaml")


def test_an_empty_file_is_the_defaults() -> None:
    assert load_text("# nothing\n", "my.yaml") == Config()


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--ranks", "010"],
        ["train", "--ranks", "0"],
        ["train", "--ranks", "2", "--port", "1_0"],
        ["explain", "--world", "+2"],
        ["generate", "run", "--prompt", "a", "--top-k", "010"],
        ["generate", "run", "--prompt", "a", "--temperature", "0_1"],
        ["verify", "--worlds", "1,02"],
        ["simulate", "--ranks", "010"],
        ["modules", "export", "run", "--to", "x", "--module", "0x1"],
    ],
    ids=" ".join,
)
def test_options_of_the_commands_are_decimal_too(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--ranks 010` was ten ranks: Python's `int` drops the zero, and `_`, and accepts a sign."""
    monkeypatch.setattr("sys.argv", ["dmoe", *arguments])
    from dmoe.cli.main import dispatch_command

    assert dispatch_command() == 2
    message = capsys.readouterr().err
    assert arguments[-1] in message
    assert message.count("\n") == 1
