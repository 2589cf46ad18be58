"""What is kept, watched and told while it trains."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Optional

# OmegaConf reads these annotations at run time and knows Optional and Union, not the `X | Y` of strings: hence typing's names.


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 300
    """Steps between two checkpoints; one more at the end. 0: only at the end."""
    keep: int = 2
    """Complete checkpoints that are kept."""
    asynchronous: bool = False
    """Write in the background from a copy: a step waits for the copy only, which takes as much memory as the state."""
    on_error: Literal["stop", "continue"] = "stop"
    """What a save that fails does to the run. The last save of a run always has to succeed."""
    accept_changes: list[str] = field(default_factory=list)
    """Fields (or sections) that may differ from those the checkpoint was trained with, e.g. [train.global_batch]."""


@dataclass(frozen=True)
class GuardConfig:
    nonfinite: Literal["skip", "stop", "rollback"] = "skip"
    """A step whose loss or gradient is NaN or infinite is never taken. skip goes on until `patience` of them came in a row."""
    spike: Literal["warn", "skip", "stop", "rollback"] = "warn"
    """What a loss far above the recent ones does: warn takes the step and says so, skip leaves it out."""
    spike_deviations: float = 6.0
    """A spike is this many standard deviations above the mean of the last spike_window good losses."""
    spike_window: int = 64
    """Losses that are remembered; a quarter of them must be there before anything is called a spike."""
    patience: int = 10
    """Bad steps in a row after which the run ends with exit code 4; if they were not finite it goes back to its last checkpoint
    first, once."""
    attempts: int = 3
    """Starts of one torchrun job from the same checkpoint after which the job ends with exit code 5 instead of trying again."""


@dataclass(frozen=True)
class AlertsConfig:
    load: Optional[float] = 4.0
    """Busiest expert's choices over the mean, or three quarters of the way to E/K where that is less; null: no alert."""
    dead_share: Optional[float] = 0.1
    """Share of a layer's experts that no token chose in a step; null: no alert."""
    drop_rate: Optional[float] = 0.2
    """Share of a layer's choices that found no slot; null: no alert."""
    certainty: Optional[float] = 0.99
    """Mean probability of the best expert, or 1 - entropy / ln E: above this a router hardly learns any more; null: no alert."""
    straggler: Optional[float] = 1.5
    """The slowest rank's compute time over the mean; null: no alert."""
    patience: int = 2
    """Logged lines in a row beyond a limit before it is said."""


@dataclass(frozen=True)
class TrackingConfig:
    trackers: list[str] = field(default_factory=list)
    """Any of wandb, tensorboard; metrics.jsonl is always written."""
    project: str = "dmoe"
    """Project name given to the trackers."""
    wandb_mode: Literal["online", "offline", "disabled"] = "offline"
    """Whether wandb talks to its server."""


@dataclass(frozen=True)
class DebugConfig:
    collectives: bool = False
    """Before each token exchange the ranks compare operation, shapes and splits, and name who does not fit. Several times slower."""
