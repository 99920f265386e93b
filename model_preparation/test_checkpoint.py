"""Command: load a checkpoint, let it write, and on request score it on MMLU or other tasks of lm-eval.

In: a checkpoint folder. Out, on the terminal: its size and layers, generated text, tokens per second, the scores; with
--full_eval, results on the disk too.
"""

import argparse
import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_preparation.command_line import (
    CommandParser,
    add_device_flags,
    add_dtype_flag,
    choose_device,
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
With --full_eval, then score it by lm-eval, on the task group mmlu unless --tasks names others. Answers are kept task by
task as they come: stopped anywhere, the same command goes on, and ends with the same score. Another setting, or other
weights, is another evaluation.
"""

EPILOG = """\
examples:
  python test_checkpoint.py --checkpoint ../model_checkpoints/llamba_replaced_11_13_17_21
  python test_checkpoint.py --checkpoint ../model_checkpoints/best_4layer --prompt "Hello world" --max_new_tokens 20
  python test_checkpoint.py --checkpoint ../model_checkpoints/best_4layer --full_eval --limit 100 --mmlu_data ./mmlu
  python test_checkpoint.py --checkpoint ../model_checkpoints/best_4layer --full_eval --tasks arc_easy hellaswag

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
        from model_preparation.evaluation.tasks import load_tasks

        tasks = load_tasks(args.tasks, mmlu_data=args.mmlu_data, num_fewshot=args.num_fewshot)

    generations = []
    if not args.skip_generation:
        model, tokenizer = _load(args.checkpoint, device, args.dtype, args.parallelize)
        generations = _generate(model, tokenizer, args.prompt, args.max_new_tokens)
        del model  # the evaluation loads it again, if there is anything to do
    if args.full_eval:
        _evaluate(tasks, device, args)
    empty = [generation.prompt for generation in generations if not generation.text.strip()]
    if empty:
        raise SurgeryError(
            f"The model wrote nothing after {empty[0]!r}. Give another --prompt; if it stays silent, "
            "the grafted layers do not fit this base."
        )


def _parser() -> CommandParser:
    parser = CommandParser(description=DESCRIPTION, epilog=EPILOG)
    at_least_0, at_least_1 = partial(_integer, least=0), partial(_integer, least=1)
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
        "--parallelize",
        action="store_true",
        help="one model over all GPUs (and the CPU, if it does not fit) instead of on one",
    )
    parser.add_argument("--skip_generation", action="store_true", help="evaluate only; needs --full_eval")
    parser.add_argument(
        "--full_eval", action="store_true", help="also run lm-eval: MMLU, 57 subjects; the flags below are its own"
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=["mmlu"],
        metavar="TASK",
        help="tasks, groups or tags of lm-eval, or folders of task files (default: mmlu)",
    )
    parser.add_argument(
        "--limit", type=at_least_1, metavar="N", help="only the first N questions of every subject: quick and rough"
    )
    parser.add_argument(
        "--mmlu_data",
        metavar="WHERE",
        help="MMLU's questions: a folder of parquet, csv or jsonl files, or the word hub or modelscope "
        "(default: the environment variable MMLU_DATA, else hub: cais/mmlu from Hugging Face)",
    )
    parser.add_argument(
        "--num_fewshot",
        type=at_least_0,
        metavar="K",
        help="solved examples before each question (default: what the task says; for MMLU 0)",
    )
    parser.add_argument(
        "--batch_size",
        type=_batch_size,
        default="auto",
        metavar="N",
        help="questions per forward pass; auto finds a number that fits (default: auto)",
    )
    parser.add_argument(
        "--seed", type=at_least_0, default=1234, metavar="N", help="of everything random (default: 1234)"
    )
    parser.add_argument(
        "--results_dir",
        type=Path,
        metavar="DIR",
        help="keep answers and results here, in a folder of the checkpoint's name (default: evaluations/ in the "
        "checkpoint's folder)",
    )
    parser.add_argument(
        "--result_json", type=Path, metavar="FILE", help="also write the scores to this file, for programs"
    )
    return parser


