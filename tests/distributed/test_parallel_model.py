"""`dmoe.parallelize`: a loop of one's own on ranks has the numbers of one process, or an error.

Experts in plain DDP gave 1.44 times an expert's gradient, and twice on its ignore list, without a
word (user study, 2026-11). Every such way is here: it raises one sentence, or the number is right.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import dmoe
from dmoe.config.schema import ExpertsConfig
from tests.distributed.own_model import (
    MODES,
    Net,
    State,
    arrays,
    batch,
    compare,
    loss_of,
    own_loop,
    truth,
)
from tests.ranks import RankError, run_ranks

pytestmark = pytest.mark.ranks
TOLERANCE = 1e-12
SHAPES = ExpertsConfig(shapes=((12,), (12,), (6,), (6,)))


def mixed_shapes() -> Net:
    return Net(SHAPES)


def every_mode(
    rank: int, world: int, ep: int, make: Callable[[], Net], loops: list[tuple[int, bool]]
) -> list[Any]:
    mesh, results = None, []
    for mode in MODES:
        for accumulate, no_sync in loops:
            net = make()
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.add_(0.0 if rank < ep else 1.0)  # copies start from the first rank's
            model = dmoe.parallelize(net, ep=ep, mode=mode, mesh=mesh)
            mesh = model.mesh
            found = own_loop(rank, world, model, accumulate, no_sync)
            results.append(compare(found, truth(world * accumulate, make=make)))
    return results


@pytest.mark.parametrize(("world", "ep"), [(2, 2), (2, 1), (4, 2)])
def test_gradients_weights_and_biases_are_those_of_one_process(world: int, ep: int) -> None:
    """Also with accumulation, and with `no_sync` left out."""
    loops = [(1, True), (2, True), (2, False)]
    for differences in run_ranks(world, every_mode, ep, Net, loops, timeout=120):
        assert max(differences) < TOLERANCE, differences


def test_experts_of_different_shapes() -> None:
    for differences in run_ranks(2, every_mode, 2, mixed_shapes, [(1, True)]):
        assert max(differences) < TOLERANCE, differences


def test_one_process_without_a_group() -> None:
    for mode in MODES:
        model = dmoe.parallelize(Net(), mode=mode)
        assert compare(own_loop(0, 1, model, 2), truth(2)) < TOLERANCE


def state_over_sizes(rank: int, world: int) -> list[bool]:
    """A state of EP=2 in fsdp is that of one process, and loads at EP=1, and back."""
    results = []
    for make in (Net, mixed_shapes):
        net = make()
        expected = copy.deepcopy(net.state_dict())
        for ep, mode in ((2, "fsdp"), (1, "ddp"), (2, "ddp"), (2, None)):
            model = dmoe.parallelize(make(), ep=ep, mode=mode)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()
            model.load_state_dict(expected)
            found = model.state_dict()
            results.append(found.keys() == expected.keys())
            results += [torch.equal(found[name], value) for name, value in expected.items()]
            with pytest.raises(dmoe.ConfigError, match="is in the model only"):
                model.load_state_dict({"outer.bias": expected["outer.bias"]})
            wrong = {**expected, "outer.bias": torch.zeros(5)}
            with pytest.raises(dmoe.ConfigError, match=r"outer\.bias: has shape \[5\]"):
                model.load_state_dict(wrong)
        net.load_state_dict(found)
    return results


def test_the_state_has_every_expert_by_its_global_id() -> None:
    for results in run_ranks(2, state_over_sizes):
        assert all(results)


def resumed_over_sizes(rank: int, world: int) -> list[float]:
    """Two steps at EP=2, saved with the optimizer, then two at another size and mode."""
    results = []
    for ep, mode in ((1, "ddp"), (2, "fsdp"), (1, "fsdp"), (2, None)):
        first = dmoe.parallelize(Net(), ep=2, mode="ddp")
        optimizer = torch.optim.AdamW(first.parameters(), lr=0.01)
        own_loop(rank, world, first, optimizer=optimizer)
        states = first.state_dict(), first.optimizer_state_dict(optimizer)
        second = dmoe.parallelize(Net(), ep=ep, mode=mode)
        optimizer = torch.optim.AdamW(second.parameters(), lr=0.5)
        second.load_state_dict(states[0])
        second.load_optimizer_state_dict(optimizer, states[1])
        found = own_loop(rank, world, second, steps=range(2, 4), optimizer=optimizer)
        norms, state = truth(world, steps=range(4))
        results.append(compare(found, (norms[2:], state)))
    return results


def test_a_loop_resumes_at_another_size() -> None:
    for differences in run_ranks(2, resumed_over_sizes, timeout=120):
        assert max(differences) < TOLERANCE, differences


def step_of(rank: int, model: nn.Module) -> Tensor:
    x, y = (part.chunk(2)[rank] for part in batch(0))
    return loss_of(model, x, y)


def in_foreign_ddp(rank: int, model: dmoe.ParallelModel) -> None:
    DistributedDataParallel(model)


def inner_in_foreign_ddp(rank: int, model: dmoe.ParallelModel) -> None:
    step_of(rank, DistributedDataParallel(model.module))


def ddp_around_a_larger_model(rank: int, model: dmoe.ParallelModel) -> None:
    outer = nn.Sequential(model.module)
    step_of(rank, DistributedDataParallel(outer))


def in_foreign_fsdp2(rank: int, model: dmoe.ParallelModel) -> None:
    fully_shard(model)
    step_of(rank, model)


def inner_in_foreign_fsdp2(rank: int, model: dmoe.ParallelModel) -> None:
    fully_shard(model.module)
    step_of(rank, model.module)


def ddp_before_parallelize(rank: int, model: dmoe.ParallelModel) -> None:
    dmoe.parallelize(DistributedDataParallel(Net()), ep=2)


def fsdp2_before_parallelize(rank: int, model: dmoe.ParallelModel) -> None:
    net = Net()
    fully_shard(net.outer)
    dmoe.parallelize(net, ep=2)


def parallelized_twice(rank: int, model: dmoe.ParallelModel) -> None:
    dmoe.parallelize(model, ep=2)


class _FabricModule(nn.Module):
    """The name of Lightning Fabric's wrapper, which is recognised without an import."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.forward_module = module


