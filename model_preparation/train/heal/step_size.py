"""How large an optimizer step is: if possible, equally many sequences on any number of processes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from model_preparation.errors import SurgeryError
from model_preparation.train.heal.settings import HealSettings


@dataclass(frozen=True)
class StepSize:
    """The size of an optimizer step with the current number of processes.

    Attributes:
        accumulation: forward passes of each process.
        sequences: sequences of all processes together.
        sequences_at_start: the value of `sequences` at the start of the run, maybe with more or fewer processes.
    """

    accumulation: int
    sequences: int
    sequences_at_start: int

    def steps_here(self, steps: int) -> int:
        """The number of steps of this size that see as many sequences as `steps` steps of the size at the start."""
        return math.ceil(steps * self.sequences_at_start / self.sequences)


def step_size(settings: HealSettings, started_world_size: int, world_size: int) -> StepSize:
    """The step of `world_size` processes: as many sequences as at the start, if the processes can share them evenly."""
    at_start = settings.batch_size * settings.accumulation * started_world_size
    per_pass = settings.batch_size * world_size
    accumulation = at_start // per_pass if at_start % per_pass == 0 else settings.accumulation
    return StepSize(accumulation, accumulation * per_pass, at_start)


def milestones_here(milestones: Mapping[int, str], settings: HealSettings, size: StepSize) -> dict[int, str]:
    """The milestones, with each step converted to a step with the current number of processes.

    Raises:
        SurgeryError: if the run has no such step.
    """
    for step, name in milestones.items():
        if not 1 <= step <= settings.max_steps:
            raise SurgeryError(
                f"The milestone {name} is at step {step}, but the run has steps 1 to {settings.max_steps}. "
                "Give one of these steps, or a larger --max_steps."
            )
    return {size.steps_here(step): name for step, name in milestones.items()}
