"""Command: trains a grafted checkpoint a little more, into a new one (see train/heal/heal.py)."""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from model_preparation.checkpoint.checkpoint_info import FORMATS
from model_preparation.command_line import CommandParser, add_device_flags, add_dtype_flag, number, run, save_config
from model_preparation.devices import choose_device
from model_preparation.hub.sources import add_source_flag
from model_preparation.train.heal.settings import METHODS, PRECISIONS, SCHEDULES, TRACKERS, HealSettings
from model_preparation.train.setting_flags import add_setting

DESCRIPTION = """\
Train a grafted checkpoint a little more, and write the result as a new checkpoint folder. The parent is only read.
While it trains, complete states are kept in OUTPUT_DIR_resume/checkpoint-N. If the run is killed, the same command
resumes it, and on a CPU the result has the very same bits. Under torchrun or accelerate launch (configs in
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
    args = vars(given).copy()
    if (given.merge_adapter is None) == (given.data is None):
        parser.error("one of --data and --merge_adapter is needed, and only one")
    if given.merge_adapter is not None:
        of_training = [name for name in args if name not in _OF_A_MERGE]
        parser.refuse(given, of_training, "belongs to training, and --merge_adapter trains nothing")
        from model_preparation.train.heal.heal import merge_adapter

        of_merge = {name: value for name, value in args.items() if name in _OF_A_MERGE}
        merge_adapter(adapter=of_merge.pop("merge_adapter"), **of_merge)
        save_config(Path(f"{given.output_dir.expanduser()}.config.yaml"))
        print(f"Merged checkpoint: {given.output_dir}")
        return

    milestones = dict(given.milestones)
    if len(set(milestones.values())) < len(given.milestones):
        parser.error("--milestones: each needs a step and a name of its own")
    if args.get("eval_interval") == 0 and args.keys() & {"eval_data", "eval_fraction"}:
        parser.error("--eval_interval 0 measures no held-out loss: leave out --eval_data and --eval_fraction")
    if args.keys() >= {"eval_data", "eval_fraction"}:
        parser.error("--eval_data is held out instead of a fraction of --data: leave out it or --eval_fraction")
    for name in ("merge_adapter", "gpu", "source"):
        del args[name]
    args |= {"milestones": milestones, "sources": given.source, "device": choose_device(given.gpu, given.device)}
    from model_preparation.train.heal.heal import heal_checkpoint

    info = heal_checkpoint(**args)
    if info:
        # Beside the checkpoint: inside, a file that is not listed is a fault.
        save_config(Path(f"{given.output_dir.expanduser()}.config.yaml"))
        _print_result(info)
        print(f"Healed checkpoint: {given.output_dir}")


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
    setting = partial(add_setting, parser, HealSettings)
    _add_run_flags(parser, setting)
    _add_training_flags(setting)
    _add_saving_flags(parser, setting)
    add_device_flags(parser)
    add_dtype_flag(parser, help="of the healed checkpoint; float16 halves the size (default: its parent's)")
    parser.add_argument("--format", choices=FORMATS, help="of the healed checkpoint (default: its parent's)")
    add_source_flag(parser)
    parser.add_config_flag()
    return parser


def _add_run_flags(parser: CommandParser, setting: Any) -> None:
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|DIR",
        help="auto: resume from the newest complete state if there is one; never: start anew; or a state's folder "
        "(default: %(default)s). A resumed run keeps the settings it was started with",
    )
    parser.add_argument("--resume_dir", metavar="DIR", help="folder of the states (default: OUTPUT_DIR_resume)")
    setting(
        "init_from",
        metavar="checkpoint|scratch|resume|PATH|NAME",
        help="weights to begin with: the checkpoint's own, random ones, those of a state that must be there, or a "
        "file, folder or model of tensors with the same names; tensors that do not fit are listed",
    )
    setting("exclude", nargs="+", metavar="PATTERN", help="tensors not to take from --init_from, such as lm_head")
    setting(
        "seed",
        type=number(int, least=0, most=2**32 - 1),
        metavar="N",
        help="of data order, dropout and new weights",
    )
    parser.add_argument("--description", default="", metavar="TEXT", help="free text for checkpoint_info.json")
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT_DIR; with --resume never, states too")
    parser.add_argument("--clean_up", action="store_true", help="remove the states once the checkpoint is written")
    parser.add_argument(
        "--merge_adapter",
        metavar="DIR",
        help="train nothing: merge this LoRA adapter into --checkpoint, and write that",
    )


def _add_training_flags(setting: Any) -> None:
    positive, fraction = number(int, least=1), number(float, least=0, most=1)
    at_least_0, above_0 = number(float, least=0), number(float, above=0)
    dropped = number(float, least=0, most=0.99)  # dropping everything would train nothing
    setting(
        "method",
        choices=METHODS,
        help="what is trained: all weights, the grafted layers, these and their neighbours, or low-rank updates",
    )
    setting("max_steps", type=positive, metavar="N", help="steps of the optimizer")
    setting("batch_size", type=positive, metavar="N", help="sequences per forward pass and process")
    setting("accumulation", type=positive, metavar="N", help="forward passes per step")
    setting("block_size", type=number(int, least=2), metavar="N", help="tokens per sequence")
    setting("learning_rate", type=above_0, metavar="X", help="the highest one, of AdamW")
    setting("schedule", choices=SCHEDULES, help="of the learning rate after its rise")
    setting("warmup", type=fraction, metavar="X", help="fraction of the steps in which the learning rate rises")
    setting("weight_decay", type=at_least_0, metavar="X", help="of AdamW")
    setting("max_grad_norm", type=at_least_0, metavar="X", help="longer gradients are clipped; 0: none is")
    setting("precision", choices=PRECISIONS, help="of the forward pass; weights are float32 while they are trained")
    setting("gradient_checkpointing", action="store_true", help="less memory, more time")
    setting("compile", action="store_true", help="torch.compile the model")
    setting("dropout", type=dropped, metavar="X", help="of attention weights in grafted layers")
    setting("lora_rank", type=positive, metavar="N", help="of the updates, with --method lora")
    setting("lora_alpha", type=above_0, metavar="X", help="their scale is alpha / rank")
    setting("lora_dropout", type=dropped, metavar="X", help="of their inputs")
    setting(
        "teacher",
        metavar="NAME|PATH",
        help="learn from this model's distributions, not from the text alone: donor, base, a checkpoint's folder, a "
        "model's folder or hub id",
    )
    setting("temperature", type=above_0, metavar="X", help="of both distributions")
    setting("teacher_weight", type=fraction, metavar="X", help="of the teacher's loss; the text's has the rest of 1")
    setting("hidden_weight", type=at_least_0, metavar="X", help="of the relative squared error of the hidden states")


def _add_saving_flags(parser: CommandParser, setting: Any) -> None:
    positive = number(int, least=1)
    setting("eval_interval", type=number(int, least=0), metavar="N", help="steps between held-out losses; 0: none")
    setting("eval_data", metavar="FILE|DIR|NAME", help="held-out text; without it some of --data is")
    setting("eval_fraction", type=number(float, above=0, most=0.5), metavar="X", help="of --data, held out")
    setting(
        "always_save",
        type=_yes_or_no,
        metavar="yes|no",
        help="save at every held-out loss and every --save_steps; no: only where the held-out loss improved",
    )
    setting("load_best", type=_yes_or_no, metavar="yes|no", help="end with the best weights, not the last ones")
    setting("save_steps", type=positive, metavar="N", help="steps between two states")
    setting("save_total_limit", type=positive, metavar="N", help="states kept; the best and the newest always are")
    parser.add_argument(
        "--milestones",
        nargs="+",
        type=_milestone,
        default=[],
        metavar="STEP[=NAME]",
        help="keep the state of these steps for good, under a name (default: milestone-STEP)",
    )
    setting("logging_steps", type=positive, metavar="N", help="steps between two lines of loss and learning rate")
    setting("report_to", choices=TRACKERS, help="tracker that also gets them")
    parser.add_argument(
        "--prompt",
        dest="prompts",
        nargs="+",
        metavar="TEXT",
        help="the model continues these before and after (default: a sentence about learning languages)",
    )


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
