"""Docker files, checked without an engine: pinned base, not root, sources exist, compose fits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILES = sorted((ROOT / "docker").glob("Dockerfile.*"))


def instructions(path: Path) -> list[tuple[str, str]]:
    """List (instruction, arguments) of a Dockerfile, lines joined, comments removed."""
    lines = [
        line
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.strip() and not line.lstrip().startswith("#")
    ]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [
        (name.upper(), rest)
        for name, _, rest in (line.partition(" ") for line in joined.splitlines())
    ]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_the_base_is_pinned_and_the_user_is_not_root(path: Path) -> None:
    steps = instructions(path)
    bases = [rest for name, rest in steps if name == "FROM"]
    assert bases
    assert all(re.fullmatch(r"[a-z/]+:\d+\.\d+\.\d+-[a-z-]+", base) for base in bases)
    assert [rest for name, rest in steps if name == "USER"] == ["dmoe"]
    after = steps[next(i for i, step in enumerate(steps) if step[0] == "USER") :]
    assert not [rest for name, rest in after if name == "RUN" and "pip" in rest]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_everything_that_is_copied_exists_and_passes_the_ignore_file(path: Path) -> None:
    sources = [
        word for name, rest in instructions(path) if name == "COPY" for word in rest.split()[:-1]
    ]
    allowed = {
        line[1:]
        for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line.startswith("!")
    }
    assert sources
    assert not [source for source in sources if not (ROOT / source).exists()]
    assert set(sources) <= allowed


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_every_install_is_held_to_the_constraints(path: Path) -> None:
    runs = [rest for name, rest in instructions(path) if name == "RUN" and "pip install" in rest]
    assert runs
    assert all("-c constraints.txt" in rest or "--no-deps" in rest for rest in runs)
    assert not re.search(r"(?i)(password|token|api_key)\s*=", path.read_text(encoding="utf-8"))


def test_compose_describes_one_job_on_two_machines() -> None:
    text = (ROOT / "docker" / "compose.yaml").read_text(encoding="utf-8")
    compose: dict[str, Any] = yaml.safe_load(text)
    services = compose["services"]
    environments = [service["environment"] for service in services.values()]
    assert sorted(environment["NODE_RANK"] for environment in environments) == ["0", "1"]
    assert {environment["NNODES"] for environment in environments} == {str(len(services))}
    first = next(
        name for name, service in services.items() if service["environment"]["NODE_RANK"] == "0"
    )
    assert {environment["MASTER_ADDR"] for environment in environments} == {first}
    assert len({environment["RUN_DIR"] for environment in environments}) == 1
    for service in services.values():
        assert (ROOT / service["build"]["dockerfile"]).is_file()
        assert all((ROOT / word).is_file() for word in service["command"][1:])
        assert service["volumes"] == ["runs:/home/dmoe/runs"]
    assert "runs" in compose["volumes"]


def test_the_image_of_compose_has_as_many_ranks_as_its_config_wants() -> None:
    service = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text(encoding="utf-8"))[
        "services"
    ]["node0"]
    config = yaml.safe_load((ROOT / service["command"][-1]).read_text(encoding="utf-8"))
    world = int(service["environment"]["NNODES"]) * int(service["environment"]["RANKS_PER_NODE"])
    assert world % config["parallel"]["ep"] == 0


def test_the_image_for_gpus_names_the_driver_that_its_torch_needs() -> None:
    """torch's wheel brings CUDA, whose least driver is the host's affair: 13.0 needs 580."""
    text = (ROOT / "docker" / "Dockerfile.cuda").read_text(encoding="utf-8")
    pinned = re.search(r"^torch==(\d+\.\d+)", (ROOT / "constraints.txt").read_text("utf-8"), re.M)
    assert pinned is not None
    assert f"torch {pinned[1]} is" in text
    assert re.search(r"CUDA 13\.0 and needs driver 580", text)
