"""Command: a base and extracted layers -> a checkpoint folder (checkpoint/graft.py and checkpoint/checkpoint.py)."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from model_preparation.command_line import (
    CommandParser,
    add_device_flags,
    add_dtype_flag,
    add_layers_flag,
    default_folder,
    run,
    score,
)
from model_preparation.devices import choose_device
from model_preparation.hub.sources import add_source_flag
from model_preparation.terminal import escaped

if TYPE_CHECKING:
    from model_preparation.checkpoint.graft import GraftPlan

EXAMPLES = """\
examples:
  python create_replaced_model_checkpoint.py --layers 11 13 17 21 \\
      --output_dir ../model_checkpoints/llamba_replaced_11_13_17_21 --description "best four" --score 0.5700
  python create_replaced_model_checkpoint.py --layers 13 17 --output_dir ../model_checkpoints/for_lm_eval --format hf
  python create_replaced_model_checkpoint.py --base /models/my-llamba --layers 3 --output_dir ./grafted --dry_run
  python create_replaced_model_checkpoint.py --from_info checkpoint_info.json --output_dir ../model_checkpoints/again
"""


_OF_THE_RECIPE = ("tokenizer", "description", "score", "dtype", "format")


def make_parser() -> CommandParser:
    """The command's flags; create_best_checkpoints.py checks with them what it passes on."""
    parser = CommandParser(
        description="Replace layers of a Llamba by a Llama's layers of the same indices, and write a checkpoint\n"
        "that loads with torch.load, from its state dict, with model_preparation.load_checkpoint, or (--format hf)\n"
        "with transformers alone.",
        epilog=EXAMPLES,
    )
    add_layers_flag(parser, required=False, help="indices of the layers to replace, in any order")
    parser.add_argument(
        "--from_info",
        metavar="FILE",
        help="build the checkpoint that this checkpoint_info.json describes, and confirm its digests; of the flags "
        "below, only where things are, --device, --overwrite and --source count",
    )
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="the checkpoint folder to write")
    parser.add_argument(
        "--llama_layers_dir",
        default=default_folder("extracted_llama_layers"),
        metavar="DIR",
        help="layers written by extract_layers.py (default: %(default)s)",
    )
    parser.add_argument(
        "--base",
        metavar="NAME|PATH",
        help="the Llamba operated on: a name, a model folder or a hub id (default: unaligned_llamba, or what "
        "--from_info says)",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="NAME|PATH",
        help="take the tokenizer from here (default: the base's own, else the donor's)",
    )
    parser.add_argument("--description", metavar="TEXT", help="free text for checkpoint_info.json")
    parser.add_argument("--score", type=score, metavar="X", help="an MMLU score known already, between 0 and 1")
    add_device_flags(parser)
    add_dtype_flag(parser, help="dtype of the whole model (default: the base's)")
    parser.add_argument(
        "--format",
        choices=("pt", "hf", "both"),
        help="pt: model.pt and model_state_dict.pt; hf: a folder that transformers and lm-eval open without this "
        "package, its untouched layers shared with the checkpoints beside it (default: pt)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is there")
    parser.add_argument("--dry_run", action="store_true", help="check everything, print the plan, write nothing")
    add_source_flag(parser)
    return parser


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    if (args.layers is None) == (args.from_info is None):
        parser.error("one of --layers and --from_info is needed, and only one")
    if args.from_info is not None and args.dry_run:
        parser.error("--dry_run has nothing to show for --from_info: the recipe is the plan")
    if args.from_info is not None:
        parser.refuse(
            args, _OF_THE_RECIPE, "is the recipe's to say: leave it out, or use --layers instead of --from_info"
        )

    from model_preparation.checkpoint import checkpoint
    from model_preparation.checkpoint.graft_parts import find_parts
    from model_preparation.io.complete_folder import check_target

    target = Path(args.output_dir).expanduser()
    format = args.format or "pt"
    check_target(target, overwrite=args.overwrite, marker_file=checkpoint.INFO)
    device = partial(choose_device, args.gpu, args.device)
    if args.from_info is not None:
        rebuild(args.from_info, target, args, device)
        return
    parts = find_parts(
        args.base or "unaligned_llamba", args.layers, args.llama_layers_dir, dtype=args.dtype, sources=args.source
    )
    how = {"tokenizer": args.tokenizer, "sources": args.source}

    def show(planned: "GraftPlan") -> None:
        print("\n".join(map(escaped, planned.describe())))
        print(checkpoint.describe_writing(planned, target, format))

    if args.dry_run:
        from model_preparation.checkpoint import graft

        device()
        show(graft.check(parts, **how))
        checkpoint.check_room(parts, target, format)
        print(f"Everything fits; nothing was written to {target} (--dry_run).")
        return
    checkpoint.write(
        parts,
        target,
        **how,
        show=show,
        description=args.description or "",
        score=args.score,
        device=device,
        format=format,
        overwrite=args.overwrite,
    )
    print(f"Checkpoint is in {target}")


def rebuild(recipe: str, target: Path, args: argparse.Namespace, device: Callable[[], str]) -> None:
    """What the command does with --from_info."""
    from model_preparation.checkpoint import recipe as recipes

    notes = recipes.rebuild(
        recipe,
        target,
        args.llama_layers_dir,
        base=args.base,
        device=device,
        overwrite=args.overwrite,
        sources=args.source,
    )
    print(f"Every tensor is as {recipe} says.")
    print("\n".join(notes or ["So is every other byte, but for the time of creation."]))
    print(f"Checkpoint is in {target}")


if __name__ == "__main__":
    run(main)
