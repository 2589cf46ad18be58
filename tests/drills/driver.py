"""Fault injection: `torchrun -m tests.drills.driver train ...` runs dmoe with faults.

The faults are in the environment, so that the product needs no hook for them. DMOE_FAULT has one or
more, separated by semicolons, each `ACTION@POINT key=value ...`. They apply to restart 0 only,
unless `restarts` is given.

Actions:
    kill | term | stop | usr1    send this signal to this process
    full                         OSError "No space left on device"
    hold                         create DMOE_DRILL.held, then wait until DMOE_DRILL.go exists
    back                         set the clock of this process back by one hour
    skip                         leave this rank's exchange out; it receives zeros
    nan | inf | spike            replace the loss of this rank (spike: 50 times itself)

Points:
    step            after backward, before the reduction; for nan, inf, spike: in the forward
    exchange        first dispatch of tokens in a step, in MoE layer 0; for skip
    move            in the middle of a move of experts: their tensors are at the new places, and
                    tokens are still sent to the old ones
    evaluation      after each batch of an evaluation
    shard           in the middle of this rank's shard file: half of it is written
    fsync           before the os.fsync number `call` (from 0) of the save of `step`
    before-rename   before, after-rename: after the rename that creates the checkpoint of `step`

Keys:
    rank=1          on this rank (default 0; any: on all)
    step=3          at this optimizer step, counted from 1 (default: at any)
    count=5         in this many steps, from `step` on (nan, inf, spike)
    restarts=0-2    in these attempts (default 0; any)
    after=0.5       after this many seconds

With DMOE_TRACE=FOLDER, every rank records its samples and random numbers: see `Trace`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SIGNALS = {
    "kill": signal.SIGKILL,
    "term": signal.SIGTERM,
    "stop": signal.SIGSTOP,
    "usr1": signal.SIGUSR1,
}
FACTORS = {"nan": float("nan"), "inf": float("inf"), "spike": 50.0}


@dataclass
class Fault:
    """One fault: action, point and keys."""

    action: str
    point: str
    keys: dict[str, str] = field(default_factory=dict)

    def matches(self, point: str, step: int) -> bool:
        """Return True if the fault applies at this point of this step."""
        first, count = int(self.keys.get("step", "-1")), int(self.keys.get("count", "1"))
        return self.point == point and (first < 0 or first <= step < first + count)

    def inject(self) -> None:
        """Perform the action."""
        time.sleep(float(self.keys.get("after", "0")))
        if self.action == "full":
            raise OSError(28, "No space left on device")
        if self.action == "hold":
            _hold(os.environ["DMOE_DRILL"])
            return
        if self.action == "back":
            _set_clock_back()
            return
        os.kill(os.getpid(), SIGNALS[self.action])


def parse(text: str, rank: int, restart: int) -> list[Fault]:
    """Return the faults of `text` for this rank and this attempt."""
    faults = []
    for item in filter(None, (part.strip() for part in text.split(";"))):
        head, *pairs = item.split()
        action, point = head.split("@")
        keys = dict(pair.split("=", 1) for pair in pairs)
        first, _, last = keys.get("restarts", "0").partition("-")
        this_rank = keys.get("rank", "0") in ("any", str(rank))
        this_attempt = first == "any" or int(first) <= restart <= int(last or first)
        if this_rank and this_attempt:
            faults.append(Fault(action, point, keys))
    return faults


class FaultInjector:
    """Replaces functions of dmoe and of `os` to inject the faults."""

    def __init__(self, faults: list[Fault]) -> None:
        self.faults, self.step = faults, 0
        self.calls: dict[int, int] = {}
        """Number of fsync calls by step of the save."""

    def install(self) -> None:
        """Replace the functions."""
        from dmoe.distributed.all_to_all import ExpertGroup
        from dmoe.distributed.placement import moves as expert_moves
        from dmoe.train import evaluation, trainer
        from dmoe.train import step as steps

        batch_sums = self._after(evaluation._batch_sums, lambda: self._reach("evaluation"))
        evaluation._batch_sums = batch_sums  # type: ignore[assignment]
        self._wrap(trainer, "training_batches", before=self._at_batches)
        move_layer = self._after(expert_moves._move_layer, lambda: self._reach("move"))
        expert_moves._move_layer = move_layer  # type: ignore[assignment]
        steps.squared_grad_norms = self._after(  # type: ignore[attr-defined]
            steps.squared_grad_norms, lambda: self._reach("step")
        )
        forward = steps.forward
        steps.forward = (  # type: ignore[assignment]
            lambda engine, batch, prior: self._scale_loss(forward(engine, batch, prior))
        )
        all_to_all = self._exchange(ExpertGroup.all_to_all)
        ExpertGroup.all_to_all = all_to_all  # type: ignore[method-assign]
        os.fsync = self._fsync(os.fsync)  # type: ignore[assignment]
        os.rename = self._rename(os.rename)  # type: ignore[assignment]

    def _at_batches(self, stream: Any, engine: Any, step: int) -> None:
        self.step = step + 1

    def _wrap(self, module: Any, name: str, before: Callable[..., None]) -> None:
        original = getattr(module, name)

        def wrapped(*args: Any) -> Any:
            before(*args)
            return original(*args)

        setattr(module, name, wrapped)

    def _after(self, original: Callable[..., Any], then: Callable[[], None]) -> Callable[..., Any]:
        def wrapped(*args: Any) -> Any:
            result = original(*args)
            then()
            return result

        return wrapped

    def _reach(self, point: str, step: int | None = None) -> None:
        for fault in self.faults:
            if fault.action not in FACTORS and fault.matches(
                point, self.step if step is None else step
            ):
                fault.inject()

    def _scale_loss(self, output: Any) -> Any:
        for fault in self.faults:
            if fault.action in FACTORS and fault.matches("step", self.step):
                output.loss_sum = output.loss_sum * FACTORS[fault.action]
        return output

    def _exchange(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(group: Any, rows: Any, send: Any, receive: Any, operation: str) -> Any:
            if (
                group.layer == 0
                and operation == "dispatch"
                and any(fault.matches("exchange", self.step) for fault in self.faults)
            ):
                return rows.new_zeros(
                    len(rows) if receive is None else sum(receive), *rows.shape[1:]
                )
            return original(group, rows, send, receive, operation)

        return wrapped

    def _fsync(self, original: Callable[[int], None]) -> Callable[[int], None]:
        def wrapped(descriptor: int) -> None:
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            found = re.search(r"step-(\d+)\.tmp", str(path))
            if found:
                step = int(found[1])
                if path.suffix == ".safetensors" and any(
                    fault.matches("shard", step) for fault in self.faults
                ):
                    os.truncate(path, path.stat().st_size // 2)
                    self._reach("shard", step)
                call = self.calls.get(step, 0)
                self.calls[step] = call + 1
                for fault in self.faults:
                    if fault.matches("fsync", step) and int(fault.keys.get("call", "0")) == call:
                        fault.inject()
            original(descriptor)

        return wrapped

    def _rename(self, original: Callable[..., None]) -> Callable[..., None]:
        def wrapped(source: Any, target: Any, **kwargs: Any) -> None:
            found = re.fullmatch(r"step-(\d+)", Path(target).name)
            step = int(found[1]) if found else None
            if step is not None:
                self._reach("before-rename", step)
            original(source, target, **kwargs)
            if step is not None:
                self._reach("after-rename", step)

        return wrapped


class Trace:
    """Record of one line per step in FOLDER/rank-R.jsonl.

    A line has the SHA-256 of each sequence of this rank, and R + 1 numbers from torch's default
    generator: the ranks' generators differ from the first step on.
    """

    def __init__(self, folder: Path, rank: int, restart: int) -> None:
        self.path, self.rank, self.restart = folder / f"rank-{rank}.jsonl", rank, restart

    def install(self) -> None:
        """Replace `training_batches`."""
        from dmoe.train import trainer

        original = trainer.training_batches

        def wrapped(stream: Any, engine: Any, step: int) -> Any:
            batches = original(stream, engine, step)
            self._write(step + 1, [digest(row) for batch in batches for row in sequences(batch)])
            return batches

        trainer.training_batches = wrapped  # type: ignore[attr-defined]

    def _write(self, step: int, samples: list[str]) -> None:
        import torch

        draws = [value.hex() for value in torch.rand(self.rank + 1, dtype=torch.float64).tolist()]
        line = {
            "step": step,
            "restart": self.restart,
            "rank": self.rank,
            "samples": samples,
            "draws": draws,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def sequences(batch: Any) -> Any:
    """Return the stored sequences [B, S+1] from the inputs and targets of a batch."""
    import torch

    return torch.cat([batch.input[:, :1], batch.target], 1).numpy()


def digest(row_S: Any) -> str:
    """Return a short hash of a sequence of tokens (a numpy row)."""
    return hashlib.sha256(row_S.astype("int64").tobytes()).hexdigest()[:16]


def _set_clock_back() -> None:
    real_time = time.time
    time.time = lambda: real_time() - 3600.0  # type: ignore[assignment]


def _hold(drill: str) -> None:
    Path(f"{drill}.held").touch()
    while not Path(f"{drill}.go").exists():
        time.sleep(0.01)


def main() -> None:
    """Install the faults of the environment and run dmoe."""
    from dmoe.cli.main import run

    rank = int(os.environ.get("RANK", "0"))
    restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    faults = parse(os.environ.get("DMOE_FAULT", ""), rank, restart)
    if "DMOE_TRACE" in os.environ:
        Trace(Path(os.environ["DMOE_TRACE"]), rank, restart).install()
    if faults:
        FaultInjector(faults).install()
    run()


if __name__ == "__main__":
    main()
