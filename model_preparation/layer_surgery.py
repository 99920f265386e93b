"""The console command `layer-surgery`. Its subcommands are the other commands.

`layer-surgery build ...` is `python create_replaced_model_checkpoint.py ...`.
"""

import importlib
import sys
from typing import NamedTuple

from model_preparation import command_line, flags_file
from model_preparation.versions import __version__


class Subcommand(NamedTuple):
    """A command's module in this package, and one line about it."""

    module: str
    summary: str


SUBCOMMANDS = {
    "build": Subcommand("create_replaced_model_checkpoint", "make a checkpoint: a base with layers of its donor"),
    "extract": Subcommand("extract_layers", "write a donor's layers into one file each"),
    "best": Subcommand("create_best_checkpoints", "build a checkpoint for every combination in a list"),
    "test": Subcommand("test_checkpoint", "load a checkpoint or model, generate text, score it"),
    "evaluate": Subcommand("evaluate_checkpoints", "score many checkpoints, and print one table"),
    "compare": Subcommand("compare_checkpoints", "compare several checkpoints, with a test of significance"),
    "search": Subcommand("search_layers", "find the best layers to replace"),
    "heal": Subcommand("heal_checkpoint", "train a checkpoint a little more on text"),
    "distill": Subcommand("distill_llamba_base", "make a base from any donor, and train its mixers layer by layer"),
    "init-base": Subcommand("init_llamba_base", "make a base from any donor, without training"),
    "verify": Subcommand("verify_checkpoint", "check that a checkpoint has not changed since it was built"),
    "inspect": Subcommand("inspect_checkpoint", "list the tensors of a file or folder, or compare two"),
    "update": Subcommand("update_checkpoint", "put this version's model code into checkpoints of format hf"),
    "share": Subcommand("share_checkpoint", "upload a checkpoint to ModelScope or Hugging Face"),
    "serve": Subcommand("serve_checkpoint", "serve a checkpoint with OpenAI's API"),
    "clean": Subcommand("clean_checkpoints", "remove files that killed builds left"),
    "run": Subcommand("run_experiment", "run an experiment that one YAML file describes, step by step"),
}


def main() -> None:
    """Run the subcommand that the command line names, as the subcommand's own script would."""
    parser = _parser()
    given = sys.argv[1:2]
    if given and given[0] in SUBCOMMANDS:
        command = importlib.import_module(f"model_preparation.{SUBCOMMANDS[given[0]].module}")
        command_line.TYPED_FOR.update({each.module: f"{parser.prog} {name}" for name, each in SUBCOMMANDS.items()})
        sys.argv = [f"{parser.prog} {given[0]}", *sys.argv[2:]]
        command_line.run(command.main)
    else:
        command_line.run(show_subcommands)


def show_subcommands() -> None:
    """Without a valid subcommand: print --help or --version, or name the nearest subcommand."""
    parser = _parser()
    if sys.argv[1:2] and not sys.argv[1].startswith("-"):
        word = sys.argv[1].removesuffix(".py").removesuffix(".sh")
        same = [name for name, each in SUBCOMMANDS.items() if each.module == word]
        hint = f" That is {same[0]}." if same else flags_file.nearest(word, SUBCOMMANDS)
        parser.error(f"there is no subcommand {sys.argv[1]!r}.{hint} {parser.prog} --help lists all.")
    parser.parse_args()
    parser.print_help()


def _parser() -> command_line.CommandParser:
    parser = command_line.CommandParser(
        usage="%(prog)s SUBCOMMAND ...",
        description="Replace layers of a language model with layers of another one, and write checkpoints.",
        epilog="\n".join(
            [
                "subcommands:",
                *(f"  {name:<10} {each.summary}" for name, each in SUBCOMMANDS.items()),
                "",
                "%(prog)s SUBCOMMAND --help shows the flags of a subcommand.",
            ]
        ),
    )
    parser.add_argument("--version", action="version", version=f"layer-surgery {__version__}")
    return parser


if __name__ == "__main__":
    main()
