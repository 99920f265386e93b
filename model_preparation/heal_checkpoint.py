"""Command: a grafted checkpoint and text -> a healed one, stopped and resumed anywhere (see train/heal/heal.py)."""

import argparse
from pathlib import Path
from typing import Any

from model_preparation.checkpoint.checkpoint_info import FORMATS
from model_preparation.command_line import (
    CommandParser,
    add_device_flags,
    add_dtype_flag,
    number,
    run,
    save_config,
)
from model_preparation.devices import choose_device
from model_preparation.hub.sources import add_source_flag
from model_preparation.train.heal.settings import METHODS, PRECISIONS, SCHEDULES, TRACKERS, HealSettings

DESCRIPTION = """\
Train a grafted checkpoint a little more, and write the result as a new checkpoint folder; the parent is only read.
While it trains, complete states are kept in OUTPUT_DIR_resume/checkpoint-N: killed at any moment, the same command goes
on, and on a CPU ends with the very bits it would have ended with. Under torchrun or accelerate launch (configs in
scripts/accelerate/), several processes share the work.
"""

EPILOG = """\
examples:
  python heal_checkpoint.py --checkpoint ../model_checkpoints/llamba_replaced_13_17 --data ./texts \\
      --output_dir ../model_checkpoints/llamba_replaced_13_17_v2_healed --method neighbours --max_steps 500
  python heal_checkpoint.py --checkpoint DIR --data corpus.jsonl --output_dir OUT --method lora --teacher donor
  torchrun --nproc_per_node 2 heal_checkpoint.py --checkpoint DIR --data ./texts --output_dir OUT
  accelerate launch --config_file ../scripts/accelerate/fsdp.yaml heal_checkpoint.py --checkpoint DIR --data ./texts \\
      --output_dir OUT
  python heal_checkpoint.py --checkpoint DIR --merge_adapter OUT/adapter --output_dir MERGED
"""


_OF_A_MERGE = ("checkpoint", "merge_adapter", "output_dir", "dtype", "format", "overwrite", "description")


def main() -> None:
    """Parse the command line, heal or merge, and say where the result is."""
    parser = _parser()
    given = parser.parse_args()
    args = vars(given)
    if (given.merge_adapter is None) == (given.data is None):
        parser.error("one of --data and --merge_adapter is needed, and only one")
    if given.merge_adapter is not None:
        of_training = [name for name in args if name not in _OF_A_MERGE]
        parser.refuse(given, of_training, "belongs to training, and --merge_adapter trains nothing")
    settings = {name: args.pop(name) for name in HealSettings.__dataclass_fields__ if name in args}
    adapter, data, gpu, device = (args.pop(name) for name in ("merge_adapter", "data", "gpu", "device"))
    names = [name for _, name in args["milestones"]]
    if len(dict(args["milestones"])) < len(names) or len(set(names)) < len(names):
        parser.error("--milestones: each needs a step and a name of its own")
    args["milestones"] = dict(args["milestones"])
    args["sources"] = args.pop("source")
    folder = args["output_dir"]
    if adapter is not None:
        from model_preparation.train.heal.heal import merge_adapter

        merge_adapter(adapter=adapter, **{name: args[name] for name in _OF_A_MERGE if name in args})
        save_config(Path(f"{folder.expanduser()}.config.yaml"))
        print(f"Merged checkpoint: {folder}")
        return

    if settings.get("eval_interval") == 0 and (settings.keys() & {"eval_data", "eval_fraction"}):
        parser.error("--eval_interval 0 looks at no held-out text: leave out --eval_data and --eval_fraction")
    if settings.keys() >= {"eval_data", "eval_fraction"}:
        parser.error("--eval_fraction is of --data, and --eval_data is held out instead: leave one of them out")
    from model_preparation.train.heal.heal import heal_checkpoint

    info = heal_checkpoint(data=data, device=choose_device(gpu, device), **args, **settings)
    if info:
        save_config(Path(f"{folder.expanduser()}.config.yaml"))  # an unknown file within is a fault of the checkpoint
        _print_result(info)
        print(f"Healed checkpoint: {folder}")


