"""The settings of a distillation, with their defaults. This file does not import torch, so that --help is quick."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

from model_preparation.command_line import number
from model_preparation.setting_flags import CheckedSettings, Flag, OneOf

SELF = "self"  # given as data, it means: the donor writes the text
Target = Literal["mixer", "layer"]


_COUNT, _AT_LEAST_TWO = number(int, least=1), number(int, least=2)


@dataclass(frozen=True)
class DistillSettings(CheckedSettings):
    """How a donor is distilled. Most fields are flags, and the help of the flag explains the field.

    Attributes:
        tokens: ignored if the data is a tensor: all its tokens are used.
        sequence_length: ignored if the data is a tensor, because its shape says the length.
        mixer: sizes of the mixers: `d_state`, `n_v_heads`, `n_qk_heads`, `d_conv`. Other sizes follow from the donor.

    Raises:
        SurgeryError: for a value that its flag refuses.
    """

    tokens: Annotated[
        int,
        Flag(
            "N",
            "tokens of text to read or write; one in 16 is held out, at most 65,536",
            _AT_LEAST_TWO,
        ),
    ] = 1_048_576
    sequence_length: Annotated[int, Flag("N", "tokens per sequence", _AT_LEAST_TWO)] = 512
    steps_per_layer: Annotated[int, Flag("N", "steps of the optimizer for each layer", _COUNT)] = 500
    batch_size: Annotated[int, Flag("N", "sequences per step", _COUNT)] = 8
    learning_rate: Annotated[
        float,
        Flag(
            "X",
            "AdamW's highest rate: it rises linearly for a tenth of the steps, then falls as a cosine",
            number(float, above=0),
        ),
    ] = 2e-3
    weight_decay: Annotated[float, Flag("X", "of AdamW", number(float, least=0))] = 0.0
    seed: Annotated[int, Flag("N", "of all random numbers", number(int, least=0))] = 0
    target: Annotated[
        Target,
        Flag(
            None,
            "outputs to compare: the mixer's with the attention's, or the whole layer's with the donor layer's",
            OneOf(*get_args(Target)),
        ),
    ] = "mixer"
    mixer: Mapping[str, int] = field(default_factory=dict)
    memory_limit_gb: Annotated[
        float,
        Flag(
            "GB",
            "keep hidden states on the disk, not in memory, if they are larger than this",
            number(float, least=0),
            name="memory_limit",
        ),
    ] = 4.0
    layers_per_job: Annotated[
        int,
        Flag(
            "N",
            "with --ray: layers that one job trains in turn; each job first runs the tokens through all earlier layers",
            _COUNT,
        ),
    ] = 4

    @property
    def memory_limit_bytes(self) -> float:
        return 1e9 * self.memory_limit_gb

    def of_training(self) -> dict[str, Any]:
        """The settings of the training, without those of the text, as JSON values for the work folder."""
        names = ("steps_per_layer", "batch_size", "learning_rate", "weight_decay", "seed", "target")
        return {name: getattr(self, name) for name in names} | {"mixer": dict(self.mixer)}
