"""Checkpoints on gloo ranks: saved and loaded on different meshes; an error is raised on all."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from dmoe.checkpoint import dcp, find_latest, list_steps, load, save, verify
from dmoe.checkpoint.consensus import fingerprint
from dmoe.config.errors import CheckpointError
from tests.checkpoint.states import (
    ep_device_mesh,
    full_state,
    ones_like,
    sharded_state,
    states_equal,
)
from tests.ranks import run_ranks

EXTRA = {"tokens": 5, "topology": "W4 EP4"}


def elements_on_disk(path: Path) -> dict[str, int]:
    """Count the elements of each tensor over all files."""
    found: dict[str, int] = {}
    for file in path.glob("*.safetensors"):
        for name, tensor in safetensors.torch.load_file(file).items():
            found[name] = found.get(name, 0) + tensor.numel()
    return found


# --- saved at (W, EP), loaded at others


def save_sharded(rank: int, world: int, root: Path, ep: int) -> str:
    return str(save(root, 100, sharded_state(world, ep), EXTRA | {"rank": rank}))


def load_sharded(rank: int, world: int, path: Path, eps: tuple[int, ...]) -> list[bool]:
    results = []
    for ep in eps:
        state = sharded_state(world, ep, ones_like)
        assert not states_equal(state, sharded_state(world, ep))
        extra = load(path, state)
        results.append(
            states_equal(state, sharded_state(world, ep)) and extra == EXTRA | {"rank": 0}
        )
    return results


def load_alone(path: Path) -> bool:
    state = {name: ones_like(tensor) for name, tensor in full_state().items()}
    load(path, state)
    return states_equal(state, full_state())


def test_saved_at_4_ranks_and_loaded_at_other_worlds_and_ep_sizes(tmp_path: Path) -> None:
    (path,) = {Path(path) for path in run_ranks(4, save_sharded, tmp_path, 4)}
    assert len(list(path.glob("*.safetensors"))) == 4
    assert load_alone(path)
    assert run_ranks(2, load_sharded, path, (2, 1)) == [[True, True]] * 2
    assert run_ranks(4, load_sharded, path, (2, 4)) == [[True, True]] * 4


def test_replicas_are_written_once(tmp_path: Path) -> None:
    """W=4, EP=2: two replicas per expert, four per dense weight; loads on one process."""
    path = Path(run_ranks(4, save_sharded, tmp_path, 2)[0])
    assert elements_on_disk(path) == {name: tensor.numel() for name, tensor in full_state().items()}
    assert load_alone(path)


def test_a_checkpoint_of_one_process_loads_on_ranks(tmp_path: Path) -> None:
    path = save(tmp_path, 100, full_state(), EXTRA | {"rank": 0})
    assert run_ranks(3, load_sharded, path, (3,)) == [[True]] * 3  # 8 experts over 3 ranks: 3, 3, 2


def fully_sharded(rank: int, world: int, root: Path) -> bool:
    """Shard experts over ep and again over edp, which FSDP2 expresses as _StridedShard."""
    mesh, full = ep_device_mesh(world, 2), full_state()["model.experts.w"]
    mine = full.chunk(2)[mesh.get_local_rank("ep")].chunk(2)[mesh.get_local_rank("edp")]
    placements = [_StridedShard(0, split_factor=2), Shard(0)]
    tensor = DTensor.from_local(
        mine, mesh, placements, run_check=False, shape=full.shape, stride=full.stride()
    )
    path = save(root, 1, {"w": tensor}, {})
    plain, target = (
        torch.zeros_like(full),
        distribute_tensor(torch.zeros_like(full), mesh, [Shard(1), Replicate()]),
    )
    load(path, {"w": plain})
    load(path, {"w": target})
    return torch.equal(plain, full) and torch.equal(target.full_tensor(), full)


def test_experts_sharded_twice_over_one_dimension(tmp_path: Path) -> None:
    assert all(run_ranks(4, fully_sharded, tmp_path))


def in_a_subgroup(rank: int, world: int, root: Path) -> str:
    group = dist.new_group([1, 2])
    if rank == 0:
        return ""
    state = {"w": torch.arange(4.0)}
    path = save(root, 1, state, {}, group=group)
    state["w"].zero_()
    load(path, state, group=group)
    found = find_latest(root, group=group)
    assert found == path
    assert state["w"].tolist() == [0.0, 1.0, 2.0, 3.0]
    return path.name


def test_a_group_that_is_not_the_world(tmp_path: Path) -> None:
    assert run_ranks(3, in_a_subgroup, tmp_path) == ["", "step-00000001", "step-00000001"]


# --- what differs between ranks must not be saved


def refusal(action: Callable[[], object]) -> str:
    try:
        action()
    except CheckpointError as error:
        return str(error)
    return "no error"


def differing_states(rank: int, world: int, root: Path) -> list[str]:
    mesh = ep_device_mesh(world, 2)
    local = torch.arange(6.0).reshape(2, 3) + 10 * mesh.get_local_rank("ep")
    drifted = local.clone()
    drifted[1, 2] += 1e-6 * (rank == 2)
    states: list[dict[str, Tensor]] = [
        {"w": torch.full((3,), float(rank == 3))},
        {
            "a": torch.ones(2),
            "experts": DTensor.from_local(drifted, mesh, [Replicate(), Shard(0)], run_check=False),
        },
        {"w": torch.ones(2 + (rank == 1))},
        {"w": torch.ones(2).to(torch.float64 if rank == 1 else torch.float32)},
        {f"w{int(rank == 2)}": torch.ones(2)},
        {"w": torch.ones(2)} if rank else {},
        {"experts": DTensor.from_local(local, mesh, [Replicate(), Shard(0)], run_check=False)},
    ]
    return [
        refusal(lambda state=state, n=n: save(root / str(n), 1, state, {}))
        for n, state in enumerate(states)
    ]


def test_what_differs_between_ranks_is_refused_on_all(tmp_path: Path) -> None:
    """Experts as plain tensors of one name: DCP, Megatron and DeepSpeed keep only one rank's."""
    results = run_ranks(4, differing_states, tmp_path)
    assert all(result == results[0] for result in results)
    messages = results[0]
    assert "'w' differs between ranks 0 and 3" in messages[0]
    assert "must be given as a DTensor" in messages[0]
    assert "'experts' differs between ranks 0 and 2" in messages[1]
    assert "ranks 0 and 1 hold tensors of different names" in messages[2]
    assert "ranks 0 and 1 hold tensors of different names" in messages[3]
    assert "ranks 0 and 2 hold tensors of different names" in messages[4]
    assert "on rank 0: there is no tensor to save" in messages[5]
    assert messages[6] == "no error"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["6"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64], ids=str)
