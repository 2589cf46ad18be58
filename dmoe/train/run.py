"""One training run from its config to its end, after the run of its base model if there is one."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext

import torch

from dmoe.config.errors import ConfigError
from dmoe.config.plugin_loader import load_plugins
from dmoe.config.plugins import get, label, references
from dmoe.config.rules import check
from dmoe.config.rules.memory import explain_out_of_memory
from dmoe.config.schema import Config
from dmoe.distributed.init import (
    ProcessInfo,
    init_distributed,
    launched_world_size,
    run_on_rank0,
    shutdown,
)
from dmoe.distributed.rank_failure import LivenessResponder
from dmoe.moe.rng import generator
from dmoe.train.engine import build_engine
from dmoe.train.modular.session import check_domains
from dmoe.train.modular.stages import (
    BASE_MODEL_DIR,
    check_base_models,
    is_config_file,
    needs_base_model,
    train_base_model,
)
from dmoe.train.run_session import open_session
from dmoe.train.signals import StopRequested
from dmoe.train.tasks import task_of
from dmoe.train.trainer import Trainer


def train(config: Config, config_text: str, quiet: bool = False) -> None:
    """Train as `config` says, as the only process or as one rank of a launched job.

    Args:
        config: the whole config.
        config_text: text of the config file, stored in the run directory.
        quiet: print notes, alerts and the run directory only.

    Raises:
        ConfigError: for a config that cannot work; before anything is written.
        CheckpointError: for a checkpoint that cannot be restored or saved.
        NumbersError: where training cannot continue.
        NoProgressError: where the launcher has restarted the job too often from one step.
        LostRankError: where another rank is gone.
        SystemExit: with 128 + signal after a stop by that signal; the state is saved then.
    """
    config = load_plugins(config)
    check(config, launched_world_size())
    check_base_models(config, launched_world_size())
    if config.train.deterministic:
        use_deterministic_kernels()
    exit_code = 0
    try:
        _train(config, config_text, quiet)
    except StopRequested as stop:
        exit_code = 128 + stop.signal_number
    shutdown()
    if exit_code:
        raise SystemExit(exit_code)


def use_deterministic_kernels() -> None:
    """Let torch take deterministic kernels, and raise where it has none. Before CUDA starts.

    Without it, the backward of attention on a GPU sums by atomic additions, in any order.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it
    torch.use_deterministic_algorithms(True)


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


def _train(config: Config, config_text: str, quiet: bool) -> None:
    """Train one run, after the run of its base model if that has to be trained first."""
    task = task_of(config)
    with explain_out_of_memory(config, launched_world_size(), "data"):
        data = task.open_data()
    check_domains(config, data.domains)
    process = init_distributed(
        config.train.device, config.parallel.backend, config.parallel.start_timeout
    )
    # For the random numbers of a user's own module: torch seeds from the clock, so no run would
    # repeat another.
    torch.manual_seed(generator(config.train.seed, "rank", process.rank).initial_seed())
    check_same_code(config, process)
    session = open_session(config.train, process) if is_config_file(config.modular.core) else None
    try:
        if session is not None and needs_base_model(config, session.directory.path):
            if process.is_main and not quiet:
                where = f"{session}/{BASE_MODEL_DIR}"
                print(f"first its core, from {config.modular.core}: {where}", flush=True)
            train_base_model(
                config, session.directory.path, lambda base, text: _train(base, text, quiet)
            )
        with explain_out_of_memory(config, process.world_size, "model"):
            engine = build_engine(config, process, task.num_outputs)
        session = open_session(config.train, process) if session is None else session
        liveness = LivenessResponder() if process.world_size > 1 else nullcontext()
        with liveness, explain_out_of_memory(config, process.world_size, "batch"):
            Trainer(engine, data, session, config_text, quiet).run()
    finally:
        if session is not None:
            session.close()
