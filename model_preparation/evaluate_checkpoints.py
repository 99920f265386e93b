"""Command: score checkpoints by test_checkpoint.py, and print one table (jobs/evaluate_many.py).

scripts/evaluate_all.sh starts this command with the right Python.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from model_preparation.command_line import CommandParser, add_device_flags, add_dtype_flag, default_folder, run
from model_preparation.errors import SurgeryError
from model_preparation.evaluation.settings import EVALUATION_SETTINGS, EvaluationSettings, limit_note
from model_preparation.jobs import combinations, evaluate_many, ray_flags
from model_preparation.setting_flags import add_flags

DESCRIPTION = f"""\
Evaluate many checkpoints, and print one table of their scores. If one evaluation fails, the others still run. Each
result is saved at once: after an interruption, run the same command again and it continues. The exit code is 1 if any
evaluation failed.

{ray_flags.HELP}"""

EXAMPLES = """\
examples:
  scripts/evaluate_all.sh model_checkpoints --limit 100
  scripts/evaluate_all.sh model_checkpoints/best_4layer model_checkpoints/best_2layer --mmlu_data ./mmlu --num_fewshot 5
  scripts/evaluate_all.sh --list model_preparation/best_combinations.csv --output_root model_checkpoints --ray local
  scripts/evaluate_all.sh model_checkpoints --ray auto --results_dir /shared/results

A score with --limit is not comparable with the full score. Compare it only with rows of the same table.
"""

# Flags that test_checkpoint.py gets unchanged.
_PASSED_ON = (*(name for name in EVALUATION_SETTINGS if name != "results_dir"), "seed", "dtype", "gpu", "device")
_HUBS = ("hub", "modelscope")  # values of --mmlu_data that are not paths


def main() -> None:
    """Find the checkpoints, evaluate them, print the table."""
    parser = make_parser()
    args = parser.parse_args()
    if bool(args.checkpoints) == (args.list is not None):
        taken = [task for task in args.tasks if Path(task).is_dir()]
        hint = f"; {taken[0]} was taken as a task: put folders before --tasks" if taken else ""
        parser.error(f"give checkpoints' folders or --list FILE, and not both{hint}")
    if args.list is None:
        parser.refuse(args, ("output_root",), "belongs to --list, which is not given")
    run_jobs = ray_flags.chosen_runner(parser, args)

    if parser.is_given("tasks"):
        from model_preparation.evaluation.tasks import check_names

        check_names(args.tasks)  # once here, not once in every evaluation
    if args.list is None:
        candidates = evaluate_many.find_checkpoints(args.checkpoints)
    else:
        candidates = evaluate_many.listed_checkpoints(combinations.read_list(args.list), args.output_root.expanduser())
    done = evaluate_many.evaluate_all(
        candidates,
        list(_flags(parser, args)),
        results_dir=None if args.results_dir is None else args.results_dir.expanduser(),
        needs=list(_needed_paths(args)),
        run_jobs=run_jobs,
    )
    print("\n" + evaluate_many.describe(done))
    if args.limit:
        print(f"{limit_note(args.limit, args.tasks)}: these scores are not comparable with full ones.")
    failed = sum(evaluation.status == "failed" for evaluation in done)
    if failed:
        raise SurgeryError(
            f"{failed} of {len(done)} evaluations failed; the reasons are above. "
            "Solve these problems, and run the same command again: complete results are kept."
        )


def make_parser() -> CommandParser:
    """The command's parser."""
    parser = CommandParser(description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument(
        "checkpoints",
        nargs="*",
        type=Path,
        metavar="DIR",
        help="a checkpoint's folder, or a folder that holds complete checkpoints",
    )
    parser.add_argument(
        "--list", type=Path, metavar="FILE", help="a list of combinations, as for create_best_checkpoints.sh"
    )
    parser.add_argument(
        "--output_root",
        type=Path,
        default=default_folder("model_checkpoints"),
        metavar="DIR",
        help="with --list: where the checkpoints' folders are (default: %(default)s)",
    )
    ray_flags.add_ray_flags(parser)
    add_flags(parser, EvaluationSettings)
    add_dtype_flag(parser, help="run in this dtype (default: the checkpoint's)")
    add_device_flags(parser)
    return parser


def _flags(parser: CommandParser, args: argparse.Namespace) -> Iterator[str]:
    """The words for test_checkpoint.py: each given flag, with its values."""
    for name in filter(parser.is_given, _PASSED_ON):
        value = getattr(args, name)
        if value is True:
            yield f"--{name}"
        elif value is not False:
            yield from (f"--{name}", *map(str, value if isinstance(value, list) else [value]))


def _needed_paths(args: argparse.Namespace) -> Iterator[Path]:
    """The files and folders that an evaluation reads, apart from its checkpoint."""
    if args.mmlu_data is not None and args.mmlu_data not in _HUBS:
        yield Path(args.mmlu_data).expanduser()
    yield from (Path(task) for task in args.tasks if Path(task).exists())
    yield from (Path(each.partition("=")[2]).expanduser() for each in args.task_data or ())
    if args.haystack is not None:
        yield args.haystack.expanduser()


if __name__ == "__main__":
    run(main)
