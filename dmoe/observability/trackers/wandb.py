"""wandb: one wandb run per run directory, however often it is killed, resumed or offline.

It never asks the user and never waits long. Each step is sent once: the rows of a wandb run are
numbered by step, cannot be taken back, and a row below the newest is dropped. So each start sends
the valid lines of metrics.jsonl up to the step it resumes at, and continues from there:

- Offline directories of earlier starts that were never uploaded hold only rows of metrics.jsonl,
  some of them void: they are replaced by one that has all valid rows. So `wandb sync` finds one
  directory per run.
- Where the server has rows (it says so online; offline, an online or uploaded directory exists),
  only later steps are sent. Repeated steps of a resumed run are bit for bit the same; after a
  change of the config they are not, and the server keeps the first ones.

wandb's record of the machine, command line, repository and console is off: it may hold a secret.
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

from accelerate import tracking

from dmoe.config.load import to_yaml
from dmoe.config.schema import Config
from dmoe.config.secrets import redact
from dmoe.observability import error_text, run_with_timeout
from dmoe.observability.trackers.content import Extreme, LoadHistory, layer_name, scalars
from dmoe.observability.trackers.tensorboard import heat_map_figure
from dmoe.runs.directory import RunDir
from dmoe.runs.metrics_log import Line, read_metrics

if TYPE_CHECKING:
    import wandb

INIT_SECONDS, FINISH_SECONDS, REQUEST_SECONDS, PROBE_SECONDS = 4, 5, 4, 4
"""Time limits. A server that stops answering costs one of them and the cleanup: under 15 s."""
PROBE_QUERY = json.dumps({"query": "query { viewer { id } }"}).encode()
MAX_PROBE_BYTES = 1 << 16
SENT_EVENTS = ("train", "eval")


class WandbTracker(tracking.WandBTracker):  # type: ignore[misc]  # no types
    """accelerate's tracker for one wandb run."""

    first_unsent = 0
    """The server has the rows of the steps before."""

    @classmethod
    def open(
        cls, config: Config, run: RunDir, past: list[Line], notify: Callable[[str], None]
    ) -> WandbTracker:
        """Open the run, online if the config says so and the server answers, else offline.

        Args:
            config: of the run.
            run: run directory.
            past: valid lines of metrics.jsonl up to the step where the run continues.
            notify: receives one line with the reason if an online run is opened offline.

        Raises:
            Exception: whatever wandb raises offline.
        """
        _set_environment(run.logs / "wandb" / "staged")
        if config.tracking.wandb_mode == "online":
            opened = probe_server() or cls._try_online(config, run, past)
            if not isinstance(opened, str):
                return opened
            notify(
                f"wandb writes offline to {run.logs / 'wandb'}, for `wandb sync`: {redact(opened)}"
            )
        return cls._start(config, run, past, "offline")

    @classmethod
    def _try_online(cls, config: Config, run: RunDir, past: list[Line]) -> WandbTracker | str:
        """The run, or the reason of a failure; then its directory and wandb's state are removed."""
        before = set((run.logs / "wandb").glob("run-*"))
        try:
            return cls._start(config, run, past, "online")
        # A server that stops answering: wandb has several exception types for it.
        except Exception as error:
            import wandb

            run_with_timeout(wandb.teardown, PROBE_SECONDS)
            for failed in set((run.logs / "wandb").glob("run-*")) - before:
                shutil.rmtree(failed, ignore_errors=True)
            return error_text(error)

    @classmethod
    def _start(cls, config: Config, run: RunDir, past: list[Line], mode: str) -> WandbTracker:
        run_id = _run_id(run)
        first_unsent = _prepare_offline(run, run_id) if mode == "offline" else 0
        given = config.tracking
        texts = {"group": given.group, "entity": given.entity, "notes": given.notes}
        tracker = cls(
            given.project,
            id=run_id,
            name=redact(given.name or run.path.name),
            tags=[redact(tag) for tag in given.tags] or None,
            **{name: redact(text) for name, text in texts.items() if text is not None},
            dir=str(run.logs),
            mode=mode,
            resume="allow" if mode == "online" else None,
            settings=_settings(),
        )
        tracker.start()
        tracker.first_unsent = max(first_unsent, tracker.run.step)
        tracker.store_init_configuration({"config": redact(to_yaml(config))})
        for line in past:
            if line["event"] in SENT_EVENTS:
                tracker.log(scalars(line, line["event"]), step=line["step"])
        return tracker

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Send the row of `step`, unless the server has it."""
        if step is None or step >= self.first_unsent:
            super().log(values, step=step, **kwargs)

    def alert(self, title: str, text: str, step: int) -> None:
        """Send an alert, which wandb may forward to the user."""
        self.run.alert(title=title, text=text)

    def log_figures(self, history: LoadHistory, step: int) -> None:
        """Send heat maps that wandb's page shows without a manual panel, and a sortable table."""
        import wandb

        figures = {
            f"{layer_name(layer)}/load_expert_by_step": heat_map_figure(
                rows, ("step", steps), ("expert", range(len(rows)))
            )
            for layer, (steps, rows) in history.by_step().items()
        }
        layers, rows = history.last()
        experts = range(max(map(len, rows)))
        figures["experts/load_layer_by_expert"] = heat_map_figure(
            rows, ("expert", experts), ("layer", layers)
        )
        table = wandb.Table(columns=list(Extreme._fields), data=list(map(list, history.extremes())))
        plots = {name: wandb.Plotly(figure) for name, figure in figures.items()}
        self.log({**plots, "experts/hottest_and_coldest": table}, step=step)

    def upload_report(self, report: Path) -> str | None:
        """Send the report as an artifact; return None, or the reason of a failure.

        Sends a copy: the report may be written again before `wandb sync`.
        """

        def upload() -> None:
            import wandb

            copy = shutil.copyfile(report, Path(self.run.dir).parent.absolute() / report.name)
            artifact = wandb.Artifact(f"report-{self.run.id}", type="report")
            artifact.add_file(str(copy), name=report.name, policy="immutable")
            self.run.log_artifact(artifact)

        late = f"it does not answer within {REQUEST_SECONDS} seconds"
        return run_with_timeout(upload, REQUEST_SECONDS, late)


