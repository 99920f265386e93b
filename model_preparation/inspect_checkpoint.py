"""Command: list the tensors of a checkpoint or of any other file or folder with tensors (checkpoint/inspect.py)."""

import sys

from model_preparation.command_line import CommandParser, run
from model_preparation.hub.sources import add_source_flag
from model_preparation.terminal import escaped

EXAMPLES = """\
examples:
  python inspect_checkpoint.py ../model_checkpoints/llamba_replaced_11_13_17_21 --keys "backbone.layers.13.*"
  python inspect_checkpoint.py ../model_checkpoints/HEALED --diff ../model_checkpoints/PARENT
  python inspect_checkpoint.py ../model_checkpoints/HEALED_resume/checkpoint-50/optimizer.pt
  python inspect_checkpoint.py tiny_llamba --diff huggingface:org/other
"""


def main() -> None:
    """Parse the command line and print the tensors."""
    parser = CommandParser(
        description="List the tensors of a file or folder: name, dtype, shape, size, mean, standard deviation, range,\n"
        "BLAKE3. Files of any size are mapped and read piece by piece. No code is run: a file is refused if it holds\n"
        "anything except tensors and plain values. Only a checkpoint's model.pt may also hold the model itself.",
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "path",
        metavar="PATH|NAME",
        help="a .safetensors, .pt, .pth or .bin file; a folder with a checkpoint (its state dict is read), a state of "
        "healing, extracted layers, an adapter or a model; or a model's name",
    )
    parser.add_argument("--keys", default="*", metavar="PATTERN", help='only names such as "*.mlp.*" or lm_head')
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--diff", metavar="OTHER", help="print the tensors that differ from those in OTHER, and how")
    output.add_argument(
        "--json", action="store_true", help="print one JSON object per tensor or plain value, with whole digests"
    )
    add_source_flag(parser)
    args = parser.parse_args()

    from model_preparation.checkpoint.inspect import inspect_checkpoint, place_of
    from model_preparation.checkpoint.model_code import code_in, remark_on_code

    path = place_of(args.path, args.source)
    for line in inspect_checkpoint(path, args.keys, diff=args.diff, as_json=args.json, sources=args.source):
        print(escaped(line))
    if path.is_dir() and (remark := remark_on_code(path, code_in(path))):
        print(f"note: {remark}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
