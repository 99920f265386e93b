"""Command: load a checkpoint and print the text it writes. With flags, also score it on MMLU or other lm-eval tasks."""

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_preparation.command_line import CommandParser, add_device_flags, add_dtype_flag, run, save_config
from model_preparation.devices import choose_device
from model_preparation.evaluation.prompt_files import FORMS, read_prompts
from model_preparation.evaluation.settings import (
    EVALUATION_SETTINGS,
    GENERATION_SETTINGS,
    EfficiencySettings,
    EvaluationSettings,
    GenerationSettings,
    limit_note,
)
from model_preparation.hub.sources import add_source_flag, names_behind, tokenizer_name
from model_preparation.setting_flags import add_flags, as_flags, from_flags

if TYPE_CHECKING:
    from model_preparation.evaluation.models import ScoredModel
    from model_preparation.evaluation.tasks import Tasks

DESCRIPTION = """\
Load a checkpoint or any model. Print its size and layers, the text it writes after each prompt, the speed of reading
and of writing, and the peak memory. Each token is the likeliest one, unless a flag says otherwise. With --compare_with,
also print the texts of other models.
With --full_eval, then score it by lm-eval, on the task group mmlu unless --tasks names others. Answers are
saved after each task, generated texts after each batch. After an interruption, the same command continues and
gives the same score. Other settings or weights start another evaluation.
With --efficiency, measure speed, cache and memory of the model, its base and its donor, each in its own process.
With --server, score a model that runs on a server, in the same way. No model is loaded here.
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
  python test_checkpoint.py --checkpoint ../model_checkpoints/best_4layer --full_eval --skip_generation \\
      --suite recall --lengths 512 1024 2048 --limit 50
  python test_checkpoint.py --checkpoint llama --prompt "Hello world"
  python test_checkpoint.py --checkpoint unaligned_llamba --full_eval --skip_generation --results_dir ../results
  python test_checkpoint.py --checkpoint ../model_checkpoints/best_4layer --efficiency --skip_generation \\
      --contexts 512 2048 8192
  python test_checkpoint.py --checkpoint ../model_checkpoints/best_4layer --server http://127.0.0.1:8000 --limit 100

The exit code is 1 if the checkpoint does not load, a logit is not finite, or a text is empty. If a model of
--compare_with is missing, the command ends at once. If such a model fails later, its error is printed in place of its
text, and the exit code does not change.
"""

DEFAULT_PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village,",
    "To make a good cup of tea, first",
)
_GENERATION_FLAGS = ("prompt", "prompts_file", *GENERATION_SETTINGS, "compare_with", "output")
_EVALUATION_FLAGS = (*(name for name in EVALUATION_SETTINGS if name != "results_dir"), "result_json")


def main() -> None:
    """Parse the command line, load, generate, and evaluate if asked to."""
    parser = _parser()
    args = parser.parse_args()
    _check(parser, args)

    from model_preparation.evaluation.models import find_model, find_others, served_model
    from model_preparation.io.complete_file import check_new_file
    from model_preparation.io.tensors.dtypes import torch_dtype

    prompts = [*args.prompt, *([] if args.prompts_file is None else read_prompts(args.prompts_file))]
    output = None if args.output is None else args.output.expanduser()
    if output is not None:
        check_new_file(output)
    model_found, others = None, []
    if args.checkpoint is not None:
        args.checkpoint = args.checkpoint.expanduser()
        model_found = find_model(args.checkpoint, args.tokenizer, sources=args.source)
        others = find_others(args.compare_with, args.checkpoint, sources=args.source)
    device = "cpu" if args.parallelize or args.server else choose_device(args.gpu, args.device)
    dtype = torch_dtype(args.dtype)
    if args.full_eval:
        from model_preparation.evaluation.evaluate import tasks_for

        if model_found is not None:
            model_found.results_root(args.results_dir)
        settings = from_flags(EvaluationSettings, args, device=device, dtype=dtype, sources=args.source)
        scored = model_found or served_model(args.model or "served", args.tokenizer, sources=args.source)
        tasks = tasks_for(scored, settings)
        if args.mmlu_data is not None and tasks.questions is None:
            parser.error(f"--mmlu_data belongs to --tasks mmlu or parts of it, but the task is {' '.join(tasks.names)}")

    if model_found is not None and not args.skip_generation:
        from model_preparation.evaluation.generation_report import GenerationReport
        from model_preparation.evaluation.models import load_other

        report = GenerationReport(prompts or DEFAULT_PROMPTS, from_flags(GenerationSettings, args), output)
        model, tokenizer = _load(model_found, device, dtype, args.parallelize)
        report.write(model, tokenizer, str(args.checkpoint))
        del model  # one model in memory at a time; the evaluation loads it again if needed
        if others:
            load = partial(load_other, tokenizer=tokenizer, device=device, dtype=dtype, parallelize=args.parallelize)
            report.compare(tokenizer, others, load)
        if output is not None:
            print(f"Texts are in {output}")
    if args.full_eval:
        _evaluate(settings, tasks, args)
    if args.efficiency:
        _measure(args, device, dtype)
    if not args.skip_generation:
        report.check_texts()


