"""What a search costs against scoring each combination alone, and what it finds against the true best combinations.

First the single layers and --sample other combinations are scored in two ways in the same process: with shared work,
and alone, as whole models by ScoringLM. Then all combinations of up to --max_layers layers are scored: this is the
truth. A race then looks for the best single layer. Beam search and the genetic algorithm search with 15% of the
evaluations. Prints layer passes, seconds, whether every answer is equal, and the found combinations with the true ones.

    python benchmarks/search_cost.py --base BASE --donor DONOR --task TASK --output_dir DIR
"""

import argparse
import random
import time
from pathlib import Path

import torch

from model_preparation.checkpoint.extract import extract_layers
from model_preparation.checkpoint.grafted_model import empty_model, grafted_config
from model_preparation.checkpoint.model_configs import read_config
from model_preparation.search.checks import DONOR_LAYERS
from model_preparation.search.layer_sets import SearchSpace
from model_preparation.search.scoring_setup import ScoringSetup
from model_preparation.search.search import search_layers
from model_preparation.search.settings import SearchSettings
from model_preparation.search.shared_scoring import SharedScorer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--donor", required=True)
    parser.add_argument("--task", required=True)
    parser.add_argument("--limit", type=int, help="questions per task")
    parser.add_argument("--max_layers", type=int, default=3)
    parser.add_argument("--sample", type=int, default=12, help="combinations to score alone, besides the single layers")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output_dir", type=Path, required=True, help="a new folder: old results would be used again")
    args = parser.parse_args()
    if args.output_dir.exists():
        parser.error(f"{args.output_dir} exists, and its results would be used again. Name a new folder")
    torch.set_num_threads(1)
    layers_dir = args.output_dir / DONOR_LAYERS
    extract_layers(args.donor, layers_dir)

    def settings(name: str, method: str = "beam", **changes) -> SearchSettings:
        given = {"base": args.base, "donor": args.donor, "llama_layers_dir": layers_dir, "tasks": (args.task,)}
        return SearchSettings(args.output_dir / name, **given, limit=args.limit, method=method, **changes)

    compare_with_alone(ScoringSetup(settings("alone")), args)
    truth = search_layers(settings("exhaustive", "exhaustive", max_layers=args.max_layers))
    assert truth is not None
    report("exhaustive", truth)
    race = search_layers(settings("singles", "singles", race=True, top=1))
    report("singles, raced for the best one", race)
    budget = int(0.15 * truth["statistics"]["evaluations"])
    for method in ("beam", "ga"):
        for seed in range(args.seeds if method == "ga" else 1):
            few = {"max_layers": args.max_layers, "budget_evaluations": budget, "beam_width": 3, "population": 12}
            found = search_layers(settings(f"{method}_{seed}", method, seed=seed, **few))
            report(f"{method}, seed {seed}", found)
            against_truth(found, truth, args.max_layers)


def compare_with_alone(setup: ScoringSetup, args: argparse.Namespace) -> None:
    """Time the single layers and some other combinations both ways, and compare every answer."""
    space = SearchSpace(setup.pair.layers, 1, args.max_layers)
    others = random.Random(0).sample([layers for layers in space.all() if len(layers) > 1], args.sample)
    for name, sets in (("single layers", space.singles), (f"{args.sample} others", others)):
        scorer = SharedScorer(setup)
        started = time.perf_counter()
        scorer.base()
        shared = dict(scorer.score(sets))
        shared_seconds = time.perf_counter() - started
        started = time.perf_counter()
        alone = {layers: run_alone(setup, layers) for layers in sets}
        alone_seconds = time.perf_counter() - started
        equal = all(
            alone[layers][setup.questions.batches[number].task][request] == answer
            for layers, results in shared.items()
            for number, result in results.items()
            for request, answer in result.answers
        )
        print(
            f"{name}: {scorer.layer_passes:.0f} layer passes with the base's, alone {len(sets) * setup.pair.layers} "
            f"({scorer.layer_passes / len(sets) / setup.pair.layers:.2f}); {shared_seconds:.1f} s, alone "
            f"{alone_seconds:.1f} s ({shared_seconds / alone_seconds:.2f}); answers "
            f"{'equal to the bit' if equal else 'DIFFER'}",
            flush=True,
        )


@torch.inference_mode()
def run_alone(setup: ScoringSetup, layers: tuple[int, ...]) -> dict[int, list]:
    """{task: answers} of a graft that runs as a whole model."""
    planned, pair = setup.planned, setup.pair
    model = empty_model(grafted_config(read_config(planned.base.folder), planned.donor, layers))
    state = {name: tensor for name, tensor in pair.model.state_dict().items() if ".layers." not in name}
    for index in range(pair.layers):
        own = pair.layer(index, index in layers).state_dict()
        state |= {f"backbone.layers.{index}.{name}": tensor for name, tensor in own.items()}
    model.load_state_dict(state, assign=True)
    setup.lm._model = model
    try:
        tasks = {batch.task for batch in setup.questions.batches}
        return {task: setup.lm._loglikelihood_tokens(setup.questions.tokens(task)) for task in tasks}
    finally:
        setup.lm._model = pair.model


def report(name: str, found: dict) -> None:
    statistics = found["statistics"]
    best = found["final_results"][0]
    passes, alone = statistics["layer_passes"], statistics["layer_passes_alone"]
    print(
        f"{name}: {statistics['evaluations']} evaluations, {passes:.0f} layer passes, alone {alone} "
        f"({passes / alone:.2f}; with repeats {passes / statistics['layer_passes_alone_with_repeats']:.2f}), "
        f"{statistics['seconds']:.1f} s; best {best['layers']} {best['fitness']:.4f} ± {best['stderr']:.4f}",
        flush=True,
    )


def against_truth(found: dict, truth: dict, most: int) -> None:
    for size in range(2, most + 1):
        true_best = next(row for row in truth["final_results"] if row["num_layers"] == size)
        ours = next((row for row in found["final_results"] if row["num_layers"] == size), None)
        is_within = ours is not None and ours["fitness"] >= true_best["fitness"] - true_best["stderr"]
        of_size = [row["fitness"] for row in truth["final_results"] if row["num_layers"] == size]
        rank = ours and 1 + sum(fitness > ours["fitness"] for fitness in of_size)
        print(
            f"    best of {size} layers: found {ours and ours['layers']}, rank {rank}; true {true_best['layers']} "
            f"{true_best['fitness']:.4f} ± {true_best['stderr']:.4f}; within one standard error: {is_within}",
            flush=True,
        )


if __name__ == "__main__":
    main()
