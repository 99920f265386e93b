"""Command: a base and extracted layers -> a checkpoint folder (see surgery/graft.py and surgery/checkpoint.py)."""

import argparse
import contextlib
from pathlib import Path

from model_preparation.command_line import (
    CommandParser,
    add_device_flags,
    add_dtype_flag,
    add_layers_flag,
    choose_device,
    default_folder,
    run,
    torch_dtype,
)
from model_preparation.surgery.sources import add_source_flag

EXAMPLES = """\
examples:
  python create_replaced_model_checkpoint.py --layers 11 13 17 21 \\
      --output_dir ../model_checkpoints/llamba_replaced_11_13_17_21 --description "best four" --score 0.5700
  python create_replaced_model_checkpoint.py --layers 13 17 --output_dir ../model_checkpoints/for_lm_eval --format hf
  python create_replaced_model_checkpoint.py --base /models/my-llamba --layers 3 --output_dir ./grafted --dry_run
"""


def make_parser() -> CommandParser:
    """The command's flags; create_best_checkpoints.py checks with them what it passes on."""
    parser = CommandParser(
        description="Replace layers of a Llamba by a Llama's layers of the same indices, and write a checkpoint\n"
        "that loads with torch.load, from its state dict, with model_preparation.load_checkpoint, or (--format hf)\n"
        "with transformers alone.",
        epilog=EXAMPLES,
    )
    add_layers_flag(parser, required=True, help="indices of the layers to replace, in any order")
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="the checkpoint folder to write")
    parser.add_argument(
        "--llama_layers_dir",
        default=default_folder("extracted_llama_layers"),
        metavar="DIR",
        help="layers written by extract_layers.py (default: %(default)s)",
    )
    parser.add_argument(
        "--base",
        default="unaligned_llamba",
        metavar="NAME|PATH",
        help="the Llamba operated on: a name, a model folder or a hub id (default: %(default)s)",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="NAME|PATH",
        help="take the tokenizer from here (default: the base's own, else the donor's)",
    )
    parser.add_argument("--description", default="", metavar="TEXT", help="free text for checkpoint_info.json")
    parser.add_argument("--score", type=score, metavar="X", help="an MMLU score known already, between 0 and 1")
    add_device_flags(parser)
    add_dtype_flag(parser, help="dtype of the whole model (default: the base's)")
    parser.add_argument(
        "--format",
        choices=("pt", "hf", "both"),
        default="pt",
        help="pt: model.pt and model_state_dict.pt; hf: a folder that transformers and lm-eval open without this "
        "package, its untouched layers shared with the checkpoints beside it (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is there")
    parser.add_argument(
        "--allow_other_heads", action="store_true", help="accept a donor whose heads differ in number or size"
    )
    parser.add_argument("--dry_run", action="store_true", help="check everything, print the plan, write nothing")
    add_source_flag(parser)
    return parser


def main() -> None:
    args = make_parser().parse_args()

    from model_preparation.surgery import checkpoint, graft
    from model_preparation.surgery.new_folder import check_target

    target = Path(args.output_dir).expanduser()
    check_target(target, overwrite=args.overwrite, complete_mark=checkpoint.INFO)
    device = choose_device(args.gpu, args.device)
    planned = graft.plan(
        args.base,
        args.layers,
        args.llama_layers_dir,
        tokenizer=args.tokenizer,
        dtype=torch_dtype(args.dtype),
        allow_other_heads=args.allow_other_heads,
        sources=args.source,
    )
    print("\n".join(planned.describe()))
    print(checkpoint.describe_writing(planned, target, args.format))
    checkpoint.check_room(planned, target, args.format)
    if args.dry_run:
        print(f"Everything fits; nothing was written to {target} (--dry_run).")
        return
    checkpoint.write(
        planned,
        target,
        description=args.description,
        score=args.score,
        device=device,
        format=args.format,
        overwrite=args.overwrite,
    )
    print(f"Checkpoint is in {target}")


def score(text: str) -> float:
    """Read --score, a fraction of 1.

    Raises:
        argparse.ArgumentTypeError: if it is not one.
    """
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not between 0 and 1, such as 0.57")


if __name__ == "__main__":
    run(main)