def test_a_fingerprint_sees_one_changed_element_and_a_swap(dtype: torch.dtype) -> None:
    tensor = (torch.arange(1001) % 7 < 3).to(dtype)
    seen = {fingerprint(tensor)}
    for position in range(0, 1001, 50):
        changed = tensor.clone()
        changed[position] = 1 - changed[position].int()
        seen.add(fingerprint(changed))
    assert len(seen) == 22
    swapped = torch.cat([tensor[500:], tensor[:500]])
    assert fingerprint(swapped) not in seen
    assert (
        fingerprint(tensor.reshape(7, 143).t().contiguous().t().reshape(-1)) in seen
    )  # the strides do not matter


# --- a failure of one rank


class Awkward(Exception):
    """An exception that cannot be unpickled: sent as it is, it would break the coordinator."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


def failing_saves(rank: int, world: int, root: Path) -> list[str]:
    save(root, 100, sharded_state(world, world), {})
    original = dcp.write_safetensors
    messages = []

    def fail(error: Exception, on: int) -> Callable[..., None]:
        def broken(*args: object, **kwargs: object) -> None:
            if rank == on:
                raise error
            original(*args, **kwargs)

        return broken

    for error, on in [
        (OSError(28, "No space left on device"), 1),
        (Awkward("two", "arguments"), 2),
        (Awkward("rank", "0"), 0),
    ]:
        dcp.write_safetensors = fail(error, on)
        messages.append(refusal(lambda: save(root, 200, sharded_state(world, world), {})))
        dcp.write_safetensors = original
        dist.barrier()
        assert sorted(entry.name for entry in root.iterdir()) == ["step-00000100"]
        dist.barrier()
    messages.append(
        refusal(
            lambda: save(
                root, 200, sharded_state(world, world), {"bad": object()} if rank == 2 else {}
            )
        )
    )
    if rank == 1:
        dcp.Chunk = None  # fails inside the writer, before a file is written
    messages.append(refusal(lambda: save(root, 200, sharded_state(world, world), {})))
    dist.barrier()
    assert list_steps(root) == [(100, root / "step-00000100")]
    assert [entry.name for entry in root.iterdir()] == ["step-00000100"]
    return messages


def test_a_writer_that_fails_on_one_rank_fails_the_save_on_all(tmp_path: Path) -> None:
    results = run_ranks(3, failing_saves, tmp_path)
    assert all(result == results[0] for result in results)
    assert "No space left on device" in results[0][0]
    assert "Awkward: two arguments" in results[0][1]
    assert "Awkward: rank 0" in results[0][2]
    assert "on rank 2: extra must be plain JSON" in results[0][3]
    assert "TypeError" in results[0][4]
    verify(tmp_path / "step-00000100")


def failing_loads(rank: int, world: int, path: Path) -> list[str]:
    messages = []
    state = sharded_state(world, world, ones_like)
    if rank == 1:
        state["model.embed"] = torch.ones(3)
    messages.append(refusal(lambda: load(path, state)))
    untouched = sharded_state(world, world, ones_like) | (
        {"model.embed": torch.ones(3)} if rank == 1 else {}
    )
    assert states_equal(state, untouched)
    dist.barrier()
    if rank == 0:
        shard = path / "shard-00001-model-00001-of-00001.safetensors"
        data = bytearray(shard.read_bytes())
        data[8 + struct.unpack("<Q", data[:8])[0]] ^= 1
        shard.write_bytes(data)
    dist.barrier()
    state = sharded_state(world, world, ones_like)
    messages.append(refusal(lambda: load(path, state)))
    assert states_equal(state, sharded_state(world, world, ones_like))
    messages.append(refusal(lambda: find_latest(path.parent)))
    return messages


def test_a_load_refused_on_one_rank_is_refused_on_all(tmp_path: Path) -> None:
    path = save(tmp_path, 100, full_state(), {})
    results = run_ranks(2, failing_loads, path)
    assert results[0] == results[1]
    assert (
        "on rank 1: 'model.embed' is float32[11, 3] in the checkpoint and float32[3]"
        in results[0][0]
    )
    assert "shard-00001-model-00001-of-00001.safetensors was changed" in results[0][1]
    assert "no checkpoint" in results[0][2]
