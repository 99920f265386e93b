"""The flags of a command that scores a checkpoint. Nothing heavy is imported before the command line is right."""

import argparse
from pathlib import Path

from model_preparation.command_line import CommandParser, number
from model_preparation.evaluation.generation_flags import GENERATION_FLAGS

# Each belongs to --full_eval and has no effect without it. --seed does not: it is generation's too.
_FLAGS: tuple[str, ...] = ("tasks", "limit", "mmlu_data", "num_fewshot", "batch_size")
_FLAGS += ("results_dir", "result_json", "skip_generation")


def add_evaluation_flags(parser: CommandParser) -> None:
    """Add --full_eval and the flags that belong to it."""
    parser.add_argument(
        "--full_eval", action="store_true", help="also run lm-eval: MMLU, 57 subjects; the flags below are its own"
    )
    parser.add_argument("--skip_generation", action="store_true", help="evaluate only")
    parser.add_argument(
        "--result_json", type=Path, metavar="FILE", help="also write the scores to this file, for programs"
    )
    add_scoring_flags(parser)


def add_scoring_flags(parser: CommandParser) -> None:
    """Add what decides on a score, and where results are kept."""
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=["mmlu"],
        metavar="TASK",
        help="tasks, groups or tags of lm-eval, embedded_recall (the one for tiny_llama and tiny_llamba), or folders "
        "of task files, whose code is run (default: mmlu)",
    )
    parser.add_argument(
        "--limit",
        type=number(int, least=1),
        metavar="N",
        help="only the first N questions of every subject: quick and rough",
    )
    parser.add_argument(
        "--mmlu_data",
        metavar="DIR|hub|modelscope",
        help="MMLU's questions: a folder, in the parquet layout of cais/mmlu, the original's csv layout or json lines; "
        "or cais/mmlu from Hugging Face (hub) or from ModelScope (default: the environment variable MMLU_DATA, else "
        "hub)",
    )
    parser.add_argument(
        "--num_fewshot",
        type=number(int, least=0),
        metavar="K",
        help="solved examples before each question (default: what the task says; for MMLU 0)",
    )
    parser.add_argument(
        "--batch_size",
        type=_batch_size,
        default="auto",
        metavar="N",
        help="questions per forward pass; auto finds a number that fits (default: auto)",
    )
    parser.add_argument(
        "--results_dir",
        type=Path,
        metavar="DIR",
        help="keep answers and results here, in a folder of the checkpoint's name (default: evaluations/ in the "
        "checkpoint's folder)",
    )


def check_evaluation_flags(parser: CommandParser, args: argparse.Namespace) -> None:
    """End the command, as for wrong usage, where flags do not go together."""
    if not args.full_eval:
        parser.refuse(args, _FLAGS, "belongs to --full_eval, which is not given")
    if args.skip_generation:
        parser.refuse(args, GENERATION_FLAGS, "has no effect with --skip_generation")


def _batch_size(text: str) -> int | str:
    return text if text == "auto" else int(number(int, least=1)(text))
