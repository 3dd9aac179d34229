"""Several processes that train as one: each computes its share of every batch, and losses see all of it.

All processes draw the same batch, because it is a function of (seed, step). Each sends its `share` of the slices
through the network; `whole` brings the embeddings of all together, and from there on every process computes the same
loss from the same numbers. Averaged over the processes, as DistributedDataParallel does it, the gradients of the
weights are then those of one process with the whole batch.

In a single process every function here returns what it was given.
"""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from glocal.errors import GlocalError

T = TypeVar("T")


def started() -> int:
    """How many processes were started together: by torchrun, or by SLURM's srun."""
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS") or 1)


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is; the first, 0, is the only one that writes files."""
    return dist.get_rank() if world_size() > 1 else 0


def part() -> None:
    """Leave the others in good order; a process that ends without it may be aborted by its own waiting threads."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def first_decides(decide: Callable[[], T]) -> T:
    """What the first process finds out or does, for all: where it refuses, all refuse with the same sentence.

    Raises:
        GlocalError: what `decide` raised in the first process.
    """
    if world_size() == 1:
        return decide()
    answer: list[Any] = [None, None]
    if rank() == 0:
        try:
            answer[0] = decide()
        except GlocalError as error:
            answer[1] = str(error)
    dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise GlocalError(answer[1])
    decision: T = answer[0]
    return decision


def share(batch: int) -> slice:
    """The rows of a batch that this process computes; shares differ by one row at most.

    Raises:
        GlocalError: there are more processes than rows.
    """
    if batch < world_size():
        raise GlocalError(
            f"{world_size()} processes cannot share a step of {batch} slices: start fewer, or let a step take more."
        )
    edges = [batch * process // world_size() for process in (rank(), rank() + 1)]
    return slice(*edges)


def whole(x: Tensor, batch: int) -> Tensor:
    """The rows of all processes, in the order of the batch; differentiable.

    Args:
        x: `(k * b, ...)` this process's rows: one after the other k views (or other versions) of its share b.
        batch: the size of the batch they are a share of.

    Returns:
        `(k * batch, ...)`: the same on every process, view after view.
    """
    if world_size() == 1:
        return x
    own = share(batch)
    views = x.view(-1, own.stop - own.start, *x.shape[1:]).transpose(0, 1)  # rows first
    rows: Tensor = _Gather.apply(views.contiguous(), batch)  # type: ignore[no-untyped-call]
    return rows.transpose(0, 1).reshape(-1, *x.shape[1:])


class _Gather(torch.autograd.Function):
    """Rows of all processes; backward, each takes the gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, batch: int) -> Tensor:
        ctx.rows = share(batch)
        size = world_size()
        longest = -(-batch // size)
        padded = torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])])
        parts = [torch.empty_like(padded) for _ in range(size)]
        dist.all_gather(parts, padded)
        lengths = [batch * (p + 1) // size - batch * p // size for p in range(size)]
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # Every process has the gradient of the same loss; DistributedDataParallel will divide by their number.
        return gradients[0][ctx.rows] * world_size(), None


def with_whole_statistics(module: nn.Module, device: torch.device) -> nn.Module:
    """Make every batch norm in `module`, which will compute on `device`, take its statistics from the whole batch."""
    if world_size() == 1:
        return module
    if device.type == "cuda":
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
        return converted
    for child in module.modules():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            child.__class__ = _BatchNorm  # same weights and names; torch's own SyncBatchNorm refuses the CPU
    return module


class _BatchNorm(nn.BatchNorm2d):
    """Batch norm over the images of all processes, on any device."""

    def forward(self, input: Tensor) -> Tensor:
        """Features `(b, C)` or maps `(b, C, H, W)` -> the same shape and type."""
        if not self.training:
            return super().forward(input)
        x = input if input.dtype == torch.float64 else input.float()
        dims, shape = (0, *range(2, x.ndim)), (1, -1, *[1] * (x.ndim - 2))
        own = x.new_tensor([x.numel() // x.shape[1]])
        sums = all_sum(torch.cat([x.sum(dims), own]))
        count, mean = sums[-1], sums[:-1] / sums[-1]
        centred = x - mean.view(shape)
        variance = all_sum(centred.square().sum(dims)) / count
        with torch.no_grad():
            assert self.running_mean is not None  # the field's batch norm keeps statistics
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            self.num_batches_tracked += 1
            momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.to(self.running_mean), momentum)
            self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var), momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return torch.addcmul(self.bias.view(shape), centred, scale.view(shape)).to(input.dtype)

    def _check_input_dim(self, input: Tensor) -> None:
        pass


def all_sum(x: Tensor) -> Tensor:
    """The sum of `x` over all processes; differentiable, whoever of them uses it."""
    summed: Tensor = x if world_size() == 1 else _Sum.apply(x)  # type: ignore[no-untyped-call]
    return summed


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].clone()
        dist.all_reduce(gradient)
        return gradient
