"""Command: build a checkpoint for each combination in a list or in a search's result (jobs/build_many.py).

create_best_checkpoints.sh starts this command with the right Python.
"""

import argparse
from pathlib import Path

from model_preparation import create_replaced_model_checkpoint
from model_preparation.command_line import CommandParser, default_folder, number, run
from model_preparation.errors import SurgeryError
from model_preparation.jobs import build_many, combinations, ray_flags

ORIGIN = ("--base", "--llama_layers_dir")  # a search's result may name the values that the search used
HERE = Path(__file__).resolve().parent

DESCRIPTION = f"""\
Build a checkpoint for every combination of layers in a list, and print a table. If one fails, the others are still
built. A complete checkpoint is skipped, unless you give --overwrite. If a complete checkpoint has other layers, another
base or another format than the list and the flags say, this combination counts as failed. The exit code is 1 if any
combination failed.
--from builds the best combinations of a search. FILE is the search_result.json of search_layers.py, or the result file
of an older program. The base and the donor's layers are those of the search, unless you give --base and
--llama_layers_dir.
Flags not listed here go to create_replaced_model_checkpoint.py: --base, --llama_layers_dir, --gpu, ...

{ray_flags.HELP}"""

EXAMPLES = f"""\
examples:
  ./create_best_checkpoints.sh
  ./create_best_checkpoints.sh --list mine.csv --output_root /data/checkpoints --base /models/my-llamba --gpu 1
  ./create_best_checkpoints.sh --list mine.csv --ray local
  ./create_best_checkpoints.sh --from ../searches/ga/search_result.json --top 3

{combinations.EXAMPLE}"""


def main() -> None:
    """Read the list, build missing checkpoints, print the table."""
    parser = CommandParser(description=DESCRIPTION, epilog=EXAMPLES)
    sources = parser.add_mutually_exclusive_group()
    sources.add_argument(
        "--list",
        type=Path,
        default=HERE / "best_combinations.csv",
        metavar="FILE",
        help="combinations, as .csv or .json (default: the published ones, best_combinations.csv)",
    )
    sources.add_argument(
        "--from", dest="search", type=Path, metavar="FILE", help="build from a search's result, not from a list"
    )
    parser.add_argument(
        "--top", type=number(int, least=1), metavar="K", help="with --from: build the K best combinations (default: 1)"
    )
    parser.add_argument(
        "--output_root",
        type=Path,
        default=default_folder("model_checkpoints"),
        metavar="DIR",
        help="the folder for the checkpoint folders (default: %(default)s)",
    )
    ray_flags.add_ray_flags(parser)
    args, passed_on = parser.parse_known_args()
    if args.top is not None and args.search is None:
        parser.error("--top belongs to --from, which is not given")
    for flag in ("--layers", "--output_dir", "--description", "--score", "--from_info"):
        if is_given(flag, passed_on):
            parser.error(f"{flag} cannot be given here: the list or the search decides what to build")
    builder = create_replaced_model_checkpoint.make_parser()
    builder.prog = "create_replaced_model_checkpoint.py"
    flags = builder.parse_args(["--layers", "0", "--output_dir", "DIR", *passed_on])  # a wrong flag ends the command
    run_jobs = ray_flags.chosen_runner(parser, argparse.Namespace(**{**vars(flags), **vars(args)}))

    assumed = ""
    if args.search is not None:
        listed, searched = combinations.best_of(args.search, args.top or 1)
        root = args.output_root.expanduser()
        builds_any = flags.overwrite or not all(build_many.is_complete(root / each.name) for each in listed)
        if builds_any and not is_given("--llama_layers_dir", passed_on):
            combinations.check_layers(args.search)
        for flag, value in searched.items():
            if not is_given(flag, passed_on):
                passed_on += [flag, value] if value else [flag]
        flags = builder.parse_args(["--layers", "0", "--output_dir", "DIR", *passed_on])
        if any(flag not in searched and not is_given(flag, passed_on) for flag in ORIGIN):
            assumed = (
                f"{args.search} does not name its base and layers. The base {flags.base or 'unaligned_llamba'} and the "
                f"donor's layers in {flags.llama_layers_dir[0]} are used. For others, give --base NAME|PATH and "
                "--llama_layers_dir DIR (extract_layers.py --model_name DONOR --output_dir DIR writes them)."
            )
            print(assumed, flush=True)
    else:
        listed = combinations.read_list(args.list)
    outcomes = build_many.build_all(listed, args.output_root.expanduser(), passed_on, flags, run_jobs=run_jobs)
    print("\n" + build_many.describe(outcomes))
    failed = sum(outcome.status == "failed" for outcome in outcomes)
    if failed:
        raise SurgeryError(
            f"{failed} of {len(outcomes)} checkpoints failed; the reasons are above. Solve these problems, and run the "
            f"same command again: complete checkpoints are skipped. {assumed}".rstrip()
        )


def is_given(flag: str, arguments: list[str]) -> bool:
    """Whether the arguments have a flag, in either spelling."""
    return any(given.partition("=")[0].replace("-", "_") == flag.replace("-", "_") for given in arguments)


if __name__ == "__main__":
    run(main)
