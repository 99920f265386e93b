"""Trains only the mixer of a Llamba layer, on the outputs of the donor's attention or whole layer.

Source: MOHAWK, arXiv 2408.10189, stage 2, hidden-state alignment.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_sliding_window_causal_mask

from model_preparation.errors import SurgeryError
from model_preparation.llamba.cache_llamba import CACHE_NAME
from model_preparation.llamba.donor_kinds import KINDS, mask_kinds
from model_preparation.llamba.modeling_llamba import LlambaDecoderLayer
from model_preparation.llamba.ssd import HAVE_FLOAT64
from model_preparation.train.distill.settings import Target

WARM_UP = 0.1  # the fraction of steps in which the learning rate rises
BETAS = (0.9, 0.95)  # of AdamW
MAX_GRADIENT_NORM = 1.0
EVALUATED_TOKENS = 4096  # in one batch without gradients


class Batch(NamedTuple):
    """Hidden states that enter the donor's layer, and the weight of each position."""

    hidden_states: Tensor  # (batch, length, width) float32
    weights: Tensor | None = None  # (batch, length), at least 0; None: equal weights


class Step(NamedTuple):
    """One step of training, for a log. `loss` is the relative error on its batch before the weights change."""

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float


def train_layer(
    donor_layer: nn.Module,
    student_layer: LlambaDecoderLayer,
    batches: Iterable[Batch],
    *,
    steps: int,
    learning_rate: float,
    target: Target = "mixer",
    weight_decay: float = 0.0,
    log: Callable[[Step], None] = lambda step: None,
) -> list[float]:
    """Train the mixer of `student_layer`, in place, to give the outputs of `donor_layer`. Nothing here is random.

    A step's loss is the squared error, divided by the variance of the donor's outputs, both over the step's batch. The
    optimizer is AdamW. The learning rate rises linearly for a tenth of the steps, then falls as a cosine. Gradients are
    clipped at norm 1.

    Args:
        donor_layer: float32, on the device of the training.
        student_layer: float32, on the same device.
        batches: at least `steps` batches, such as `shuffled` yields. Each is moved to the device.
        target: "mixer" compares the outputs of mixer and attention, "layer" the outputs of both layers.
        log: called after every step.

    Returns:
        The loss of every step.

    Raises:
        SurgeryError: if a loss is not finite.
        ValueError: if there are fewer batches than steps.
    """
    teacher = Teacher(donor_layer, target)
    student_layer.requires_grad_(False)
    mixer = student_layer.mixer.requires_grad_(True)
    optimizer = torch.optim.AdamW(mixer.parameters(), lr=learning_rate, betas=BETAS, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, steps))
    losses: list[float] = []
    source = iter(batches)
    for step in range(steps):
        batch = next(source, None)
        if batch is None:
            raise ValueError(f"there are only {step} batches for {steps} steps")
        moments = teacher.compare(student_layer, batch)
        loss = moments.relative_error()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise SurgeryError(
                f"The loss is {losses[-1]} at step {step} of {steps}, with a learning rate of {learning_rate}. "
                "Give a lower --learning_rate. If layers are finished already, add --restart: it keeps only the tokens."
            )
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(mixer.parameters(), MAX_GRADIENT_NORM)
        log(Step(step, losses[-1], optimizer.param_groups[0]["lr"], norm.item()))
        optimizer.step()
        schedule.step()
    mixer.requires_grad_(False)
    return losses


@torch.no_grad()
def relative_error(
    donor_layer: nn.Module, student_layer: LlambaDecoderLayer, batches: Iterable[Batch], target: Target = "mixer"
) -> float:
    """The mean squared error of the student's outputs, divided by the variance of the donor's outputs.

    Both are computed over all positions of all `batches`. The variance is measured from each channel's mean. So
    the best constant output has error 1. With target "layer", an output is what a layer adds to its input.
    """
    teacher = Teacher(donor_layer, target)
    total = Moments.none()
    for batch in batches:
        total = total + teacher.compare(student_layer, batch)
    return total.relative_error().item()


def rate_factor(step: int, steps: int) -> float:
    """The factor of the learning rate at `step` of `steps`: a linear rise, then half a cosine down to 0."""
    rise = max(1, round(steps * WARM_UP))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def shuffled(states: Tensor, weights: Tensor | None, batch_size: int, seed: int) -> Iterator[Batch]:
    """Yield random batches of whole sequences, endlessly. A sequence comes at most once in each pass.

    Args:
        states: (sequences, length, width).
        weights: (sequences, length), or None.
    """
    generator = torch.Generator().manual_seed(seed)
    batch_size = min(batch_size, len(states))
    while True:
        order = torch.randperm(len(states), generator=generator)
        for chosen in order[: len(order) - len(order) % batch_size].split(batch_size):
            yield Batch(states[chosen], None if weights is None else weights[chosen])


