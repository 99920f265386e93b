"""Command: train a grafted checkpoint a little more, and write a new checkpoint (train/heal/heal.py)."""

import argparse
from pathlib import Path
from typing import Any

from model_preparation.checkpoint.checkpoint_info import FORMATS
from model_preparation.command_line import CommandParser, add_device_flags, add_dtype_flag, run, save_config
from model_preparation.devices import choose_device
from model_preparation.errors import SurgeryError
from model_preparation.flags_file import Entry
from model_preparation.hub.sources import add_source_flag
from model_preparation.setting_flags import add_flags, as_flags
from model_preparation.train.heal.settings import PATHS, HealSettings

DESCRIPTION = """\
Train a grafted checkpoint (the parent) a little more, and write the result as a new checkpoint folder. The parent does
not change. During the training, complete states are kept in OUTPUT_DIR_resume/checkpoint-N. If the run is killed, the
same command resumes it. On a CPU, the result then has exactly the same bits as without the kill. With torchrun or
accelerate launch (configs in scripts/accelerate/), several processes share the work.
"""

EPILOG = """\
examples:
  python heal_checkpoint.py --checkpoint ../model_checkpoints/llamba_replaced_13_17 --data ./texts \\
      --output_dir ../model_checkpoints/llamba_replaced_13_17_v2_healed --method neighbours --max_steps 500
  python heal_checkpoint.py --checkpoint DIR --data corpus.jsonl --output_dir OUT --method lora --teacher donor
  python heal_checkpoint.py --checkpoint DIR --data conversations.jsonl --packing --output_dir OUT
  torchrun --nproc_per_node 2 heal_checkpoint.py --checkpoint DIR --data ./texts --output_dir OUT
  accelerate launch --config_file ../scripts/accelerate/fsdp.yaml heal_checkpoint.py --checkpoint DIR --data ./texts \\
      --output_dir OUT
  python heal_checkpoint.py --config stages.yaml      (a list of stages: docs/training.md)
  python heal_checkpoint.py --checkpoint DIR --merge_adapter OUT/adapter --output_dir MERGED
"""


_MERGE_FLAGS = ("checkpoint", "merge_adapter", "output_dir", "dtype", "format", "overwrite", "description")


def main() -> None:
    """Parse the command line, heal or merge, and print where the result is."""
    parser = _parser()
    given = parser.parse_args()
    # A resumed run keeps its settings, so pass on only the settings that the user gave.
    is_default = {name for name in HealSettings.__dataclass_fields__ if not parser.is_given(name)}
    args = {name: value for name, value in vars(given).items() if name not in is_default}
    stages = args.pop("stages")
    if stages is not None:
        parser.refuse(given, ("merge_adapter",), "trains nothing, but the file of --config has stages")
        parser.refuse(given, ("milestones",), "belongs into a stage: write `milestones: [STEP=NAME]` there")
    elif (given.merge_adapter is None) == (given.data is None):
        parser.error("give --data or --merge_adapter, and only one of them")
    if given.merge_adapter is not None:
        of_training = [name for name in args if name not in _MERGE_FLAGS]
        parser.refuse(given, of_training, "belongs to training, and --merge_adapter trains nothing")
        from model_preparation.train.heal.heal import merge_adapter

        of_merge = {name: value for name, value in args.items() if name in _MERGE_FLAGS}
        merge_adapter(adapter=of_merge.pop("merge_adapter"), **of_merge)
        save_config(Path(f"{given.output_dir.expanduser()}.config.yaml"))
        print(f"Merged checkpoint: {given.output_dir}")
        return

    milestones = dict(given.milestones)
    if len(set(milestones.values())) < len(given.milestones):
        parser.error("--milestones: each needs its own step and its own name")
    if given.eval_interval == 0:
        why = "has no effect with --eval_interval 0, which measures no held-out loss"
        parser.refuse(given, ("eval_data", "eval_fraction"), why)
    if given.eval_data is not None:
        parser.refuse(given, ("eval_fraction",), "has no effect with --eval_data: leave out one of them")
    for name in ("merge_adapter", "gpu", "source"):
        del args[name]
    args |= {"milestones": milestones, "sources": given.source, "device": choose_device(given.gpu, given.device)}
    if stages is None:
        from model_preparation.train.heal.heal import heal_checkpoint

        info = heal_checkpoint(**args)
    else:
        from model_preparation.train.heal.stages import heal_in_stages

        del args["milestones"]
        args["stages"] = _stages(stages)
        info = heal_in_stages(**args)
    if info:
        used = {"stages": stages} if stages else _flags_used(info["healing"], args)
        # Not in the checkpoint's folder: verify would report that this file is not listed.
        save_config(Path(f"{given.output_dir.expanduser()}.config.yaml"), used)
        _print_result(info)
        print(f"Healed checkpoint: {given.output_dir}")


