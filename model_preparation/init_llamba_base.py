"""Command: make an untrained Llamba of a donor's shape from the donor's weights (checkpoint/llamba_init.py)."""

from pathlib import Path

from model_preparation.command_line import CommandParser, add_dtype_flag, run
from model_preparation.hub.sources import add_source_flag

DESCRIPTION = """\
Make a base (a Llamba) from a donor (Llama, Mistral, Qwen2 or Qwen3) for which no Llamba is published. Embeddings,
norms, MLPs and head are the donor's. Each mixer starts from the attention's projections, as in Mamba in the Llama
(arXiv 2408.15237) and MOHAWK (arXiv 2408.10189). Nothing is trained. A model with few of these untrained
mixers loses little. The base has such a mixer in every layer, and writes no sensible text.
"""

EXAMPLES = """\
examples:
  python init_llamba_base.py --donor /models/SmolLM2-135M-Instruct --output_dir ../local_models/llamba_smollm2
  python init_llamba_base.py --donor LLM-Research/Llama-3.2-1B-Instruct --output_dir ../local_models/llamba_1b
then:
  python create_replaced_model_checkpoint.py --base ../local_models/llamba_smollm2 --layers ... --output_dir ...
"""


def main() -> None:
    parser = CommandParser(description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument(
        "--donor",
        required=True,
        metavar="NAME|PATH",
        help="llama, qwen3, tiny_llama, a model folder, or a hub id such as org/name@revision",
    )
    parser.add_argument("--output_dir", required=True, type=Path, metavar="DIR", help="the model folder to write")
    add_dtype_flag(parser, help="dtype of the weights written (default: the donor's)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing model folder")
    add_source_flag(parser)
    args = parser.parse_args()

    from rich.filesize import decimal

    from model_preparation.checkpoint.llamba_init import init_llamba_base
    from model_preparation.checkpoint.model_configs import heads_of

    config = init_llamba_base(
        args.donor, args.output_dir, dtype=args.dtype, overwrite=args.overwrite, sources=args.source
    )
    heads, head_dim = heads_of(config)
    size_bytes = sum(path.stat().st_size for path in args.output_dir.glob("*.safetensors"))
    print(
        f"{config.n_layer} layers of width {config.d_model}, {heads} heads of {head_dim}, "
        f"{str(config.dtype).removeprefix('torch.')}, {decimal(size_bytes)}"
    )
    print(f"The base is in {args.output_dir}")


if __name__ == "__main__":
    run(main)
