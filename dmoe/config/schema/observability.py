"""Checkpoints, alerts, trackers and debugging."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal, Optional

from dmoe.config.schema.constraints import above, at_least, at_most, items_from

# OmegaConf evaluates these annotations and accepts Optional and Union, not `X | Y`.

BALANCED = "must be above 1, which is perfect balance"
OR_NULL = "use the default, or null for none"


@dataclass(frozen=True)
class CheckpointConfig:
    every: Annotated[int, at_least(0)] = 300
    """Steps between two checkpoints; one more at the end. 0: only at the end."""
    keep: Annotated[int, at_least(1)] = 2
    """Number of complete checkpoints to keep."""
    asynchronous: bool = False
    """Write in the background from a copy: a step waits only for the copy, which needs as much
    memory as the state."""
    on_error: Literal["stop", "continue"] = "stop"
    """Action if a save fails. The last save of a run must always succeed."""
    accept_changes: list[str] = field(default_factory=list)
    """Fields (or sections) that may differ from those in the checkpoint, e.g.
    [train.global_batch]. A change that gives the model other tensors cannot be accepted."""


@dataclass(frozen=True)
class GuardConfig:
    nonfinite: Literal["skip", "stop", "rollback"] = "skip"
    """A step whose loss or gradient is NaN or infinite is never applied. skip: continue until
    `patience` such steps in a row."""
    spike: Literal["warn", "skip", "stop", "rollback"] = "warn"
    """Action on a loss spike. warn: apply the step and log a warning; skip: do not apply it."""
    spike_deviations: Annotated[float, above(0)] = 6.0
    """A spike is this many standard deviations above the mean of the last spike_window good
    losses."""
    spike_window: Annotated[int, at_least(1), at_most(1 << 20)] = 64
    """Number of recent losses; spikes are detected once a quarter of them is there."""
    patience: Annotated[int, at_least(1)] = 10
    """Bad steps in a row after which the run ends with exit code 4. If they were not finite, the
    run rolls back to its last checkpoint first, once."""
    attempts: Annotated[int, at_least(1)] = 3
    """Starts of one torchrun job from the same checkpoint after which the job ends with exit code
    5."""


@dataclass(frozen=True)
class AlertsConfig:
    load: Annotated[Optional[float], above(1, BALANCED, OR_NULL)] = 4.0
    """Maximum over mean of the tokens per expert, or three quarters of the way to E/K if that is
    less; null: no alert."""
    dead_share: Annotated[Optional[float], above(0)] = 0.1
    """Share of a layer's experts that no token chose in a step; null: no alert."""
    drop_rate: Annotated[Optional[float], above(0)] = 0.2
    """Share of a layer's assignments that were dropped; null: no alert."""
    certainty: Annotated[Optional[float], above(0)] = 0.99
    """Mean probability of the best expert, or 1 - entropy / ln E: above this a router has almost no
    gradient; null: no alert."""
    straggler: Annotated[Optional[float], above(1, BALANCED, OR_NULL)] = 1.5
    """Compute time of the slowest rank over the mean; null: no alert."""
    patience: Annotated[int, at_least(1)] = 2
    """Logged lines in a row above a limit before an alert."""


@dataclass(frozen=True)
class TrackingConfig:
    trackers: Annotated[
        list[str],
        items_from(
            *("wandb", "tensorboard", "aim", "clearml", "comet_ml", "dvclive", "mlflow"),
            *("swanlab", "trackio"),
            fix="metrics.jsonl is always written",
        ),
    ] = field(default_factory=list)
    """Any of wandb, tensorboard, aim, clearml, comet_ml, dvclive, mlflow, swanlab, trackio (the
    names of accelerate); metrics.jsonl is always written."""
    project: str = "dmoe"
    """Project name for the trackers."""
    name: Optional[str] = None
    """Name of the run for wandb; null: the name of the run directory."""
    group: Optional[str] = None
    """Group of runs in wandb, e.g. one per sweep."""
    tags: list[str] = field(default_factory=list)
    """Tags of the run in wandb."""
    entity: Optional[str] = None
    """User or team in wandb; null: your default one."""
    notes: Optional[str] = None
    """A longer description of the run in wandb."""
    trace: Literal["none", "counts", "choices", "scores"] = "none"
    """Write the routing of every step to RUN/trace, for `dmoe simulate --replay RUN`: counts per
    sequence and expert, every token's choices with their scores, or with the scores of all experts
    (docs/simulation.md)."""
    wandb_mode: Literal["online", "offline", "disabled"] = "offline"
    """online: wandb (and comet_ml, clearml, swanlab) connects to its server; offline: it writes to
    the run directory. disabled: no wandb."""


@dataclass(frozen=True)
class DebugConfig:
    collectives: bool = False
    """Before each all-to-all of tokens, compare operation, shapes and splits over the ranks, and
    name the rank that differs. Several times slower."""
