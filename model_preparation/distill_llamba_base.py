"""Command: make a base (a Llamba) from a donor, and distill each layer's attention into its mixer (train/distill/)."""

from pathlib import Path

from model_preparation.command_line import (
    CommandParser,
    add_device_flags,
    add_dtype_flag,
    add_layers_flag,
    number,
    run,
    save_config,
)
from model_preparation.devices import choose_device
from model_preparation.hub.sources import add_source_flag
from model_preparation.jobs import ray_flags
from model_preparation.setting_flags import add_flags, as_flags, from_flags
from model_preparation.train.distill.settings import SELF, DistillSettings

DESCRIPTION = f"""\
Make a base (a Llamba) from a donor (Llama, Mistral, Qwen2 or Qwen3). It starts as init_llamba_base.py makes it. Then
the mixer of each layer learns the outputs of the donor's attention on the same inputs (MOHAWK's second stage, arXiv
2408.10189). Embeddings, norms, MLPs and head stay the donor's. The layers are never trained together: such a base is
called unaligned.

Finished layers are kept in DIR.distilling, next to the folder to write. If the command is stopped, run it again: it
continues with the next layer. The command needs memory for one layer of the donor, one layer of the base, and the
hidden states of all tokens (tokens x width x 4 bytes). With --data self, it first needs memory for the whole donor in
bfloat16. Hidden states larger than --memory_limit are kept on the disk, where they take twice their size: 33 GB for a
million tokens of an 8B model, whose width is 4096. The model's folder also gets distillation.json (errors,
perplexities, settings), distillation.jsonl (losses) and distillation.png.

{ray_flags.HELP}"""

EXAMPLES = """\
examples:
  python distill_llamba_base.py --donor /models/SmolLM2-135M-Instruct --data self --output_dir ../local_models/llamba
  python distill_llamba_base.py --donor llama --data /data/texts --tokens 4194304 --steps_per_layer 4000 \\
      --output_dir ../local_models/llamba_8b --gpu 0
  python distill_llamba_base.py --donor llama --data /data/texts --tokens 4194304 --steps_per_layer 4000 \\
      --output_dir ../local_models/llamba_8b --ray local
then:
  python create_replaced_model_checkpoint.py --base ../local_models/llamba --layers ... --output_dir ...
"""

MIXER_FLAGS = {
    "d_state": "mixers: width of the keys and of the state (default: the donor's head_dim)",
    "n_v_heads": "mixers: number of value heads (default: the donor's number of query heads)",
    "n_qk_heads": "mixers: number of key and query heads, a divisor of --n_v_heads (default: the donor's query heads)",
    "d_conv": "mixers: number of tokens that the convolution sees (default: 4)",
}


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    if args.ray is None:
        parser.refuse(args, ("layers_per_job",), "belongs to --ray, which is not given")
    run_jobs = ray_flags.chosen_runner(parser, args)
    on_job_only = args.ray is not None and args.device == "cuda"  # this machine may have no GPU
    device = choose_device(args.gpu, None if on_job_only else args.device)

    from model_preparation.train.distill.distill import distill_llamba_base
    from model_preparation.train.distill.report import describe

    mixer = {name: getattr(args, name) for name in MIXER_FLAGS if getattr(args, name) is not None}
    settings = from_flags(DistillSettings, args, mixer=mixer)
    summary = distill_llamba_base(
        args.donor,
        args.output_dir,
        args.data,
        settings,
        layers=args.layers,
        dtype=args.dtype,
        device=device,
        overwrite=args.overwrite,
        restart=args.restart,
        sources=args.source,
        run_jobs=None if args.ray is None else run_jobs,
    )
    save_config(args.output_dir.expanduser() / "config.yaml", as_flags(settings))
    print("\n" + describe(summary))
    print(f"The base is in {args.output_dir}")


def make_parser() -> CommandParser:
    """The command's parser."""
    parser = CommandParser(description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument(
        "--donor",
        required=True,
        metavar="NAME|PATH",
        help="llama, qwen3, tiny_llama, a model folder, or a hub id such as org/name@revision",
    )
    parser.add_argument(
        "--data",
        default=SELF,
        metavar="FILE|DIR|self",
        help="the text to learn from: a .txt file, a .jsonl file with a text in every line, or a folder of such files. "
        "self: the donor writes the text, without a prompt (default: %(default)s)",
    )
    parser.add_argument("--output_dir", required=True, type=Path, metavar="DIR", help="the model folder to write")
    add_flags(parser, DistillSettings)
    add_layers_flag(
        parser, required=False, help="train these layers only; the others keep their initial weights (default: all)"
    )
    for name, meaning in MIXER_FLAGS.items():
        parser.add_argument(f"--{name}", type=number(int, least=1), metavar="N", help=meaning)
    add_dtype_flag(parser, help="dtype of the weights written (default: the donor's); training is in float32")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing model folder")
    parser.add_argument(
        "--restart",
        action="store_true",
        help="train all layers again. The tokens of a stopped run are used again if donor, text and settings are the "
        "same",
    )
    ray_flags.add_ray_flags(parser)
    add_device_flags(parser)
    add_source_flag(parser)
    parser.add_config_flag()
    return parser


if __name__ == "__main__":
    run(main)