def in_order(states: Tensor, weights: Tensor | None = None) -> Iterator[Batch]:
    """Yield all sequences once, in order, in batches of at most `EVALUATED_TOKENS` tokens, but at least one sequence.

    Shapes are as in `shuffled`. Batches are views of `states` and `weights`, not copies.
    """
    at_once = max(1, EVALUATED_TOKENS // states.shape[1])
    for first in range(0, len(states), at_once):
        chosen = slice(first, first + at_once)
        yield Batch(states[chosen], None if weights is None else weights[chosen])


def apply_layer(layer: Callable[[Tensor], Tensor], states: Tensor, outputs: Tensor) -> None:
    """Write the output of `layer` for `states` into `outputs`, some sequences at a time. `outputs` may be `states`."""
    for batch, place in zip(in_order(states), in_order(outputs), strict=True):
        place.hidden_states.copy_(layer(batch.hidden_states))


class Moments(NamedTuple):
    """Weighted sums over positions, for a relative error. The sums of several batches can be added."""

    weight: Tensor  # () the weights themselves
    error: Tensor  # () the squared error, summed over the channels too
    first: Tensor  # (width,) the donor's outputs
    second: Tensor  # () the squares of the donor's outputs, summed over the channels too

    @classmethod
    def none(cls) -> "Moments":
        return cls(*(torch.zeros((), dtype=torch.float64) for _ in cls._fields))

    def __add__(self, other: "Moments") -> "Moments":  # type: ignore[override]
        return Moments(*(mine.cpu() + its.cpu() for mine, its in zip(self, other, strict=True)))

    def relative_error(self) -> Tensor:
        return self.error / (self.second - self.first.square().sum() / self.weight)


class Teacher:
    """A donor's layer. It measures the error of a student."""

    def __init__(self, layer: nn.Module, target: Target = "mixer"):
        if target not in ("mixer", "layer"):
            raise ValueError(f"target {target!r} is neither 'mixer' nor 'layer'")
        attention: Any = layer.self_attn
        self._layer: Any = layer.eval().requires_grad_(False)
        self._target = target
        self._device = attention.q_proj.weight.device
        self._config = config = attention.config
        if config._attn_implementation is None:
            config._attn_implementation = "sdpa"
        kind = KINDS[config.model_type]
        masks = mask_kinds(kind.settings(config), config.num_hidden_layers)
        self._is_sliding = masks[attention.layer_idx] == "sliding_attention"
        self._rotary = kind.transformers_class("RotaryEmbedding")(config).to(self._device)

    @torch.no_grad()
    def output(self, hidden_states: Tensor) -> Tensor:
        """The layer's output, (batch, length, width), on the device of the input."""
        states = hidden_states.to(self._device)
        return self._layer(states, **self._arguments(states)).to(hidden_states.device)

    def compare(self, student: LlambaDecoderLayer, batch: Batch) -> Moments:
        """The sums for a batch, on the layer's device. Gradients flow to the student's parameters."""
        states = batch.hidden_states.to(self._device)
        wanted = self._added(states)
        whole = self._target == "layer"
        given = student(states) - states if whole else student.mixer(student.input_layernorm(states))
        weights = states.new_ones(states.shape[:2]) if batch.weights is None else batch.weights.to(states)
        weighted = weights.unsqueeze(-1)
        dtype = torch.float64 if states.device.type in HAVE_FLOAT64 else torch.float32
        return Moments(
            weight=weights.sum(dtype=dtype),
            error=((given - wanted).square() * weighted).sum(dtype=dtype),
            first=(wanted * weighted).sum((0, 1), dtype=dtype),
            second=(wanted.square() * weighted).sum(dtype=dtype),
        )

    @torch.no_grad()
    def _added(self, states: Tensor) -> Tensor:
        """What the layer, or its attention block alone, adds to the hidden states."""
        arguments = self._arguments(states)
        if self._target == "layer":
            return self._layer(states, **arguments) - states
        return self._layer.self_attn(self._layer.input_layernorm(states), **arguments)[0]

    def _arguments(self, states: Tensor) -> dict[str, Any]:
        """The other arguments of the layer: mask and positions. `states` are whole sequences."""
        mask = None  # without a mask, transformers' attention is causal
        if self._is_sliding:
            mask = create_sliding_window_causal_mask(self._config, states, None, **{CACHE_NAME: None})
        positions = torch.arange(states.shape[1], device=states.device).unsqueeze(0)
        return {"attention_mask": mask, "position_embeddings": self._rotary(states, position_ids=positions)}
