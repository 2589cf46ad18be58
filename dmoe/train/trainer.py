"""The run: steps, evaluations, checkpoints, in order, and one place where they are told to the world."""

from __future__ import annotations

import signal
import time
from contextlib import nullcontext
from typing import Any

import torch

from dmoe.config.errors import ConfigError, NumbersError
from dmoe.config.rules import check
from dmoe.config.schema import Config
from dmoe.distributed import init as worlds
from dmoe.distributed.rank_failure import LivenessResponder, is_collective_failure, lost_rank_error
from dmoe.moe.rng import generator
from dmoe.observability.display.format import measure_words
from dmoe.observability.logger import RunLogger
from dmoe.observability.profiler import Profiling
from dmoe.train import engine as engines
from dmoe.train.checkpointer import Checkpointer, CheckpointScheduler
from dmoe.train.engine import Engine
from dmoe.train.evaluation import Evaluation, evaluate
from dmoe.train.modular.session import Session, check_domains
from dmoe.train.modular.stages import CORE, check_stages, is_config_file, needed, prepare
from dmoe.train.optim import learning_rate
from dmoe.train.run_session import RunSession, open_session
from dmoe.train.signals import Signals
from dmoe.train.step import StepResult, compute_gradients, grad_norm, training_batches, update
from dmoe.train.step_guard import StepAction, StepGuard, StepHealth, check_first_step
from dmoe.train.summary import print_summary
from dmoe.train.tasks import Data, task_of
from dmoe.train.telemetry import Telemetry, is_logged


def train(config: Config, given: str, quiet: bool = False) -> None:
    """Train as `config` says, alone or as one rank of those the launcher started. `given` is the config file's text, for the record;
    `quiet` leaves notes, alerts and where the run is.

    Raises ConfigError before anything is written, CheckpointError for a run that cannot be taken up or saved, NumbersError where
    training cannot go on, NoProgressError where a launcher has restarted it in vain, LostPeerError where another rank is gone.
    """
    check(config, worlds.launched_world_size())
    check_stages(config, worlds.launched_world_size())
    stopped_by = _train(config, given, quiet)
    worlds.shutdown()
    if stopped_by:
        raise SystemExit(128 + stopped_by)


def _train(config: Config, given: str, quiet: bool) -> int:
    """One run; and before it the one that its core comes from, if that is to be trained first. The signal that stopped it, or 0."""
    task = task_of(config)
    data = task.open()
    check_domains(config, data.domains)
    process = worlds.init_distributed(
        config.train.device, config.parallel.backend, config.parallel.start_timeout
    )
    # For what a user's own module draws: torch starts its generators from the clock, and no run would repeat another.
    torch.manual_seed(generator(config.train.seed, "rank", process.rank).initial_seed())
    run = open_session(config, process) if is_config_file(config.modular.core) else None
    try:
        if run is not None and needed(config, run.directory.path):
            if process.is_main and not quiet:
                print(f"first its core, from {config.modular.core}: {run}/{CORE}", flush=True)
            stopped_by = prepare(
                config, run.directory.path, lambda core, text: _train(core, text, quiet)
            )
            if stopped_by:
                return stopped_by
        engine = engines.build(config, process, task.outputs)
        run = open_session(config, process) if run is None else run
        with LivenessResponder() if process.world_size > 1 else nullcontext():
            return Trainer(engine, data, run, given, quiet).run()
    finally:
        if run is not None:
            run.close()


