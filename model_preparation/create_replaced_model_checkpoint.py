"""Command: build a checkpoint folder from a base and extracted layers (checkpoint/build.py and rebuild.py)."""

from functools import partial
from pathlib import Path

from model_preparation.command_line import (
    CommandParser,
    HeadsByLayer,
    add_device_flags,
    add_dtype_flag,
    add_layers_flag,
    default_folder,
    heads_of_donor,
    layer_index,
    run,
    score,
)
from model_preparation.devices import choose_device
from model_preparation.hub.sources import add_source_flag
from model_preparation.terminal import escaped

EXAMPLES = """\
examples:
  python create_replaced_model_checkpoint.py --layers 11 13 17 21 \\
      --output_dir ../model_checkpoints/llamba_replaced_11_13_17_21 --description "best four" --score 0.5700
  python create_replaced_model_checkpoint.py --layers 13 17 --output_dir ../model_checkpoints/for_lm_eval --format hf
  python create_replaced_model_checkpoint.py --layers 17 --heads 13:16,17 15:11 --output_dir ../model_checkpoints/heads
  python create_replaced_model_checkpoint.py --base /models/my-llamba --layers 3 --output_dir ./grafted --dry_run
  python create_replaced_model_checkpoint.py --base ../model_checkpoints/for_lm_eval --layers 11 --ungraft 13 \\
      --output_dir ../model_checkpoints/next
  python create_replaced_model_checkpoint.py --layers A:11,13 B:17 --llama_layers_dir A=./instruct B=./plain \\
      --output_dir ../model_checkpoints/two_donors
  python create_replaced_model_checkpoint.py --from_info checkpoint_info.json --output_dir ../model_checkpoints/again
"""

_RECIPE_FLAGS = ("heads", "ungraft", "keep_mixer_heads", "tokenizer", "description", "score", "dtype", "format")


def make_parser() -> CommandParser:
    """The command's parser. create_best_checkpoints.py also uses it, to check the flags that it passes on."""
    parser = CommandParser(
        description="Replace layers of a Llamba with the donor's layers of the same indices, and write a checkpoint.\n"
        "The checkpoint loads with torch.load, from its state dict, or with model_preparation.load_checkpoint. With\n"
        "--format hf, it loads with transformers alone.",
        epilog=EXAMPLES,
    )
    add_layers_flag(
        parser,
        required=False,
        names=True,
        help="indices of the layers to replace, in any order. For several donors, add the names that "
        "--llama_layers_dir gives them, such as A:11,13 B:17",
    )
    parser.add_argument(
        "--heads",
        nargs="+",
        type=heads_of_donor,
        action=HeadsByLayer,
        metavar="[NAME:]LAYER:HEAD[,HEAD...]",
        help="query heads of the donor to add to the mixers of layers that are not replaced, such as 13:16,17,18 "
        "15:11. Heads need less cache than whole layers. For several donors, add the names, such as B:13:16",
    )
    parser.add_argument(
        "--ungraft",
        nargs="+",
        type=layer_index,
        metavar="N",
        help="if --base is a checkpoint: undo its grafts (whole layers or heads) in these layers. The layers of the "
        "checkpoint's own base take their place",
    )
    parser.add_argument(
        "--keep_mixer_heads",
        action="store_true",
        help="with --heads: keep the whole mixer in these layers (default: the mixer's channels at the "
        "places of the heads are set to zero)",
    )
    parser.add_argument(
        "--from_info",
        metavar="FILE",
        help="build the checkpoint that this checkpoint_info.json describes, and compare its digests. The only other "
        "flags allowed are --base, --llama_layers_dir, --output_dir, --gpu, --device, --overwrite and --source",
    )
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="the checkpoint folder to write")
    parser.add_argument(
        "--llama_layers_dir",
        nargs="+",
        default=[default_folder("extracted_llama_layers")],
        metavar="DIR",
        help="layers that extract_layers.py wrote (default: extracted_llama_layers in the repository). For several "
        "donors: A=DIR B=DIR. "
        "With --from_info: a DIR for each donor of the recipe",
    )
    parser.add_argument(
        "--base",
        metavar="NAME|PATH",
        help="the Llamba that gets the layers: a name, a model folder or a hub id. A checkpoint's folder also works: "
        "its grafts stay (default: unaligned_llamba, or the base in --from_info)",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="NAME|PATH",
        help="take the tokenizer from here (default: the base's own, else the donor's)",
    )
    parser.add_argument("--description", metavar="TEXT", help="free text for checkpoint_info.json")
    parser.add_argument(
        "--score", type=score, metavar="X", help="the checkpoint's MMLU score, if known, between 0 and 1"
    )
    add_device_flags(parser)
    add_dtype_flag(parser, help="dtype of the whole model (default: the base's)")
    parser.add_argument(
        "--format",
        choices=("pt", "hf", "both"),
        help="pt: model.pt and model_state_dict.pt. hf: a folder that transformers and lm-eval open without this "
        "package; checkpoints in the same folder share the files of layers that are not replaced. both: all of these "
        "files (default: pt)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing checkpoint")
    parser.add_argument("--dry_run", action="store_true", help="check everything, print the plan, write nothing")
    add_source_flag(parser)
    return parser


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    if (args.layers is None and args.heads is None and args.ungraft is None) == (args.from_info is None):
        parser.error("give --layers, --heads or --ungraft, or several of them; or --from_info alone")
    layers, heads, layers_dir = args.layers or [], args.heads or {}, args.llama_layers_dir[0]
    has_names = isinstance(layers, dict) or any(isinstance(each, dict) for each in heads.values())
    if has_names or (args.from_info is None and len(args.llama_layers_dir) > 1):
        layers_dir = {name: folder for name, _, folder in (str(each).partition("=") for each in args.llama_layers_dir)}
    if args.keep_mixer_heads and args.heads is None:
        parser.error("--keep_mixer_heads belongs to --heads")
    if args.from_info is not None and args.dry_run:
        parser.error("--dry_run does nothing with --from_info: the recipe is the plan")
    if args.from_info is not None:
        parser.refuse(
            args, _RECIPE_FLAGS, "is a part of the recipe: leave it out, or use --layers instead of --from_info"
        )

    target = Path(args.output_dir).expanduser()
    device = partial(choose_device, args.gpu, args.device)
    where = {"device": device, "overwrite": args.overwrite, "sources": args.source}
    if args.from_info is not None:
        from model_preparation.checkpoint.rebuild import rebuild_checkpoint

        notes = rebuild_checkpoint(args.from_info, target, args.llama_layers_dir, base=args.base, **where)
        print(f"Every tensor is as in {args.from_info}.")
        print("\n".join(notes or ["Every other byte is the same too, except the time of creation."]))
    else:
        from model_preparation.checkpoint.build import build_checkpoint

        build_checkpoint(
            args.base or "unaligned_llamba",
            layers,
            layers_dir,
            target,
            tokenizer=args.tokenizer,
            description=args.description or "",
            score=args.score,
            dtype=args.dtype,
            format=args.format or "pt",
            dry_run=args.dry_run,
            heads=heads,
            keep_mixer_heads=args.keep_mixer_heads,
            ungraft=args.ungraft or [],
            show=lambda lines: print("\n".join(map(escaped, lines))),
            **where,
        )
    if args.dry_run:
        print(f"Everything fits; nothing was written to {target} (--dry_run).")
    else:
        print(f"Checkpoint is in {target}")


if __name__ == "__main__":
    run(main)
