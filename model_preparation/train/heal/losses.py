"""The losses of healing: on the text, or against a teacher.

Sources: Hinton et al., arXiv 1503.02531, section 2 (the gradient of soft targets is scaled by temperature squared);
Agarwal et al., arXiv 2306.13649 (both directions of the divergence).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax, mse_loss, pad
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from model_preparation.errors import SurgeryError
from model_preparation.llamba.cache_llamba import CACHE_NAME
from model_preparation.train.heal.conversation_tokens import NOT_COUNTED
from model_preparation.train.heal.settings import HealSettings


class TeacherOutput(NamedTuple):
    """A teacher's predictions at some positions.

    Attributes:
        log_probs: (positions, vocab), or (positions, K) for only the K likeliest tokens.
        tokens: (positions, K) int64, the likeliest tokens; None if `log_probs` has all tokens.
        others: (positions,), the log-probability of all other tokens together; None if there are no others.
        hidden_states: the embeddings and the output of each layer, (batch, length, width) each; None if not needed.
    """

    log_probs: Tensor
    tokens: Tensor | None = None
    others: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


# Called with a batch and a mask (batch, length); gives the predictions at the positions where the mask is True.
Teacher = Callable[[Mapping[str, Tensor], Tensor], TeacherOutput]


class LiveTeacher:
    """A teacher in memory, with the student's vocabulary, on the student's device."""

    def __init__(self, model: PreTrainedModel, settings: HealSettings):
        self._model = model.eval().requires_grad_(False)
        self._settings = settings
        self._cache: Any = None  # of the earlier segments, if a sequence is trained in segments

    @property
    def device(self) -> torch.device:
        return self._model.device

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor], counted: Tensor) -> TeacherOutput:
        given = {name: inputs[name] for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
        start, carried = inputs.get("start"), {}
        if start is not None:
            if "position_ids" in inputs:
                raise SurgeryError(
                    "A teacher in memory would mix the documents of packed sequences that are trained in segments. "
                    "Give --teacher_cache, or leave out --segment_length."
                )
            carried = {CACHE_NAME: self._cache if start else None}
        wants_hidden_states = self._settings.hidden_weight > 0
        outputs = self._model(**given, **carried, use_cache=start is not None, output_hidden_states=wants_hidden_states)
        self._cache = outputs.get(CACHE_NAME)
        logits = outputs.logits[counted].float() / self._settings.temperature
        return TeacherOutput(log_softmax(logits, dim=-1), hidden_states=outputs.hidden_states)


class Distillation:
    """The loss of a student against a teacher; temperature and the weights of the terms are in the settings."""

    def __init__(self, teacher: Teacher, settings: HealSettings):
        self._teacher, self._settings = teacher, settings

    def loss(
        self, student: CausalLMOutputWithPast, batch: Mapping[str, Tensor], count: Tensor | int | None = None
    ) -> Tensor:
        """The sum of the losses at the positions that count, divided by `count`.

        A loss is w T^2 KL + (1 - w) cross-entropy + h MSE(hidden states), with w, T and h from the settings. KL mixes
        both directions: (1 - r) KL(teacher || student) + r KL(student || teacher). The MSE is a mean over layers and
        positions. Each layer's error is divided by the teacher's mean square, which grows a thousandfold with depth.

        Args:
            student: its logits (batch, length, vocab), and with a `hidden_weight` its hidden states.
            batch: `targets` from `next_tokens`, and the inputs of student and teacher.
            count: how many positions count in the whole step; by default this batch's number, so the loss is a mean.
        """
        settings = self._settings
        targets = batch["targets"]
        counted = targets != NOT_COUNTED
        teacher = self._teacher(batch, counted)
        logits = student.logits[counted].float()  # (positions, vocab)
        count = counted.sum().clamp(min=1) if count is None else count
        ours = log_softmax(logits / settings.temperature, dim=-1)
        loss = settings.teacher_weight * settings.temperature**2 * divergence(ours, teacher, settings.reverse_weight)
        if settings.teacher_weight < 1:
            loss = loss + (1 - settings.teacher_weight) * cross_entropy(logits, targets[counted], reduction="sum")
        if teacher.hidden_states is not None:
            pairs = zip(student.hidden_states[1:], teacher.hidden_states[1:], strict=True)  # [0] are the embeddings
            terms = [_relative_error(ours[counted].float(), theirs[counted].float()) for ours, theirs in pairs]
            loss = loss + settings.hidden_weight * torch.stack(terms).mean() * counted.sum()
        return loss / count


def divergence(ours: Tensor, teacher: TeacherOutput, reverse_weight: float) -> Tensor:
    """(1 - r) KL(teacher || student) + r KL(student || teacher), summed over positions.

    If only the likeliest tokens of a teacher are known, all others count as one token, for both models. Then no
    probability is lost. At the known tokens, the gradient of the forward divergence is the same as with all tokens
    known.

    Args:
        ours: the student's log-probabilities, (positions, vocab).
    """
    theirs = teacher.log_probs
    if teacher.tokens is not None:
        known = ours.gather(1, teacher.tokens)
        if teacher.others is not None:
            others = ours.scatter(1, teacher.tokens, -torch.inf).logsumexp(1, keepdim=True)
            known = torch.cat([known, others], dim=1)
            theirs = torch.cat([theirs, teacher.others.unsqueeze(1)], dim=1)
        ours = known
    weighted = [(1 - reverse_weight, ours, theirs), (reverse_weight, theirs, ours)]
    terms = [weight * kl_div(of, to, reduction="sum", log_target=True) for weight, of, to in weighted if weight]
    return sum(terms[1:], terms[0])


def _relative_error(ours: Tensor, theirs: Tensor) -> Tensor:
    return mse_loss(ours, theirs) / theirs.square().mean()


def next_tokens(labels: Tensor) -> Tensor:
    """(batch, length): at each position the label of the next token; at the last position `NOT_COUNTED`."""
    return pad(labels[:, 1:], (0, 1), value=NOT_COUNTED)


def losses_of(logits: Tensor, targets: Tensor) -> Tensor:
    """(batch, length) float32: the cross-entropy at each position, 0 where it does not count.

    Args:
        logits: (batch, length, vocab).
        targets: from `next_tokens`.
    """
    losses = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=NOT_COUNTED, reduction="none")
    return losses.view_as(targets)


def check_teacher(teacher: PreTrainedModel, student: PreTrainedModel, settings: HealSettings) -> None:
    """Raise SurgeryError unless the two models' outputs can be compared."""
    pairs = [("vocabulary", teacher.config.vocab_size, student.config.vocab_size)]
    if settings.hidden_weight > 0:
        pairs.append(("width", teacher.config.hidden_size, student.config.hidden_size))
        pairs.append(("number of layers", teacher.config.num_hidden_layers, student.config.num_hidden_layers))
    for what, found, wanted in pairs:
        if found != wanted:
            raise SurgeryError(f"The teacher's {what} is {found}, the checkpoint's {wanted}. Name another --teacher.")
