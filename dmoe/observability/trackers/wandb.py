"""One wandb run for one run directory, however often it is killed, resumed or without network; never a question, never a long wait.

Each step once. The rows of a wandb run are numbered by step and cannot be taken back; a row below the newest is dropped. So each start
brings wandb up to date from metrics.jsonl, the lines in force up to the step it resumes at, and goes on from there:

- offline, a directory of an earlier start that was never uploaded holds nothing but rows of metrics.jsonl, some of them void: it is
  replaced by one that has all rows in force. `wandb sync` then finds one directory a run.
- where the server knows rows (it says so online; offline, an online or an uploaded directory is there), only later steps are sent.
  The steps that a resumed run repeats are bit for bit those the server has; after a change of the config they are not, and it keeps
  the first ones.

wandb's own record of the machine, the command line, the repository and the console is off: a secret may be in any of them.

Whether a wandb server and a key are there, asked before a run is opened: wandb itself would ask the user, or wait for minutes.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import string
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.tracking import WandBTracker

from dmoe.config.load import to_yaml
from dmoe.config.schema import Config
from dmoe.config.secrets import redact
from dmoe.observability.trackers.load_history import Extreme, LoadHistory
from dmoe.observability.trackers.names import layer_name, scalars
from dmoe.observability.trackers.tensorboard import figure
from dmoe.observability.trackers.time_limit import bounded
from dmoe.runs.directory import RunDir
from dmoe.runs.metrics_log import read_metrics

if TYPE_CHECKING:
    import wandb


INIT_SECONDS, FINISH_SECONDS, REQUEST_SECONDS = 4, 5, 4
"""A server that falls silent costs one of these, or a question's time (wandb_server.py), and the clearing up: under 15 seconds."""


class WandbRun(WandBTracker):  # type: ignore[misc]  # accelerate has no types
    """An open wandb run. Steps below `sent` are known to the server and are not sent again."""

    sent = 0

    @classmethod
    def open(
        cls, config: Config, run: RunDir, past: list[dict[str, Any]], say: Callable[[str], None]
    ) -> WandbRun:
        """Online if the config says so and the server answers, else offline with one line of why. Raises what wandb raises offline.

        `past`: the lines of metrics.jsonl in force up to the step where the run goes on.
        """
        keep_to_itself(run.logs / "wandb" / "staged")
        if config.tracking.wandb_mode == "online":
            why = why_unreachable() or cls._try_online(config, run, past)
            if not isinstance(why, str):
                return why
            say(f"wandb writes offline to {run.logs / 'wandb'}, for `wandb sync`: {redact(why)}")
        return cls._start(config, run, past, "offline")

    @classmethod
    def _try_online(cls, config: Config, run: RunDir, past: list[dict[str, Any]]) -> WandbRun | str:
        """The run, or why not; then nothing is left of the attempt, neither its directory nor wandb's hold on the id."""
        before = set((run.logs / "wandb").glob("run-*"))
        try:
            return cls._start(config, run, past, "online")
        except (
            Exception
        ) as error:  # a server that stops answering: several types, each with a sentence
            import wandb

            bounded(wandb.teardown, SECONDS, "")
            for failed in set((run.logs / "wandb").glob("run-*")) - before:
                shutil.rmtree(failed, ignore_errors=True)
            return " ".join(str(error).split())[:200] or type(error).__name__

    @classmethod
    def _start(cls, config: Config, run: RunDir, past: list[dict[str, Any]], mode: str) -> WandbRun:
        name, known = _run_id(run), 0
        if mode == "offline":
            known = _rows_known(run, name)
        tracker = cls(
            config.tracking.project,
            id=name,
            name=redact(run.path.name),
            dir=str(run.logs),
            mode=mode,
            resume="allow" if mode == "online" else None,
            settings=_settings(),
        )
        tracker.start()
        tracker.sent = max(known, tracker.run.step)
        tracker.store_init_configuration({"config": redact(to_yaml(config))})
        for line in past:
            if line["event"] in ("train", "eval"):
                tracker.log(scalars(line, line["event"]), step=line["step"])
        return tracker

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        if step is None or step >= self.sent:
            super().log(values, step=step, **kwargs)

    def alert(self, title: str, text: str, step: int) -> None:
        self.run.alert(title=title, text=text)

    def draw(self, loads: LoadHistory, step: int) -> None:
        """Heat-maps that wandb's page draws without a panel made by hand, and a table that it can sort."""
        import wandb

        pictures: dict[str, Any] = {}
        for layer, (steps, rows) in loads.by_step().items():
            pictures[f"{layer_name(layer)}/load_expert_by_step"] = figure(
                rows, steps, "step", range(len(rows)), "expert"
            )
        layers, rows = loads.last()
        experts = range(max(map(len, rows)))
        pictures["experts/load_layer_by_expert"] = figure(rows, experts, "expert", layers, "layer")
        table = wandb.Table(
            columns=list(Extreme._fields), data=[list(extreme) for extreme in loads.extremes()]
        )
        plots = {name: wandb.Plotly(picture) for name, picture in pictures.items()}
        self.log({**plots, "experts/hottest_and_coldest": table}, step=step)

    def hand_over(self, report: Path) -> str | None:
        """The report as an artifact of the run; why it could not be, or None. It may be written anew later, so wandb has a copy."""

        def send() -> str | None:
            import wandb

            try:
                copy = shutil.copyfile(report, Path(self.run.dir).parent.absolute() / report.name)
                artifact = wandb.Artifact(f"report-{self.run.id}", type="report")
                artifact.add_file(str(copy), name=report.name, policy="immutable")
                self.run.log_artifact(artifact)
            except (
                Exception
            ) as error:  # online, it asks the server: several types, each with a sentence
                return " ".join(str(error).split())[:200] or type(error).__name__
            return None

        return bounded(
            send, REQUEST_SECONDS, f"it does not answer within {REQUEST_SECONDS} seconds"
        )


