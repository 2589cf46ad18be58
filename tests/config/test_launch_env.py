"""The launcher's environment variables are complete and in range, or refused by name."""

from __future__ import annotations

import pytest

from dmoe.config.errors import ConfigError
from dmoe.config.launch_env import LaunchEnv, main_memory, read_launch_env

TORCHRUN = {
    "WORLD_SIZE": "4",
    "RANK": "3",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node-0",
    "MASTER_PORT": "29500",
}
WRONG = {
    "no number": ("WORLD_SIZE", "abc", "from 1 to"),
    "no ranks": ("WORLD_SIZE", "0", "from 1 to"),
    "an absurd world": ("WORLD_SIZE", "9" * 5000, "from 1 to"),
    "negative": ("WORLD_SIZE", "-2", "from 1 to"),
    "other digits": ("WORLD_SIZE", "\N{ARABIC-INDIC DIGIT TWO}", "from 1 to"),
    "outside the world": ("RANK", "4", "from 0 to 3"),
    "no rank": ("RANK", None, "must be set with WORLD_SIZE=4"),
    "an empty rank": ("RANK", "", "must be set with WORLD_SIZE=4"),
    "no address": ("MASTER_ADDR", None, "must be set with WORLD_SIZE=4"),
    "no port": ("MASTER_PORT", None, "must be set with WORLD_SIZE=4"),
    "no number of a port": ("MASTER_PORT", "tcp", "from 0 to 65535"),
    "more on this machine than there are": ("LOCAL_WORLD_SIZE", "5", "from 1 to 4"),
    "a restart that is no number": ("TORCHELASTIC_RESTART_COUNT", "abc", "from 0 to"),
    "an address that is not UTF-8": ("MASTER_ADDR", "node\udcff", "must be UTF-8 text"),
    "a local rank above the rank": ("LOCAL_RANK", "9", "from 0 to 3"),
}


def test_launch_env_is_read() -> None:
    assert read_launch_env(TORCHRUN) == LaunchEnv(3, 4, local_world_size=2, local_rank=1)
    assert read_launch_env({}) is None
    assert read_launch_env({"MASTER_ADDR": "node-0", "MASTER_PORT": "x"}) is None


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"])
def test_a_rank_without_a_world_is_refused(name: str) -> None:
    """With RANK=1 left in the shell a run of one process printed and wrote nothing; LOCAL_RANK
    chose another GPU, and accelerate waited for a process group."""
    with pytest.raises(ConfigError, match=f"{name}=1: must not be set without WORLD_SIZE"):
        read_launch_env({name: "1"})


@pytest.mark.parametrize("name", WRONG)
def test_incomplete_launch_env_is_refused(name: str) -> None:
    """WORLD_SIZE alone would wait for ranks that do not exist."""
    variable, value, words = WRONG[name]
    environment = {
        key: text for key, text in (TORCHRUN | {variable: value}).items() if text is not None
    }
    with pytest.raises(ConfigError, match=words) as refusal:
        read_launch_env(environment)
    assert str(refusal.value).startswith(f"{variable}=")
    assert "start it with torchrun" in str(refusal.value)


@pytest.mark.parametrize(
    "variable",
    [
        "OMPI_COMM_WORLD_SIZE",
        "PMI_SIZE",
        "PMIX_SIZE",
        "MV2_COMM_WORLD_SIZE",
        "SLURM_STEP_NUM_TASKS",
    ],
)
def test_other_launchers_are_refused(variable: str) -> None:
    """Two ranks under `mpirun -n 2` said "1 process" each: gradients were twice too large, and one
    metrics file got both. A step of one task, as in an interactive job, is one process."""
    with pytest.raises(ConfigError, match="each would train alone"):
        read_launch_env({variable: "2"})
    assert read_launch_env({variable: "1"}) is None
    assert read_launch_env({variable: "2"} | TORCHRUN) is not None, "torchrun inside a Slurm step"


@pytest.mark.parametrize("variable", ["GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME"])
def test_a_network_interface_that_does_not_exist_is_refused(variable: str) -> None:
    """`GLOO_SOCKET_IFNAME=nosuch0` ended in a C++ trace."""
    for environment in ({variable: "nosuch0"}, TORCHRUN | {variable: "lo,nosuch0"}):
        with pytest.raises(ConfigError, match="nosuch0: must name a network interface"):
            read_launch_env(environment)
    assert read_launch_env({variable: "lo"}) is None


def test_a_replica_of_a_pytorchjob_is_the_only_rank_of_its_machine() -> None:
    """It sets no LOCAL_RANK, which accelerate asserted (`WORLD_SIZE=1 RANK=0`)."""
    names = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")
    found = read_launch_env({name: TORCHRUN[name] for name in names})
    assert found == LaunchEnv(rank=3, world_size=4, local_world_size=1)


def test_this_machine_has_memory() -> None:
    assert main_memory() > 1 << 26
