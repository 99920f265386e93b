"""Command: load a checkpoint, let it write, and on request score it on MMLU or other tasks of lm-eval.

In: a checkpoint folder, or a model. Out, on the terminal: its size and layers, generated text, tokens per second, the
scores; with --full_eval, results on the disk too.
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_preparation.command_line import (
    CommandParser,
    add_device_flags,
    add_dtype_flag,
    run,
)
from model_preparation.devices import choose_device
from model_preparation.evaluation.evaluation_flags import add_evaluation_flags, check_evaluation_flags
from model_preparation.evaluation.generation_flags import add_generation_flags, check_generation_flags, read_request

if TYPE_CHECKING:
    from model_preparation.evaluation.scored_model import ScoredModel

DESCRIPTION = """\
Load a checkpoint or any model, print its size and layers, the text it writes after each prompt, greedily unless asked
otherwise, the speed of reading and of writing, and the peak memory; with --compare_with, what other models write too.
With --full_eval, then score it by lm-eval, on the task group mmlu unless --tasks names others. Answers are kept task by
task as they come: stopped anywhere, the same command goes on, and ends with the same score. Another setting, or other
weights, is another evaluation.
"""

EPILOG = """\
examples:
  python test_checkpoint.py --checkpoint ../model_checkpoints/llamba_replaced_11_13_17_21
  python test_checkpoint.py --checkpoint ../model_checkpoints/best_4layer --prompt "Hello world" --max_new_tokens 20
  python test_checkpoint.py --checkpoint ../model_checkpoints/best_4layer --prompts_file prompts.jsonl --chat \\
      --compare_with donor base --output texts.jsonl
  python test_checkpoint.py --checkpoint ../model_checkpoints/best_4layer --temperature 0.7 --num_return_sequences 3
  python test_checkpoint.py --checkpoint ../model_checkpoints/best_4layer --full_eval --limit 100 --mmlu_data ./mmlu
  python test_checkpoint.py --checkpoint ../model_checkpoints/best_4layer --full_eval --skip_generation \\
      --tasks arc_easy hellaswag --num_fewshot 5
  python test_checkpoint.py --checkpoint llama --prompt "Hello world"
  python test_checkpoint.py --checkpoint unaligned_llamba --full_eval --skip_generation --results_dir ../results

The exit code is 1 if the checkpoint does not load, a logit is not finite, or an answer is empty;
a model to compare with that is not there is refused at once; what goes wrong with one later is told in its place, and
changes no exit code.
"""


def main() -> None:
    """Parse the command line, load, generate, and evaluate if asked to."""
    parser = _parser()
    args = parser.parse_args()
    check_generation_flags(parser, args)
    check_evaluation_flags(parser, args)
    if args.parallelize and (args.gpu is not None or args.device is not None):
        parser.error("--parallelize takes all GPUs: leave out --gpu and --device, or set CUDA_VISIBLE_DEVICES")

    from model_preparation.evaluation.generation_report import check_answers, compare_and_print, write_and_print
    from model_preparation.evaluation.other_models import find_others
    from model_preparation.evaluation.scored_model import find_model
    from model_preparation.io.tensors.dtypes import torch_dtype

    args.checkpoint = args.checkpoint.expanduser()
    request = read_request(args)
    model_found = find_model(args.checkpoint, args.tokenizer, sources=args.source)
    others = find_others(args.compare_with, args.checkpoint, sources=args.source)
    device = "cpu" if args.parallelize else choose_device(args.gpu, args.device)
    dtype = torch_dtype(args.dtype)
    if args.full_eval:
        from model_preparation.evaluation.evaluation_report import evaluate_and_print
        from model_preparation.evaluation.tasks import is_mmlu, load_tasks

        model_found.results_root(args.results_dir)
        tasks = load_tasks(args.tasks, mmlu_data=args.mmlu_data, num_fewshot=args.num_fewshot)
        if args.mmlu_data is not None and not any(map(is_mmlu, args.tasks)):
            parser.error(f"--mmlu_data belongs to --tasks mmlu or parts of it, and the task is {' '.join(args.tasks)}")

    written = None
    if not args.skip_generation:
        model, tokenizer = _load(model_found, device, dtype, args.parallelize)
        written = write_and_print(model, tokenizer, str(args.checkpoint), request)
        del model  # one model in memory at a time; the evaluation loads it again, if there is anything to do
        if others:
            placed = {"device": device, "dtype": dtype, "parallelize": args.parallelize}
            compare_and_print(written, tokenizer, others, request, **placed)
        if request.output is not None:
            print(f"Texts are in {request.output}")
    if args.full_eval:
        evaluate_and_print(tasks, args, device=device, dtype=dtype)
    if written is not None:
        check_answers(written)


def _parser() -> CommandParser:
    parser = CommandParser(description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="DIR|NAME",
        help="the checkpoint folder; or the name, folder or hub id of a model, such as its base or donor",
    )
    parser.add_argument(
        "--tokenizer", metavar="NAME|DIR|ID", help="of a model that is published without one (llama_tokenizer, ...)"
    )
    add_generation_flags(parser)
    add_dtype_flag(parser, help="run in this dtype (default: the checkpoint's)")
    add_device_flags(parser)
    parser.add_argument(
        "--parallelize",
        action="store_true",
        help="spread the model over all GPUs (and the CPU, if it does not fit) instead of on one",
    )
    add_evaluation_flags(parser)
    parser.add_config_flag()
    return parser


def _load(found: "ScoredModel", device: str, dtype: Any, parallelize: bool) -> tuple[Any, Any]:
    """Load the checkpoint or model, and print what it is."""
    from rich.filesize import decimal

    from model_preparation.checkpoint.checkpoint_info import read_info

    started = time.perf_counter()
    model, tokenizer = found.load(device, dtype, parallelize)
    seconds = time.perf_counter() - started
    info = read_info(found.folder) if found.is_checkpoint else None
    files = found.weight_files if info is None else info["files"]
    print(f"{'Model' if info is None else 'Checkpoint':<12} {found.folder}")
    print(f"Parameters   {model.num_parameters():,}")
    print(f"On disk      {decimal(sum((found.folder / name).stat().st_size for name in files))}")
    if info is not None:
        layers = info["replaced_layers"]
        print(f"Grafted      {len(layers)} of {info['total_layers']} layers: {' '.join(map(str, layers)) or 'none'}")
    print(f"Loaded       in {seconds:.1f} s, {str(model.dtype).removeprefix('torch.')}", end="")
    places = sorted({str(parameter.device) for parameter in model.parameters()}) if parallelize else []
    print(f", spread over {', '.join(places)}" if places else "", flush=True)
    return model, tokenizer


if __name__ == "__main__":
    run(main)
