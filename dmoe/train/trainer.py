"""The training loop: steps, evaluations and checkpoints, in order, and what is logged of them."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from typing import Any

from dmoe.config.errors import NumbersError
from dmoe.config.schedule import learning_rate
from dmoe.distributed.init import set_timeouts
from dmoe.distributed.rank_failure import is_collective_failure, lost_rank_error
from dmoe.distributed.watchdog import Watchdog
from dmoe.observability.logger import RunLogger
from dmoe.observability.profiler import StepProfiler
from dmoe.train.callbacks import Callback, Callbacks
from dmoe.train.checkpointer import Checkpointer, CheckpointScheduler
from dmoe.train.engine import Engine
from dmoe.train.evaluation import Evaluation, evaluate
from dmoe.train.modular.session import ModularSession
from dmoe.train.replay import Replay
from dmoe.train.run_session import RunSession
from dmoe.train.signals import Signals, StopRequested
from dmoe.train.step import (
    StepResult,
    compute_gradients,
    count_target_bytes,
    grad_norm,
    training_batches,
    update,
)
from dmoe.train.step_guard import (
    StepAction,
    StepGuard,
    StepHealth,
    check_first_step,
    describe_bad_step,
)
from dmoe.train.summary import log_start, print_summary
from dmoe.train.tasks import DataSplits
from dmoe.train.telemetry import Telemetry, basic_metrics, is_logged


class Trainer:
    """Run the training loop; steps, evaluations and checkpoints are defined in their modules."""

    def __init__(
        self,
        engine: Engine,
        data: DataSplits,
        session: RunSession,
        config_text: str,
        quiet: bool = False,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        """Restore the newest checkpoint, if there is one. Collective.

        Args:
            engine: model, optimizer and process groups.
            data: training and held-out data.
            session: the locked run directory.
            config_text: text of the config file, stored in the run directory.
            quiet: print notes, alerts and the run directory only.
            callbacks: of this rank.
        """
        config = engine.config
        self.engine, self.data, self.session = engine, data, session
        self.config, self.task = config.train, engine.task
        has_scaler = engine.accelerator.scaler is not None
        self.step_guard = StepGuard(config.guard, loss_scaling=has_scaler)
        self.checkpointer = Checkpointer(engine, data, session.directory, self.step_guard)
        self.signals = Signals()
        self.start_step = self.steps_done = self.checkpointer.resume()
        """Optimizer steps done: when this process began, and now."""
        session.check_steps_left(self.start_step, self.config)
        fresh = self.checkpointer.last_saved_step < 0
        self.modular = ModularSession(engine, session.directory.path, fresh=fresh)
        session.record_attempt(self.start_step, config.guard.attempts)
        self.evaluation_missing = session.is_evaluation_missing(self.start_step, self.config)
        self.replay = Replay(engine, data, session.directory.path, self.checkpointer)
        session.write_config(config, config_text)
        self.logger = RunLogger(
            config,
            engine.accelerator,
            session.directory,
            start_step=self.start_step,
            is_main=engine.process.is_main,
            quiet=quiet,
        )
        self.callbacks = Callbacks(callbacks, engine, self.logger)
        self.checkpoint_scheduler = CheckpointScheduler(
            self.checkpointer, self.logger, config.checkpoint
        )
        self.telemetry = Telemetry(engine, data.domains)
        self.watchdog = Watchdog(
            config.parallel.timeout, [self.checkpointer.drain, self.logger.display.close]
        )
        self.profiler = StepProfiler(
            self.config.profile_steps,
            self.config.profile_ranks,
            engine.process.rank,
            session.directory.logs,
            self.logger.print,
            exclude=self._exclude,
        )
        self.interval_start_tokens = self.checkpointer.tokens

    def run(self) -> None:
        """Train to the last step. Collective. Raises StopRequested, saved, and as `train_run`."""
        log_start(
            self.logger, self.engine, self.data, self.session, self.checkpointer, self.modular
        )
        self.signals.install_handlers()
        self.step_began = self.interval_began = time.monotonic()  # the step, the logged interval
        try:
            self._train()
            self.logger.write_report(self.steps_done)
        except StopRequested:
            self.logger.write_report(self.steps_done)
            raise
        except NumbersError as error:
            self.session.record_fatal_error(error)
            self.logger.alert(self.steps_done, "stopped", str(error))
            self.logger.log_event("end", self.steps_done, {"failed": True})
            self.logger.write_report(self.steps_done)
            raise
        except RuntimeError as error:
            if not is_collective_failure(error):
                raise
            seconds = time.monotonic() - self.step_began
            raise lost_rank_error(error, self.steps_done + 1, seconds) from error
        finally:
            self.watchdog.close()
            self.checkpointer.drain()
            self.logger.close()

    def _train(self) -> None:
        """Run all steps and the end of the run. Raises StopRequested once the state is saved."""
        try:
            if self.evaluation_missing:
                self._evaluate()
            while self.steps_done < self.config.steps:
                self._profiled_step()
            self._finish()
        except StopRequested:
            self.checkpoint_scheduler.save_final(self.steps_done)
            done = f"stopped after step {self.steps_done}, which is saved"
            line = f"{done}; continue with: {self.session.resume_command(self.engine.config)}"
            self.logger.log_event("end", self.steps_done, {"stopped": True}, line)
            # The signal may have reached other ranks only.
            raise StopRequested(self.signals.stop_signal or signal.SIGTERM) from None

    def _profiled_step(self) -> None:
        stop: StopRequested | None = None
        with self.profiler.profile(self.steps_done + 1):
            try:
                self._step()
            except StopRequested as request:  # held back: the trace of this step is written first
                stop = request
        if stop is not None:
            raise stop

    def _step(self) -> None:
        """Take the next optimizer step, then log, save and evaluate where that is due."""
        self.step_began = time.monotonic()
        step, engine = self.steps_done, self.engine
        batches = self.replay.given(training_batches(self.data.train, engine, step), step)
        lr = learning_rate(step, self.config.steps, engine.config.optim)
        recorder = self.telemetry.recorder_of(step + 1, self.start_step, self.step_began)
        recorder = self.replay.recorder(recorder)
        with self.watchdog.watch(f"step {step + 1}"):
            totals = compute_gradients(
                engine,
                batches,
                target_bytes=count_target_bytes(engine, self.data, batches),
                requests=self.signals.take_requests(self.checkpoint_scheduler.failed),
                recorder=recorder,
                take_at=lr if self.step_guard.takes_finite_steps else None,
            )
            health, action = self.step_guard.check(step, totals.loss, grad_norm(totals))
            result = update(engine, totals, lr, apply=action is StepAction.APPLY)
            self.replay.record(step, recorder, self.logger)
        self.steps_done = step + 1
        self.checkpointer.tokens += totals.num_tokens
        self._after_first_step(step, result)
        is_bad, last = health is not StepHealth.GOOD, self.steps_done == self.config.steps
        rolled_back = is_bad and self._handle_bad_step(step, health, action, result)
        if not rolled_back:
            self.callbacks.end_step(self.steps_done, self._log(result, lr))
            if engine.placement is not None and result.updated:
                with self.watchdog.watch(f"the move of experts after step {self.steps_done}"):
                    engine.placement.after_step(self.steps_done, totals.kept_LE, last=last)
            began = time.monotonic()
            self.checkpoint_scheduler.after_step(
                self.steps_done,
                totals.requests,
                last_step_good=self.step_guard.bad_steps == 0,
                last=last,
            )
            if totals.requests.save:
                self.signals.clear_save_request()
            self._exclude(began)
        if totals.requests.stop:
            raise StopRequested
        due = self.config.eval_every and self.steps_done % self.config.eval_every == 0
        if due and self.steps_done < self.config.steps and not rolled_back:
            self._evaluate()

    def _after_first_step(self, step: int, result: StepResult) -> None:
        """Shorten the timeouts after the first step of this process; check the run's first step."""
        if step == self.start_step:
            set_timeouts(self.engine.mesh.step_groups(), self.engine.config.parallel.timeout)
            self.watchdog.start()
        if step == 0 and (warning := check_first_step(self.engine, result)):
            self.logger.note(1, warning)

    def _handle_bad_step(
        self, step: int, health: StepHealth, action: StepAction, result: StepResult
    ) -> bool:
        """Log a bad step and roll back if the guard says so; return whether the run rolled back.

        Raises NumbersError if the guard says stop, or there is no checkpoint to roll back to.
        """
        restored_step = None
        if action is StepAction.ROLLBACK:
            self.checkpoint_scheduler.wait_for_pending(self.steps_done)
            restored_step = self.checkpointer.rollback()
            action = StepAction.STOP if restored_step is None else action
        text = describe_bad_step(step, health, action, result, self.engine)
        if action is StepAction.STOP:
            raise NumbersError(f"{text}; {self.step_guard.stop_reason()}")
        self.logger.alert(self.steps_done, "bad step", text)
        if restored_step is None:
            return False
        self.steps_done, self.interval_start_tokens = restored_step, self.checkpointer.tokens
        self.interval_began = time.monotonic()
        self.logger.log_rollback(restored_step)
        self.telemetry.probe.previous = []
        return True

    def _log(self, result: StepResult, lr: float) -> dict[str, Any]:
        """Log the step where that is due; return its metrics, in any step the basic ones."""
        step = self.steps_done
        if not is_logged(step, self.start_step, self.config):
            self.logger.display.step(step)
            return basic_metrics(result, self.engine) | {"lr": lr}
        now = time.monotonic()
        values = self.telemetry.train_record(
            result,
            tokens=self.checkpointer.tokens,
            interval_tokens=self.checkpointer.tokens - self.interval_start_tokens,
            learning_rate=lr,
            seconds=now - self.interval_began,
        )
        self.interval_began, self.interval_start_tokens = now, self.checkpointer.tokens
        self.logger.log_metrics("train", step, values)
        for text in self.telemetry.alerts.check(values):
            self.logger.alert(step, "routing", text)
        return values

    def _evaluate(self) -> Evaluation:
        """Evaluate on the held-out data and log the result. Raises StopRequested."""
        began = time.monotonic()
        compositions: list[dict[str, Any]] = []
        try:
            with self.watchdog.watch(f"the evaluation after step {self.steps_done}"):
                result = evaluate(
                    self.engine, self.data, self.signals.is_stop_requested, self.telemetry.probe
                )
            if self.steps_done == self.config.steps:
                compositions = self.modular.evaluate_compositions(
                    self.data, self.signals.is_stop_requested
                )
        finally:
            self._exclude(began)
        line = f"step {self.steps_done}: {result.summary(self.task.unit)}"
        more = {"compositions": compositions} if compositions else {}
        self.logger.log_metrics("eval", self.steps_done, result.record() | more, line)
        return result

    def _finish(self) -> None:
        """Save, evaluate, and log the results, a sample and the end. Raises StopRequested."""
        self.checkpoint_scheduler.save_final(self.steps_done)
        result = self._evaluate()
        self.logger.display.close()
        print_summary(self.logger)
        unchanged, line = self.modular.finish()
        values: dict[str, Any] = {**result.metrics, **unchanged}
        if line:
            self.logger.print(line)
        sample = self.task.generate_sample(self.engine.model, self.data)
        if sample is not None:
            values["sample"] = sample
            self.logger.print(f"\nsample:\n{sample}\n")
        self.logger.log_event("end", self.steps_done, values, f"run directory: {self.session}")

    def _exclude(self, began: float) -> None:
        """Leave the time since `began` out of the logged throughput."""
        self.interval_began += time.monotonic() - began
