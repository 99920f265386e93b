"""Command: a Llama -> an unaligned Llamba, each mixer distilled from its layer (see train/distill/distill.py)."""

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
from model_preparation.train.distill import distill_defaults as defaults

DESCRIPTION = f"""\
Make an unaligned Llamba from any Llama. It starts as init_llamba_base.py's; then each layer's mixer is trained to give
what the donor's attention gives, on the donor's own inputs of that layer (MOHAWK's second stage, arXiv 2408.10189).
Embeddings, norms, MLPs and head stay the donor's, and nothing is trained end to end.

Finished layers are kept in DIR.distilling, beside the folder to write: stopped anywhere, the same command goes on at
the next layer. One layer of the donor and one of the base are in memory at a time, with --data self first the whole
donor, in bfloat16; and the hidden states of all tokens, tokens x width x 4 bytes. Beyond --memory_limit these are on
the disk instead, and take twice that there: 34 GB for a million tokens of an 8B model, whose width is 4096. The model's
folder also gets distillation.json (errors, perplexities, settings), distillation.jsonl (losses) and distillation.png.

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


MIXER_FLAGS = ("d_state", "n_v_heads", "n_qk_heads", "d_conv")


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    if args.ray is None and args.layers_per_job is not None:
        parser.error("--layers_per_job belongs to --ray, which is not given")
    run_jobs = ray_flags.chosen_runner(parser, args)
    on_job_only = args.ray is not None and args.device == "cuda"  # this machine may be one without GPUs
    device = choose_device(args.gpu, None if on_job_only else args.device)

    from model_preparation.train.distill.distill import distill_llamba_base
    from model_preparation.train.distill.distill_report import describe

    summary = distill_llamba_base(
        args.donor,
        args.output_dir,
        args.data,
        tokens=args.tokens,
        sequence_length=args.sequence_length,
        steps_per_layer=args.steps_per_layer,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        seed=args.seed,
        target=args.target,
        mixer={name: getattr(args, name) for name in MIXER_FLAGS if getattr(args, name) is not None},
        layers=args.layers,
        dtype=args.dtype,
        device=device,
        memory_limit_gb=args.memory_limit,
        overwrite=args.overwrite,
        restart=args.restart,
        sources=args.source,
        run_jobs=None if args.ray is None else run_jobs,
        layers_per_job=args.layers_per_job or defaults.LAYERS_PER_JOB,
    )
    save_config(args.output_dir.expanduser() / "config.yaml")
    print("\n" + describe(summary))
    print(f"The base is in {args.output_dir}")


def make_parser() -> CommandParser:
    """The command's flags."""
    parser = CommandParser(description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument(
        "--donor",
        required=True,
        metavar="NAME|PATH",
        help="llama, tiny_llama, a model folder, or a hub id such as org/name@revision",
    )
    parser.add_argument(
        "--data",
        default=defaults.SELF,
        metavar="FILE|DIR|self",
        help="text: a .txt file, a .jsonl file with a text in every line, a folder of such files, or self: text that "
        "the donor writes from its first token on (default: %(default)s)",
    )
    parser.add_argument("--output_dir", required=True, type=Path, metavar="DIR", help="the model folder to write")

    counted = number(int, least=1)
    parser.add_argument(
        "--tokens",
        type=number(int, least=2),
        default=defaults.TOKENS,
        metavar="N",
        help="tokens of text to take or to write, one in 16 of which is held out (default: %(default)s)",
    )
    parser.add_argument(
        "--sequence_length",
        type=number(int, least=2),
        default=defaults.SEQUENCE_LENGTH,
        metavar="N",
        help="tokens that are seen at once (default: %(default)s)",
    )
    parser.add_argument(
        "--steps_per_layer",
        type=counted,
        default=defaults.STEPS_PER_LAYER,
        metavar="N",
        help="steps of the optimizer for each layer (default: %(default)s)",
    )
    parser.add_argument(
        "--batch_size",
        type=counted,
        default=defaults.BATCH_SIZE,
        metavar="N",
        help="sequences per step (default: %(default)s)",
    )
    parser.add_argument(
        "--learning_rate",
        type=number(float, above=0),
        default=defaults.LEARNING_RATE,
        metavar="X",
        help="AdamW's, after a linear warm-up over a tenth of the steps; it falls as a cosine (default: %(default)s)",
    )
    parser.add_argument(
        "--weight_decay",
        type=number(float, least=0),
        default=defaults.WEIGHT_DECAY,
        metavar="X",
        help="AdamW's (default: %(default)s)",
    )
    parser.add_argument(
        "--target",
        choices=("mixer", "layer"),
        default="mixer",
        help="what is compared: the mixer's output with the attention's, or the layers' outputs (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=number(int, least=0), default=0, metavar="N", help="of everything random (default: %(default)s)"
    )
    add_layers_flag(
        parser, required=False, help="train these layers only; the others stay as they start (default: all)"
    )

    for name, meaning in {
        "d_state": "of the mixers: width of the keys, so of the state (default: the donor's head_dim)",
        "n_v_heads": "of the mixers: heads of the values (default: the donor's heads)",
        "n_qk_heads": "of the mixers: heads of keys and queries, a divisor of --n_v_heads (default: the donor's heads)",
        "d_conv": "of the mixers: tokens the convolution sees (default: 4)",
    }.items():
        parser.add_argument(f"--{name}", type=counted, metavar="N", help=meaning)

    add_dtype_flag(parser, help="dtype of the weights written (default: the donor's); training is in float32")
    parser.add_argument(
        "--memory_limit",
        type=number(float, least=0),
        default=defaults.MEMORY_LIMIT_GB,
        metavar="GB",
        help="hidden states larger than this are kept on the disk, not in memory (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a model folder that is there")
    parser.add_argument(
        "--restart",
        action="store_true",
        help="train all layers anew; a stopped run's tokens are kept if donor, text and their settings are the same",
    )
    ray_flags.add_ray_flags(parser)
    parser.add_argument(
        "--layers_per_job",
        type=counted,
        metavar="N",
        help="with --ray: layers that a worker trains one after the other, after putting the tokens through all before "
        f"them (default: {defaults.LAYERS_PER_JOB})",
    )
    add_device_flags(parser)
    add_source_flag(parser)
    parser.add_config_flag()
    return parser


if __name__ == "__main__":
    run(main)
