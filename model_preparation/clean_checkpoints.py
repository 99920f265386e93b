"""Command: remove from a folder of checkpoints what none needs (see checkpoint/store_folder.py and new_folder.py)."""

from pathlib import Path

from model_preparation.command_line import CommandParser, default_folder, run
from model_preparation.terminal import escaped

DESCRIPTION = """\
Remove from a folder of checkpoints what none of them needs: folders NAME.partial of builds that were killed, and shards
of bases in .base_shards that no checkpoint of format hf shares any more. Checkpoints themselves are never touched, nor
is what a running build works in.
"""

EXAMPLES = """\
examples:
  python clean_checkpoints.py --dry_run
  python clean_checkpoints.py --dir /data/checkpoints
"""


def main() -> None:
    parser = CommandParser(description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument(
        "--dir",
        type=Path,
        default=default_folder("model_checkpoints"),
        metavar="DIR",
        help="the folder that holds the checkpoints' folders (default: %(default)s)",
    )
    parser.add_argument("--dry_run", action="store_true", help="print what would be removed, remove nothing")
    args = parser.parse_args()

    from rich.filesize import decimal

    from model_preparation.checkpoint.store_folder import clean
    from model_preparation.errors import SurgeryError
    from model_preparation.io.complete_folder import remove_abandoned

    folder = args.dir.expanduser()
    if not folder.is_dir():
        raise SurgeryError(f"{folder} is no folder. Give the one that holds the checkpoints' folders with --dir.")
    abandoned = remove_abandoned(folder, dry_run=args.dry_run)
    cleaned = clean(folder, dry_run=args.dry_run)
    for path in [*abandoned, *cleaned.paths]:
        print(escaped(str(path)))
    verb = "would be removed from" if args.dry_run else "removed from"
    print(
        f"{len(abandoned)} folders of killed builds and {len(cleaned.paths)} stored files of "
        f"{decimal(cleaned.size_bytes)} {verb} {folder}"
    )


if __name__ == "__main__":
    run(main)
