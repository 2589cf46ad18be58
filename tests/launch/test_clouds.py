"""Manifests of Kubernetes and SkyPilot, the script of Ray, and `--dry-run` of every launch script.

Kubernetes and SkyPilot are not run: their files are compared with the fields that the published
schemas have, and the commands in them are run with the variables that they set. launch/ray_train.py
was run with Ray 2.60 by hand; here a stand-in with Ray's signatures calls it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.launch.test_scripts import BASH, CONFIG, GOOD, LAUNCH, ROOT, SLURM, run, tools

pytestmark = pytest.mark.ranks

Shape = dict[str, Any]
CONTAINER: Shape = {
    "name": str,
    "image": str,
    "command": [str],
    "env": [{"name": str, "value": str, "valueFrom": {"fieldRef": {"fieldPath": str}}}],
    "resources": {"limits": {"nvidia.com/gpu": int}},
    "volumeMounts": [{"name": str, "mountPath": str}],
}
POD: Shape = {
    "restartPolicy": ("Never", "OnFailure"),
    "terminationGracePeriodSeconds": int,
    "containers": [CONTAINER],
    "volumes": [
        {
            "name": str,
            "persistentVolumeClaim": {"claimName": str},
            "emptyDir": {"medium": ("Memory", "")},
        }
    ],
}
JOB: Shape = {
    "completionMode": ("Indexed", "NonIndexed"),
    "parallelism": int,
    "completions": int,
    "backoffLimit": int,
    "template": {"spec": POD},
}
JOBSET: Shape = {
    "apiVersion": ("jobset.x-k8s.io/v1alpha2",),
    "kind": ("JobSet",),
    "metadata": {"name": str},
    "spec": {
        "failurePolicy": {"maxRestarts": int},
        "network": {"enableDNSHostnames": bool},
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": JOB}}],
    },
}
"""The part that the manifest uses of the CRD in kubernetes-sigs/jobset
(config/components/crd/bases), and of Kubernetes' batch/v1 and core/v1."""
SKYPILOT: Shape = {
    "name": str,
    "num_nodes": int,
    "workdir": str,
    "resources": {"accelerators": str, "use_spot": bool},
    "envs": {"CONFIG": str, "RUN": str},
    "file_mounts": {"/runs": {"name": str, "mode": ("MOUNT", "COPY", "MOUNT_CACHED")}},
    "setup": str,
    "run": str,
}


def misfits(value: Any, shape: Any, path: str = "") -> list[str]:
    """Return where `value` has a field that `shape` lacks, or one of another type."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return [f"{path}: not a mapping"]
        unknown = [f"{path}.{key}: unknown" for key in value if key not in shape]
        known = [(f"{path}.{key}", value[key], shape[key]) for key in value if key in shape]
        return unknown + [text for key, item, of in known for text in misfits(item, of, key)]
    if isinstance(shape, list):
        if not isinstance(value, list):
            return [f"{path}: not a list"]
        return [
            text for n, item in enumerate(value) for text in misfits(item, shape[0], f"{path}.{n}")
        ]
    if isinstance(shape, tuple):
        return [] if value in shape else [f"{path}: {value!r} is not one of {shape}"]
    return [] if type(value) is shape else [f"{path}: {value!r} is no {shape.__name__}"]


def load(name: str) -> Any:
    return yaml.safe_load((LAUNCH / name).read_text(encoding="utf-8"))


def test_the_manifests_have_only_known_fields() -> None:
    jobset = load("kubernetes/jobset.yaml")
    assert misfits(jobset, JOBSET) == []
    assert misfits(load("skypilot.yaml"), SKYPILOT) == []
    jobset["spec"]["network"]["enableDnsHostnames"] = True
    jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["parallelism"] = "2"
    assert [text.split(":")[0] for text in misfits(jobset, JOBSET)] == [
        ".spec.network.enableDnsHostnames",
        ".spec.replicatedJobs.0.template.spec.parallelism",
    ]


@pytest.mark.parametrize("index", ["0", "1"])
def test_the_pods_of_the_jobset_start_torchrun(index: str, tmp_path: Path) -> None:
    manifest = load("kubernetes/jobset.yaml")
    (replicated,) = manifest["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    env = {item["name"]: item.get("value", index) for item in container["env"]}
    assert int(env["NNODES"]) == job["parallelism"] == job["completions"]
    assert int(env["RANKS_PER_NODE"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    name, part = manifest["metadata"]["name"], replicated["name"]
    assert env["MASTER_ADDR"] == f"{name}-{part}-0-0.{name}", "job 0, pod 0, in its subdomain"
    bash, script, config, *_ = container["command"]
    assert (bash, (ROOT / script).is_file(), (ROOT / config).is_file()) == ("bash", True, True)
    status, errors, recorded = run(Path(script).name, env, [config], tmp_path)
    assert status == 0, errors
    text = " ".join(recorded)
    assert "--nnodes 2 --nproc-per-node 8 --max-restarts 3 --rdzv-backend c10d" in text
    assert f"is_host={'true' if index == '0' else 'false'}" in text
    assert text.endswith(f"-m dmoe train {config} train.run_dir={env['RUN_DIR']}")


def test_skypilot_starts_torchrun_on_each_machine(tmp_path: Path) -> None:
    task, record = load("skypilot.yaml"), tmp_path / "record"
    env = {
        "PATH": str(tools(tmp_path / "bin")),
        "RECORD": str(record),
        "SKYPILOT_NUM_NODES": str(task["num_nodes"]),
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        "SKYPILOT_TASK_ID": "sky-7",
        **task["envs"],
    }
    subprocess.run([BASH, "-c", task["run"]], cwd=ROOT, env=env, check=True, timeout=60)
    text = " ".join(record.read_text(encoding="utf-8").splitlines())
    assert "--rdzv-endpoint 10.0.0.1:29500 --rdzv-id sky-7 --rdzv-conf is_host=false" in text
    assert text.endswith("train.run_dir=/runs/run1")
    assert (ROOT / task["envs"]["CONFIG"]).is_file()


@pytest.mark.parametrize("script", GOOD)
def test_a_dry_run_prints_the_command_and_starts_nothing(script: str, tmp_path: Path) -> None:
    bin_dir, record = tools(tmp_path / "bin"), tmp_path / "record"
    env = GOOD[script] if script != "slurm.sbatch" else {"RUN_DIR": "/r", "RANKS_PER_NODE": "8"}
    done = subprocess.run(
        [BASH, str(LAUNCH / script), "--dry-run", CONFIG, "moe.top_k=1"],
        cwd=ROOT,
        env={"PATH": str(bin_dir), "RECORD": str(record), **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert not record.exists(), "nothing was started"
    launcher = "accelerate launch" if script == "accelerate.sh" else "torchrun"
    assert f"{launcher} --" in done.stdout
    assert f"-m dmoe train {CONFIG}" in done.stdout
    assert "moe.top_k=1" in done.stdout
    assert done.stdout.count("is_host=") == {"slurm.sbatch": 2, "multi_node.sh": 1}.get(script, 0)


def test_slurm_in_a_job_does_not_dry_run_by_itself(tmp_path: Path) -> None:
    status, _, recorded = run("slurm.sbatch", SLURM, [CONFIG], tmp_path)
    assert (status, recorded.count("torchrun")) == (0, 2)


RAY = """
import json, os, pathlib
class ScalingConfig:
    def __init__(self, num_workers=1, use_gpu=False, resources_per_worker=None):
        self.num_workers, self.use_gpu = num_workers, use_gpu
        self.resources_per_worker = resources_per_worker
