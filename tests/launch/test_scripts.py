"""Launch scripts refuse an incomplete configuration, else start the documented command.

torchrun, srun, scontrol and accelerate are fakes that record their arguments.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.ranks

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch", ROOT / ".ci" / "run"]
CONFIG = "configs/cpu_8_ranks.yaml"
BASH = shutil.which("bash") or "/bin/bash"

MULTI_NODE = {
    "NNODES": "2",
    "NODE_RANK": "1",
    "MASTER_ADDR": "node0",
    "RANKS_PER_NODE": "4",
    "RUN_DIR": "/shared/run",
}
SLURM = {
    "SLURM_JOB_ID": "12345",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_SUBMIT_DIR": str(ROOT),
    "RUN_DIR": "/shared/run",
}
GOOD: dict[str, dict[str, str]] = {
    "local.sh": {"RANKS": "2"},
    "multi_node.sh": MULTI_NODE,
    "slurm.sbatch": SLURM,
    "accelerate.sh": {"DEVICE": "cpu", "RANKS": "2"},
}

RECORD = """#!{bash}
printf '%s\\n' "{name}" "$@" >>"$RECORD"
echo "share=${{TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-}} omp=${{OMP_NUM_THREADS:-}}" >>"$RECORD.env"
"""
SRUN = """#!{bash}
while [[ "$1" == --* ]]; do shift; done
for node in 0 1; do SLURM_NODEID=$node "$@"; done
{end}
"""


def tools(folder: Path, srun_end: str = "") -> Path:
    """Make a bin directory with the fakes and the few programs the scripts call."""
    folder.mkdir()
    for name in ("bash", "nproc", "dirname", "sleep"):
        target = shutil.which(name)
        assert target
        (folder / name).symlink_to(target)
    texts = {name: RECORD.format(bash=BASH, name=name) for name in ("torchrun", "accelerate")}
    texts["srun"] = SRUN.format(bash=BASH, end=srun_end)
    texts["scontrol"] = (
        f'#!{BASH}\n[[ $1 == show ]] && printf "n1\\nn2\\n" ||'
        ' printf "%s\\n" scontrol "$@" >>"$RECORD"\n'
    )
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(0o755)
    return folder


def run(
    script: str, env: dict[str, str], arguments: list[str], tmp_path: Path, **kinds: str
) -> tuple[int, str, list[str]]:
    """Launch with only `env` in the environment: (status, stderr, recorded words)."""
    bin_dir = tools(tmp_path / "bin", **kinds)
    record = tmp_path / "record"
    full = {"PATH": str(bin_dir), "RECORD": str(record), "HOME": str(tmp_path), **env}
    done = subprocess.run(
        [BASH, str(LAUNCH / script), *arguments],
        cwd=ROOT,
        env=full,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return (
        done.returncode,
        done.stderr,
        record.read_text(encoding="utf-8").splitlines() if record.exists() else [],
    )


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_syntax(path: Path) -> None:
    subprocess.run([BASH, "-n", str(path)], check=True, timeout=30)
    assert "set -euo pipefail" in path.read_text(encoding="utf-8")
    if path.suffix != ".sbatch":
        assert os.access(path, os.X_OK), f"{path} is not executable"


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(path: Path) -> None:
    done = subprocess.run(
        ["shellcheck", "-s", "bash", str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("script", "variable", "value"),
    [
        ("local.sh", "RANKS", ""),
        ("local.sh", "RANKS", "two"),
        ("local.sh", "RANKS", "0"),
        ("accelerate.sh", "RANKS", ""),
        ("accelerate.sh", "DEVICE", ""),
        ("accelerate.sh", "DEVICE", "tpu"),
        *[("multi_node.sh", name, "") for name in MULTI_NODE],
        ("multi_node.sh", "NODE_RANK", "2"),
        ("multi_node.sh", "MASTER_PORT", "http"),
        ("multi_node.sh", "MAX_RESTARTS", "-1"),
        ("slurm.sbatch", "SLURM_JOB_ID", ""),
        ("slurm.sbatch", "RUN_DIR", ""),
        ("slurm.sbatch", "RANKS_PER_NODE", "all"),
        ("slurm.sbatch", "SLURM_SUBMIT_DIR", "/nowhere"),
    ],
)
def test_a_half_configured_launch_is_refused(
    script: str, variable: str, value: str, tmp_path: Path
) -> None:
    status, stderr, recorded = run(script, {**GOOD[script], variable: value}, [CONFIG], tmp_path)
    assert status == 2
    assert variable in stderr
    assert len(stderr.strip().splitlines()) == 1
    assert stderr.rstrip().endswith(".")
    assert not recorded


def test_slurm_without_gpus_asks_for_the_number_of_ranks(tmp_path: Path) -> None:
    env = {name: value for name, value in SLURM.items() if name != "SLURM_GPUS_ON_NODE"}
    status, stderr, _ = run("slurm.sbatch", env, [CONFIG], tmp_path)
    assert status == 2
    assert "RANKS_PER_NODE" in stderr


@pytest.mark.parametrize("script", GOOD)
@pytest.mark.parametrize("arguments", [[], ["configs/no_such_file.yaml"]], ids=["none", "missing"])
def test_a_missing_config_is_refused(script: str, arguments: list[str], tmp_path: Path) -> None:
    status, stderr, recorded = run(script, GOOD[script], arguments, tmp_path)
    assert status == 2
    assert "CONFIG" in stderr
    assert not recorded


@pytest.mark.parametrize(
    ("script", "tool"),
    [("local.sh", "torchrun"), ("multi_node.sh", "torchrun"), ("accelerate.sh", "accelerate")],
)
def test_a_missing_launcher_is_named(script: str, tool: str, tmp_path: Path) -> None:
    bin_dir = tools(tmp_path / "bin")
    (bin_dir / tool).unlink()
    done = subprocess.run(
        [BASH, str(LAUNCH / script), CONFIG],
        cwd=ROOT,
        env={"PATH": str(bin_dir), **GOOD[script]},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert f"{tool} is not on PATH" in done.stderr


def test_local_starts_torchrun(tmp_path: Path) -> None:
    status, stderr, recorded = run(
        "local.sh", GOOD["local.sh"], [CONFIG, "moe.top_k=1", "data.source=a b"], tmp_path
    )
    assert status == 0, stderr
    assert recorded == [
        "torchrun",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "dmoe",
        "train",
        CONFIG,
        "moe.top_k=1",
        "data.source=a b",
    ]
    assert int((tmp_path / "record.env").read_text(encoding="utf-8").split("omp=")[1]) >= 1


@pytest.mark.parametrize(("rank", "host"), [("0", "true"), ("1", "false")])
def test_multi_node_starts_torchrun_with_a_rendezvous(rank: str, host: str, tmp_path: Path) -> None:
    env = {**MULTI_NODE, "NODE_RANK": rank}
    status, stderr, recorded = run("multi_node.sh", env, [CONFIG, "moe.top_k=1"], tmp_path)
    assert status == 0, stderr
    assert recorded == [
        "torchrun",
        "--nnodes",
        "2",
        "--nproc-per-node",
        "4",
        "--max-restarts",
        "3",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "node0:29500",
        "--rdzv-id",
        "dmoe",
        "--rdzv-conf",
        f"is_host={host}",
        "-m",
        "dmoe",
        "train",
        CONFIG,
        "train.run_dir=/shared/run",
        "moe.top_k=1",
    ]
    assert "share=1" in (tmp_path / "record.env").read_text(encoding="utf-8")


def test_slurm_starts_one_launcher_a_machine(tmp_path: Path) -> None:
    status, stderr, recorded = run("slurm.sbatch", SLURM, [CONFIG, "moe.top_k=1"], tmp_path)
    assert status == 0, stderr
    text = " ".join(recorded)
    for host in ("true", "false"):
        assert (
            "torchrun --nnodes 2 --nproc-per-node 8 --max-restarts 3 --rdzv-backend c10d"
            " --rdzv-endpoint n1:22345"
            f" --rdzv-id dmoe-12345-0 --rdzv-conf is_host={host} -m dmoe train {CONFIG}"
            " train.run_dir=/shared/run moe.top_k=1"
        ) in text
    assert "requeue" not in text


def test_slurm_returns_the_status_of_the_training(tmp_path: Path) -> None:
    status, _, recorded = run("slurm.sbatch", SLURM, [CONFIG], tmp_path, srun_end="exit 4")
    assert status == 4
    assert "scontrol" not in recorded


def test_slurm_passes_the_early_signal_on_waits_and_requeues(tmp_path: Path) -> None:
    # The fake signals the batch shell like Slurm, then "saves" when the signal is passed back.
    end = (
        """trap 'sleep 0.3; echo saved >>"$RECORD"; exit 143' TERM; kill -TERM "$PPID";"""
        " while :; do sleep 0.05; done"
    )
    status, stderr, recorded = run("slurm.sbatch", SLURM, [CONFIG], tmp_path, srun_end=end)
    assert status == 143, stderr
    assert recorded[-4:] == ["saved", "scontrol", "requeue", "12345"]


@pytest.mark.parametrize(("device", "name"), [("cpu", "cpu"), ("gpu", "cuda")])
def test_accelerate_starts_with_its_own_file(device: str, name: str, tmp_path: Path) -> None:
    status, stderr, recorded = run(
        "accelerate.sh", {"DEVICE": device, "RANKS": "2"}, [CONFIG, "moe.top_k=1"], tmp_path
    )
    assert status == 0, stderr
    assert recorded == [
        "accelerate",
        "launch",
        "--config_file",
        str(LAUNCH / f"accelerate_{device}.yaml"),
        "--num_processes",
        "2",
        "-m",
        "dmoe",
        "train",
        CONFIG,
        f"train.device={name}",
        "moe.top_k=1",
    ]


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_accelerate_reads_our_files_and_would_use_torchrun(device: str) -> None:
    """MULTI_CPU would start one process, FSDP or DeepSpeed would wrap experts."""
    from accelerate.commands.config.config_args import load_config_from_file

    path = LAUNCH / f"accelerate_{device}.yaml"
    config = load_config_from_file(str(path))
    assert config.distributed_type.value == "MULTI_GPU"
    assert config.use_cpu is (device == "cpu")
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["mixed_precision"] == "no"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")
def test_threads_are_divided_among_the_cores_that_the_process_may_use(tmp_path: Path) -> None:
    """The cores of the machine were divided: under `taskset -c 0` two ranks had one thread each on
    one core of two, and in a job with 4 of 64 cores they had 32 each."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        status, _, _ = run("local.sh", {"RANKS": "1"}, [CONFIG], tmp_path)
    finally:
        os.sched_setaffinity(0, allowed)
    assert status == 0
    assert (tmp_path / "record.env").read_text(encoding="utf-8").strip().endswith("omp=1")


def test_a_slurm_task_with_fewer_cores_than_ranks_is_reported(tmp_path: Path) -> None:
    """Clusters give a task one core, so eight ranks shared it, and nothing said so."""
    few_cores = SLURM | {"SLURM_CPUS_PER_TASK": "1"}
    _, few, _ = run("slurm.sbatch", few_cores, [CONFIG], tmp_path)
    assert "1 cores for" in few
    assert "--cpus-per-task" in few
    (tmp_path / "enough").mkdir()
    enough = SLURM | {"SLURM_CPUS_PER_TASK": "64"}
    assert "cpus-per-task" not in run("slurm.sbatch", enough, [CONFIG], tmp_path / "enough")[1]