def fabric_before_parallelize(rank: int, model: dmoe.ParallelModel) -> None:
    dmoe.parallelize(_FabricModule(Net()), ep=2)


def prepared_by_accelerate(rank: int, model: dmoe.ParallelModel) -> None:
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    Accelerator(cpu=True).prepare(model)


def weights_assigned(rank: int, model: dmoe.ParallelModel) -> None:
    state = {name: value.clone() for name, value in model.module.state_dict(keep_vars=True).items()}
    model.module.load_state_dict(state, assign=True)
    step_of(rank, model)


def optimizer_made_before(rank: int, model: dmoe.ParallelModel) -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    model = dmoe.parallelize(net, ep=2)
    model.backward(step_of(rank, model))
    optimizer.step()


def clipped_with_torch(rank: int, model: dmoe.ParallelModel) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.backward(step_of(rank, model))
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def clipped_by_value(rank: int, model: dmoe.ParallelModel) -> None:
    """The same by another function."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.backward(step_of(rank, model))
    nn.utils.clip_grad_value_(model.parameters(), 1e-6)
    optimizer.step()


def last_backward_in_no_sync(rank: int, model: dmoe.ParallelModel) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with model.no_sync():
        loss = step_of(rank, model)
    model.backward(loss)
    optimizer.step()


def clipped_in_no_sync(rank: int, model: dmoe.ParallelModel) -> None:
    with model.no_sync():
        model.backward(step_of(rank, model))
    model.clip_grad_norm_(1.0)


def second_backward(rank: int, model: dmoe.ParallelModel) -> None:
    first, second = step_of(rank, model), step_of(rank, model)
    model.backward(first)
    model.backward(second)


def state_on_one_rank(rank: int, model: dmoe.ParallelModel) -> None:
    model.patience = 1.0
    if rank == 0:
        model.state_dict()
    raise dmoe.ConfigError("state_dict()", "on rank 0", "not this rank's", "")


def unused_in_ddp(rank: int, model: dmoe.ParallelModel) -> None:
    """DDP itself would raise in the next forward: after a step with gradients of this rank."""
    net = nn.ModuleDict({"net": Net(), "unused": nn.Linear(2, 2)})
    model = dmoe.parallelize(net, ep=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    net.forward = net["net"].forward  # type: ignore[method-assign]
    model.backward(step_of(rank, model))
    optimizer.step()


def optimizer_state_saved(rank: int, model: dmoe.ParallelModel) -> None:
    """Rank 0's moments would be loaded into the experts of all ranks: the shapes are equal."""
    optimizer = torch.optim.AdamW(model.parameters())
    model.backward(step_of(rank, model))
    optimizer.step()
    optimizer.state_dict()


def inner_state_saved(rank: int, model: dmoe.ParallelModel) -> None:
    model.module.state_dict()


