"""What one step of the optimizer is, with the number of processes that there are.

In: a run's settings, and the numbers of processes it was started with and has now. Out: forward passes per process and
step, sequences per step, and steps converted. Where it can be, a step stays the same sequences, so that the run stays
the same run; else each process goes on as it did, and steps are converted by the old number of processes over the new.
"""

import math
from dataclasses import dataclass

from model_preparation.train.heal.settings import HealSettings


@dataclass(frozen=True)
class StepSize:
    """A step of this number of processes.

    Attributes:
        accumulation: forward passes of each process.
        sequences: seen by all processes together.
        sequences_at_start: the same when the run was started.
    """

    accumulation: int
    sequences: int
    sequences_at_start: int

    def steps_here(self, steps: int) -> int:
        """Steps of this size that take as much data as `steps` of the size that the run was started with."""
        return math.ceil(steps * self.sequences_at_start / self.sequences)


def step_size(settings: HealSettings, started_world_size: int, world_size: int) -> StepSize:
    at_start = settings.batch_size * settings.accumulation * started_world_size
    per_pass = settings.batch_size * world_size
    accumulation = at_start // per_pass if at_start % per_pass == 0 else settings.accumulation
    return StepSize(accumulation, accumulation * per_pass, at_start)
