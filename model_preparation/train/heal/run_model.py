"""What is trained on what: the model with its trainable weights chosen, the sequences, the teacher.

In: a run's settings. Out: the parent's model in memory of its own, the data, the loss to a teacher where there is one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import LlamaAttention

from model_preparation.checkpoint.checkpoint_loading import load_checkpoint
from model_preparation.errors import SurgeryError
from model_preparation.evaluation.other_models import find_others, load_other
from model_preparation.llamba import LlambaForCausalLM
from model_preparation.train.heal.adapters import add_lora, is_adapter, load_adapter
from model_preparation.train.heal.objective import Distillation, check_teacher
from model_preparation.train.heal.resume_state import ResumeState
from model_preparation.train.heal.sequences import Sequences, hold_out, load_sequences
from model_preparation.train.heal.settings import HealSettings
from model_preparation.train.heal.trainable import freeze_others
from model_preparation.train.heal.weights import load_weights


@dataclass(frozen=True)
class Run:
    """What stays the same while a run lasts."""

    parent: Path
    settings: HealSettings
    state: ResumeState | None
    sources: Mapping[str, str] | None
    say: Callable[..., None]

    @property
    def adapter(self) -> Path | None:
        """The folder of the adapter to begin with, if there is one."""
        folder = Path(self.settings.init_from).expanduser()
        if not is_adapter(folder):
            return None
        if self.settings.method != "lora":
            raise SurgeryError(
                f"{folder} is an adapter. Train it with --method lora, or merge it with --merge_adapter."
            )
        return folder

    def load_model(self) -> tuple[LlambaForCausalLM, PreTrainedTokenizerBase]:
        """The parent's model in float32 memory of its own, with weights from where the settings say."""
        settings = self.settings
        model, tokenizer = load_checkpoint(self.parent, dtype=torch.float32)
        in_memory(model)
        in_state = self.state is not None and settings.method != "lora"  # all weights come from there later
        if settings.init_from == "scratch" and not in_state:
            model.load_state_dict(LlambaForCausalLM(model.config).state_dict())
        elif settings.init_from != "checkpoint" and not in_state and self.adapter is None:
            path = Path(settings.init_from).expanduser()
            if not path.exists():
                path = find_others([settings.init_from], self.parent, sources=self.sources)[0].folder
            self.say("\n".join([f"Weights from {path}:", *load_weights(model, path, settings.exclude).lines()]))
        for module in model.modules():
            if isinstance(module, LlamaAttention):
                module.attention_dropout = settings.dropout
        return model, tokenizer


def with_trained_weights_chosen(model: LlambaForCausalLM, run: Run) -> Any:
    if run.settings.method == "lora":
        return with_adapter(model, run)
    freeze_others(model, run.settings.method)
    return model


def with_adapter(model: LlambaForCausalLM, run: Run) -> Any:
    folder = run.adapter
    return add_lora(model, run.settings) if folder is None else load_adapter(model, folder, trainable=True)


def in_memory(model: LlambaForCausalLM) -> LlambaForCausalLM:
    """Copy the parameters out of the mapped file, whose pages would else stay the parent's."""
    for parameter in model.parameters():  # tied ones come once
        parameter.data = parameter.data.clone()
    return model


def load_data(
    data: str, tokenizer: PreTrainedTokenizerBase, settings: HealSettings
) -> tuple[Sequences, Sequences | None]:
    sequences = load_sequences(data, tokenizer, settings.block_size)
    if not settings.eval_interval:
        return sequences, None
    if settings.eval_data is not None:
        return sequences, load_sequences(settings.eval_data, tokenizer, settings.block_size)
    return hold_out(sequences, settings.eval_fraction)


def distillation_of(
    model: LlambaForCausalLM, tokenizer: PreTrainedTokenizerBase, run: Run, device: torch.device
) -> Distillation | None:
    if run.settings.teacher is None:
        return None
    other = find_others([run.settings.teacher], run.parent, sources=run.sources)[0]
    teacher, _ = load_other(other, tokenizer, device=device, dtype=torch.float32)
    check_teacher(teacher, model, run.settings)
    return Distillation(teacher, run.settings)
