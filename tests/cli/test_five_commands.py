"""From the wheel to a sweep of three configs over two seeds and its comparison: five commands."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.cli.commands import environment

ROOT = Path(__file__).parents[2]
PARTS = ("dmoe", "configs", "constraints.txt", "pyproject.toml", "README.md", "LICENSE")
SMALL = (
    *("model.dim=16", "model.layers=1", "model.heads=2", "moe.expert_dim=8", "data.seq_len=16"),
    *("data.source=synthetic:zipf", "train.steps=2", "train.global_batch=4", "optim.warmup=0"),
    *("train.eval_sequences=4", "train.sample_tokens=0", "train.device=cpu"),
    "tracking.trackers=[]",
)


def run(*command: str | Path, cwd: Path) -> str:
    """Run one of the commands as a person would, outside of the repository; return stdout."""
    env = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.slow
def test_five_commands_lead_from_the_wheel_to_a_comparison(tmp_path: Path) -> None:
    """The libraries that dmoe depends on are those of this environment, dmoe is the wheel's."""
    source, place, fresh = tmp_path / "source", tmp_path / "work", tmp_path / "venv"
    source.mkdir()
    place.mkdir()
    for part in PARTS:
        ignore = shutil.ignore_patterns("__pycache__")
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, source / part, **({"ignore": ignore} if copy is shutil.copytree else {}))
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    # setuptools of this environment, if it can build the project: no download
    try:
        offline = (
            ("--no-build-isolation",) if int(version("setuptools").split(".")[0]) >= 77 else ()
        )
    except ModuleNotFoundError:
        offline = ()
    run(*pip, "wheel", source, "--no-deps", *offline, "-w", tmp_path, cwd=tmp_path)
    (wheel,) = tmp_path.glob("dmoe-*.whl")
    venv.create(fresh)
    (libraries,) = fresh.glob("lib/python*/site-packages")
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (libraries / "libraries-of-the-test.pth").write_text("\n".join(paths), encoding="utf-8")
    dmoe = fresh / "bin" / "dmoe"

    run(*pip, "--python", fresh / "bin" / "python", "install", "--no-deps", wheel, cwd=place)
    run(dmoe, "configs", "copy", "quickstart", "my.yaml", cwd=place)
    swept = run(
        *(dmoe, "sweep", "my.yaml", "moe.num_experts=2,4,8", "train.seed=0,1", *SMALL),
        *("--dir", "swept", "--jobs", "2"),
        cwd=place,
    )
    names = [f"swept/num_experts={e},seed={s}" for e in (2, 4, 8) for s in (0, 1)]
    compared = json.loads(run(dmoe, "compare", *names, "--json", cwd=place))

    assert "6 runs in swept" in swept
    for words in ("over seeds", "moe.num_experts=8     2"):
        assert words in swept, swept[-3000:]
    assert len(compared["runs"]) == 6
    where = run(fresh / "bin" / "python", "-c", "import dmoe; print(dmoe.__file__)", cwd=place)
    assert Path(where.strip()).is_relative_to(fresh), "the wheel's, not the repository's"
