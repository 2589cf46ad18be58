"""References to code of the user's own: what is loaded, what is refused, and in which words."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dmoe
from dmoe.config.errors import ConfigError
from dmoe.config.load import load, to_yaml
from dmoe.config.plugin_loader import construct, load_plugins, plugin_class
from dmoe.config.plugins import FIELDS, get, label, parse
from dmoe.config.rules import check
from dmoe.config.schedule import describe_schedule, learning_rate
from dmoe.config.schema import Config, RouterConfig
from dmoe.data import open_data
from dmoe.moe.experts import build_experts
from dmoe.moe.routers import build_router
from dmoe.train.optimizer import build_optimizer

EXAMPLE = Path(__file__).parents[2] / "examples" / "nearest_router.py"
KINDS = Path(__file__).parents[1] / "own_kinds.py"
ROUTER = f"moe.router.kind={EXAMPLE}:Nearest"


def build(*overrides: str) -> object:
    """Do what a run does with every kind of code."""
    config = load_plugins(load(None, [*overrides]))
    check(config)
    moe = config.moe
    build_experts(moe.experts, 8, 12, 4, 8)
    build_optimizer(torch.nn.Linear(2, 2), config.optim)
    layer = dmoe.MoE.from_config(moe, 8)
    layer(torch.randn(6, 8))
    if config.data.source != "stdlib":
        open_data(config.data, 0)
    return layer


def refusal(*overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as refused:
        build(*overrides)
    assert "\n" not in str(refused.value)
    return refused.value


@pytest.mark.parametrize(
    ("value", "field", "found"),
    [
        ("./my_router.py:Nearest", "", ("./my_router.py", "Nearest")),
        ("/a b/c.py:X", "", ("/a b/c.py", "X")),
        ("my_pkg:Nearest", "", ("my_pkg", "Nearest")),
        ("pkg.module:Nearest", "data.source", ("pkg.module", "Nearest")),
        ("top_k", "", None),
        ("x.py", "", None),
        ("x.py:", "", None),
        ("x.py:a-b", "", None),
        ("guide:de", "data.source", None),
        ("upper:stdlib", "data.source", None),
        ("synthetic:zipf", "data.source", None),
        ("a.txt,b.py:X", "data.source", None),
        (3, "", None),
        (None, "", None),
    ],
)
def test_what_is_a_reference(value: object, field: str, found: tuple[str, str] | None) -> None:
    reference = parse(value, field)
    assert (reference and (reference.place, reference.name)) == found


def test_a_loaded_reference_is_absolute_hashed_and_written_to_yaml(tmp_path: Path) -> None:
    config = load_plugins(load(None, [ROUTER, "moe.router.options.power=2"]))
    digest = hashlib.sha256(EXAMPLE.read_bytes()).hexdigest()
    assert config.moe.router.kind == f"{EXAMPLE}:Nearest@{digest}"
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    again = load_plugins(load(tmp_path / "resolved.yaml"))
    assert again == config
    router = build_router(again.moe.router, 8, 4, 2, 0)
    assert (type(router).__name__, router.power) == ("Nearest", 2)
    assert label(config.moe.router.kind) == "nearest_router.py:Nearest"


def test_a_path_in_a_config_file_starts_there_and_in_an_override_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_bytes(EXAMPLE.read_bytes())
    (tmp_path / "mine.yaml").write_text("moe: {router: {kind: './mine.py:Nearest'}}\n")
    monkeypatch.chdir(tmp_path.parent)
    from_file = load_plugins(load(str(tmp_path / "mine.yaml")))
    here = load_plugins(load(None, [f"moe.router.kind={tmp_path.name}/mine.py:Nearest"]))
    assert from_file.moe.router.kind == here.moe.router.kind


def test_a_module_on_the_path_is_loaded_and_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "routers.py").write_bytes(EXAMPLE.read_bytes())
    monkeypatch.syspath_prepend(tmp_path)
    config = load_plugins(load(None, ["moe.router.kind=own_package.routers:Nearest"]))
    assert config.moe.router.kind.startswith("own_package.routers:Nearest@")
    assert type(build_router(config.moe.router, 8, 4, 2, 0)).__module__ == "own_package.routers"


def test_a_config_that_nobody_has_loaded_runs_no_code(tmp_path: Path) -> None:
    """A run directory of somebody else names a file of theirs: looking at it must not run it."""
    code, proof = tmp_path / "evil.py", tmp_path / "proof"
    code.write_text(f"open({str(proof)!r}, 'w')\nclass Nearest: pass\n")
    reference = f"{code}:Nearest@{hashlib.sha256(code.read_bytes()).hexdigest()}"
    config = load(None, [f"moe.router.kind={reference}"])
    check(config)
    for kind in (reference, f"{code}:Nearest", "subprocess:Popen", "os:PathLike"):
        with pytest.raises(ConfigError, match="--trust-code"):
            build_router(RouterConfig(kind=kind), 8, 4, 2, 0)
    assert not proof.exists()
    load_plugins(config)
    assert proof.exists()


def test_the_bytes_that_are_hashed_run_although_the_file_has_the_old_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cached bytecode, which goes by time and size, would run the old router under the new hash."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    code = tmp_path / "router.py"
    sources = [EXAMPLE.read_text().replace("= 1.0", f"= {n}.0") for n in (3, 4)]
    powers = []
    for source in sources:
        code.write_text(source)
        os.utime(code, (10**9, 10**9))
        config = load_plugins(load(None, [f"moe.router.kind={code}:Nearest"]))
        powers.append(build_router(config.moe.router, 8, 4, 2, 0).power)
    assert powers == [3.0, 4.0]


def test_a_changed_file_is_refused_unless_it_is_accepted(tmp_path: Path) -> None:
    code = tmp_path / "router.py"
    code.write_bytes(EXAMPLE.read_bytes())
    config = load_plugins(load(None, [f"moe.router.kind={code}:Nearest"]))
    code.write_text(EXAMPLE.read_text() + "# another word\n")
    with pytest.raises(ConfigError, match=r"is not the file that this config was written with"):
        load_plugins(config)
    accepting = replace(config, checkpoint=replace(config.checkpoint, accept_changes=["moe"]))
    assert load_plugins(accepting).moe.router.kind != config.moe.router.kind


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import torch\nraise KeyError('a')\n", r"KeyError: 'a' \(mine.py, line 2\)"),
        ("x = (\n", r"SyntaxError: .*\(mine.py, line 1\)"),
        ("def f():\n    import no_such\nf()\n", r"No module named 'no_such' \(mine.py, line 2\)"),
        ("import sys\nsys.exit(3)\n", r"SystemExit: 3 \(mine.py, line 2\)"),
        ("class Other: pass\n", r"Nearest is not in it; mine.py has Other"),
        ("Nearest = 3\n", r"Nearest is no class; mine.py has none"),
        ("class Nearest: pass\n", r"takes no arguments|must be derived from"),
        ("\0", r"null bytes|cannot be imported"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence(
    tmp_path: Path, source: str, message: str
) -> None:
    (tmp_path / "mine.py").write_text(source)
    before = set(sys.modules)
    error = refusal(f"moe.router.kind={tmp_path / 'mine.py'}:Nearest")
    assert error.field == "moe.router.kind"
    assert re.search(message, str(error)), error
    if "cannot be imported" in str(error):
        assert not {name for name in set(sys.modules) - before if name.startswith("dmoe_plugin")}


@pytest.mark.parametrize(
    ("overrides", "field", "message"),
    [
        (["moe.router.kind=./none.py:A"], "moe.router.kind", "cannot be read"),
        (["moe.router.kind=no_such_package:A"], "moe.router.kind", "there is no Python module"),
        (["moe.router.kind=json.decoder:JSONDecoder"], "moe.router.kind", "must be derived from"),
        (["moe.router.kind=nearest"], "moe.router.kind", "FILE.py:Name"),
        ([ROUTER, "moe.router.options.sharpness=2"], "moe.router.options", "sharpness"),
        (["moe.router.options.power=2"], "moe.router.options", "is built in"),
        ([ROUTER, "moe.router.options=3"], "moe.router.options", "must be a mapping"),
        ([ROUTER, "moe.router.groups=2"], "moe.router.groups", "no meaning"),
        ([f"moe.router.kind={KINDS}:Broken"], "moe.router.kind", "must be derived"),
        ([f"moe.experts.kind={KINDS}:Lion"], "moe.experts.kind", "must be derived"),
        (
            [f"moe.experts.kind={KINDS}:Squared", "moe.experts.shapes=[[3]]"],
            "moe.experts.shapes",
            "own",
        ),
        ([f"optim.kind={KINDS}:Squared"], "optim.kind", "must be derived"),
        ([f"optim.kind={KINDS}:Lion", "optim.options.gamma=1"], "optim.options", "gamma"),
        (
            [f"data.tokenizer={KINDS}:Squares", "data.source=synthetic:zipf"],
            "data.tokenizer",
            "vocab",
        ),
        ([f"data.source={KINDS}:Broken"], "data.source", "ZeroDivisionError: made nothing"),
        ([f"data.source={KINDS}:Sawtooth"], "data.source_options", "missing a required argument"),
        ([f"data.source={KINDS}:NO_CLASS"], "data.source", "is no class"),
        (["moe.balance.own=0.1"], "moe.balance.own", "set the other one"),
        (["moe.balance.kind=entropy", "moe.balance.own=1"], "moe.balance.kind", "FILE.py:Name"),
        ([f"moe.balance.kind={KINDS}:Squares", "moe.balance.own=1"], "moe.balance.kind", "values"),
    ],
)
def test_every_mistake_names_its_field(overrides: list[str], field: str, message: str) -> None:
    error = refusal(*overrides)
    assert (error.field, message in str(error)) == (field, True), error


def test_an_error_of_the_constructor_has_its_line(tmp_path: Path) -> None:
    code = tmp_path / "mine.py"
    code.write_text(EXAMPLE.read_text().replace("self.power = power", "self.power = 1 // 0"))
    line = code.read_text().splitlines().index("        self.power = 1 // 0") + 1
    assert f"(mine.py, line {line})" in str(refusal(f"moe.router.kind={code}:Nearest"))


def test_a_schedule_that_gives_no_rate_is_refused(tmp_path: Path) -> None:
    code = tmp_path / "mine.py"
    code.write_text(
        "class S:\n    def __init__(self, optim, steps): pass\n"
        "    def rate(self, step): return float('nan') if step else 1\n"
    )
    optim = load_plugins(load(None, [f"optim.schedule={code}:S"])).optim
    assert learning_rate(0, 9, optim) == 1
    with pytest.raises(ConfigError, match="gives nan for step 1"):
        learning_rate(1, 9, optim)
    assert "mine.py:S of your own (sha256" in describe_schedule(optim, 9)


def test_every_field_has_its_options_and_takes_a_reference() -> None:
    config = Config()
    for field in FIELDS:
        section, _, last = field.rpartition(".")
        options = f"{section}.options" if last == "kind" else f"{field}_options"
        assert get(config, options) == {}
        loaded = load(None, [f"{field}=./x.py:Mine", f"{options}={{a: [1, x]}}"])
        assert (get(loaded, field), get(loaded, options)) == ("./x.py:Mine", {"a": [1, "x"]})


def test_tokenizer_and_source_of_ones_own_make_a_corpus() -> None:
    config = load_plugins(
        load(
            None,
            [
                f"data.source={KINDS}:Squares",
                "data.source_options.count=20",
                f"data.tokenizer={KINDS}:Nibbles",
                "data.holdout=0.2",
            ],
        )
    )
    data = open_data(config.data, 0)
    assert data.domains == ("squares",)
    text = data.tokenizer.decode(data.train.samples(0, 1)[0].tolist())
    assert set(text) <= set("0123456789 \ufffd")
    assert "own_kinds.py:Squares: 20 files" in data.summary


def test_construct_wants_a_loaded_class() -> None:
    with pytest.raises(ConfigError, match="--trust-code"):
        construct(f"{KINDS}:Lion", "optim.kind", options={})
    assert plugin_class("top_k", "moe.router.kind") is None
