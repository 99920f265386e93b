"""Command: load a checkpoint, let it write, and on request score it on MMLU.

In: a checkpoint folder. Out, on the terminal: its size and layers, generated text, tokens per second, the MMLU score.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_preparation.command_line import (
    CommandParser,
    add_device_flags,
    add_dtype_flag,
    choose_device,
    integer_from,
    run,
    torch_dtype,
)

if TYPE_CHECKING:
    from model_preparation.evaluation.generation import Generation

DEFAULT_PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village,",
    "To make a good cup of tea, first",
)

DESCRIPTION = """\
Load a checkpoint, print its size, layers and speed, and the text it writes after each prompt (greedily).
With --full_eval, then run lm-eval's task group mmlu and print its score.
"""

EPILOG = """\
examples:
  python test_checkpoint.py --checkpoint ../model_checkpoints/llamba_replaced_11_13_17_21
  python test_checkpoint.py --checkpoint ../model_checkpoints/best_4layer --prompt "Hello world" --max_new_tokens 20
  python test_checkpoint.py --checkpoint ../model_checkpoints/best_4layer --full_eval --limit 100 --mmlu_data ./mmlu

The exit code is 1 if the checkpoint does not load, a logit is not finite, or an answer is empty.
"""


def main() -> None:
    """Parse the command line, load, generate, and evaluate if asked to."""
    parser = _parser()
    args = parser.parse_args()
    _refuse_flags_without_effect(parser, args)

    from model_preparation.errors import SurgeryError
    from model_preparation.surgery.checkpoint_info import read_info

    args.checkpoint = args.checkpoint.expanduser()
    read_info(args.checkpoint)  # what is wrong with the folder is said before anything is downloaded
    device = choose_device(args.gpu, args.device)
    if args.full_eval:
        from model_preparation.evaluation.mmlu import find_questions

        args.mmlu_data = find_questions(args.mmlu_data, num_fewshot=args.num_fewshot)

    model, tokenizer = _load(args.checkpoint, device, args.dtype)
    generations = _generate(model, tokenizer, args.prompt, args.max_new_tokens)
    if args.full_eval:
        _evaluate(model, tokenizer, args)
    empty = [generation.prompt for generation in generations if not generation.text.strip()]
    if empty:
        raise SurgeryError(
            f"The model wrote nothing after {empty[0]!r}. Give another --prompt; if it stays silent, "
            "the grafted layers do not fit this base."
        )


def _parser() -> CommandParser:
    parser = CommandParser(description=DESCRIPTION, epilog=EPILOG)
    at_least_0, at_least_1 = integer_from(0), integer_from(1)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="the checkpoint folder")
    parser.add_argument(
        "--prompt",
        nargs="+",
        default=DEFAULT_PROMPTS,
        metavar="TEXT",
        help="texts to continue (default: three of ours)",
    )
    parser.add_argument(
        "--max_new_tokens", type=at_least_1, default=50, metavar="N", help="tokens to write per prompt (default: 50)"
    )
    add_dtype_flag(parser, help="run in this dtype (default: the checkpoint's)")
    add_device_flags(parser)
    parser.add_argument(
        "--full_eval", action="store_true", help="also run MMLU, 57 subjects; the flags below are its own"
    )
    parser.add_argument(
        "--limit", type=at_least_1, metavar="N", help="only the first N questions of every subject: quick and rough"
    )
    parser.add_argument(
        "--mmlu_data",
        type=Path,
        metavar="DIR",
        help="folder with <subject>/{dev,test}-*.parquet, as cais/mmlu has them "
        "(default: the environment variable MMLU_DATA, else cais/mmlu from the Hugging Face hub)",
    )
    parser.add_argument(
        "--num_fewshot",
        type=at_least_0,
        default=0,
        metavar="K",
        help="solved examples before each question (default: 0)",
    )
    parser.add_argument(
        "--batch_size", type=at_least_1, default=4, metavar="N", help="questions per forward pass (default: 4)"
    )
    return parser


def _refuse_flags_without_effect(parser: CommandParser, args: argparse.Namespace) -> None:
    if args.full_eval:
        return
    for flag in ("limit", "mmlu_data", "num_fewshot", "batch_size"):
        if getattr(args, flag) != parser.get_default(flag):
            parser.error(f"--{flag} belongs to --full_eval, which is not given")


def _load(directory: Path, device: str, dtype_name: str | None) -> tuple[Any, Any]:
    """Load the checkpoint and print what it is."""
    from rich.filesize import decimal

    from model_preparation.surgery.checkpoint_info import read_info
    from model_preparation.surgery.checkpoint_loading import load_checkpoint

    started = time.perf_counter()
    model, tokenizer = load_checkpoint(directory, device=device, dtype=torch_dtype(dtype_name))
    seconds = time.perf_counter() - started
    info = read_info(directory)
    layers = info["replaced_layers"]
    size_bytes = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    print(f"Checkpoint   {directory}")
    print(f"Parameters   {model.num_parameters():,}")
    print(f"On disk      {decimal(size_bytes)}")
    print(f"Grafted      {len(layers)} of {info['total_layers']} layers: {' '.join(map(str, layers)) or 'none'}")
    print(f"Loaded       in {seconds:.1f} s onto {model.device}, {str(model.dtype).removeprefix('torch.')}", flush=True)
    return model, tokenizer


def _generate(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int) -> "list[Generation]":
    """Continue every prompt and print the text and the speed."""
    from model_preparation.evaluation.generation import generate_text

    generations = []
    for prompt in prompts:
        generation = generate_text(model, tokenizer, prompt, max_new_tokens=max_new_tokens)
        print(f"\nPrompt       {prompt}")
        print(f"Text         {generation.text.strip()}")
        print(f"Prompt read  {_speed(generation.prompt_tokens, generation.prefill_tokens_per_second)}")
        print(f"Written      {_speed(generation.new_tokens, generation.decode_tokens_per_second)}", flush=True)
        generations.append(generation)
    return generations


def _speed(tokens: int, tokens_per_second: float | None) -> str:
    return f"{tokens} tokens" + (f", {tokens_per_second:.1f} per second" if tokens_per_second else "")


def _evaluate(model: Any, tokenizer: Any, args: argparse.Namespace) -> None:
    """Score the model on MMLU and print the groups, then the score."""
    from model_preparation.evaluation.mmlu import evaluate_model

    print(f"\nMMLU, {args.num_fewshot}-shot, from {args.mmlu_data}", flush=True)
    started = time.perf_counter()
    result = evaluate_model(
        model,
        tokenizer,
        limit=args.limit,
        mmlu_data=args.mmlu_data,
        num_fewshot=args.num_fewshot,
        batch_size=args.batch_size,
    )
    print(f"Took         {time.perf_counter() - started:.0f} s, lm-eval {result['lm_eval_version']}")
    for name, group in result["groups"].items():
        print(f"{name:<16} {_score(group)}")
    if args.limit:
        print(
            f"--limit {args.limit} is per subject: this score is of {result['questions']} questions only "
            "and not comparable with the full one."
        )
    print(f"MMLU score   {_score(result)}")


def _score(row: dict[str, Any]) -> str:
    stderr = "" if row["stderr"] is None else f" ± {row['stderr']:.4f}"
    return f"{row['score']:.4f}{stderr} ({row['questions']} questions)"


if __name__ == "__main__":
    run(main)
