"""Command: check that a checkpoint folder has not changed since it was built (checkpoint/verify.py)."""

from pathlib import Path

from model_preparation.command_line import CommandParser, run
from model_preparation.errors import SurgeryError
from model_preparation.hub.sources import add_source_flag
from model_preparation.terminal import escaped

EXAMPLES = """\
examples:
  python verify_checkpoint.py ../model_checkpoints/llamba_replaced_11_13_17_21
  python verify_checkpoint.py ./downloaded --base unaligned_llamba --llama_layers_dir ../extracted_llama_layers
"""


def main() -> None:
    parser = CommandParser(
        description="Compare every file and every tensor of a checkpoint with its digest. Also check that the pickle\n"
        "in model.pt names only allowed classes. The command writes nothing, and runs no code of the checkpoint.",
        epilog=EXAMPLES,
    )
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("directory", nargs="?", metavar="DIR", type=Path, help="the checkpoint's folder")
    place.add_argument("--checkpoint", metavar="DIR", type=Path, help="the same, as a flag")
    parser.add_argument("--base", metavar="NAME|PATH", help="also compare tensors with this base, except grafts")
    parser.add_argument(
        "--llama_layers_dir",
        metavar="DIR",
        help="also compare the grafted layers with the layers in this folder (default: extracted_llama_layers in the "
        "repository, if its layers are those that the checkpoint records)",
    )
    parser.add_argument("--files_only", action="store_true", help="compare digests of files only; finds any change")
    add_source_flag(parser)
    args = parser.parse_args()
    checkpoint = args.directory or args.checkpoint
    if args.files_only:
        parser.refuse(args, ("base", "llama_layers_dir"), "compares tensors, but --files_only reads none")
    if args.base is None:
        parser.refuse(args, ("source",), "belongs to --base, which is not given")

    from model_preparation.checkpoint.verify import verify

    found = verify(checkpoint, args.base, args.llama_layers_dir, files_only=args.files_only, sources=args.source)
    for line in [*found.checks, *(f"Note         {note}" for note in found.notes)]:
        print(escaped(line))
    for fault in found.faults:
        print(escaped(f"FAULT        {fault}"))
    if found.faults and len(found.faults) == found.elsewhere:
        raise SurgeryError(
            f"{checkpoint} has not changed, but it was built from another base or other layers. "
            "Name its own base and layers by --base and --llama_layers_dir."
        )
    if found.faults:
        count = len(found.faults)
        raise SurgeryError(
            f"{count} fault{'s' * (count > 1)} in {checkpoint}. Copy or download it again, or build it again."
        )
    print(escaped(f"Checkpoint {checkpoint} is as it was built."))


if __name__ == "__main__":
    run(main)
