"""Is the parallel model the plain model? What is measured, and how: `verify` and the parity tests use the same numbers.

The plain model is called once per data rank's batch, the mean of those losses is stepped on by SGD (Adam would hide a
wrong factor). A difference of gradients is the norm of the difference relative to the plain gradient's norm.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-6, 1e-5  # of fp32
SMALL = 1e-6  # a gradient is compared with at least this part of the norm of all gradients

Batches = Callable[[int, int], Any]  # (data rank, step) to the arguments of the model, a dict or a tuple


def call(model: nn.Module, batch: Any) -> Any:
    return model(**batch) if isinstance(batch, dict) else model(*batch)


def loss_of(output: Any) -> Tensor:
    """The loss in what a training forward returns. Raises ValueError where there is none."""
    found = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", output)
    for value in found if isinstance(found, (tuple, list)) else [found]:
        if isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point():
            return value
    raise ValueError("the model returns no loss in training: its forward must return a scalar, or an output with .loss")


def losses_of(output: Any) -> Tensor:
    """The loss, and the auxiliary loss where the output has one, on the host."""
    losses = [loss_of(output), getattr(output, "aux_loss", None)]
    return torch.stack([loss.detach().double().cpu() for loss in losses if isinstance(loss, Tensor)])


@dataclass
class Reference:
    """What the plain model does."""

    losses: list[list[Tensor]]  # [step][data rank], of `losses_of`
    initial: dict[str, Tensor]
    gradients: dict[str, Tensor]  # of step 1
    updates: dict[str, Tensor]  # parameters after all steps, less the initial ones


def train_plain(
    model: nn.Module,
    batch: Batches,
    data_world: int,
    steps: int,
    rate: float,
    after: Callable[[int, int], None] = lambda data_rank, step: None,
) -> Reference:
    """Trains the plain model; `after` is called after each backward."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    initial = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses: list[list[Tensor]] = []
    gradients: dict[str, Tensor] = {}
    for step in range(steps):
        losses.append([])
        for data_rank in range(data_world):
            output = call(model, batch(data_rank, step))
            losses[-1].append(losses_of(output))
            (loss_of(output) / data_world).backward()
            after(data_rank, step)
        if step == 0:
            gradients = {n: zeros_if_none(p.grad, p).detach().clone() for n, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    updates = {n: p.detach() - initial[n] for n, p in model.named_parameters()}
    return Reference(losses, *({n: t.cpu() for n, t in d.items()} for d in (initial, gradients, updates)))


@dataclass
class Sensitivity:
    """How much the plain model itself changes by other rounding, in the measures of `differences`."""

    loss: float
    gradients: dict[str, float]
    updates: dict[str, float]


def sensitivity(
    model: nn.Module, batch: Batches, data_world: int, steps: int, rate: float, of: Reference, tolerance: float
) -> Sensitivity:
    """Trains copies of the plain model whose weights are each one rounding away (half a unit in the last place), and
    one in fp64 where the model takes that: what this one is away from is rounding.

    A program that rounds at other places cannot be nearer to the plain one than the plain one is to these. `tolerance`
    is that of `differences`.
    """
    found = Sensitivity(0.0, dict.fromkeys(of.gradients, 0.0), dict.fromkeys(of.updates, 0.0))
    for seed in (0, 1, None):
        moved = copy.deepcopy(model)
        if seed is None:
            moved.double()
        else:
            _round_otherwise(moved, seed)
        try:
            other = train_plain(moved, batch, data_world, steps, rate)
        except RuntimeError:
            if seed is None:  # it makes tensors of another dtype itself
                break
            raise
        pairs = [(a, b) for found_, of_ in zip(other.losses, of.losses) for a, b in zip(found_, of_)]
        found.loss = max(found.loss, *(loss_difference(a, b) for a, b in pairs))
        by_gradient = differences(other.gradients, of.gradients)
        by_update = differences(other.updates, of.updates, of.initial, steps, tolerance)
        for worst, errors in ((found.gradients, by_gradient), (found.updates, by_update)):
            for name, error in errors.items():
                worst[name] = max(worst[name], error)
    return found


@torch.no_grad()
def _round_otherwise(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.is_floating_point():
            sign = torch.randint(2, p.shape, generator=generator).to(p.device) * 2 - 1
            p.copy_(p.double() * (1 + sign.double() * torch.finfo(p.dtype).eps / 2))


def zeros_if_none(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient


def local(tensor: Tensor) -> Tensor:
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()).clone().cpu()


def finite(error: Tensor) -> float:
    return error.nan_to_num(nan=math.inf).item()


def loss_difference(found: Tensor, expected: Tensor) -> float:
    """The largest relative difference of the losses of one call."""
    if found.shape != expected.shape:
        return math.inf
    return finite(((found - expected).abs() / expected.abs().clamp(min=1e-12)).max())


def differences(
    found: dict[str, Tensor],
    expected: dict[str, Tensor],
    stored: dict[str, Tensor] | None = None,
    steps: int = 1,
    tolerance: float = GRADIENT_TOLERANCE,
) -> dict[str, float]:
    """The error of each tensor, relative to max(its norm, `SMALL` of the norm of all). A missing tensor is zero.

    Updates are differences of `stored` parameters: one rounding of these per step is within the tolerance.
    """
    norms = {name: tensor.double().norm() for name, tensor in expected.items()}
    floor = SMALL * torch.stack(list(norms.values())).norm()
    errors = {}
    for name, tensor in expected.items():
        scale = torch.maximum(norms[name], floor)
        if stored:
            unit = torch.finfo(stored[name].dtype).eps / 2
            scale = torch.maximum(scale, steps * unit * stored[name].double().norm() / tolerance)
        difference = zeros_if_none(found.get(name), tensor).double() - tensor.double()
        errors[name] = finite(difference.norm() / scale) if difference.norm() != 0 else 0.0
    return errors


def held(parameters: Iterable[Tensor]) -> float:
    """The part of the parameters' elements that this rank holds."""
    sizes = [(local(p).numel(), p.numel()) for p in parameters]
    return sum(mine for mine, _ in sizes) / max(sum(whole for _, whole in sizes), 1)


def drifted(model: nn.Module, mesh: DeviceMesh) -> dict[str, str]:
    """Parameters and buffers that are replicated over an axis and not bit-equal on its ranks, with that axis."""
    found: dict[str, str] = {}
    for axis in mesh.mesh_dim_names or ():
        digests: dict[str, str] = {}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            names: Sequence[str] = (tensor.device_mesh.mesh_dim_names or ()) if isinstance(tensor, DTensor) else ()
            if axis not in names or tensor.placements[names.index(axis)].is_replicate():
                raw = local(tensor).cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                digests[name] = hashlib.sha256(raw).hexdigest()
        others: list[Any] = [None] * mesh[axis].size()
        dist.all_gather_object(others, digests, group=mesh.get_group(axis))
        for name, digest in digests.items():
            if any(other.get(name) != digest for other in others):
                found.setdefault(name, axis)
    return found