def _print_result(info: dict[str, Any]) -> None:
    healing = info["healing"]
    for text in healing["texts"]:
        print(f"Prompt           {text['prompt']}\nText before      {text['before']}\nText after       {text['after']}")
    before, after = (healing["scores"][when]["eval_loss"] for when in ("before", "after"))
    if before is not None:
        best = "" if healing["best_step"] is None else f", of step {healing['best_step']}"
        print(f"Held-out loss    {before:.4f} before, {after:.4f} after{best}")
        if after > before:
            print("                 It is higher than before: the parent does better on this text.")


def _parser() -> CommandParser:
    parser = CommandParser(description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="DIR", help="the checkpoint to heal")
    parser.add_argument(
        "--data",
        metavar="FILE|DIR|NAME",
        help='text: .txt and .md files, .jsonl and .parquet files with a field "text", a folder of these, or the name '
        "of a data set: org/name or org/name:config on Hugging Face, modelscope:org/name on ModelScope",
    )
    parser.add_argument(
        "--output_dir", required=True, type=Path, metavar="DIR", help="the healed checkpoint's folder, made whole"
    )
    _add_run_flags(parser)
    _add_training_flags(parser)
    _add_objective_flags(parser)
    _add_look_flags(parser)
    add_device_flags(parser)
    add_dtype_flag(parser, help="of the healed checkpoint, float16 for half the size (default: its parent's)")
    parser.add_argument("--format", choices=FORMATS, help="of the healed checkpoint (default: its parent's)")
    add_source_flag(parser)
    parser.add_config_flag()
    return parser


def _add_run_flags(parser: CommandParser) -> None:
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|DIR",
        help="auto: go on from the newest complete state if there is one; never: start anew; or a state's folder "
        "(default: %(default)s). A run that goes on has the settings it was started with",
    )
    parser.add_argument("--resume_dir", metavar="DIR", help="where the states are (default: OUTPUT_DIR_resume)")
    _setting(
        parser,
        "init_from",
        metavar="checkpoint|scratch|resume|PATH|NAME",
        help="weights to begin with: the checkpoint's own, random ones, those of a state that must be there, or a "
        "file, folder or model of tensors under the same names; what does not fit is listed",
    )
    _setting(
        parser, "exclude", nargs="+", metavar="PATTERN", help="tensors not to take from --init_from, such as lm_head"
    )
    _setting(
        parser,
        "seed",
        type=number(int, least=0, most=2**32 - 1),
        metavar="N",
        help="of data order, dropout and new weights",
    )
    parser.add_argument("--description", default="", metavar="TEXT", help="free text for checkpoint_info.json")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in OUTPUT_DIR, and states with never")
    parser.add_argument("--clean_up", action="store_true", help="remove the states once the checkpoint is written")
    parser.add_argument(
        "--merge_adapter",
        metavar="DIR",
        help="train nothing: merge this LoRA adapter into --checkpoint, and write that",
    )


def _add_training_flags(parser: CommandParser) -> None:
    positive, fraction = number(int, least=1), number(float, least=0, most=1)
    some = number(float, least=0, most=0.99)  # with all of them dropped nothing would be learnt
    _setting(
        parser,
        "method",
        choices=METHODS,
        help="what is trained: all weights, the grafted layers, these and their neighbours, or low-rank updates",
    )
    _setting(parser, "max_steps", type=positive, metavar="N", help="steps of the optimizer")
    _setting(parser, "batch_size", type=positive, metavar="N", help="sequences per forward pass and process")
    _setting(parser, "accumulation", type=positive, metavar="N", help="forward passes per step")
    _setting(parser, "block_size", type=number(int, least=2), metavar="N", help="tokens per sequence")
    _setting(parser, "learning_rate", type=number(float, above=0), metavar="X", help="the highest one, of AdamW")
    _setting(parser, "schedule", choices=SCHEDULES, help="of the learning rate after its rise")
    _setting(parser, "warmup", type=fraction, metavar="X", help="fraction of the steps in which it rises")
    _setting(parser, "weight_decay", type=number(float, least=0), metavar="X", help="of AdamW")
    _setting(
        parser, "max_grad_norm", type=number(float, least=0), metavar="X", help="longer gradients are cut; 0: none is"
    )
    _setting(
        parser, "precision", choices=PRECISIONS, help="of the forward pass; weights stay in float32 while they train"
    )
    _setting(parser, "gradient_checkpointing", action="store_true", help="less memory, more time")
    _setting(parser, "compile", action="store_true", help="torch.compile the model")
    _setting(parser, "dropout", type=some, metavar="X", help="of attention weights in grafted layers")
    _setting(parser, "lora_rank", type=positive, metavar="N", help="of the updates, with --method lora")
    _setting(parser, "lora_alpha", type=number(float, above=0), metavar="X", help="their scale is alpha / rank")
    _setting(parser, "lora_dropout", type=some, metavar="X", help="of their inputs")