class FailureConfig:
    def __init__(self, max_failures=0): self.max_failures = max_failures
class RunConfig:
    def __init__(self, name=None, failure_config=None): self.failure_config = failure_config
class Context:
    def get_world_rank(self): return 0
def get_context(): return Context()
"""
TORCH = """
import os
class TorchConfig:
    def __init__(self, backend=None, init_method="env", timeout_s=1800): self.backend = backend
class TorchTrainer:
    def __init__(self, train_loop_per_worker, *, train_loop_config=None, torch_config=None,
                 scaling_config=None, run_config=None):
        self.loop, self.given = train_loop_per_worker, train_loop_config
        print("workers", scaling_config.num_workers, scaling_config.use_gpu,
              scaling_config.resources_per_worker, torch_config.backend,
              run_config.failure_config.max_failures)
    def fit(self):
        os.chdir("/")  # a worker has a working directory of its own
        self.loop(self.given)
"""


def test_ray_trains_on_its_workers(tmp_path: Path) -> None:
    package = tmp_path / "ray" / "train"
    package.mkdir(parents=True)
    (tmp_path / "ray" / "__init__.py").touch()
    (package / "__init__.py").write_text(RAY, encoding="utf-8")
    (package / "torch.py").write_text(TORCH, encoding="utf-8")
    config = tmp_path / "small.yaml"
    shutil.copy(ROOT / "configs" / "quickstart.yaml", config)
    (tmp_path / "text.txt").write_text("A line of text for a small run. " * 500, encoding="utf-8")
    small = ["train.steps=2", "model.dim=32", "model.layers=1", "data.source=text.txt"]
    small += ["data.seq_len=16", "train.global_batch=4", "train.eval_every=0"]
    done = subprocess.run(
        [
            sys.executable,
            str(LAUNCH / "ray_train.py"),
            *("--workers", "2", "--cpus", "1"),
            "small.yaml",
            *small,
            "train.run_dir=run",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "workers 2 False {'CPU': 1.0} gloo 3" in done.stdout
    assert f"trained: {tmp_path / 'run'}" in done.stdout
    assert (tmp_path / "run" / "metrics.jsonl").is_file()


def test_an_error_of_dmoe_can_be_pickled() -> None:
    """Ray's controller could not read a worker's ConfigError, so the user saw a TypeError of it."""
    import copy

    from dmoe.config.errors import ConfigError, OutOfMemoryError

    for kind in (ConfigError, OutOfMemoryError):
        error = kind("moe.top_k", 9, "must be at most 8", "use 8")
        again = copy.copy(error)  # uses `__reduce__`, as pickle does
        assert (type(again), str(again), again.fix) == (kind, str(error), "use 8")
