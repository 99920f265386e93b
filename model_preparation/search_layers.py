"""Command: base, donor and tasks -> which layers to graft (see search/search.py)."""

from dataclasses import replace
from pathlib import Path

from model_preparation.command_line import (
    CommandParser,
    add_device_flags,
    add_dtype_flag,
    default_folder,
    number,
    run,
    save_config,
)
from model_preparation.devices import choose_device
from model_preparation.hub.sources import add_source_flag
from model_preparation.jobs import ray_flags
from model_preparation.jobs.table import table
from model_preparation.terminal import escaped

DESCRIPTION = """\
Search for the layers of a Llamba that are best replaced by its donor's. What candidates have in common runs once: the
base's hidden states before each layer are computed once for all questions, a candidate starts at its lowest grafted
layer, and candidates that are alike further on share those layers too. The scores are exactly those that the built
checkpoint gets from test_checkpoint.py --full_eval with the same settings.

Writes OUTPUT_DIR/search_result.json (the combinations, the best first), report.html and plots. Every evaluation is kept
in OUTPUT_DIR/journal.jsonl as soon as it is made: stopped anywhere, the same command goes on where it was.

methods:
  singles      every layer by itself, on all questions: of n layers, (n + n (n + 1) / 2) / n^2 of the layer passes of
               each alone, more than half; with --race on --top 1 only the best, for 0.32 of them on the embedded pair
               with 250 questions (--limit 250)
  exhaustive   every combination
  greedy       layer after layer, each time the one that adds most
  beam         the same from the best few of each size; then what is one layer away from the best
  ga           a genetic algorithm; then what is one layer away from the best
"""

EPILOG = """\
Tasks are those that lm-eval answers by log-likelihoods: multiple_choice and loglikelihood, with options of one or of
several tokens, scored by acc. Tasks that generate text, or have filters, are refused.

examples:
  python search_layers.py --base unaligned_llamba --donor llama --task mmlu --limit 10 --method ga \\
      --output_dir ../searches/ga
  python search_layers.py --base ../local_models/llamba_smollm2 --llama_layers_dir ../local_models/smollm2_layers \\
      --task my_task_folder --method exhaustive --max_layers 2 --output_dir ../searches/pairs --dry_run
then:
  ./create_best_checkpoints.sh --from ../searches/ga/search_result.json --top 3
"""


def main() -> None:
    parser = _parser()
    args = parser.parse_args()
    if args.donor is None and args.llama_layers_dir is None:
        parser.error("one of --donor and --llama_layers_dir is needed")
    if args.ray is not None:
        ray_flags.check(parser, args)
    elif args.cpus_per_job is not None:
        parser.error("--cpus_per_job belongs to --ray, which is not given")

    from model_preparation.evaluation.tasks import is_mmlu
    from model_preparation.search.methods import OPTIONS_OF, Options, Search
    from model_preparation.search.progress import names
    from model_preparation.search.result_files import RESULT
    from model_preparation.search.search import check_first, search_layers
    from model_preparation.search.setup import Spec

    for method, flags in OPTIONS_OF.items():
        for flag in flags:
            if flag != "seed" and getattr(args, flag) is not None and method != args.method:  # a seed harms nothing
                parser.error(f"--{flag} belongs to --method {method}, and the method is {args.method}")
    if args.method == "singles" and args.max_layers not in (None, 1):
        parser.error(f"--method singles takes layers one by one: leave out --max_layers {args.max_layers}")
    if args.mmlu_data is not None and not any(map(is_mmlu, args.task)):
        parser.error(f"--mmlu_data belongs to --task mmlu or parts of it, and the task is {' '.join(args.task)}")
    output_dir = args.output_dir.expanduser()
    device = "cpu" if args.ray is not None else choose_device(args.gpu, args.device)
    spec = Spec(
        base=args.base,
        llama_layers_dir=None if args.llama_layers_dir is None else str(args.llama_layers_dir),
        tasks=tuple(args.task),
        folder=str(output_dir),
        donor=args.donor,
        tokenizer=args.tokenizer,
        sources=args.source,
        limit=args.limit,
        mmlu_data=args.mmlu_data,
        num_fewshot=args.num_fewshot,
        batch_size=args.batch_size,
        device=device,
        dtype=args.dtype,
        objective=args.objective,
        memory_bytes=int(args.boundary_memory * 1e9),
    )
    given = {flag: getattr(args, flag) for flags in OPTIONS_OF.values() for flag in flags}
    options = Options(top=args.top, **{flag: value for flag, value in given.items() if value is not None})
    search = Search(
        method=args.method,
        least=args.min_layers,
        most=args.max_layers or (1 if args.method == "singles" else 4),
        budget_evaluations=args.budget_evaluations,
        budget_hours=args.budget_hours,
        racing=None if args.race == "auto" else args.race == "on",
        prior=args.prior,
        options=options,
    )

    def say(line: str) -> None:
        print(line, flush=True)

    if args.ray is None or args.dry_run:
        found = search_layers(spec, search, say=say, dry_run=args.dry_run, overwrite=args.overwrite)
    else:
        from model_preparation.jobs.remote import remote_scorer

        check_first(spec, search, overwrite=args.overwrite)  # before there is a cluster
        with remote_scorer(args.ray, args.cpus_per_job or 1, args.device) as (make_scorer, kind):
            spec = replace(spec, device=kind, device_here=device)
            found = search_layers(spec, search, make_scorer=make_scorer, say=say, overwrite=args.overwrite)
    if found is None:
        print(f"Everything fits; nothing was evaluated (--dry_run). {output_dir} would have the result.")
        return
    save_config(output_dir / "config.yaml")
    statistics = found["statistics"]
    passes, alone = statistics["layer_passes"], statistics["layer_passes_alone"]
    print(
        f"{statistics['evaluations']:,} combinations evaluated in {statistics['seconds']:.0f} s: "
        f"{passes:,.0f} layer passes, alone {alone:,} ({1 - passes / alone:.0%} saved)"
    )
    for each in found["failed"]:
        print(f"failed      {names(tuple(each['layers']))}: {escaped(each['reason'])}")
    rows = [("base", _score(found["base_score"], found["base_stderr"]), "")]
    if found["donor_score"] is not None:
        told = "" if found["objective"] == "accuracy" else f"accuracy {found['donor_accuracy']:.4f}"
        rows.append(("donor", _score(found["donor_score"], None), told))
    for row in found["final_results"][: args.top]:
        rows.append((names(tuple(row["layers"])), _score(row["fitness"], row["stderr"]), row["verdict"]))
    print(table(("layers", found["objective"], "verdict"), rows))
    print(f"Result is in {output_dir / RESULT}, to look at in {output_dir / 'report.html'}")