def _add_objective_flags(parser: CommandParser) -> None:
    _setting(
        parser,
        "teacher",
        metavar="NAME|PATH",
        help="learn from this model's distributions, not from the text alone: donor, base, a checkpoint's folder, a "
        "model's folder or hub id",
    )
    _setting(parser, "temperature", type=number(float, above=0), metavar="X", help="of both distributions")
    _setting(
        parser, "teacher_weight", type=number(float, least=0, most=1), metavar="X", help="the text's has the rest of 1"
    )
    _setting(
        parser,
        "hidden_weight",
        type=number(float, least=0),
        metavar="X",
        help="of the hidden states' relative squared error",
    )


def _add_look_flags(parser: CommandParser) -> None:
    positive = number(int, least=1)
    _setting(parser, "eval_interval", type=number(int, least=0), metavar="N", help="steps between two looks; 0: none")
    _setting(parser, "eval_data", metavar="FILE|DIR|NAME", help="held-out text (default: some of --data)")
    _setting(parser, "eval_fraction", type=number(float, above=0, most=0.5), metavar="X", help="of --data, held out")
    _setting(
        parser,
        "always_save",
        type=_yes_or_no,
        metavar="yes|no",
        help="save at every look and every --save_steps; no: only where the held-out loss improved",
    )
    _setting(
        parser, "load_best", type=_yes_or_no, metavar="yes|no", help="end with the best weights, not the last ones"
    )
    _setting(parser, "save_steps", type=positive, metavar="N", help="steps between two states")
    _setting(
        parser, "save_total_limit", type=positive, metavar="N", help="states kept; the best and the newest always are"
    )
    parser.add_argument(
        "--milestones",
        nargs="+",
        type=_milestone,
        default=[],
        metavar="STEP[=NAME]",
        help="keep the state of these steps for good, under a name (default: milestone-STEP)",
    )
    _setting(
        parser, "logging_steps", type=positive, metavar="N", help="steps between two lines of loss and learning rate"
    )
    _setting(parser, "report_to", choices=TRACKERS, help="tracker that gets them too")
    parser.add_argument(
        "--prompt",
        dest="prompts",
        nargs="+",
        metavar="TEXT",
        help="written on before and after (default: a sentence about learning languages)",
    )


def _setting(parser: CommandParser, name: str, *, help: str, **kwargs: Any) -> None:
    """A flag for a field of HealSettings; it is in the result only if it was given."""
    default = getattr(HealSettings, name)
    shown = "none" if default in ((), None) else default
    if isinstance(default, bool):
        shown = "yes" if default else "no"
    if kwargs.get("action") != "store_true":
        help += f" (default: {shown})"
    parser.add_argument(f"--{name}", default=argparse.SUPPRESS, help=help, **kwargs)


def _yes_or_no(text: str) -> bool:
    if text not in ("yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither yes nor no")
    return text == "yes"


def _milestone(text: str) -> tuple[int, str]:
    step, _, name = text.partition("=")
    if not step.isdigit() or "/" in name or name.startswith((".", "checkpoint-")):
        raise argparse.ArgumentTypeError(f"{text!r} is no STEP or STEP=NAME")
    return int(step), name or f"milestone-{step}"


if __name__ == "__main__":
    run(main)
