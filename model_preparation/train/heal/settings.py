"""The settings of a healing run, with their defaults; and which of them a resumed run may change."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, get_args, get_origin

from model_preparation.errors import SurgeryError
from model_preparation.io.untrusted.untrusted_files import check_fields

METHODS = ("full", "grafted", "neighbours", "lora")
PRECISIONS = ("float32", "bfloat16", "float16")
SCHEDULES = ("linear", "cosine", "constant")
TRACKERS = ("none", "trackio", "wandb", "swanlab")
_CHOICES = {"method": METHODS, "precision": PRECISIONS, "schedule": SCHEDULES, "report_to": TRACKERS}
_AT_LEAST_ONE = "max_steps batch_size accumulation block_size lora_rank logging_steps save_steps save_total_limit"

# A resumed run may change these: they decide what is kept and shown, not the weights ...
_FREE = ("save_steps", "save_total_limit", "report_to")
# ... and this one, which decides where the run ends. The user gets a line about it.
_FREE_WITH_A_LINE = ("max_steps",)


@dataclass(frozen=True)
class HealSettings:
    """All that decides the healed weights, apart from the checkpoint and the text.

    Attributes:
        method: which weights are trained: "full" all, "grafted" the donor's layers, "neighbours" these and the layers
            next to them, "lora" low-rank updates of the linear layers.
        init_from: "checkpoint" for the checkpoint's own weights, "scratch" for random ones, or other weights.
        exclude: patterns of names of tensors that are not taken from `init_from`.
        max_steps: of the optimizer, counted with the number of processes that the run was started with.
        batch_size: sequences per forward pass and process.
        accumulation: forward passes per step.
        block_size: tokens per sequence.
        warmup: fraction of the steps in which the learning rate rises.
        precision: of the forward pass, by autocast; weights, gradients and optimizer state stay in float32.
        dropout: of the attention weights in grafted layers.
        teacher: a model whose next-token distributions are the target; None for the text itself.
        temperature: of the two distributions.
        teacher_weight: weight of the teacher's term in the loss; the text's term has 1 minus that.
        hidden_weight: weight of a third term, the squared error of the hidden states relative to the teacher's.
        eval_interval: steps between two measurements of the held-out loss; 0 for none.
        eval_fraction: fraction of the sequences that is held out if there is no `eval_data`.
        always_save: save at every measurement and every `save_steps`; else only if the held-out loss improved.
        load_best: end with the weights of the lowest held-out loss, not with the last ones.
    """

    method: str = "full"
    init_from: str = "checkpoint"
    exclude: tuple[str, ...] = ()
    seed: int = 0
    max_steps: int = 200
    batch_size: int = 4
    accumulation: int = 1
    block_size: int = 512
    learning_rate: float = 1e-4
    schedule: str = "cosine"
    warmup: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    precision: str = "float32"
    gradient_checkpointing: bool = False
    compile: bool = False
    dropout: float = 0.0
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    teacher: str | None = None
    temperature: float = 1.0
    teacher_weight: float = 1.0
    hidden_weight: float = 0.0
    eval_data: str | None = None
    eval_interval: int = 50
    eval_fraction: float = 0.05
    always_save: bool = True
    load_best: bool = True
    logging_steps: int = 10
    save_steps: int = 50
    save_total_limit: int = 3
    report_to: str = "none"

    def __post_init__(self):
        object.__setattr__(self, "exclude", tuple(self.exclude))
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise SurgeryError(f"{name} is {getattr(self, name)!r}. Choose one of {', '.join(choices)}.")
        for name in _AT_LEAST_ONE.split():
            if getattr(self, name) < 1:
                raise SurgeryError(f"{name} is {getattr(self, name)}. It must be at least 1.")
        for names, needed, is_given in (
            (("temperature", "teacher_weight", "hidden_weight"), "teacher", self.teacher is not None),
            (("exclude",), "init_from with weights to take", self.init_from not in ("checkpoint", "scratch")),
            (("lora_rank", "lora_alpha", "lora_dropout"), "method lora", self.method == "lora"),
        ):
            for name in names:
                if not is_given and getattr(self, name) != getattr(type(self), name):
                    raise SurgeryError(
                        f"{name} is given, but has no effect without {needed}. Give that, or leave it out."
                    )
        if not self.always_save and not self.eval_interval:
            raise SurgeryError(
                "Without always_save, states are saved where the held-out loss improves. Set eval_interval."
            )

    def as_dict(self) -> dict[str, Any]:
        """The settings as JSON files have them."""
        return asdict(self) | {"exclude": list(self.exclude)}


def saved_settings(saved: Mapping[str, Any]) -> HealSettings:
    """The settings in a state.

    Raises:
        SurgeryError: for a name that is no setting, or a value of another type.
    """
    if unknown := sorted(saved.keys() - {field.name for field in fields(HealSettings)}):
        raise SurgeryError(f"The state has settings this version does not know: {', '.join(unknown)}. Update it.")
    try:
        check_fields(saved, {f"{field.name}?": _json_type(field.type) for field in fields(HealSettings)})
    except ValueError as error:
        raise SurgeryError(f"The state's settings are not valid: {error}. Start anew with --resume never.") from error
    return HealSettings(**saved)


def _json_type(annotation: Any) -> Any:
    """A field's type as JSON has it, for `check_fields`."""
    if annotation is float:
        return (int, float)
    return [str] if get_origin(annotation) is tuple else get_args(annotation) or annotation


def resumed_settings(saved: HealSettings, given: Mapping[str, Any]) -> tuple[HealSettings, list[str]]:
    """The settings of a resumed run, which are mostly the saved ones; and a line for each one given that differs."""
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    differing = {name: value for name, value in given.items() if value != getattr(saved, name)}
    taken = {name: value for name, value in differing.items() if name in _FREE + _FREE_WITH_A_LINE}
    lines = []
    for name, value in differing.items():
        if name in _FREE_WITH_A_LINE:
            lines.append(f"{name} is now {value}, was {getattr(saved, name)}; the learning rate changes from here on")
        elif name not in _FREE:
            lines.append(
                f"{name} stays {getattr(saved, name)!r}, as the run was started with; {value!r} is ignored "
                "(to start anew, give --resume never)"
            )
    return replace(saved, **taken), lines