def _run_id(run: RunDir) -> str:
    """Id of this run directory, created once and kept in a plain file."""
    file = run.logs / "wandb-run-id"
    if not file.exists():
        letters = string.ascii_lowercase + string.digits
        run_id = "".join(secrets.choice(letters) for _ in range(8))
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_text(run_id + "\n", encoding="utf-8")
        partial.replace(file)
    return file.read_text(encoding="utf-8").strip()


def _prepare_offline(run: RunDir, run_id: str) -> int:
    """First step that no server can have. Removes offline directories that were not uploaded."""
    folder = run.logs / "wandb"
    offline = sorted(folder.glob(f"offline-run-*-{run_id}*"))
    if any(folder.glob(f"run-*-{run_id}*")) or any(
        folder.glob(f"offline-run-*-{run_id}*/*.synced")
    ):
        # Void lines count too: they were sent.
        lines = []
        if run.metrics.exists():
            lines = read_metrics(run.metrics, include_void=True, layers=False)
        return 1 + max((line["step"] for line in lines if line["event"] in SENT_EVENTS), default=0)
    for directory in offline:
        shutil.rmtree(directory)
    return 0


def _settings() -> wandb.Settings:
    """Settings that record nothing of the machine and limit all waiting.

    Names with `x_` are private to wandb: test_trackers.py checks their effect.
    """
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


def _set_environment(folder: Path) -> None:
    """Set what wandb reads only from the environment.

    It reports its own errors to its server, also offline, and waits for that at exit. And it keeps
    files for `wandb sync` in the home directory, which may be full, read-only or on another
    machine by then: they go to `folder`, in the run directory.
    """
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("WANDB_DATA_DIR", str(folder))


def probe_server() -> str | None:
    """Return None if a wandb server and an API key are there, else the reason.

    wandb itself would ask the user, or wait for minutes. Takes at most `PROBE_SECONDS`. Opening
    the run shows if the server accepts the key.
    """
    import wandb

    settings = wandb.setup(settings=wandb.Settings(silent=True, x_disable_viewer=True)).settings
    late = f"{settings.base_url} does not answer within {PROBE_SECONDS:g} seconds"
    problem = run_with_timeout(lambda: _query_server(settings.base_url), PROBE_SECONDS, late)
    if problem is None and not wandb.login(prompt=False, verify=False):
        problem = "there is no API key (set WANDB_API_KEY, or use `wandb login`)"
    return problem


def _query_server(base_url: str) -> str | None:
    """Query without the key, which another server must not get. None if wandb answers."""
    headers = {"Content-Type": "application/json"}
    try:
        request = urllib.request.Request(f"{base_url.rstrip('/')}/graphql", PROBE_QUERY, headers)
        with urllib.request.urlopen(request, timeout=PROBE_SECONDS) as response:
            is_wandb = "data" in json.loads(response.read(MAX_PROBE_BYTES))
    except urllib.error.HTTPError as error:
        # 401 and 403: the server wants the key first.
        return None if error.code in (401, 403) else f"{base_url} answers with error {error.code}"
    except (ValueError, TypeError):
        is_wandb = False
    # No network, no such host, no HTTP: OSError, http.client.HTTPException and others.
    except Exception as error:
        return f"{base_url} cannot be reached ({getattr(error, 'reason', error)})"
    return None if is_wandb else f"{base_url} is not a wandb server"
