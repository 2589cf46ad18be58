"""One training run from its config to its end, after the run of its base model if there is one."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dmoe.config.errors import ConfigError
from dmoe.config.plugin_loader import load_plugins
from dmoe.config.plugins import get, label, references
from dmoe.config.published import with_source
from dmoe.config.rules import check
from dmoe.config.rules.memory import explain_out_of_memory
from dmoe.config.rules.modular import PREFIX_BANKS, prefix_error
from dmoe.config.rules.tracking import check_tracking
from dmoe.config.schema import Config
from dmoe.data.tables import fill_table_shape
from dmoe.distributed.init import (
    ProcessInfo,
    init_distributed,
    launched_world_size,
    run_on_rank0,
    shutdown,
)
from dmoe.distributed.rank_failure import LivenessResponder
from dmoe.models.base import Model
from dmoe.moe.rng import generator
from dmoe.train.allocator import keep_freed_memory
from dmoe.train.callbacks import Callback
from dmoe.train.engine import Engine, build_engine
from dmoe.train.modular.session import check_domains
from dmoe.train.modular.stages import (
    BASE_MODEL_DIR,
    check_base_models,
    is_config_file,
    needs_base_model,
    train_base_model,
)
from dmoe.train.replay import check_replay
from dmoe.train.run_session import open_session
from dmoe.train.signals import StopRequested
from dmoe.train.tasks import task_of
from dmoe.train.trainer import Trainer


@dataclass(frozen=True)
class EndedRun:
    """A run that has ended; its process group is still open."""

    path: Path
    model: Model | None
    """None if it was stopped before it was made, in the run of its base model."""
    stop_signal: int | None
    """None at the last step; number of the signal that stopped it, SIGTERM for a callback."""


def train_run(
    config: Config,
    config_text: str,
    quiet: bool = False,
    *,
    callbacks: Sequence[Callback] = (),
    data: Any = None,
    model: Model | None = None,
) -> EndedRun:
    """Train as `config` says, as the only process or as one rank of a launched job.

    Args:
        config: the whole config.
        config_text: text of the config file, stored in the run directory.
        quiet: print notes, alerts and the run directory only.
        callbacks: of this rank.
        data: the splits, in place of those that the config names.
        model: one to train in place of the config's.

    Raises:
        ConfigError: for a config that cannot work; before anything is written.
        CheckpointError: for a checkpoint that cannot be restored or saved.
        NumbersError: where training cannot continue.
        NoProgressError: where the launcher has restarted the job too often from one step.
        LostRankError: where another rank is gone.
        DmoeError: on all ranks, where a callback has raised on one.
    """
    config = with_source(fill_table_shape(load_plugins(config)))
    check(config, launched_world_size())
    check_tracking(config)
    check_base_models(config, launched_world_size())
    if config.train.deterministic:
        use_deterministic_kernels()
    return _train(config, config_text, quiet, callbacks, data, model)


def train(config: Config, config_text: str, quiet: bool = False) -> None:
    """Train, and leave the process group: for a process that ends with the run.

    Arguments and errors as in `train_run`. Raises SystemExit with 128 + signal after a stop by that
    signal; the state is saved then.
    """
    if config.train.device == "cpu" or not torch.cuda.is_available():
        keep_freed_memory()
    stop_signal = train_run(config, config_text, quiet).stop_signal
    shutdown()
    if stop_signal is not None:
        raise SystemExit(128 + stop_signal)


def use_deterministic_kernels() -> None:
    """Let torch take deterministic kernels, and raise where it has none. Before CUDA starts.

    Without it, the backward of attention on a GPU sums by atomic additions, in any order.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it
    torch.use_deterministic_algorithms(True)


def check_document_mask(engine: Engine, data: Any) -> None:
    """Refuse a model that cannot keep the documents of a sequence apart, where the data ask for it.

    Raises:
        ConfigError: the model does not read positions, or its modules put positions in front.
    """
    if not getattr(data, "document_mask", False):
        return
    name, fix = type(engine.model).__name__, "use data.document_mask=false"
    if not engine.model.reads_positions:
        allowed = f"needs a model that reads context.position_T, and {name} does not"
        if engine.config.model.source is not None:
            allowed = "needs dmoe's transformer: a published model does not keep documents apart"
        else:  # code of the user's own
            fix = f"set reads_positions = True in {name} once it does, or {fix}"
        raise ConfigError("data.document_mask", True, allowed, fix)
    if engine.config.modular.bank in PREFIX_BANKS:
        raise prefix_error(engine.config.modular.bank)


def check_same_code(config: Config, process: ProcessInfo) -> None:
    """Refuse code of the user's own that differs between hosts. Collective if there is any.

    Raises:
        ConfigError: on the ranks whose file is not that of rank 0.
    """
    own = {field: str(reference.digest) for field, reference in references(config).items()}
    if not own:
        return
    first = json.loads(run_on_rank0(process, lambda: json.dumps(own)))
    for field, digest in own.items():
        if first.get(field) != digest:
            allowed = f"is another file on rank {process.rank} than on rank 0"
            raise ConfigError(field, label(get(config, field)), allowed, "copy it to every host")


def _train(
    config: Config,
    config_text: str,
    quiet: bool,
    callbacks: Sequence[Callback] = (),
    data: Any = None,
    model: Model | None = None,
) -> EndedRun:
    """Train one run, after the run of its base model if that has to be trained first.

    Arguments as in `train_run`.
    """
    task = task_of(config)
    with explain_out_of_memory(config, launched_world_size(), "data"):
        data = task.open_data() if data is None else data
    check_domains(config, data.domains)
    process = init_distributed(
        config.train.device, config.parallel.backend, config.parallel.start_timeout
    )
    # For the random numbers of a user's own module: torch seeds from the clock, so no run would
    # repeat another.
    torch.manual_seed(generator(config.train.seed, "rank", process.rank).initial_seed())
    check_same_code(config, process)
    session = open_session(config.train, process) if is_config_file(config.modular.core) else None
    engine: Engine | None = None
    try:
        if session is not None and needs_base_model(config, session.directory.path):
            if process.is_main and not quiet:
                where = f"{session}/{BASE_MODEL_DIR}"
                print(f"first its core, from {config.modular.core}: {where}", flush=True)
            train_base_model(
                config, session.directory.path, lambda base, text: _train_base(base, text, quiet)
            )
        with explain_out_of_memory(config, process.world_size, "model"):
            engine = build_engine(config, process, task.num_outputs, model=model)
        check_document_mask(engine, data)
        check_replay(engine, data)  # here, so that a refused run leaves no directory
        session = open_session(config.train, process) if session is None else session
        liveness = LivenessResponder() if process.world_size > 1 else nullcontext()
        with liveness, explain_out_of_memory(config, process.world_size, "batch"):
            Trainer(engine, data, session, config_text, quiet, callbacks).run()
        return EndedRun(session.directory.path, engine.model, None)
    except StopRequested as stop:
        assert session is not None
        trained = None if engine is None else engine.model
        return EndedRun(session.directory.path, trained, stop.signal_number)
    finally:
        if session is not None:
            session.close()


def _train_base(config: Config, config_text: str, quiet: bool) -> None:
    """Train a base model. Raises StopRequested after a stop."""
    stop_signal = _train(config, config_text, quiet).stop_signal
    if stop_signal is not None:
        raise StopRequested(stop_signal)