def _batch_size(text: str) -> int | str:
    return text if text == "auto" else _integer(text, least=1)


def _integer(text: str, least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
    if number < least:
        raise argparse.ArgumentTypeError(f"{number} is too small; it must be at least {least}")
    return number


def _refuse_flags_without_effect(parser: CommandParser, args: argparse.Namespace) -> None:
    if args.parallelize and (args.gpu is not None or args.device is not None):
        parser.error("--parallelize takes all GPUs: leave out --gpu and --device, or set CUDA_VISIBLE_DEVICES")
    if args.full_eval:
        return
    flags = ("skip_generation", "tasks", "limit", "mmlu_data", "num_fewshot", "batch_size", "results_dir")
    for flag in (*flags, "seed", "result_json"):
        if getattr(args, flag) != parser.get_default(flag):
            parser.error(f"--{flag} belongs to --full_eval, which is not given")


def _load(directory: Path, device: str, dtype_name: str | None, parallelize: bool) -> tuple[Any, Any]:
    """Load the checkpoint and print what it is."""
    from rich.filesize import decimal

    from model_preparation.surgery.checkpoint_info import read_info
    from model_preparation.surgery.checkpoint_loading import load_checkpoint

    started = time.perf_counter()
    model, tokenizer = load_checkpoint(directory, device=device, dtype=torch_dtype(dtype_name), parallelize=parallelize)
    seconds = time.perf_counter() - started
    info = read_info(directory)
    layers = info["replaced_layers"]
    size_bytes = sum(entry["bytes"] for entry in info["files"].values())
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


def _evaluate(tasks: Any, device: str, args: argparse.Namespace) -> None:
    """Score the model and print the groups, then the scores, and where the results are."""
    from model_preparation.evaluation.evaluate import evaluate_checkpoint

    shots = "" if args.num_fewshot is None else f", {args.num_fewshot}-shot"
    print(f"\nEvaluating   {' '.join(args.tasks)}{shots}", flush=True)
    started = time.perf_counter()
    result = evaluate_checkpoint(
        args.checkpoint,
        tasks=tasks,
        limit=args.limit,
        num_fewshot=args.num_fewshot,
        batch_size=args.batch_size,
        device=device,
        dtype=torch_dtype(args.dtype),
        seed=args.seed,
        parallelize=args.parallelize,
        results_dir=args.results_dir,
    )
    if args.result_json is not None:
        _write_result(args.result_json, result)
    if result["kept"]:
        print("Kept         all of it was evaluated before, with these settings and weights")
    else:
        print(f"Took         {time.perf_counter() - started:.0f} s, lm-eval {result['lm_eval_version']}")
    for name, row in result["groups"].items():
        print(f"{name:<16} {_score(row)}")
    if args.limit:
        print(
            f"--limit {args.limit} is per subject: this score is of {result['questions']} questions only "
            "and not comparable with the full one."
        )
    for name, row in result["tasks"].items():
        print(f"{'MMLU' if name == 'mmlu' else name} score   {_score(row)}")
    if tuple(args.tasks) == ("mmlu",) and not result["entered"]:
        print("checkpoint_info.json keeps what it says: it cannot be written, or has a score of more questions.")
    print(f"Results are in {result['results_dir']}")


def _score(row: dict[str, Any]) -> str:
    if row["score"] is None:
        return f"none ({row['questions']} questions)"
    stderr = "" if row["stderr"] is None else f" ± {row['stderr']:.4f}"
    metric = "" if row["metric"] == "acc,none" else f"{row['metric'].removesuffix(',none')} "
    return f"{metric}{row['score']:.4f}{stderr} ({row['questions']} questions)"


def _write_result(path: Path, result: dict[str, Any]) -> None:
    path = path.expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    run(main)
