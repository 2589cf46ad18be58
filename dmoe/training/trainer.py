"""The run: steps, evaluations, checkpoints, in order, and one place where they are told to the world."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

from dmoe.config.check import check
from dmoe.config.errors import ConfigError, NumbersError
from dmoe.config.schema import Config
from dmoe.data import Data, open_data
from dmoe.distributed import world as worlds
from dmoe.distributed.world import World
from dmoe.models.generate import generate
from dmoe.training import checkpointing
from dmoe.training import engine as engines
from dmoe.training.batches import training_batches
from dmoe.training.engine import Engine
from dmoe.training.evaluation import Evaluation, evaluate
from dmoe.training.progress import Display, open_display
from dmoe.training.run_dir import MetricsFile, RunDir, name_run
from dmoe.training.sanity import check_first_step
from dmoe.training.schedule import learning_rate
from dmoe.training.step import StepResult, train_step
from dmoe.training.stopping import StopRequest
from dmoe.training.telemetry import train_metrics
from dmoe.training.trackers import Trackers

__all__ = ["train"]

MOST_BAD_STEPS = 10


def train(config: Config, given: str) -> None:
    """Train as `config` says, alone or as one rank of those the launcher started. `given` is the config file's text, for the record.

    Raises ConfigError before anything is written, NumbersError where training cannot go on.
    """
    check(config, worlds.launched_world_size())
    data = open_data(config.data, config.train.seed)
    world = worlds.start(config.train.device, config.parallel.backend, config.parallel.start_timeout)
    engine = engines.build(config, world, data.tokenizer.vocab_size)
    run = _open_run(config, world)
    Trainer(engine, data, run, given).run()
    worlds.close()


def _open_run(config: Config, world: World) -> RunDir:
    """The run directory, made by rank 0, known to all; every rank fails if rank 0 does."""
    path, problem = "", None
    if world.is_main:
        try:
            run = RunDir(name_run(config))
            run.create(config.train.run_dir)
            path = str(run.path.resolve())
        except ConfigError as error:
            problem = error
    path = worlds.agree_on(path, world.device)
    if not path:
        raise problem or ConfigError("train.run_dir", config.train.run_dir, "rank 0 cannot write there", "see its message")
    return RunDir(Path(path))


class Trainer:
    """Owns the loop and nothing else: what a step, an evaluation or a checkpoint is, their modules say."""

    def __init__(self, engine: Engine, data: Data, run: RunDir, given: str) -> None:
        self.engine, self.data, self.run_dir = engine, data, run
        self.config = engine.config.train
        self.targets = self.config.global_batch * engine.config.data.seq_len
        self.bad_steps = 0
        self.stop = StopRequest()
        self.first = checkpointing.resume(engine, data, run)
        if self.first > self.config.steps:
            done = f"the run in {_short(run.path)} has done {self.first} steps already"
            raise ConfigError("train.steps", self.config.steps, done, "use more, or another train.run_dir")
        if engine.world.is_main:
            run.record(engine.config, given)
        self.display: Display = open_display(self.config.steps, self.first, engine.world.is_main)
        self.metrics = MetricsFile(run.metrics) if engine.world.is_main else None
        self.trackers = Trackers(engine.accelerator, engine.config, run)

    def run(self) -> None:
        """Train to the last step, or to where all ranks agreed to stop: then the exit code is that of the signal."""
        self._greet()
        self.stop.listen()
        self.clock, self.clock_step = time.monotonic(), self.first
        try:
            for step in range(self.first, self.config.steps):
                if self._step(step):
                    return self._leave(step + 1)
            self._finish()
        finally:
            self.display.close()
            self.trackers.close()
            if self.metrics is not None:
                self.metrics.close()

    def _step(self, step: int) -> bool:
        """Optimizer step number `step` (0-based), and what is due after it; whether some rank was told to stop."""
        batches = training_batches(self.data.train, self.engine, step)
        rate = learning_rate(step, self.config.steps, self.engine.config.optim)
        read_bytes = sum(int(self.data.tokenizer.token_bytes[batch.token_BS[:, 1:].numpy()].sum()) for batch in batches)
        result = train_step(self.engine, batches, rate, read_bytes=read_bytes, stop=self.stop.asked)
        done = step + 1
        self._watch(step, result)
        self._log(done, result, rate)
        if result.totals.stop or done == self.config.steps:
            return result.totals.stop
        if self.config.eval_every and done % self.config.eval_every == 0:
            self._evaluate(done)
        if self.engine.config.checkpoint.every and done % self.engine.config.checkpoint.every == 0:
            self._save(done)
        return False

    def _leave(self, done: int) -> None:
        """A stop that all ranks agreed on: save this step, say so, and end as the signal would have."""
        self._save(done)
        where = f"train.run_dir={_short(self.run_dir.path)}"
        self._tell("end", done, {"stopped": True}, f"stopped after step {done}, which is saved; continue with {where}")
        worlds.close()
        raise SystemExit(128 + (self.stop.number or signal.SIGTERM))

    def _watch(self, step: int, result: StepResult) -> None:
        if step == self.first:
            worlds.shorten_timeouts(self.engine.topology.groups(), self.engine.config.parallel.timeout)
        if step == 0:
            remark = check_first_step(self.engine, result, self.data.tokenizer.vocab_size, self.targets)
            if remark:
                self._tell("alert", 1, {"text": remark}, f"note: {remark}")
        self.bad_steps = 0 if result.updated else self.bad_steps + 1
        if not result.updated:
            text = f"step {step + 1} skipped on all ranks: loss or gradient not finite (norm {result.grad_norm})"
            self._tell("alert", step + 1, {"text": text}, text)
        if self.bad_steps >= MOST_BAD_STEPS:
            raise NumbersError(
                f"{MOST_BAD_STEPS} steps in a row were not finite, the last is {step + 1}: lower optim.lr, or look at the data"
            )

    def _log(self, done: int, result: StepResult, rate: float) -> None:
        due = done % self.config.log_every == 0 or done in (self.first + 1, self.config.steps)
        values: dict[str, Any] | None = None
        if due:
            now = time.monotonic()
            values = train_metrics(
                result,
                targets=self.targets,
                tokens=done * self.targets,
                learning_rate=rate,
                seconds=now - self.clock,
                steps=done - self.clock_step,
            )
            self.clock, self.clock_step = now, done
            self._tell("train", done, values)
            self.trackers.log(values, done)
        self.display.step(done, values)

    def _evaluate(self, done: int) -> Evaluation:
        began = time.monotonic()
        result = evaluate(self.engine, self.data)
        values = {"loss": result.loss, "bits_per_byte": result.bits_per_byte, "split": "held_out", "tokens": result.tokens}
        line = (
            f"step {done}: held-out loss {result.loss:.3f}, {result.bits_per_byte:.3f} bits/byte over {result.tokens:,} tokens"
        )
        self._tell("eval", done, values, line)
        self.trackers.log(values, done, "eval/")
        self._exclude(began)
        return result

    def _save(self, done: int) -> None:
        began = time.monotonic()
        checkpointing.save(self.engine, self.data, self.run_dir, done)
        self._tell("checkpoint", done, {"seconds": time.monotonic() - began})
        self._exclude(began)

    def _finish(self) -> None:
        """The end of a run: evaluate, save what is not saved yet, show a sample and where everything is."""
        steps = self.config.steps
        result = self._evaluate(steps)
        if self.first < steps:
            self._save(steps)
        self.display.close()
        if self.config.sample_tokens:
            self.display.say(f"\nsample:\n{self._sample()}\n")
        self._tell("end", steps, {"bits_per_byte": result.bits_per_byte}, f"run directory: {_short(self.run_dir.path)}")

    def _sample(self) -> str:
        """Every rank generates the same text: under expert parallelism each layer needs all of them."""
        tokenizer = self.data.tokenizer
        prompt = tokenizer.encode(self.config.sample_prompt.encode()).tolist() or [tokenizer.separator]
        window = self.engine.config.data.seq_len
        ids = generate(
            self.engine.model, prompt, self.config.sample_tokens, window=window, temperature=0.7, seed=self.config.seed
        )
        return tokenizer.decode([*prompt, *ids])

    def _greet(self) -> None:
        engine, counts = self.engine, self.engine.model.num_parameters()
        self.display.say(f"data: {self.data.describe()}")
        self.display.say(
            f"model: {counts.total / 1e6:.2f} M parameters, {counts.active / 1e6:.2f} M active a token; "
            f"{engine.precision} on {engine.world.device.type}"
        )
        self.display.say(
            f"ranks: {engine.topology}; {engine.config.train.global_batch} sequences a step = {engine.world.size} x "
            f"{engine.sequences} x {engine.batching.accumulation} accumulated"
        )
        resumed = f"resumed after step {self.first}; " if self.first else ""
        self.display.say(f"{resumed}run directory: {_short(self.run_dir.path)}")
        start = {
            "parameters": counts.total,
            "active_parameters": counts.active,
            "world": engine.world.size,
            "ep": engine.topology.ep,
        }
        self._tell(
            "restart" if self.first else "start",
            self.first,
            {**start, "precision": engine.precision, "data": self.data.fingerprint},
        )

    def _tell(self, event: str, step: int, values: dict[str, Any], line: str = "") -> None:
        if self.metrics is not None:
            self.metrics.write(event, step, values)
        if line:
            self.display.say(line)

    def _exclude(self, began: float) -> None:
        """What is not training does not count in tokens per second."""
        self.clock += time.monotonic() - began


def _short(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
