"""The settings of a distillation, with their defaults. The command shows these without importing torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from model_preparation.errors import SurgeryError

SELF = "self"  # as data: the donor writes the text itself
Target = Literal["mixer", "layer"]


@dataclass(frozen=True)
class DistillSettings:
    """How a donor is distilled.

    Attributes:
        tokens: to train on and hold out, together; all tokens of a tensor are taken.
        sequence_length: tokens per sequence of text; a tensor has its own.
        steps_per_layer: steps of the optimizer for each layer.
        batch_size: sequences per step.
        learning_rate: the highest one, of AdamW.
        weight_decay: of AdamW.
        seed: of all random numbers.
        target: "mixer" compares what mixer and attention give, "layer" what the two whole layers give.
        mixer: sizes of the mixers, `d_state`, `n_v_heads`, `n_qk_heads`, `d_conv`; the others follow from the donor.
        memory_limit_gb: larger hidden states are kept on the disk, in GB.
        layers_per_job: layers that a job on Ray trains. It first puts the tokens through all layers before them.
    """

    tokens: int = 1_048_576
    sequence_length: int = 512
    steps_per_layer: int = 500
    batch_size: int = 8
    learning_rate: float = 2e-3
    weight_decay: float = 0.0
    seed: int = 0
    target: Target = "mixer"
    mixer: Mapping[str, int] = field(default_factory=dict)
    memory_limit_gb: float = 4.0
    layers_per_job: int = 4

    def __post_init__(self) -> None:
        if self.target not in get_args(Target):
            raise SurgeryError(f"target is {self.target!r}. Choose one of {', '.join(get_args(Target))}.")
        for name in ("tokens", "sequence_length", "steps_per_layer", "batch_size", "layers_per_job"):
            if getattr(self, name) < 1:
                raise SurgeryError(f"{name} is {getattr(self, name)}. It must be at least 1.")

    @property
    def memory_limit_bytes(self) -> float:
        return 1e9 * self.memory_limit_gb

    def of_training(self) -> dict[str, Any]:
        """The settings that change the trained weights, beside the text; as the work folder keeps them."""
        names = ("steps_per_layer", "batch_size", "learning_rate", "weight_decay", "seed", "target")
        return {name: getattr(self, name) for name in names} | {"mixer": dict(self.mixer)}
