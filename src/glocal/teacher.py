"""A slow copy of trained modules, which methods and strategies take their targets from (Tarvainen & Valpola 2017)."""

from collections.abc import Sequence
from copy import deepcopy
from math import cos, pi

import torch
from torch import nn


class Teacher(nn.ModuleList):
    """Copies of modules that follow them, θ_t ← μ θ_t + (1 − μ) θ_s, and are never trained themselves.

    A learner that has one calls `follow` at the beginning of every step but the first: the state after each step is
    then that of the checkpoint, so that a run continues exactly.
    """

    def __init__(self, *students: nn.Module, gathers: bool = False) -> None:
        """Copy modules.

        Args:
            students: the modules.
            gathers: the copies' batch norms gather running statistics of what they are shown; else they have the
                students', whatever they are shown.
        """
        super().__init__(deepcopy(student) for student in students)
        self.requires_grad_(False)
        if not gathers:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
                    module.momentum = 0.0

    @torch.no_grad()
    def follow(self, students: Sequence[nn.Module], momentum: float, statistics: bool = True) -> None:
        """Move towards the students.

        Args:
            students: the modules that were copied, in that order.
            momentum: μ in [0, 1]; 1 stays where it is.
            statistics: running statistics of batch norm are taken over as they are; else the copy keeps its own.
        """
        for mine, theirs in zip(self, students, strict=True):
            weights = [(p, q.detach()) for p, q in zip(mine.parameters(), theirs.parameters(), strict=True)]
            torch._foreach_lerp_([p for p, _ in weights], [q for _, q in weights], 1 - momentum)
            for buffer, other in zip(mine.buffers(), theirs.buffers(), strict=True):
                if statistics:
                    buffer.copy_(other)


def rising(start: float, step: int, steps: int) -> float:
    """The momentum of step `step` of `steps`: from `start` to 1 along a cosine (Grill et al. 2020, BYOL)."""
    return 1 - (1 - start) * (cos(pi * step / steps) + 1) / 2