def _run_id(run: RunDir) -> str:
    """The id of this run directory, made once and kept in a plain file."""
    file = run.logs / "wandb-run-id"
    if not file.exists():
        letters = string.ascii_lowercase + string.digits
        fresh = file.with_suffix(f".{os.getpid()}")
        fresh.write_text(
            "".join(secrets.choice(letters) for _ in range(8)) + "\n", encoding="utf-8"
        )
        fresh.replace(file)
    return file.read_text(encoding="utf-8").strip()


def _rows_known(run: RunDir, name: str) -> int:
    """The first step that a server cannot know yet. Removes earlier offline directories if no server knows any of their rows."""
    folder = run.logs / "wandb"
    offline = sorted(folder.glob(f"offline-run-*-{name}*"))
    uploaded = [*folder.glob(f"run-*-{name}*"), *folder.glob(f"offline-run-*-{name}*/*.synced")]
    if uploaded:
        return 1 + _last_step(run.metrics)
    for old in offline:
        shutil.rmtree(old)
    return 0


def _last_step(metrics: Path) -> int:
    """Of all rows ever written, also the void ones: they were sent."""
    if not metrics.exists():
        return 0
    return max(
        (
            line["step"]
            for line in read_metrics(metrics, include_void=True)
            if line["event"] in ("train", "eval")
        ),
        default=0,
    )


def _settings() -> wandb.Settings:
    """Nothing of the surroundings is recorded, nothing waits for long. The names with x_ are private to wandb: a test holds them."""
    import wandb

    return wandb.Settings(
        console="off",
        silent=True,
        disable_git=True,
        disable_code=True,
        disable_job_creation=True,
        save_code=False,
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
        x_transaction_log_flush_interval=1.0,
        init_timeout=INIT_SECONDS,
        finish_timeout=FINISH_SECONDS,
        x_graphql_timeout_seconds=REQUEST_SECONDS,
        x_graphql_retry_max=1,
    )


SECONDS = 4.0
"""For the question whether it is a wandb server. Whether it takes the key, opening the run shows: a refusal comes at once."""
QUESTION = json.dumps({"query": "query { viewer { id } }"}).encode()
MOST_BYTES = 1 << 16


def why_unreachable() -> str | None:
    """One sentence why wandb cannot go online, or None if it can. Takes about `SECONDS` at most; asks nobody at the terminal."""
    import wandb

    settings = wandb.setup(settings=wandb.Settings(silent=True, x_disable_viewer=True)).settings
    silence = f"{settings.base_url} does not answer within {SECONDS:g} seconds"
    why = bounded(lambda: _ask(settings.base_url), SECONDS, silence)
    if why is None and not wandb.login(prompt=False, verify=False):
        why = "there is no API key (set WANDB_API_KEY, or use `wandb login`)"
    return why


def keep_to_itself(folder: Path) -> None:
    """What only the environment can tell wandb.

    It reports its own errors to its server, also offline, and waits for it at exit. And it keeps what waits for `wandb sync` in the
    home directory, which may be full, read-only or on another machine by then: here it is `folder`, in the run's directory.
    """
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("WANDB_DATA_DIR", str(folder))


def _ask(base_url: str) -> str | None:
    """Without the key: a server answers anyone who it is, and a wrong one has no business with it."""
    if not base_url.startswith(("http://", "https://")):
        return f"{base_url} is no http address"
    address = f"{base_url.rstrip('/')}/graphql"
    request = urllib.request.Request(
        address, data=QUESTION, headers={"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as response:
            text = response.read(MOST_BYTES)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):  # it wants the key first: opening the run shows it
            return None
        return f"{base_url} answers with error {error.code}"
    except (
        Exception
    ) as error:  # no network, no such host, no HTTP: OSError, ValueError, http.client.HTTPException
        return f"{base_url} cannot be reached ({getattr(error, 'reason', error)})"
    try:
        known = "data" in json.loads(text)
    except (ValueError, TypeError):
        known = False
    return None if known else f"{base_url} is no wandb server"