WRONG: dict[Callable[[int, dmoe.ParallelModel], None], str] = {
    in_foreign_ddp: "model=in DistributedDataParallel.*call the ParallelModel itself",
    inner_in_foreign_ddp: "model=in DistributedDataParallel",
    ddp_around_a_larger_model: "model=in DistributedDataParallel",
    in_foreign_fsdp2: "are not those that dmoe.parallelize made",
    inner_in_foreign_fsdp2: "are not those that dmoe.parallelize made",
    ddp_before_parallelize: "model=in DistributedDataParallel",
    fsdp2_before_parallelize: "model=in FSDPModule",
    parallelized_twice: "parallel already.*call parallelize once",
    fabric_before_parallelize: "model=in _FabricModule.*setup_optimizers",
    prepared_by_accelerate: r"model=in DistributedDataParallel.*give accelerate \(prepare\)",
    weights_assigned: "are not those that dmoe.parallelize made",
    optimizer_made_before: "make the optimizer after dmoe.parallelize",
    clipped_with_torch: r"gradients=changed.*call model.clip_grad_norm_\(max_norm\)",
    clipped_by_value: "gradients=changed after backward",
    last_backward_in_no_sync: "no_sync=around the last backward",
    clipped_in_no_sync: "no_sync=around the last backward",
    second_backward: "backward=a second one.*mode=None",
    unused_in_ddp: "parameter=unused.weight: has no gradient.*mode=None",
    optimizer_state_saved: r"state_dict=.*call model.optimizer_state_dict\(optimizer\)",
    inner_state_saved: "state_dict=of this rank.*call the ParallelModel's",
    state_on_one_rank: r"state_dict\(\)=on rank 0.*",  # the last: it leaves the group unusable
}


def every_wrong_way(rank: int, world: int) -> dict[str, str]:
    said = {}
    for way in WRONG:
        model = dmoe.parallelize(Net(), ep=2)
        try:
            way(rank, model)
            said[way.__name__] = "nothing"
        except dmoe.ConfigError as error:
            said[way.__name__] = str(error)
        except Exception as error:
            said[way.__name__] = f"{type(error).__name__}: {error}"
    return said


def test_every_wrong_way_is_an_error_on_all_ranks() -> None:
    results = run_ranks(2, every_wrong_way, timeout=120)
    for said in results:
        for way, pattern in WRONG.items():
            assert re.search(pattern, said[way.__name__]), (way.__name__, said[way.__name__])
    assert "another rank has not called it within 1 second" in results[0]["state_on_one_rank"]


def gradients_of(model: dmoe.ParallelModel) -> State:
    """The full gradients, by way of a step of plain gradient descent."""
    before = arrays(model.state_dict())
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    after = arrays(model.state_dict())
    return {name: before[name] - after[name] for name in before if "bias_E" not in name}


def forgot_backward(rank: int, model: dmoe.ParallelModel) -> None:
    """`loss.backward()` instead of the model's: there is no `finish` to forget."""
    step_of(rank, model).backward()


def two_forwards_one_backward(rank: int, model: dmoe.ParallelModel) -> None:
    first, second = step_of(rank, model), step_of(rank, model)
    model.backward((first + second) / 2)


def two_forwards_two_backwards(rank: int, model: dmoe.ParallelModel) -> None:
    first, second = step_of(rank, model), step_of(rank, model)
    model.backward(first / 2)
    model.backward(second / 2)


def evaluated_between(rank: int, model: dmoe.ParallelModel) -> None:
    loss = step_of(rank, model)
    with torch.no_grad():
        model.eval()
        step_of(rank, model)
        model.train()
    model.backward(loss)


def forward_outside_no_sync(rank: int, model: dmoe.ParallelModel) -> None:
    """Only the backward is in `no_sync`; then a whole one follows."""
    loss = step_of(rank, model) / 2
    with model.no_sync():
        model.backward(loss)
    model.backward(step_of(rank, model) / 2)


def through_accelerate(rank: int, model: dmoe.ParallelModel) -> None:
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    accelerator = Accelerator(cpu=True)
    optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.0))
    accelerator.backward(step_of(rank, model))
    optimizer.step()


RIGHT: dict[Callable[[int, dmoe.ParallelModel], None], tuple[str | None, ...]] = {
    forgot_backward: MODES,
    two_forwards_one_backward: MODES,
    two_forwards_two_backwards: ("fsdp", None),
    evaluated_between: MODES,
    forward_outside_no_sync: MODES,
    through_accelerate: MODES,
}


