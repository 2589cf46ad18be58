"""Whether this machine, and the ranks of a job, can train: `dmoe doctor`."""

from dmoe.doctor.findings import Finding, State
from dmoe.doctor.machine import check_machine
from dmoe.doctor.ranks import check_ranks
from dmoe.doctor.storage import check_storage

__all__ = ["Finding", "State", "check_machine", "check_ranks", "check_storage"]
