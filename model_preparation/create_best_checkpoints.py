"""Command: a list of combinations -> one checkpoint each, by create_replaced_model_checkpoint.py.

In: a CSV or JSON file (jobs/combinations.py), or the result of a search (jobs/from_search.py). Out: a folder per
combination, and a table at the end (jobs/builds.py).
Usually started by create_best_checkpoints.sh, which finds the right Python.
"""

import argparse
from pathlib import Path

from model_preparation import create_replaced_model_checkpoint
from model_preparation.command_line import CommandParser, default_folder, number, run
from model_preparation.errors import SurgeryError
from model_preparation.jobs import builds, combinations, from_search, ray_flags
from model_preparation.jobs.existing import is_complete

ORIGIN = ("--base", "--llama_layers_dir")  # what a search was made on
HERE = Path(__file__).resolve().parent

DESCRIPTION = f"""\
Build a checkpoint for every combination of layers in a list. One that fails does not stop the others, one that is
complete already is skipped (unless --overwrite is given; if its layers, base or format are others than asked for, it
counts as failed), and a table ends it all. Exit code 1 if any failed.
--from takes the best of a search, search_layers.py's search_result.json or an older program's result file, and builds
them from the base and the donor's layers that the search had, unless --base and --llama_layers_dir say otherwise.
Flags not listed here go to create_replaced_model_checkpoint.py as they are: --base, --llama_layers_dir, --gpu, ...

{ray_flags.HELP}"""

EXAMPLES = f"""\
examples:
  ./create_best_checkpoints.sh
  ./create_best_checkpoints.sh --list mine.csv --output_root /data/checkpoints --base /models/my-llamba --gpu 1
  ./create_best_checkpoints.sh --list mine.csv --ray local
  ./create_best_checkpoints.sh --from ../searches/ga/search_result.json --top 3

{combinations.EXAMPLE}"""


def main() -> None:
    """Read the list, build what is missing, print the table."""
    parser = CommandParser(description=DESCRIPTION, epilog=EXAMPLES)
    sources = parser.add_mutually_exclusive_group()
    sources.add_argument(
        "--list",
        type=Path,
        default=HERE / "best_combinations.csv",
        metavar="FILE",
        help="combinations, as .csv or .json (default: the published ones, best_combinations.csv)",
    )
    sources.add_argument("--from", dest="search", type=Path, metavar="FILE", help="the result of a search instead")
    parser.add_argument(
        "--top", type=number(int, least=1), metavar="K", help="with --from: build the K best combinations (default: 1)"
    )
    parser.add_argument(
        "--output_root",
        type=Path,
        default=default_folder("model_checkpoints"),
        metavar="DIR",
        help="where the checkpoint folders go (default: %(default)s)",
    )
    ray_flags.add_ray_flags(parser)
    args, passed_on = parser.parse_known_args()
    if args.top is not None and args.search is None:
        parser.error("--top belongs to --from, which is not given")
    for flag in ("--layers", "--output_dir", "--description", "--score", "--from_info"):
        if is_given(flag, passed_on):
            parser.error(f"{flag} comes from the list")
    builder = create_replaced_model_checkpoint.make_parser()
    builder.prog = "create_replaced_model_checkpoint.py"
    flags = builder.parse_args(["--layers", "0", "--output_dir", "DIR", *passed_on])  # ends here if a flag is wrong
    run_jobs = ray_flags.chosen_runner(parser, argparse.Namespace(**{**vars(flags), **vars(args)}))

    taken = ""
    if args.search is not None:
        listed, sources_found = from_search.best_of(args.search, args.top or 1)
        root = args.output_root.expanduser()
        is_to_build = flags.overwrite or not all(is_complete(root / each.name) for each in listed)
        if is_to_build and not is_given("--llama_layers_dir", passed_on):
            from_search.check_layers(args.search)
        for flag, value in sources_found.items():
            if not is_given(flag, passed_on):
                passed_on += [flag, value]
        flags = builder.parse_args(["--layers", "0", "--output_dir", "DIR", *passed_on])
        if any(flag not in sources_found and not is_given(flag, passed_on) for flag in ORIGIN):
            taken = (
                f"{args.search} does not say what was searched. Taken are the base {flags.base or 'unaligned_llamba'} "
                f"and the donor's layers in {flags.llama_layers_dir}; name others by --base NAME|PATH and "
                "--llama_layers_dir DIR (extract_layers.py --model_name DONOR --output_dir DIR writes them)."
            )
            print(taken, flush=True)
    else:
        listed = combinations.read_list(args.list)
    outcomes = builds.build_all(listed, args.output_root.expanduser(), passed_on, flags, run_jobs=run_jobs)
    print("\n" + builds.describe(outcomes))
    failed = sum(outcome.status == "failed" for outcome in outcomes)
    if failed:
        raise SurgeryError(
            f"{failed} of {len(outcomes)} checkpoints failed; the reasons are above. "
            f"Run this again when they are mended: what is complete will be skipped. {taken}".rstrip()
        )


def is_given(flag: str, arguments: list[str]) -> bool:
    """Whether a flag is among arguments, in either spelling."""
    return any(given.partition("=")[0].replace("-", "_") == flag.replace("-", "_") for given in arguments)


if __name__ == "__main__":
    run(main)
