"""Command: upload a checkpoint folder to ModelScope or Hugging Face, with a model card made from its recipe."""

import argparse
import re
from pathlib import Path

from model_preparation.command_line import CommandParser, run
from model_preparation.terminal import escaped

DESCRIPTION = """\
Upload a checkpoint to ModelScope or Hugging Face, with a model card (README.md): recipe, scores, licence, and how to
load the model. The files are verified first. If you run the command again, it sends only files that the repository
does not have yet.
"""

EPILOG = """\
examples:
  python share_checkpoint.py --checkpoint ../model_checkpoints/best_4layer --repo my-org/Llama-hybrid-4 --dry_run
  python share_checkpoint.py --checkpoint ../model_checkpoints/best_4layer --repo my-org/Llama-hybrid-4 --private
  python share_checkpoint.py --checkpoint ../model_checkpoints/best_4layer --repo my-org/Llama-hybrid-4 \\
      --hub huggingface --what recipe

Put a token with write access into MODELSCOPE_API_TOKEN or HF_TOKEN, or log in with the hub's own tool. To use another
address of a hub, set MODELSCOPE_ENDPOINT or HF_ENDPOINT.
"""


def main() -> None:
    """Parse the command line, print the files to upload, and upload them."""
    args = _parser().parse_args()

    from rich.filesize import decimal

    from model_preparation.checkpoint.share import CARD, plan_upload, upload

    plan = plan_upload(
        args.checkpoint,
        repo=args.repo,
        hub=args.hub,
        what=args.what,
        revision=args.revision,
        licence=args.licence,
        card=args.card,
    )
    sizes = plan.sizes()
    for name, size_bytes in sizes.items():
        print(f"{decimal(size_bytes):>12}  {escaped(name)}")
    print(f"{decimal(sum(sizes.values())):>12}  in {len(sizes)} files, under {plan.licence}")
    if plan.left_out:
        print(escaped(f"Not uploaded: {', '.join(plan.left_out)}"))
    if args.dry_run:
        print(f"\n{plan.texts[CARD].decode()}")
        print(f"Nothing was uploaded to {args.repo} (--dry_run).")
        return
    page = upload(plan, private=args.private, message=args.message, verify=args.verify)
    print(f"Checkpoint is at {page}")


def _parser() -> CommandParser:
    parser = CommandParser(description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="the checkpoint folder")
    parser.add_argument(
        "--repo", type=repository, required=True, metavar="ORG/NAME", help="the repository, created if needed"
    )
    parser.add_argument(
        "--hub", choices=("modelscope", "huggingface"), default="modelscope", help="the hub (default: %(default)s)"
    )
    parser.add_argument(
        "--what",
        choices=("auto", "pt", "hf", "recipe"),
        default="auto",
        help="pt: the .pt files; hf: the Hugging Face files; recipe: only the recipe, a few KB from which the same "
        "bytes can be built again (default: auto, all files of the checkpoint)",
    )
    parser.add_argument("--private", action="store_true", help="make the repository private; refuse a public one")
    parser.add_argument("--revision", "--branch", metavar="NAME", help="the branch (default: the hub's default branch)")
    parser.add_argument("--message", metavar="TEXT", help="the commit's message")
    licence = parser.add_mutually_exclusive_group()
    licence.add_argument(
        "--licence",
        "--license",
        metavar="ID",
        help="the model's licence, such as llama3.1 or apache-2.0; needed if base and donor do not determine it",
    )
    licence.add_argument("--card", type=Path, metavar="FILE", help="upload this README.md, not the generated card")
    parser.add_argument("--dry_run", action="store_true", help="print files and card, write nothing, contact no hub")
    parser.add_argument(
        "--no_verify", dest="verify", action="store_false", help="do not compare the files with their SHA-256 first"
    )
    return parser


def repository(text: str) -> str:
    """Read --repo.

    Raises:
        argparse.ArgumentTypeError: if it is not org/name.
    """
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text, re.ASCII) or ".." in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not org/name, such as my-org/Llama-hybrid-4")
    return text


if __name__ == "__main__":
    run(main)
