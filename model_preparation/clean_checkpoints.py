"""Command: remove files that no checkpoint in a folder of checkpoints needs (checkpoint/base_store.py)."""

from pathlib import Path

from model_preparation.command_line import CommandParser, default_folder, run
from model_preparation.terminal import escaped

DESCRIPTION = """\
Remove what no checkpoint in a folder of checkpoints needs:
- the folders NAME.partial, which killed builds left
- files with weights of a base in .base_shards, if no checkpoint of format hf uses them any more
The command never touches checkpoints, nor the folders and files of a running build.
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
        help="the folder with the checkpoints' folders (default: %(default)s)",
    )
    parser.add_argument("--dry_run", action="store_true", help="print what would be removed, but remove nothing")
    args = parser.parse_args()

    from rich.filesize import decimal

    from model_preparation.checkpoint.base_store import clean_checkpoints

    folder = args.dir.expanduser()
    cleaned = clean_checkpoints(folder, dry_run=args.dry_run)
    for path in [*cleaned.abandoned, *cleaned.paths]:
        print(escaped(str(path)))
    verb = "would be removed from" if args.dry_run else "removed from"
    print(
        f"{len(cleaned.abandoned)} folders of killed builds, and {len(cleaned.paths)} stored files "
        f"({decimal(cleaned.size_bytes)}) {verb} {folder}"
    )


if __name__ == "__main__":
    run(main)
