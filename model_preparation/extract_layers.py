"""Command: write a folder of layers from a donor (checkpoint/extract.py), or from old layer files (legacy/)."""

from model_preparation.command_line import CommandParser, add_dtype_flag, add_layers_flag, default_folder, run
from model_preparation.errors import SurgeryError
from model_preparation.hub.sources import add_source_flag
from model_preparation.terminal import escaped

EXAMPLES = """\
examples:
  python extract_layers.py --model_name llama --output_dir ../extracted_llama_layers
  python extract_layers.py --model_name /models/Llama-3.1-8B-Instruct --layers 11 13 17 21
  python extract_layers.py --output_dir ../extracted_llama_layers --verify
  python extract_layers.py --from_legacy /old/extracted_llama_layers --trust_pickle --output_dir ./imported_layers
"""


def main() -> None:
    parser = CommandParser(
        description="Write each decoder layer of a model into its own file. Also write the tokenizer and everything\n"
        "else that a graft needs. The command works layer by layer, so it needs memory for one layer only.",
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "--model_name",
        metavar="NAME|PATH",
        help="the donor: llama, mistral, qwen2.5, qwen3 or tiny_llama; a model's folder; or a hub id such as "
        "org/name@revision",
    )
    parser.add_argument(
        "--output_dir",
        default=default_folder("extracted_llama_layers"),
        metavar="DIR",
        help="the folder to write, or the folder to read with --verify (default: %(default)s)",
    )
    add_layers_flag(parser, required=False, help="extract these layers only (default: all)")
    add_dtype_flag(parser, help="cast the layers to this dtype (default: the dtype of the model's files)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder of layers")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare every file in the folder with its recorded SHA-256; with --model_name, do this after extracting",
    )
    parser.add_argument(
        "--from_legacy",
        metavar="DIR",
        help="import layers that were saved as whole pickled LlamaDecoderLayer modules (layer_11.pt, ...); "
        "--model_name then gives only the config.json and the tokenizer that DIR lacks",
    )
    parser.add_argument(
        "--trust_pickle",
        action="store_true",
        help="with --from_legacy: open these files, although they could run code, in a separate process without "
        "network",
    )
    parser.add_argument(
        "--allow_network",
        action="store_true",
        help="with --trust_pickle: continue even if the system cannot block the network for that process",
    )
    add_source_flag(parser)
    args = parser.parse_args()
    if args.model_name is None and args.from_legacy is None and not args.verify:
        parser.error("one of --model_name, --from_legacy and --verify is needed")
    if args.from_legacy is None:
        parser.refuse(args, ("trust_pickle", "allow_network"), "belongs to --from_legacy, which is not given")
    if args.model_name is None and args.from_legacy is None:
        parser.refuse(args, ("layers", "dtype", "overwrite", "source"), "has no effect if nothing is extracted")

    from rich.filesize import decimal

    from model_preparation.checkpoint.extract import extract_layers
    from model_preparation.checkpoint.layer_store import LayerStore

    options = {"layers": args.layers, "dtype": args.dtype, "overwrite": args.overwrite, "sources": args.source}
    metadata = None
    if args.from_legacy is not None:
        from model_preparation.legacy.import_layers import import_legacy  # it imports the model's classes

        metadata = import_legacy(
            args.from_legacy,
            args.output_dir,
            trust_pickle=args.trust_pickle,
            allow_network=args.allow_network,
            model_name=args.model_name,
            **options,
        )
        if not_run := metadata["source"]["not_run"]:
            print(f"The pickles refer to code that no layer needs. It was not run: {', '.join(not_run)}")
    elif args.model_name is not None:
        metadata = extract_layers(args.model_name, args.output_dir, **options)
    if metadata is not None:
        size_bytes = sum(entry["bytes"] for entry in metadata["layers"].values())
        print(
            f"{len(metadata['layers'])} of {metadata['total_layers']} layers, {metadata['dtype']}, "
            f"{decimal(size_bytes)}, {metadata['num_heads']} heads of {metadata['head_dim']}"
        )
        if metadata["config"]["model_type"] == "llamba":
            print("These layers are a Llamba's, only to look at. For a graft, extract the donor's layers.")
    if args.verify:
        store = LayerStore(args.output_dir)
        faults = store.faults()
        for fault in faults:
            print(escaped(str(fault)))
        if faults:
            raise SurgeryError(f"{len(faults)} bad files in {args.output_dir}. Extract them again with --overwrite.")
        print(
            f"All {len(store.layers)} layers and {len(store.metadata['files'])} other files are as they were written."
        )
    print(f"Extracted layers are in {args.output_dir}")


if __name__ == "__main__":
    run(main)
