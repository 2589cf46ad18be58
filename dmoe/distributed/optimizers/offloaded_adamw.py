"""Fused AdamW whose moments are in the memory of the host: 8 bytes less per weight on a GPU.

The moments of all parameters of a dtype lie one after another in two vectors of pinned memory. A
step takes them in buckets of at most `BUCKET` numbers, whatever the sizes of the parameters: a
large one is updated in parts, since the update of an element reads that element alone.

    stream up:    to the device 0 | to the device 1 | to the device 2 ...
    computation:                    update 0        | update 1        | update 2
    stream down:                                      to the host 0   | to the host 1

The device has two buckets: the copies of one run in both directions while the other is updated.
Weights, gradients and step counts stay on the device, and so does the decision to skip a step
(`found_inf`): the host waits for nothing until somebody reads `state`.

The numbers are those of torch's fused AdamW, bit for bit: the same kernel on the same elements.

Cost per weight and step: 8 bytes in each direction over the link to the host, 2 copies per bucket
and direction. Memory of the device: 4 `BUCKET` numbers, 256 MiB in float32, during the step only.
Memory of the host: 8 bytes per weight.

Letters: N numbers of all parameters of a dtype, each parameter padded to `ALIGNMENT` numbers.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dmoe.distributed.gradients import local_tensor
from dmoe.distributed.optimizers.copy_streams import CopyStreams
from dmoe.distributed.state_dict import MOMENTS

BUCKET = 1 << 24
ALIGNMENT = 64
"""Numbers at whose multiples a parameter begins: whole vectors of any kernel."""
SLOTS = 2


class _Piece(NamedTuple):
    """Elements `start` to `end` of a parameter, in the order of its memory."""

    parameter: Tensor
    group: int
    start: int
    end: int
    place: int
    """Place of the moments of `start` in N."""


class _Bucket(NamedTuple):
    """Numbers `start` to `end` of N."""

    start: int
    end: int
    pieces: list[_Piece]


class OffloadedAdamW(torch.optim.AdamW):
    """AdamW that keeps its moments on the host and copies them in buckets.

    Args:
        groups: parameters with `weight_decay`.
        lr: learning rate of all groups.
        betas, eps: of AdamW.
        bucket: numbers of each moment that are on the device at one time, twice; a multiple of
            `ALIGNMENT`.
        on_gpu: pin the memory of the host, and copy on streams of their own; by default where the
            parameters are on a GPU.
    """

    clips_in_its_step = True
    """`gradients.folds_clip` asks: `grad_scale` and `found_inf` work as in torch's."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        bucket: int = BUCKET,
        on_gpu: bool | None = None,
    ) -> None:
        assert bucket > 0
        assert bucket % ALIGNMENT == 0
        self.bucket = bucket
        device = groups[0]["params"][0].device
        self.on_gpu = device.type == "cuda" if on_gpu is None else on_gpu
        self._state: dict[Tensor, dict[str, Tensor]] = defaultdict(dict)
        self._vectors: list[_Vectors] = []
        self._copies: CopyStreams | None = None
        super().__init__(groups, lr=lr, betas=betas, eps=eps, fused=True)

    @property
    def state(self) -> Any:
        """`step` of each parameter, on its device, and the moments, on the host.

        Waits for the copies of the last step: what is read is complete.
        """
        if self._copies is not None:
            self._copies.wait()
        return self._state

    @state.setter
    def state(self, state: Any) -> None:
        assert not state, "moments are filled in place"

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the groups of `load_state_dict`, which accelerate calls before the first step."""
        self.state = state.get("state")
        super().__setstate__({key: value for key, value in state.items() if key != "state"})

    def allocate_moments(self) -> None:
        """Make the moments, zeros, if there are none: before the first step, or to load them.

        In pinned memory for parameters on a GPU. No collective.
        """
        if self._vectors:
            return
        of_dtype: dict[torch.dtype, list[tuple[int, Tensor]]] = {}
        for number, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                of_dtype.setdefault(parameter.dtype, []).append((number, parameter))
        self._vectors = [_Vectors(members, self.bucket) for members in of_dtype.values()]
        for vectors in self._vectors:
            if self.on_gpu and vectors.memory.nbytes:
                _pin(vectors.memory)
                weakref.finalize(self, _unpin, vectors.memory).atexit = False
            for parameter, moments in vectors.of_parameters():
                step = torch.zeros((), dtype=torch.float32, device=parameter.device)
                self._state[parameter] = {"step": step, **moments}

    def host_memory(self) -> list[Tensor]:
        """Return the memory of all moments, one vector per dtype."""
        return [vectors.memory for vectors in self._vectors]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient. No collective, no host read."""
        assert closure is None
        self.allocate_moments()
        steps = [moments["step"] for p, moments in self._state.items() if p.grad is not None]
        if not steps:
            return
        decision = (getattr(self, name, None) for name in ("grad_scale", "found_inf"))
        scale, found_inf = (
            None if value is None else value.to(steps[0].device, non_blocking=True)
            for value in decision
        )
        torch._foreach_add_(steps, 1)
        for vectors in self._vectors:
            self._update(vectors, scale, found_inf)
        if found_inf is not None:
            torch._foreach_sub_(steps, [found_inf] * len(steps))

    def _update(self, vectors: _Vectors, scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Update the parameters of one dtype, bucket by bucket; one without gradients stays."""
        given = [
            bucket._replace(pieces=[p for p in bucket.pieces if p.parameter.grad is not None])
            for bucket in vectors.buckets
        ]
        if self._copies is None:
            self._copies = CopyStreams(self.on_gpu)
        with self._copies.on(vectors.slots) as moved:
            for start, end, pieces in given:
                if not pieces:
                    continue
                with moved([moment[start:end] for moment in vectors.moments]) as moments:
                    for number, members in groupby(pieces, lambda piece: piece.group):
                        group = self.param_groups[number]
                        self._update_pieces(group, list(members), start, moments, scale, found_inf)

    def _update_pieces(
        self,
        group: dict[str, Any],
        pieces: list[_Piece],
        start: int,
        moments: list[Tensor],
        scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Call the kernel of torch's AdamW. `start`: place in N of the first of the moments."""
        beta1, beta2 = group["betas"]
        first, second = (
            [moment[p.place - start :][: p.end - p.start] for p in pieces] for moment in moments
        )
        torch._fused_adamw_(
            [_flat(p.parameter)[p.start : p.end] for p in pieces],
            [_flat_grad(p.parameter)[p.start : p.end] for p in pieces],
            first,
            second,
            [],
            [self._state[p.parameter]["step"] for p in pieces],
            amsgrad=False,
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
            grad_scale=scale,
            found_inf=found_inf,
        )


class _Vectors:
    """The moments of the parameters of one dtype, and the buckets that they are moved in.

    `members`: parameters with the numbers of their groups.
    """

    def __init__(self, members: list[tuple[int, Tensor]], bucket: int) -> None:
        sizes = [local_tensor(parameter).numel() for _, parameter in members]
        places = list(accumulate(map(padded, sizes), initial=0))
        total, parameter = places[-1], members[0][1]
        self.places = {p: place for (_, p), place in zip(members, places, strict=False)}
        self.device, self.bucket = parameter.device, bucket
        self.memory = torch.zeros(len(MOMENTS) * total, dtype=parameter.dtype, device="cpu")
        self.moments = [self.memory[n * total :][:total] for n in range(len(MOMENTS))]
        self.buckets = [
            _Bucket(start, min(start + bucket, total), []) for start in range(0, total, bucket)
        ]
        for (group, parameter), place, size in zip(members, places, sizes, strict=False):
            for start, end, pieces in self.buckets[place // bucket : -(-(place + size) // bucket)]:
                first, last = max(start, place), min(end, place + size)
                pieces.append(_Piece(parameter, group, first - place, last - place, first))

    def slots(self) -> list[list[Tensor]]:
        """Allocate the buckets of the device: two of each moment, or one where it holds all."""
        total = len(self.moments[0])
        numbers = slot_numbers(total, self.bucket)
        memory = torch.empty(numbers, dtype=self.memory.dtype, device=self.device)
        parts = memory.split(min(self.bucket, total)) if total else ()
        return [list(parts[n : n + len(MOMENTS)]) for n in range(0, len(parts), len(MOMENTS))]

    def of_parameters(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Yield each parameter with its moments, sharded as it is."""
        for parameter, place in self.places.items():
            local = local_tensor(parameter)
            parts = (m[place:].as_strided(local.shape, local.stride()) for m in self.moments)
            sharded = (_like(part, parameter) for part in parts)
            yield parameter, dict(zip(MOMENTS, sharded, strict=True))


def padded(numbers: int) -> int:
    """Return how many numbers of N a parameter takes."""
    return -(-numbers // ALIGNMENT) * ALIGNMENT


def slot_numbers(total: int, bucket: int = BUCKET) -> int:
    """Return how many numbers a step has on the device, for moments of `total` numbers each."""
    return len(MOMENTS) * (total if total <= bucket else SLOTS * bucket)


def _like(local: Tensor, parameter: Tensor) -> Tensor:
    """Make `local` a DTensor like the parameter. `DTensor.from_local` would move it to a GPU."""
    if not isinstance(parameter, DTensor):
        return local
    return DTensor(local, parameter._spec, requires_grad=False)


def _flat(tensor: Tensor) -> Tensor:
    """View what this rank holds in the order of its memory."""
    local = local_tensor(tensor)
    span = 1 + sum((n - 1) * s for n, s in zip(local.shape, local.stride(), strict=True))
    assert local.numel() in (0, span), "a parameter has gaps in its memory"
    return local.as_strided((local.numel(),), (1,))


def _flat_grad(parameter: Tensor) -> Tensor:
    """View the gradient in the order of its parameter's memory."""
    assert parameter.grad is not None
    local, grad = local_tensor(parameter), local_tensor(parameter.grad)
    if grad.stride() != local.stride():
        grad = torch.empty_like(local).copy_(grad)
    return grad.as_strided((grad.numel(),), (1,))


def _pin(memory: Tensor) -> None:
    """Pin memory in place: torch's pinned allocator rounds sizes up to powers of two."""
    code = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 1)
    torch.cuda.check_error(code)


def _unpin(memory: Tensor) -> None:
    torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(memory.data_ptr()))