def every_right_way(rank: int, world: int, ep: int) -> dict[str, float]:
    net, found = Net(), {}
    x, y = (part.chunk(2) for part in batch(0))
    torch.stack([loss_of(net, *pair) for pair in zip(x, y, strict=True)]).mean().backward()
    expected = {name: p.grad for name, p in net.named_parameters()}
    for way, modes in RIGHT.items():
        for mode in modes:
            model = dmoe.parallelize(Net(), ep=ep, mode=mode)
            way(rank, model)
            got = gradients_of(model)
            assert got.keys() == expected.keys()
            found[f"{way.__name__} {mode}"] = max(
                float((torch.from_numpy(got[name]) - value).abs().max())  # type: ignore[operator]
                for name, value in expected.items()
            )
    return found


@pytest.mark.parametrize("ep", [2, 1])
def test_every_other_way_has_the_gradients_of_one_process(ep: int) -> None:
    for found in run_ranks(2, every_right_way, ep, timeout=120):
        assert {name: value for name, value in found.items() if value > TOLERANCE} == {}


def gradients_in_no_sync(rank: int, world: int) -> list[float]:
    net, found = Net(), []
    loss_of(net, *(part.chunk(2)[rank] for part in batch(0))).backward()
    for mode in ("ddp", None):
        model = dmoe.parallelize(Net(), ep=2, mode=mode)
        with model.no_sync():
            model.backward(step_of(rank, model))
        own, alone = model.module.outer.weight.grad, net.outer.weight.grad
        found.append(float((own - alone).abs().max()))
    return found


def test_no_sync_leaves_the_gradients_of_this_rank() -> None:
    for differences in run_ranks(2, gradients_in_no_sync):
        assert max(differences) < TOLERANCE, differences


def clipped_by_torch(rank: int, world: int) -> dict[str, str | float]:
    """What torch's function does in every mode: the norm, or the error of it or of the step."""
    found: dict[str, str | float] = {}
    for ep in (1, 2):
        for mode in MODES:
            model = dmoe.parallelize(Net(), ep=ep, mode=mode)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            model.backward(step_of(rank, model))
            try:
                norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                found[f"{ep} {mode}"] = float(
                    getattr(norm, "full_tensor", lambda norm=norm: norm)()
                )
            except (RuntimeError, dmoe.ConfigError) as error:
                found[f"{ep} {mode}"] = type(error).__name__
    return found


def test_torch_clipping_is_right_or_an_error_in_every_mode() -> None:
    norm = truth(2, steps=range(1))[0][0]
    for found in run_ranks(2, clipped_by_torch):
        assert found.pop("2 ddp") == found.pop("2 None") == "ConfigError"
        assert found.pop("2 fsdp") == "RuntimeError"  # torch's own: two kinds of tensors
        assert found == pytest.approx({"1 ddp": norm, "1 fsdp": norm, "1 None": norm})


def manual_updates(rank: int, world: int) -> str:
    """A loop that updates without an optimizer of torch has no hook that moves the bias."""
    model = dmoe.parallelize(Net(), ep=2, mode=None)
    biases = []
    for forgotten in (False, True):
        for _ in range(2):
            model.backward(step_of(rank, model))
            with torch.no_grad():
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    parameter -= parameter.grad
                    parameter.grad = None
            if not forgotten:
                model.step_balance()
                biases.append(model.module.moes()[0].router.get_buffer("bias_E").abs().max())
    return str(biases)


def test_a_forgotten_update_of_the_bias_is_an_error_without_an_optimizer() -> None:
    with pytest.raises(RankError, match=r"its balance bias was not; call"):
        run_ranks(2, manual_updates)


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "ep": (lambda: dmoe.parallelize(Net(), ep=3), r"ep=3: must divide the number of ranks, 1"),
    "mode": (lambda: dmoe.parallelize(Net(), mode="zero"), "mode=zero: must be ddp, fsdp or None"),
    "mesh": (lambda: dmoe.parallelize(Net(), mesh=2), "mesh=int"),  # type: ignore[arg-type]
    "twice": (lambda: dmoe.parallelize(dmoe.parallelize(Net())), "parallel already"),
    "data parallel": (lambda: dmoe.parallelize(nn.DataParallel(Net())), "model=in DataParallel"),
    "empty": (lambda: dmoe.parallelize(nn.ReLU()), "has no parameters"),
    "meta": (lambda: dmoe.parallelize(nn.Linear(2, 2, device="meta")), "has no weights yet"),
    "clip": (lambda: dmoe.parallelize(Net()).clip_grad_norm_(0), "max_norm=0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_that_cannot_work_are_refused(name: str) -> None:
    call, pattern = REFUSED[name]
    with pytest.raises(dmoe.ConfigError, match=pattern):
        call()
