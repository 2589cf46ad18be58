"""Output of `dmoe explain` for every config, and its list of fields."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dmoe.cli.explain import MAX_WIDTH, as_text, choose_world, fields_as_text
from dmoe.config.errors import ConfigError
from dmoe.config.fields import list_fields
from dmoe.config.keywords import shown
from dmoe.config.load import load
from dmoe.config.schema import Config
from dmoe.explain import explain
from tests.cli.commands import SMALL, dmoe, refused, run_in_process
from tests.launch.test_configs import FILES, count
from tests.launch.test_configs import load as load_file
from tests.tiny import tiny

ROUTERS = {
    "top_k": [],
    "noisy": ["moe.balance.load=0.1"],
    "group_limited": ["moe.router.groups=4", "moe.router.topk_groups=2"],
    "adaptive": ["moe.router.renormalize=false", "moe.top_k=4"],
    "fixed": [],
    "hash": [],
    "workload": ["moe.router.workload=W1"],
    "soft": ["moe.top_k=8"],
    "expert_choice": ["moe.router.allow_future_leak=true"],
    "budget": ["moe.router.renormalize=false"],
}


def numbers(config: Config, world: int) -> dict[str, dict[str, Any]]:
    return {section.key: section.numbers for section in explain(config, world)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_config_is_explained_without_ranks(path: Path) -> None:
    config = load(path)
    world, origin = choose_world(config, None)
    sections = explain(config, world)
    text = as_text(world, origin, sections)
    assert max(map(len, text.splitlines())) <= MAX_WIDTH
    for unformatted in ("None", "nan", "{", "e+"):
        assert unformatted not in text
    json.dumps([section.numbers for section in sections], allow_nan=False)
    total, active = count(load_file(path.name), vocabulary=256)
    size = numbers(config, world)["size"]
    assert (size["parameters"], size["active_parameters"]) == (total, active)


@pytest.mark.parametrize("group", ["rank", "sequence", "global"])
@pytest.mark.parametrize("kind", ROUTERS)
def test_every_router_is_explained(kind: str, group: str) -> None:
    overrides = [f"moe.router.kind={kind}", "moe.capacity.factor=1.5", *ROUTERS[kind]]
    if (kind, group) == ("expert_choice", "global"):
        pytest.skip("refused: it would compare tokens of all ranks before any is sent")
    sections = {
        section.key: section
        for section in explain(tiny(*overrides, f"moe.capacity.group={group}"), 2)
    }
    assert sections["routing"].numbers["kind"] == kind
    assert sections["capacity"].numbers["slots"] >= 1
    assert any(sentence.startswith("Choice: ") for sentence in sections["routing"].sentences)


def test_the_world_is_the_option_or_from_the_config() -> None:
    assert choose_world(tiny("parallel.ep=8"), None) == (8, "parallel.ep")
    assert choose_world(tiny("parallel.ep=8"), 16) == (16, "--world")
    assert choose_world(tiny(), None) == (1, "default")


def test_an_impossible_world_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.ep=3: must divide the world of 4"):
        explain(tiny("parallel.ep=3"), 4)


def test_text_and_json_have_the_same_sentences(tmp_path: Path) -> None:
    """With ep=8 and no --world, the world is 8, and the text says so."""
    result = dmoe("explain", "parallel.ep=8", "moe.capacity.factor=1.25", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "On 8 ranks (from parallel.ep" in result.stdout
    assert "rank 7: experts 7" in result.stdout
    content = json.loads(
        dmoe("explain", "parallel.ep=8", "moe.capacity.factor=1.25", "--json", cwd=tmp_path).stdout
    )
    assert content["world"] == 8
    plain = " ".join(result.stdout.split())
    for section in (value for value in content.values() if isinstance(value, dict)):
        for sentence in section["words"]:
            assert " ".join(sentence.split()) in plain
    refused(
        dmoe("explain", "--world", "3", "parallel.ep=8", cwd=tmp_path),
        "parallel.ep=8",
        "world of 3",
    )


def test_a_dense_model_has_no_sections_on_experts() -> None:
    sections = {section.key: section for section in explain(tiny("model.moe_every=0"), 2)}
    assert "dense" in sections["experts"].sentences[0]
    assert sections.keys() == {"batch", "experts", "size", "optimization", "evaluation"}


def test_the_held_out_split_is_named() -> None:
    """It was a share of the files, also where files are cut or named."""
    for override, expected in (
        ("data.holdout=0.1", "10% of the documents, by a hash of their content; of fewer than 50"),
        ("data.validation_source=b.txt", "Held out: data.validation_source=b.txt."),
    ):
        sections = {section.key: section for section in explain(tiny(override), 1)}
        assert expected in " ".join(sections["evaluation"].sentences)


def test_listed_fields_are_those_of_the_schema() -> None:
    listed = {field.name: field for field in list_fields()}
    expected = {shown(name): value for name, value in leaves(Config(), "")}
    assert listed.keys() == expected.keys()
    for name, value in expected.items():
        read = listed[name].default
        assert value in (read, yaml.safe_load(read)) or float(read) == value
        assert len(listed[name].doc) > 10, f"{name} has no docstring"
    assert listed["moe.exchange"].type == "packed | padded"
    assert listed["model.kv_heads"].type == "int | null"
    assert "moe.router.kind: top_k | noisy" in fields_as_text()


def leaves(section: Any, prefix: str) -> list[tuple[str, Any]]:
    found = []
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        name = f"{prefix}{item.name}"
        found += leaves(value, f"{name}.") if dataclasses.is_dataclass(value) else [(name, value)]
    return found


@pytest.mark.parametrize(
    ("ep", "ranks_per_node", "nodes"), [(2, 4, 1), (4, 4, 1), (8, 4, 2), (4, 3, 2), (1, 4, 1)]
)
def test_the_machines_of_an_ep_group(ep: int, ranks_per_node: int, nodes: int) -> None:
    (experts,) = [
        section
        for section in explain(tiny(f"parallel.ep={ep}", "moe.num_experts=8"), 8, ranks_per_node)
        if section.key == "experts"
    ]
    ranks_of_groups = [range(first, first + ep) for first in range(0, 8, ep)]
    spanned = max(len({rank // ranks_per_node for rank in group}) for group in ranks_of_groups)
    assert experts.numbers["nodes_of_ep_group"] == nodes == spanned
    said = " ".join(experts.sentences)
    assert ("cross the network. An EP" in said) == (nodes > 1)
    assert ("never cross the network" in said) == (nodes == 1 and ep > 1)


def test_explain_names_the_plan_and_the_cards_that_are_too_small(tmp_path: Path) -> None:
    arguments = ("configs/mixtral_8x7b.yaml", "--world", "16")
    done = run_in_process("explain", *arguments, cwd=tmp_path)
    words = " ".join(done.stdout.split())
    cards = "8 x H100 SXM 80 GB or 8 x A100 SXM 80 GB"
    assert f"No card of {cards} holds the 112 GB per rank" in words
    assert "Cards that do: 8 x H200" in words
    assert words.endswith("dmoe plan configs/mixtral_8x7b.yaml --ranks 16")
    small = run_in_process("explain", *SMALL, "moe.top_k=4", "--json", cwd=tmp_path)
    plan = json.loads(small.stdout)["plan"]
    assert plan["numbers"]["command"].endswith("moe.top_k=4 --ranks 1")
    assert not plan["numbers"]["cards_too_small"]
