"""Command: find the layers of a donor that are best to graft into a base (search/search.py)."""

import shlex
from functools import partial
from pathlib import Path
from typing import Any

from model_preparation.command_line import (
    CommandParser,
    add_device_flags,
    add_dtype_flag,
    default_folder,
    run,
    save_config,
)
from model_preparation.devices import choose_device
from model_preparation.hub.sources import add_source_flag
from model_preparation.jobs import ray_flags
from model_preparation.jobs.table import table
from model_preparation.search.settings import HEADS, OPTIONS_OF, SearchSettings
from model_preparation.setting_flags import add_flags, as_flags, from_flags
from model_preparation.terminal import escaped

DESCRIPTION = """\
Search for the donor's layers that are best to graft into a Llamba. With --unit heads, search for the donor's heads that
are best to add. Combinations share their work. The base's hidden states before each layer are computed once. Each
combination starts from them at its lowest grafted layer. Combinations that begin with the same layers compute these
layers once. For tasks that are answered by log-likelihoods, the accuracy is exactly the accuracy that
test_checkpoint.py --full_eval measures on the built checkpoint with the same settings.

The command writes OUTPUT_DIR/search_result.json (the combinations, the best first), report.html and plots. It writes
every evaluation to OUTPUT_DIR/journal.jsonl at once. If the search is interrupted, run the same command again: it
continues.

methods:
  singles      every layer alone, on all questions. A layer pass is one layer on all questions. Without shared work, n
               layers take n^2 passes. With shared work they take n + n (n + 1) / 2, more than half of n^2. With
               --race on --top 1, only the best layer is sure to be scored on all questions. On tiny_llama and
               tiny_llamba with --limit 250, this took 0.32 of the passes without shared work
  exhaustive   every combination
  greedy       add one layer after the other, each time the layer that improves the score most
  beam         like greedy, but continue from the best few combinations of each size. Then try combinations that
               differ from the best one in one layer
  ga           a genetic algorithm; then combinations that differ from the best one in one layer
  removal      start with all layers. Each time, remove the layer whose removal lowers the score least (as in arXiv
               2601.11667). For n layers this takes about n^2 / 2 combinations, most of them larger than you want
  ratio        for each of n layers, score all other layers together, on --task and on --second_task. The layer's loss
               in a task is how far this score is below the best of the n scores. Order the layers by a ratio: the
               loss in the first task, divided by the loss in the second. Then evaluate the first 1, 2, ... layers
               together. HALO chooses in this way, with recall and common knowledge as tasks (arXiv 2601.22156). This
               takes n combinations, and one of each size
With --unit heads, methods choose heads in place of layers. removal and ratio take layers only.
"""

EPILOG = """\
The search takes tasks that lm-eval answers by log-likelihoods: multiple_choice and loglikelihood, with options of one
or several tokens, and the metric acc. It also takes tasks that generate text, such as kv_retrieval. An answer counts as
right if greedy decoding would write the right answer at once, without other words before it. If few answers are right,
--objective nll tells combinations apart better.

examples:
  python search_layers.py --base unaligned_llamba --donor llama --task mmlu --limit 10 --method ga \\
      --output_dir ../searches/ga
  python search_layers.py --base unaligned_llamba --donor llama --task kv_retrieval --objective nll --limit 50 \\
      --unit heads --max_heads 6 --prior published_heads.txt --output_dir ../searches/heads
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
    uses_ray = ray_flags.uses_ray(parser, args)
    idle = {name: method for method, options in OPTIONS_OF.items() if method != args.method for name in options}
    for name in filter(parser.is_given, idle):
        if name != "seed":  # harmless with other methods
            parser.error(f"--{name} belongs to --method {idle[name]}, but the method is {args.method}")
    if args.method == "singles" and (most := getattr(args, f"max_{args.unit}") or 1) > 1:
        parser.error(f"--method singles takes {args.unit} one by one: leave out --max_{args.unit} {most}")

    from model_preparation.evaluation.tasks import is_mmlu
    from model_preparation.jobs.ray_scoring import remote_scorer
    from model_preparation.search.layer_sets import names_of
    from model_preparation.search.result_reader import RESULT
    from model_preparation.search.search import search_layers

    if args.mmlu_data is not None and not any(map(is_mmlu, [*args.tasks, args.second_task])):
        parser.error(f"--mmlu_data belongs to --task mmlu or parts of it, but the task is {' '.join(args.tasks)}")
    device = "cpu" if uses_ray else choose_device(args.gpu, args.device)
    output = args.output_dir.expanduser()
    settings = from_flags(SearchSettings, args, output_dir=output, device=device, sources=args.source)
    workers = remote_scorer(args.ray, args.cpus_per_job or 1, args.device) if uses_ray else None

    say = partial(print, flush=True)
    found = search_layers(settings, workers=workers, say=say, dry_run=args.dry_run, overwrite=args.overwrite)
    if found is None:
        print(f"All checks passed. Nothing was evaluated (--dry_run). Results would be in {settings.folder}")
        return
    save_config(settings.folder / "config.yaml", {**as_flags(settings), **dict.fromkeys(idle)})
    unit, statistics = settings.unit, found["statistics"]
    passes, alone = statistics["layer_passes"], statistics["layer_passes_alone"]
    print(
        f"{statistics['evaluations']:,} combinations evaluated in {statistics['seconds']:.0f} s: "
        f"{passes:,.0f} layer passes; without sharing, it would be {alone:,} ({1 - passes / alone:.0%} saved)"
    )
    for each in found["failed"]:
        print(f"failed      {names_of(each[unit])}: {escaped(each['reason'])}")
    rows = [("base", _score(found["base_score"], found["base_stderr"]), "")]
    if found["donor_score"] is not None:
        accuracy = "" if found["objective"] == "accuracy" else f"accuracy {found['donor_accuracy']:.4f}"
        rows.append(("donor", _score(found["donor_score"], None), accuracy))
    for row in found["final_results"][: settings.top]:
        rows.append((names_of(row[unit]), _score(row["fitness"], row["stderr"]), row["verdict"]))
    print(table((unit, found["objective"], "verdict"), rows))
    if unit == HEADS:
        best = names_of(found["final_results"][0][unit])
        print(f"To build the best, run: {_build_command(found, best)}")
    print(f"Result is in {settings.folder / RESULT}. Open {settings.folder / 'report.html'} to look at it.")


def _build_command(found: dict[str, Any], best: str) -> str:
    """The command that builds a combination of heads."""
    names = ("base", "llama_layers_dir", "tokenizer")
    given = shlex.join(word for name in names if found[name] is not None for word in (f"--{name}", found[name]))
    whole = " --keep_mixer_heads" if found["settings"].get("keep_mixer_heads") else ""
    return f"python create_replaced_model_checkpoint.py {given} --heads {best}{whole} --output_dir DIR"


def _score(value: float, stderr: float | None) -> str:
    return f"{value:.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")


def _parser() -> CommandParser:
    parser = CommandParser(description=DESCRIPTION, epilog=EPILOG)
    add_flags(parser, SearchSettings)
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=default_folder("searches") / "search",
        metavar="DIR",
        help="the folder for the journal and the results (default: %(default)s)",
    )
    add_device_flags(parser)
    add_dtype_flag(parser, help="run in this dtype (default: the base's)")
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="check everything and print the plan with the highest possible cost, but write nothing",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the result of another search in OUTPUT_DIR; the journal keeps its evaluations",
    )
    ray_flags.add_ray_flags(parser)
    add_source_flag(parser)
    parser.add_config_flag()
    return parser


if __name__ == "__main__":
    run(main)
