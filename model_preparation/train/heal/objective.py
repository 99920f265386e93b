"""The losses of healing: on the text, or to a teacher.

Source: Hinton et al., arXiv 1503.02531, section 2 (the gradient of soft targets is scaled by temperature squared).
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax, mse_loss
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from model_preparation.errors import SurgeryError
from model_preparation.train.heal.settings import HealSettings


class Distillation:
    """The loss of a student against a teacher.

    Args:
        teacher: a causal language model with the student's vocabulary, on the student's device.
        settings: temperature and the weights of the terms.
    """

    def __init__(self, teacher: PreTrainedModel, settings: HealSettings):
        self._teacher = teacher.eval().requires_grad_(False)
        self._settings = settings

    @property
    def wants_hidden_states(self) -> bool:
        """Whether the loss needs the student's hidden states."""
        return self._settings.hidden_weight > 0

    def loss(self, student: CausalLMOutputWithPast, input_ids: Tensor) -> Tensor:
        """Mean over all positions that have a next token.

        w T^2 KL(teacher || student) + (1 - w) cross-entropy + h MSE(hidden states), with w, T and h from the settings.
        The MSE is a mean over layers. Each is relative to the teacher's mean square, which grows a thousandfold with
        depth.

        Args:
            student: its logits (batch, length, vocab), and hidden states if wanted.
            input_ids: (batch, length) int64.
        """
        settings = self._settings
        with torch.no_grad():
            teacher = self._teacher(input_ids=input_ids, output_hidden_states=self.wants_hidden_states, use_cache=False)
        temperature = settings.temperature
        # (batch * (length - 1), vocab): the last position has no next token in the batch.
        logits = student.logits[:, :-1].flatten(0, 1).float()
        targets = teacher.logits[:, :-1].flatten(0, 1).float()
        loss = (
            settings.teacher_weight
            * temperature**2
            * kl_div(
                log_softmax(logits / temperature, dim=-1),
                log_softmax(targets / temperature, dim=-1),
                reduction="batchmean",
                log_target=True,
            )
        )
        if settings.teacher_weight < 1:
            loss = loss + (1 - settings.teacher_weight) * cross_entropy(logits, input_ids[:, 1:].flatten())
        if self.wants_hidden_states:
            pairs = zip(student.hidden_states[1:], teacher.hidden_states[1:], strict=True)  # [0] are the embeddings
            terms = [mse_loss(ours.float(), theirs.float()) / theirs.float().square().mean() for ours, theirs in pairs]
            loss = loss + settings.hidden_weight * torch.stack(terms).mean()
        return loss


def losses_of(logits: Tensor, labels: Tensor) -> Tensor:
    """(batch,) float32: each sequence's mean cross-entropy over its labels.

    Args:
        logits: (batch, length, vocab).
        labels: (batch, length) int64, -100 where no loss is taken.
    """
    losses = cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="none")
    return losses.view(len(labels), -1).sum(1) / (labels[:, 1:] != -100).sum(1).clamp(min=1)


def check_teacher(teacher: PreTrainedModel, student: PreTrainedModel, settings: HealSettings) -> None:
    """Raise SurgeryError unless the two models' outputs can be compared."""
    pairs = [("vocabulary", teacher.config.vocab_size, student.config.vocab_size)]
    if settings.hidden_weight > 0:
        pairs.append(("width", teacher.config.hidden_size, student.config.hidden_size))
        pairs.append(("number of layers", teacher.config.num_hidden_layers, student.config.num_hidden_layers))
    for what, found, wanted in pairs:
        if found != wanted:
            raise SurgeryError(f"The teacher's {what} is {found}, the checkpoint's {wanted}. Name another --teacher.")