def _load(found: "ScoredModel", device: str, dtype: Any, parallelize: bool) -> tuple[Any, Any]:
    """Load the checkpoint or model, and print its description."""
    from rich.filesize import decimal

    from model_preparation.checkpoint.checkpoint_info import head_spec, read_info

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
        if heads := head_spec(info):
            print(f"Heads        {heads}")
    print(f"Loaded       in {seconds:.1f} s, {str(model.dtype).removeprefix('torch.')}", end="")
    places = sorted({str(parameter.device) for parameter in model.parameters()}) if parallelize else []
    print(f", spread over {', '.join(places)}" if places else "", flush=True)
    return model, tokenizer


def _evaluate(settings: EvaluationSettings, tasks: "Tasks", args: argparse.Namespace) -> None:
    """Score the checkpoint. Print groups, scores and the folder of the results; write --result_json."""
    from model_preparation.checkpoint.checkpoint_info import INFO
    from model_preparation.errors import SurgeryError
    from model_preparation.evaluation.evaluate import evaluate_checkpoint
    from model_preparation.evaluation.tasks import MMLU
    from model_preparation.io.complete_file import make_folder, write_file

    shots = "" if args.num_fewshot is None else f", {args.num_fewshot}-shot"
    source = "" if tasks.questions is None else f", MMLU's questions from {tasks.questions.source}"
    if args.server is not None:
        print(f"Server       {args.server}")
    print(f"\nEvaluating   {' '.join(tasks.names)}{shots}{source}", flush=True)
    result_json = None if args.result_json is None else args.result_json.expanduser()
    if result_json is not None:  # refuse a wrong path now, not after an hour of work
        if result_json.is_dir():
            raise SurgeryError(f"--result_json {args.result_json} is a folder. Name a file.")
        make_folder(result_json.parent)
    started = time.perf_counter()
    result = evaluate_checkpoint(args.checkpoint, settings, tasks=tasks)
    if result_json is not None:
        write_file(result_json, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    save_config(Path(result["results_dir"]) / "config.yaml", as_flags(settings))
    if "put_aside" in result:
        print(f"Put aside    results of another model ({'; '.join(result['differing'])}), to {result['put_aside']}")
    if result["kept"]:
        print("Kept         everything was evaluated before, with these settings and weights")
    else:
        print(f"Took         {time.perf_counter() - started:.0f} s, lm-eval {result['lm_eval_version']}")
    for name, row in result["groups"].items():
        print(f"{name:<16} {_score(row)}")
    if args.limit:
        print(
            f"{limit_note(args.limit, tasks.names)}: this score is from only {result['questions']} questions "
            "and not comparable with the full score."
        )
    for name, row in result["tasks"].items():
        print(f"{'MMLU' if name == MMLU else name} score   {_score(row)}{_protocol(row.get('protocol'))}")
    for name, count in result.get("truncated", {}).items():
        print(f"Cut          {count} prompts of {name} at their beginning: they are too long for the model")
    if tasks.names == (MMLU,) and not (result["entered"] or args.server) and (args.checkpoint / INFO).is_file():
        print("checkpoint_info.json is not changed: it has a score from more questions, or cannot be written.")
    print(f"Results are in {result['results_dir']}", flush=True)


def _measure(args: argparse.Namespace, device: str, dtype: Any) -> None:
    """Measure the costs of the checkpoint, its base and its donor, and print a table."""
    from model_preparation.evaluation.efficiency import MEASURED, measure_efficiency
    from model_preparation.jobs.table import table

    settings = from_flags(EfficiencySettings, args, device=device, dtype=dtype, sources=args.source)
    result = measure_efficiency(args.checkpoint, settings)
    heading = ["model", "context", *(f"{words}, {unit}" for words, unit, _ in MEASURED.values())]
    rows = [
        [model["name"], f"{row['context']:,}"]
        + [f"{row[field] / one:,.{1 if one < 1 else 2}f}" for field, (_, _, one) in MEASURED.items()]
        for model in result["models"]
        for row in model["contexts"]
    ]
    print(f"\nMeasured     on {result['measured_on']}, {result['models'][0]['dtype']}, one sequence; medians")
    print(table(heading, rows))
    print(f"Efficiency is in {result['results_dir']}", flush=True)


def _score(row: dict[str, Any]) -> str:
    if row["score"] is None:
        return f"none ({row['questions']} questions)"
    stderr = "" if row["stderr"] is None else f" ± {row['stderr']:.4f}"
    metric = row["metric"].removesuffix(",none")
    length = (row.get("protocol") or {}).get("length")  # the metric of a recall task is named after its length
    shown = "" if metric in ("acc", str(length)) else f"{metric} "
    return f"{shown}{row['score']:.4f}{stderr} ({row['questions']} questions)"


def _protocol(protocol: dict[str, Any] | None) -> str:
    """The protocol of the task as text; results of older versions have none."""
    if protocol is None:
        return ""
    answer = {"generate_until": "generated", "multiple_choice": "likeliest choice"}.get(
        protocol["output"], protocol["output"]
    )
    length = f", {protocol['length']} tokens" if "length" in protocol else ""
    template = " ".join(protocol["template"].split())
    return f"; {protocol['shots']}-shot, {answer}{length}, {template if len(template) <= 60 else template[:59] + '…'!r}"


# --- The command line -------------------------------------------------------------------------------------------------


def _check(parser: CommandParser, args: argparse.Namespace) -> None:
    """End the command as for wrong usage if flags contradict each other."""
    if args.server is not None:
        args.full_eval = args.skip_generation = True
        parser.refuse(args, ("dtype", "gpu", "device", "parallelize"), "has no effect with --server")
        parser.refuse(args, ("efficiency",), "measures on this machine, not on a server: leave out --server")
        if args.checkpoint is None and (args.tokenizer is None or args.results_dir is None):
            parser.error("--server without --checkpoint needs --tokenizer and --results_dir")
    elif args.checkpoint is None:
        parser.error("the following arguments are required: --checkpoint")
    parser.refuse(args, () if args.server else ("model",), "belongs to --server, which is not given")
    if args.num_return_sequences > 1 and not (args.do_sample or args.temperature or args.top_p or args.top_k):
        parser.error(
            "--num_return_sequences needs --do_sample, --temperature, --top_p or --top_k; greedy texts are all the same"
        )
    repeated = {name for name in args.compare_with if args.compare_with.count(name) > 1}
    if repeated:
        parser.error(f"--compare_with has {sorted(repeated)[0]} more than once")
    asked_for = [str(args.checkpoint), *args.compare_with, args.tokenizer or tokenizer_name(str(args.checkpoint)) or ""]
    used = {name for given in asked_for for name in names_behind(given, args.source)}
    idle = sorted(args.source.keys() - used)
    if idle and not {"base", "donor"} & set(args.compare_with):
        parser.error(f"--source {idle[0]}=... does nothing: no --checkpoint, --compare_with or --tokenizer names it")
    if not args.full_eval:
        parser.refuse(args, _EVALUATION_FLAGS, "belongs to --full_eval, which is not given")
    if not args.efficiency:
        parser.refuse(args, ("contexts",), "belongs to --efficiency, which is not given")
    if not (args.full_eval or args.efficiency):
        both = "belongs to --full_eval and --efficiency, but neither is given"
        parser.refuse(args, ("results_dir", "skip_generation"), both)
    if args.efficiency and args.parallelize:
        parser.error("--efficiency measures on one device: leave out --parallelize")
    if args.skip_generation:
        used_elsewhere = ("seed", *(["compare_with"] if args.efficiency else []))  # the evaluation uses "seed"
        unused = [name for name in _GENERATION_FLAGS if name not in used_elsewhere]
        parser.refuse(args, unused, f"has no effect with {'--server' if args.server else '--skip_generation'}")
    if args.parallelize and (args.gpu is not None or args.device is not None):
        parser.error("--parallelize takes all GPUs: leave out --gpu and --device, or set CUDA_VISIBLE_DEVICES")


def _parser() -> CommandParser:
    parser = CommandParser(description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR|NAME",
        help="the checkpoint folder; or the name, folder or hub id of a model, such as its base or donor",
    )
    parser.add_argument(
        "--server",
        metavar="URL",
        help="score the model of this OpenAI API (layer-surgery serve starts one), with --batch_size prompts per "
        "request. Give the --checkpoint that is served, or else --tokenizer and --results_dir. $OPENAI_API_KEY is sent",
    )
    parser.add_argument("--model", metavar="NAME", help="the model's name on the server, if it has several")
    parser.add_argument(
        "--tokenizer", metavar="NAME|DIR|ID", help="for a model published without a tokenizer: llama_tokenizer, ..."
    )
    parser.add_argument(
        "--prompt", nargs="+", default=[], metavar="TEXT", help="texts to continue (default: three built-in texts)"
    )
    parser.add_argument(
        "--prompts_file",
        type=Path,
        metavar="FILE",
        help="more prompts: a .txt file with a text in each line, a .jsonl file with a prompt in each line, "
        f"or a .json file with a list of prompts. Such a prompt is {FORMS}",
    )
    add_flags(parser, GenerationSettings)
    parser.add_argument(
        "--compare_with",
        nargs="+",
        action="extend",
        default=[],
        metavar="MODEL",
        help="also print the texts of other models, side by side: `donor` or `base` of this checkpoint, another "
        "checkpoint's folder, or a model's folder, name or hub id. The models are loaded one after the other",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.jsonl",
        help="also write every text with its tokens, speeds and settings into this file",
    )
    add_source_flag(parser)
    add_dtype_flag(parser, help="run in this dtype (default: the checkpoint's)")
    add_device_flags(parser)
    parser.add_argument(
        "--parallelize",
        action="store_true",
        help="spread the model over all GPUs; layers that do not fit on the GPUs go to the CPU",
    )
    parser.add_argument(
        "--efficiency",
        action="store_true",
        help="also measure time to the first token, time per token, bytes of the cache and peak memory, "
        "of the checkpoint, its base and its donor; with --compare_with, of the checkpoint and those models",
    )
    add_flags(parser, EfficiencySettings)
    parser.add_argument("--skip_generation", action="store_true", help="evaluate or measure only, write no texts")
    parser.add_argument(
        "--full_eval", action="store_true", help="also run lm-eval (MMLU, 57 subjects); the flags below belong to it"
    )
    parser.add_argument(
        "--result_json", type=Path, metavar="FILE", help="also write the scores to this file, for programs"
    )
    add_flags(parser, EvaluationSettings, without=("seed",))  # GenerationSettings has added --seed already
    parser.add_config_flag()
    return parser


if __name__ == "__main__":
    run(main)
