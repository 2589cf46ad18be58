"""`dmoe doctor` on one machine: every fault is named with what to change."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from dmoe.cli import doctor as command
from dmoe.cli.main import app
from dmoe.doctor import Finding, check_machine, check_storage, machine, storage


def found(findings: list[Finding], check: str) -> Finding:
    return next(item for item in findings if item.check == check)


def test_this_machine_can_train(tmp_path: Path) -> None:
    findings = check_machine(1) + check_storage(tmp_path / "runs" / "new")
    assert not [item for item in findings if item.state == "failed"]
    assert found(findings, "torch").found == torch.__version__
    assert list(tmp_path.iterdir()) == [], "what the checks wrote is gone"


def test_the_command_prints_json_and_returns_0(tmp_path: Path) -> None:
    arguments = ["doctor", f"train.run_dir={tmp_path}/run", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert {"check", "state", "found", "fix"} == set(json.loads(result.stdout)[0])


def test_a_fault_gives_exit_code_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(command, "main_memory", lambda: 1 << 20)
    result = CliRunner().invoke(app, ["doctor", f"train.run_dir={tmp_path}/run"])
    assert result.exit_code == 1
    assert "memory of the config" in result.stdout


def limits(**given: int) -> Any:
    """Return a `getrlimit` with some limits replaced."""
    numbers = {getattr(resource, f"RLIMIT_{name}"): value for name, value in given.items()}
    real = resource.getrlimit
    return lambda kind: (numbers[kind], numbers[kind]) if kind in numbers else real(kind)


@pytest.mark.parametrize(
    ("given", "state", "text"),
    [
        ({"NOFILE": 100}, "failed", "open files 100"),
        ({"NOFILE": 600}, "warning", "open files 600"),
        ({"NPROC": 10}, "warning", "processes and threads 10"),
        ({"AS": 1 << 30}, "warning", "address space 1.0 GiB"),
        ({"FSIZE": 1 << 20}, "warning", "file size 0.0 GiB"),
    ],
)
def test_limits(
    given: dict[str, int], state: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", limits(**given))
    finding = next(item for item in machine._limits(2) if item.found == text)
    assert finding.state == state
    assert "ulimit" in finding.fix


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name == "omegaconf":
            raise metadata.PackageNotFoundError(name)
        return {"accelerate": "0.20.0", "rich": "99.1.0"}.get(name) or real(name)

    monkeypatch.setattr(metadata, "version", version)
    findings = machine._versions()
    assert found(findings, "omegaconf").state == found(findings, "accelerate").state == "failed"
    assert "pip install 'accelerate" in found(findings, "accelerate").fix
    assert found(findings, "rich").state == "warning"
    assert "tested with" in found(findings, "rich").fix


def test_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(machine, "_cpu_quota", lambda: 2.0)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert machine._cores(1).state == "ok"
    assert machine._cores(2).fix == "set OMP_NUM_THREADS=1"
    assert machine._cores(3).state == "warning"


def test_a_taken_port_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with socket.create_server(("", 0)) as server:
        monkeypatch.setenv("MASTER_PORT", str(server.getsockname()[1]))
        assert "is in use" in machine._loopback().fix
    monkeypatch.setenv("MASTER_PORT", "99999")
    assert machine._loopback().state == "warning"


def test_a_debug_level_at_which_torch_crashes_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_DISTRIBUTED_DEBUG", "DETAIL")
    assert machine._debug_level().state == "failed"


def test_a_directory_that_cannot_be_written_fails(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (finding,) = check_storage(tmp_path / "file" / "run")
    assert finding.state == "failed"
    assert "train.run_dir" in finding.fix


def test_a_disk_too_small_for_the_checkpoints_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3 << 30))
    assert found(check_storage(tmp_path, 1 << 30, keep=2), "disk space").state == "ok"
    assert found(check_storage(tmp_path, 1 << 30, keep=3), "disk space").state == "failed"


def test_a_file_system_without_locks_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(next(iter(storage.LOCKS_UNSUPPORTED)), "no locks")

    monkeypatch.setattr(storage.fcntl, "flock", refuse)
    assert found(check_storage(tmp_path), "locks").state == "warning"


def test_a_slow_disk_and_one_in_memory_are_warnings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(storage, "_write_and_rename", lambda _: 2.0)
    assert "asynchronous" in found(check_storage(tmp_path), "run directory").fix
    monkeypatch.setattr(storage, "_write_and_rename", lambda _: 0.1)
    monkeypatch.setattr(storage, "file_system", lambda _: "tmpfs")
    assert found(check_storage(tmp_path), "run directory").state == "warning"
