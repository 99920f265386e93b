"""Command: put this package's model code into checkpoints of format hf (checkpoint/model_code.py)."""

import os
import sys
from pathlib import Path

from model_preparation.command_line import CommandParser, run

DESCRIPTION = """\
A checkpoint of format hf contains the model's own code, so that transformers opens it without this package. The command
puts this package's code into checkpoints that have other code. The weights do not change. The command updates
README.txt and the digests, and checkpoint_info.json records the change. It does not change a damaged checkpoint. If the
command is stopped, each folder is whole: either as it was before, or updated.
"""

EXAMPLES = """\
examples:
  python update_checkpoint.py ../model_checkpoints/for_transformers
  python update_checkpoint.py ../model_checkpoints/*/
"""


def main() -> None:
    parser = CommandParser(description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument("checkpoints", nargs="+", metavar="DIR", type=Path, help="a checkpoint's folder")
    args = parser.parse_args()

    from model_preparation.checkpoint.model_code import update_code
    from model_preparation.errors import SurgeryError

    failures, updated = [], 0
    for given, folder in [(given, given.expanduser().absolute()) for given in args.checkpoints]:
        try:
            changed = update_code(folder)
        except SurgeryError as error:
            failures.append(str(error))
            continue
        updated += bool(changed)
        print(f"{given}: {'updated: ' + ', '.join(changed) if changed else 'already up to date'}")
    try:
        os.getcwd()
    except FileNotFoundError:
        print('You are in a folder that was replaced. Enter it again: cd "$PWD"')
    if failures:
        for failure in failures[:-1]:
            print(f"error: {failure}", file=sys.stderr)
        raise SurgeryError(failures[-1])
    if len(args.checkpoints) > 1:
        print(f"{updated} of {len(args.checkpoints)} checkpoints updated; the others were up to date.")


if __name__ == "__main__":
    run(main)