class Trainer:
    """Owns the loop and nothing else: what a step, an evaluation or a checkpoint is, their modules say."""

    def __init__(
        self, engine: Engine, data: Data, run: RunSession, given: str, quiet: bool = False
    ) -> None:
        self.engine, self.data, self.run_dir = engine, data, run
        self.config, self.targets, self.task = engine.config.train, engine.targets, engine.task
        self.step_guard = StepGuard(
            engine.config.guard, scaled=engine.accelerator.scaler is not None
        )
        self.checkpointer = Checkpointer(engine, data, run.directory, self.step_guard)
        self.signals = Signals()
        self.first = self.done = self.checkpointer.resume()
        """Steps done: when this process began, and now."""
        if self.first > self.config.steps:
            done = f"the run in {run} has done {self.first} steps already"
            raise ConfigError(
                "train.steps", self.config.steps, done, "use more, or another train.run_dir"
            )
        self.modules = Session(engine, run.directory.path, fresh=self.checkpointer.saved < 0)
        run.begin(self.first, engine.config.guard.attempts)
        self.owes_evaluation = run.misses_evaluation(self.first, self.config)
        run.record(engine.config, given)
        self.logger = RunLogger(engine, run.directory, self.first, quiet)
        self.checkpoint_scheduler = CheckpointScheduler(
            self.checkpointer, self.logger, engine.config.checkpoint
        )
        self.telemetry = Telemetry(engine, data.domains)
        self.profiling = Profiling(
            self.config.profile_steps,
            self.config.profile_ranks,
            engine.process.rank,
            run.directory.logs,
            self.logger.print,
            exclude=self._exclude,
        )

    def run(self) -> int:
        """Train to the last step, or to where all ranks agreed to stop: then the number of the signal, else 0."""
        self._greet()
        self.signals.listen()
        self.clock, self.clock_step, self.began = time.monotonic(), self.first, time.monotonic()
        try:
            code = self._train()
            self.logger.write_report(self.done)
            return code
        except NumbersError as error:
            self.run_dir.record_fatal_error(error)
            self.logger.alert(self.done, "stopped", str(error))
            self.logger.log_event("end", self.done, {"failed": True})
            self.logger.write_report(self.done)
            raise
        except RuntimeError as error:
            if not is_collective_failure(error):
                raise
            raise lost_rank_error(error, self.done + 1, time.monotonic() - self.began) from error
        finally:
            self.checkpointer.drain()
            self.logger.close()

    def _train(self) -> int:
        stopped = self.owes_evaluation and self._evaluate() is None
        while self.done < self.config.steps and not stopped:
            with self.profiling.around(self.done + 1):
                stopped = self._step()
        return self._leave() if stopped or self._finish() else 0

    def _step(self) -> bool:
        """The next optimizer step, and what is due after it; whether some rank was told to stop."""
        self.began = time.monotonic()
        step = self.done
        batches = training_batches(self.data.train, self.engine, step)
        rate = learning_rate(step, self.config.steps, self.engine.config.optim)
        read_bytes = sum(
            int(self.task.bytes_per_target(self.data, batch.target).sum()) for batch in batches
        )
        requests = self.signals.requests(self.checkpointer.failed)
        measurement = self.telemetry.begin(is_logged(step + 1, self.first, self.config), self.began)
        totals = compute_gradients(
            self.engine, batches, read_bytes=read_bytes, requests=requests, recorder=measurement
        )
        kind, action = self.step_guard.check(
            step, totals.loss_sum / self.targets, grad_norm(totals)
        )
        result = update(self.engine, totals, rate, take=action is StepAction.APPLY)
        self.done = step + 1
        self._check_first(step, result)
        if kind is not StepHealth.GOOD and self._bad(step, kind, action, result):
            return totals.requests.stop
        self._log(result, rate)
        began = time.monotonic()
        self.checkpoint_scheduler.after_step(
            self.done,
            totals.requests,
            last_step_good=self.step_guard.bad == 0,
            last=self.done == self.config.steps,
        )
        if totals.requests.save:
            self.signals.saved()
        self._exclude(began)
        if totals.requests.stop:
            return True
        due = (
            self.config.eval_every
            and self.done % self.config.eval_every == 0
            and self.done < self.config.steps
        )
        return bool(due) and self._evaluate() is None

    def _check_first(self, step: int, result: StepResult) -> None:
        if step == self.first:
            worlds.set_timeouts(self.engine.mesh.step_groups(), self.engine.config.parallel.timeout)
        if step == 0:
            remark = check_first_step(self.engine, result, self.task.outputs, self.targets)
            if remark:
                self.logger.note(1, remark)

    def _bad(self, step: int, kind: StepHealth, action: StepAction, result: StepResult) -> bool:
        """Tell of a bad step, and go back or end where the guard says so; whether the run went back."""
        back = None
        if action is StepAction.ROLLBACK:
            self.checkpoint_scheduler.wait_for_pending(self.done)
            back = self.checkpointer.rollback()
            action = StepAction.STOP if back is None else action
        first = step * self.config.global_batch
        text = (
            f"step {step + 1} is {kind.value} and {action.value} on all ranks: loss {result.totals.loss_sum / self.targets:.4g}, "
            f"gradient norm {result.grad_norm:.4g}, samples {first} to {first + self.config.global_batch - 1}"
        )
        if action is StepAction.STOP:
            raise NumbersError(
                f"{text}; {self.step_guard.bad} bad steps in a row, and starting again would meet them again: lower optim.lr, look at "
                "the data, or see guard.* in the config"
            )
        self.logger.alert(self.done, "bad step", text)
        if back is None:
            return False
        self.done = self.clock_step = back
        self.clock = time.monotonic()
        self.logger.log_rollback(back)
        self.telemetry.probe.previous = []
        return True

    def _log(self, result: StepResult, rate: float) -> None:
        done = self.done
        if not is_logged(done, self.first, self.config):
            self.logger.display.step(done)
            return
        now = time.monotonic()
        values = self.telemetry.train_line(
            result,
            tokens=done * self.targets,
            learning_rate=rate,
            seconds=now - self.clock,
            steps=done - self.clock_step,
        )
        self.clock, self.clock_step = now, done
        self.logger.log_metrics("train", done, values)
        for text in self.telemetry.alerts.judge(values):
            self.logger.alert(done, "routing", text)

    def _evaluate(self) -> Evaluation | None:
        """Held-out loss, told to all; None if some rank was told to stop on the way."""
        began = time.monotonic()
        result = evaluate(self.engine, self.data, lambda: self.signals.stop, self.telemetry.probe)
        last = result is not None and self.done == self.config.steps
        composed = self.modules.compositions(self.data, lambda: self.signals.stop) if last else []
        self._exclude(began)
        if result is None or composed is None:
            return None
        said = "".join(f", {measure_words(name, value)}" for name, value in result.measures.items())
        line = f"step {self.done}: held-out loss {result.loss:.3f}{said} over {result.tokens:,} {self.task.unit}s"
        self.logger.log_metrics(
            "eval",
            self.done,
            result.line() | ({"compositions": composed} if composed else {}),
            line,
        )
        return result

    def _leave(self) -> int:
        """A stop that all ranks agreed on: save this step, say so, and tell the signal that asked for it."""
        self.checkpoint_scheduler.save_last(self.done)
        line = f"stopped after step {self.done}, which is saved; continue with train.run_dir={self.run_dir}"
        self.logger.log_event("end", self.done, {"stopped": True}, line)
        return self.signals.number or signal.SIGTERM

    def _finish(self) -> bool:
        """The end of a run: save, evaluate, show a sample and where everything is; whether some rank was told to stop before that."""
        self.checkpoint_scheduler.save_last(self.done)
        result = self._evaluate()
        if result is None:
            return True
        self.logger.display.close()
        print_summary(self.logger)
        proven, words = self.modules.finish()
        values: dict[str, Any] = {**result.measures, **proven}
        if words:
            self.logger.print(words)
        sample = self.task.sample(self.engine.model, self.data)
        if sample is not None:
            values["sample"] = sample
            self.logger.print(f"\nsample:\n{sample}\n")
        self.logger.log_event("end", self.done, values, f"run directory: {self.run_dir}")
        return False

    def _greet(self) -> None:
        engine, counts, say = self.engine, self.engine.model.num_parameters(), self.logger.print
        say(f"data: {self.data.describe()}")
        say(
            f"model: {counts.total / 1e6:.2f} M parameters, {counts.active / 1e6:.2f} M active a token; "
            f"{engine.precision} on {engine.process.device.type}"
        )
        say(
            f"ranks: {engine.mesh}; {engine.config.train.global_batch} sequences a step = {engine.process.world_size} x "
            f"{engine.sequences} x {engine.batching.accumulation} accumulated"
        )
        for remark in (self.run_dir.remark, *self.checkpointer.remarks):
            if remark:
                self.logger.note(self.first, remark)
        resumed = f"resumed after step {self.first}; " if self.first else ""
        say(f"{resumed}run directory: {self.run_dir}")
        start = {
            "parameters": counts.total,
            "active_parameters": counts.active,
            "trainable_parameters": self.modules.trained(counts.trained),
            "flops_per_token": engine.model.flops_per_token(self.task.targets),
            "task": self.task.name,
            "world": engine.process.world_size,
            "ep": engine.mesh.ep,
            "precision": engine.precision,
            "data": self.data.fingerprint,
        }
        again = {"resumed_from": self.first, "attempt": engine.process.restart_count}
        self.logger.log_event(
            "restart" if self.first or engine.process.restart_count else "start",
            self.first,
            start | again,
        )

    def _exclude(self, began: float) -> None:
        """What is not training does not count in tokens per second."""
        self.clock += time.monotonic() - began