def _score(value: float, stderr: float | None) -> str:
    return f"{value:.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")


def _parser() -> CommandParser:
    parser = CommandParser(description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument(
        "--base",
        default="unaligned_llamba",
        metavar="NAME|PATH",
        help="the Llamba operated on: a name, a model folder or a hub id (default: %(default)s)",
    )
    parser.add_argument(
        "--donor",
        metavar="NAME|PATH",
        help="the Llama that layers come from; its own score is told too, and --objective kl needs it",
    )
    parser.add_argument(
        "--llama_layers_dir",
        type=Path,
        metavar="DIR",
        help="the donor's layers, written by extract_layers.py (default: extracted from --donor into OUTPUT_DIR)",
    )
    parser.add_argument(
        "--task",
        nargs="+",
        default=["mmlu"],
        metavar="TASK",
        help="tasks, groups or tags of lm-eval, or folders of task files, whose code is run (default: mmlu)",
    )
    parser.add_argument("--limit", type=number(int, least=1), metavar="N", help="the first N questions of every task")
    parser.add_argument(
        "--mmlu_data", metavar="DIR|hub|modelscope", help="MMLU's questions, as test_checkpoint.py has it"
    )
    parser.add_argument(
        "--num_fewshot", type=number(int, least=0), metavar="K", help="solved examples before each question"
    )
    parser.add_argument(
        "--batch_size",
        type=_batch_size,
        default="auto",
        metavar="N",
        help="questions at once; a race asks whole batches, so what it drops may differ with it (default: auto)",
    )
    parser.add_argument(
        "--method",
        choices=("singles", "exhaustive", "greedy", "beam", "ga"),
        default="beam",
        help="see above (default: %(default)s)",
    )
    parser.add_argument("--min_layers", type=number(int, least=1), default=1, metavar="N", help="(default: 1)")
    parser.add_argument("--max_layers", type=number(int, least=1), metavar="N", help="(default: 4; of singles: 1)")
    parser.add_argument(
        "--objective",
        choices=("accuracy", "kl"),
        default="accuracy",
        help="accuracy: right answers; kl: closeness to the donor's predictions, less noisy (default: %(default)s)",
    )
    parser.add_argument(
        "--budget_evaluations", type=number(int, least=1), metavar="N", help="evaluate at most N combinations"
    )
    parser.add_argument(
        "--budget_hours", type=number(float, above=0), metavar="H", help="evaluate for at most H hours in all"
    )
    parser.add_argument(
        "--race",
        choices=("auto", "on", "off"),
        default="auto",
        help="ask part after part of the questions, and drop candidates that a paired test says are surely worse "
        "(default: on for greedy, beam and ga; off for singles and exhaustive, where all get their score)",
    )
    parser.add_argument(
        "--prior", metavar="FILE", help="single_layer_results of another search: single layers known beforehand"
    )
    parser.add_argument("--seed", type=number(int, least=0), metavar="N", help="of ga (default: 0)")
    parser.add_argument("--beam_width", type=number(int, least=1), metavar="N", help="of beam (default: 4)")
    parser.add_argument(
        "--population", type=number(int, least=4), metavar="N", help="of ga, per generation (default: 40)"
    )
    parser.add_argument("--generations", type=number(int, least=1), metavar="N", help="of ga, at most (default: 20)")
    parser.add_argument(
        "--patience",
        type=number(int, least=1),
        metavar="N",
        help="ga stops after N generations without a better combination (default: 4)",
    )
    parser.add_argument(
        "--top",
        type=number(int, least=1),
        default=10,
        metavar="N",
        help="combinations to print, and for singles and "
        "exhaustive in a race those to score on all questions (default: 10)",
    )
    parser.add_argument(
        "--boundary_memory",
        type=number(float, least=0),
        default=4.0,
        metavar="GB",
        help="memory for the base's hidden states; what is more goes into a file in OUTPUT_DIR (default: %(default)s)",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=default_folder("searches") / "search",
        metavar="DIR",
        help="journal and results (default: %(default)s)",
    )
    parser.add_argument(
        "--tokenizer", metavar="NAME|PATH", help="take the tokenizer from here (default: the base's own)"
    )
    add_device_flags(parser)
    add_dtype_flag(parser, help="dtype to run in (default: that of the checkpoints)")
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="check everything and print the plan, with what the search will cost at most; nothing is written",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the result of another search in OUTPUT_DIR; its evaluations stay in the journal",
    )
    ray_flags.add_ray_flags(parser)
    add_source_flag(parser)
    parser.add_config_flag()
    return parser


def _batch_size(text: str) -> int | str:
    return text if text == "auto" else int(number(int, least=1)(text))


if __name__ == "__main__":
    run(main)
