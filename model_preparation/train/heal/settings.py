"""The settings of a healing run, with their defaults; and which of them a resumed run may change."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from model_preparation.command_line import number
from model_preparation.errors import SurgeryError
from model_preparation.io.result_inputs import name_of
from model_preparation.io.untrusted.untrusted_files import check_fields
from model_preparation.setting_flags import YES_OR_NO, CheckedSettings, Flag, OneOf

METHODS = ("full", "grafted", "neighbours", "lora")
PRECISIONS = ("float32", "bfloat16", "float16")
SCHEDULES = ("linear", "cosine", "constant")
TRACKERS = ("none", "trackio", "wandb", "swanlab")
PATHS = ("teacher", "teacher_cache", "init_from", "eval_data", "chat_template")  # settings that may be paths
# A resumed run may change these settings, because they do not change the weights.
FREE = ("save_steps", "save_total_limit", "report_to")
# A resumed run may also change the number of steps. It then prints a line about the change.
_FREE_WITH_A_LINE = ("max_steps",)

_COUNT = number(int, least=1)
_AT_LEAST_0, _ABOVE_0, _FRACTION = number(float, least=0), number(float, above=0), number(float, least=0, most=1)
_DROPPED = number(float, least=0, most=0.99)  # dropping everything would train nothing


@dataclass(frozen=True)
class HealSettings(CheckedSettings):
    """The settings of a healing run. Most fields are flags, and the help of a flag explains its field.

    A step's number of sequences may change when a run is resumed with another number of processes. `max_steps` still
    counts steps as large as those at the start of the run.

    Raises:
        SurgeryError: for a value that its flag refuses, or settings that contradict each other.
    """

    method: Annotated[
        str,
        Flag(
            None,
            "full: train all weights; grafted: the grafted layers; neighbours: these and their neighbours; lora: "
            "low-rank updates",
            OneOf(*METHODS),
        ),
    ] = "full"
    init_from: Annotated[
        str,
        Flag(
            "checkpoint|scratch|resume|PATH|NAME",
            "weights to begin with: the checkpoint's own, random ones, or those of a file, folder or model with "
            "tensors of the same names (tensors that do not fit are listed, and keep the checkpoint's values); "
            "resume: continue the run from its newest state, and fail if there is none",
        ),
    ] = "checkpoint"
    exclude: Annotated[
        tuple[str, ...],
        Flag("PATTERN", "tensors not to take from --init_from, such as lm_head (default: none)", nargs="+"),
    ] = ()
    seed: Annotated[
        int, Flag("N", "seed of data order, dropout and new weights", number(int, least=0, most=2**32 - 1))
    ] = 0
    max_steps: Annotated[int, Flag("N", "steps of the optimizer", _COUNT)] = 200
    batch_size: Annotated[int, Flag("N", "sequences per forward pass and process", _COUNT)] = 4
    accumulation: Annotated[int, Flag("N", "forward passes per step", _COUNT)] = 1
    block_size: Annotated[int, Flag("N", "tokens per sequence", number(int, least=2))] = 512
    loss_on: Annotated[
        str,
        Flag(
            None,
            "in conversations, the tokens to learn: of every turn of the assistant, of its last one, or all",
            OneOf("assistant", "completion", "all"),
        ),
    ] = "assistant"
    packing: Annotated[
        bool, Flag(None, "fill each sequence with several conversations or texts, which do not see each other")
    ] = False
    long_conversations: Annotated[
        str, Flag(None, "what to do with conversations longer than --block_size", OneOf("error", "drop", "cut"))
    ] = "error"
    chat_template: Annotated[
        str | None, Flag("FILE", "Jinja template for conversations (default: the tokenizer's own)")
    ] = None
    self_conversations: Annotated[
        int, Flag("N", "how many conversations the donor writes, with --data self", _COUNT)
    ] = 512
    segment_length: Annotated[
        int,
        Flag(
            "N",
            "train on this many tokens of a sequence at once, which saves memory for long ones; 0: on the whole "
            "sequence. States and K/V pass from segment to segment, gradients do not",
            number(int, least=0),
        ),
    ] = 0
    learning_rate: Annotated[float, Flag("X", "highest learning rate of AdamW", _ABOVE_0)] = 1e-4
    schedule: Annotated[str, Flag(None, "how the learning rate changes after the warmup", OneOf(*SCHEDULES))] = "cosine"
    warmup: Annotated[float, Flag("X", "fraction of the steps in which the learning rate rises", _FRACTION)] = 0.05
    weight_decay: Annotated[float, Flag("X", "weight decay of AdamW", _AT_LEAST_0)] = 0.0
    max_grad_norm: Annotated[float, Flag("X", "clip gradients to this norm; 0: no clipping", _AT_LEAST_0)] = 1.0
    precision: Annotated[
        str,
        Flag(None, "dtype of the forward pass (autocast); the trained weights stay float32", OneOf(*PRECISIONS)),
    ] = "float32"
    gradient_checkpointing: Annotated[bool, Flag(None, "less memory, more time")] = False
    compile: Annotated[bool, Flag(None, "torch.compile the model")] = False
    dropout: Annotated[float, Flag("X", "dropout of attention weights in grafted layers", _DROPPED)] = 0.0
    lora_rank: Annotated[int, Flag("N", "rank of the updates, with --method lora", _COUNT)] = 16
    lora_alpha: Annotated[float, Flag("X", "the scale of the updates is alpha / rank", _ABOVE_0)] = 32.0
    lora_dropout: Annotated[float, Flag("X", "dropout of the updates' inputs", _DROPPED)] = 0.0
    teacher: Annotated[
        str | None,
        Flag(
            "NAME|PATH",
            "learn from the predictions of this model (see --teacher_weight): donor, base, a checkpoint's folder, a "
            "model's folder or hub id (default: none)",
        ),
    ] = None
    teacher_cache: Annotated[
        str | None,
        Flag(
            "DIR",
            "keep the teacher's likeliest tokens here, and train without the teacher in memory; once the folder is "
            "complete, --teacher is not needed (default: the teacher is in memory)",
        ),
    ] = None
    teacher_top_k: Annotated[
        int, Flag("N", "how many of the likeliest tokens --teacher_cache keeps for each position", _COUNT)
    ] = 64
    temperature: Annotated[float, Flag("X", "softmax temperature of teacher and student", _ABOVE_0)] = 1.0
    teacher_weight: Annotated[
        float, Flag("X", "weight of the teacher's loss; the text's loss has 1 - X", _FRACTION)
    ] = 1.0
    reverse_weight: Annotated[
        float,
        Flag(
            "X",
            "weight of the reverse KL(student || teacher) in the teacher's loss; the forward KL has 1 - X",
            _FRACTION,
        ),
    ] = 0.0
    hidden_weight: Annotated[float, Flag("X", "weight of the hidden states' relative squared error", _AT_LEAST_0)] = 0.0
    eval_data: Annotated[str | None, Flag("FILE|DIR|NAME", "held-out text (default: a part of --data)")] = None
    eval_interval: Annotated[int, Flag("N", "steps between held-out losses; 0: none", number(int, least=0))] = 50
    eval_fraction: Annotated[float, Flag("X", "held-out part of --data", number(float, above=0, most=0.5))] = 0.05
    always_save: Annotated[
        bool,
        Flag(
            "yes|no",
            "yes: save a state at every held-out loss and every --save_steps; no: only if the held-out loss improved",
            YES_OR_NO,
        ),
    ] = True
    load_best: Annotated[
        bool, Flag("yes|no", "yes: take the weights of the lowest held-out loss; no: the last weights", YES_OR_NO)
    ] = True
    logging_steps: Annotated[int, Flag("N", "steps between two lines of loss and learning rate", _COUNT)] = 10
    save_steps: Annotated[int, Flag("N", "steps between two states", _COUNT)] = 50
    save_total_limit: Annotated[int, Flag("N", "states to keep; the best and the newest always stay", _COUNT)] = 3
    report_to: Annotated[str, Flag(None, "also send the losses to this tracker", OneOf(*TRACKERS))] = "none"

    stage: str | None = None  # the name of this run's stage, for `heal_in_stages`

    def __post_init__(self) -> None:
        super().__post_init__()
        has_cache = self.teacher_cache is not None
        for names, needed, is_given in (
            (("temperature", "teacher_weight", "reverse_weight"), "teacher", self.has_teacher),
            (("hidden_weight",), "a teacher in memory", self.teacher is not None and not has_cache),
            (("teacher_top_k",), "teacher_cache", has_cache),
            (("exclude",), "init_from FILE, FOLDER or MODEL", self.init_from not in ("checkpoint", "scratch")),
            (("lora_rank", "lora_alpha", "lora_dropout"), "method lora", self.method == "lora"),
        ):
            for name in names:
                if not is_given and getattr(self, name) != getattr(type(self), name):
                    raise SurgeryError(
                        f"{name} is given, but has no effect without {needed}. Give that, or leave {name} out."
                    )
        if self.segment_length and self.segment_length >= self.block_size:
            raise SurgeryError(
                f"segment_length is {self.segment_length}, but a whole sequence has {self.block_size} tokens "
                "(block_size). Give a smaller segment_length, or leave it out."
            )
        if self.segment_length and self.gradient_checkpointing:
            raise SurgeryError(
                "gradient_checkpointing and segment_length cannot be used together: the layers' states "
                "would be updated twice. Give only one of them."
            )
        if not self.always_save and not self.eval_interval:
            raise SurgeryError(
                "Without always_save, a state is saved only if the held-out loss improves. "
                "Give an eval_interval above 0."
            )

    @property
    def has_teacher(self) -> bool:
        """Whether the run learns from a teacher, in memory or on the disk."""
        return self.teacher is not None or self.teacher_cache is not None

    def as_dict(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return asdict(self) | {"exclude": list(self.exclude)}


def described(settings: HealSettings) -> dict[str, Any]:
    """The settings for checkpoint_info.json. Of a path, only the last part is kept."""
    found = settings.as_dict()
    return found | {name: found[name] and name_of(found[name]) for name in PATHS}


def saved_settings(saved: Mapping[str, Any]) -> HealSettings:
    """The settings that a state saved.

    Raises:
        SurgeryError: for an unknown name, or a value of the wrong type.
    """
    if unknown := sorted(saved.keys() - {field.name for field in fields(HealSettings)}):
        raise SurgeryError(
            f"The state has settings that this version does not know: {', '.join(unknown)}. Use a newer version."
        )
    types = get_type_hints(HealSettings)
    try:
        check_fields(saved, {f"{name}?": _json_type(annotation) for name, annotation in types.items()})
    except ValueError as error:
        raise SurgeryError(f"The state's settings are not valid: {error}. Start again with --resume never.") from error
    return HealSettings(**saved)


def _json_type(annotation: Any) -> Any:
    """The type that a field with this annotation has in JSON, for `check_fields`."""
    if annotation is float:
        return (int, float)
    return [str] if get_origin(annotation) is tuple else get_args(annotation) or annotation


def resumed_settings(saved: HealSettings, given: Mapping[str, Any]) -> tuple[HealSettings, list[str]]:
    """The settings of a resumed run, and lines for the user: about another `max_steps`, and ignored settings."""
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    differing = {name: value for name, value in given.items() if value != getattr(saved, name)}
    taken = {name: value for name, value in differing.items() if name in FREE + _FREE_WITH_A_LINE}
    lines = []
    for name, value in differing.items():
        if name in _FREE_WITH_A_LINE:
            lines.append(f"{name} is now {value}, was {getattr(saved, name)}; the schedule has the new length")
        elif name not in FREE:
            lines.append(
                f"{name} stays {getattr(saved, name)!r}, as at the start of the run; {value!r} is ignored "
                "(to start again, give --resume never)"
            )
    return replace(saved, **taken), lines