def _stages(entry: Entry) -> list[dict[str, Any]]:
    """The stages in a file of --config, as `heal_in_stages` takes them."""
    if not isinstance(entry.value, list) or not all(isinstance(each, dict) for each in entry.value):
        raise SurgeryError(f"{entry.place}: stages must be a list. Begin each with a line such as `- name: short`.")
    stages = []
    for stage in entry.value:
        parser, found = _parser(), argparse.Namespace()
        for key, each in stage.items():
            if key == "name":
                found.name = each.value
            else:
                parser.check_entry(key, each, found)
        if "milestones" in found:
            found.milestones = dict(found.milestones)
        stages.append(vars(found))
    return stages


def _flags_used(healing: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The flags that repeat this run. The record has only the last part of a path; `given` has all of it."""
    from model_preparation.io.result_inputs import name_of

    settings = dict(healing["settings"])
    for name in PATHS:
        if given.get(name) is not None and name_of(given[name]) == settings[name]:
            settings[name] = given[name]
    return {**as_flags(HealSettings(**settings)), "prompt": [text["prompt"] for text in healing["texts"]]}


def _print_result(info: dict[str, Any]) -> None:
    healing = info["healing"]
    for text in healing["texts"]:
        print(f"Prompt           {text['prompt']}\nText before      {text['before']}\nText after       {text['after']}")
    before, after = (healing["scores"][when]["eval_loss"] for when in ("before", "after"))
    if before is not None:
        best = "" if healing["best_step"] is None else f", of step {healing['best_step']}"
        print(f"Held-out loss    {before:.4f} before, {after:.4f} after{best}")
        if after > before:
            print("                 It is higher than before: the parent is better on this text.")


def _parser() -> CommandParser:
    parser = CommandParser(description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="DIR", help="the checkpoint to heal")
    parser.add_argument(
        "--data",
        metavar="FILE|DIR|NAME|self",
        help='text: .txt and .md files, .jsonl and .parquet files with a field "text", a folder of these, or the name '
        "of a data set: org/name or org/name:config on Hugging Face, modelscope:org/name on ModelScope. A "
        "row is a conversation if it has one of these: messages; conversations; query and response; "
        "instruction and output. self: the donor writes conversations",
    )
    parser.add_argument(
        "--output_dir", required=True, type=Path, metavar="DIR", help="the folder of the healed checkpoint"
    )
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|DIR",
        help="auto: resume from the newest complete state, or start if there is none; never: start again; DIR: resume "
        "from this state (default: %(default)s). A resumed run keeps the settings that it began with",
    )
    parser.add_argument("--resume_dir", metavar="DIR", help="folder of the states (default: OUTPUT_DIR_resume)")
    parser.add_argument("--description", default="", metavar="TEXT", help="free text for checkpoint_info.json")
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT_DIR; with --resume never, also states")
    parser.add_argument("--clean_up", action="store_true", help="remove the states once the checkpoint is written")
    parser.add_argument(
        "--merge_adapter",
        metavar="DIR",
        help="train nothing: merge this LoRA adapter into --checkpoint, and write the result",
    )
    add_flags(parser, HealSettings)
    parser.add_argument(
        "--milestones",
        nargs="+",
        type=_milestone,
        default=[],
        metavar="STEP[=NAME]",
        help="keep the states of these steps forever, under a name (default: milestone-STEP)",
    )
    parser.add_argument(
        "--prompt",
        dest="prompts",
        nargs="+",
        metavar="TEXT",
        help="texts that the model continues, before and after healing (default: the beginning of a sentence about "
        "learning languages)",
    )
    add_device_flags(parser)
    add_dtype_flag(
        parser,
        help="dtype of the healed checkpoint; float16 is half as large as float32 (default: its parent's)",
    )
    parser.add_argument("--format", choices=FORMATS, help="format of the healed checkpoint (default: its parent's)")
    add_source_flag(parser)
    parser.add_config_flag()
    parser.list_keys = ("stages",)
    parser.set_defaults(stages=None)
    return parser


def _milestone(text: str) -> tuple[int, str]:
    step, _, name = text.partition("=")
    if not step.isdigit() or "/" in name or name.startswith((".", "checkpoint-")):
        raise argparse.ArgumentTypeError(f"{text!r} is not STEP or STEP=NAME")
    return int(step), name or f"milestone-{step}"


if __name__ == "__main__":
    run(main)
