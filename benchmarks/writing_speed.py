"""Generating answers to prompts of unequal lengths: our code against stock lm-eval (HFLM), on the same documents.

The documents are from recall tasks, with all --lengths mixed. Both sides answer all documents in one process, one side
after the other, --repeats times each. The fastest time counts. Prints seconds (processor seconds on a CPU), the ratio,
and how many texts differ.

    python benchmarks/writing_speed.py --checkpoint CHECKPOINT
"""

import argparse
import copy
import time
from pathlib import Path

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from model_preparation.evaluation.models import find_model
from model_preparation.evaluation.recall_tasks import RecallRecipe
from model_preparation.evaluation.scoring_lm import ScoringLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=["kv_retrieval", "mqar"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[160, 256, 384, 640])
    parser.add_argument("--documents", type=int, default=3, help="number for each task and length")
    parser.add_argument("--batch_size", type=int, default=8, help="for stock lm-eval")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.device == "cpu" else time.perf_counter  # other programs may run on the CPU too
    model, tokenizer = find_model(args.checkpoint).load(args.device, torch.float32, False)
    recipe = RecallRecipe(tokenizer, max(args.lengths), lengths=args.lengths, documents=args.documents)
    sides = {
        "stock": HFLM(pretrained=model, tokenizer=tokenizer, batch_size=args.batch_size),
        "ours": ScoringLM(model, tokenizer, "auto"),
    }
    totals = dict.fromkeys(sides, 0.0)
    for name in args.tasks:
        asked = requests(recipe, name)
        texts, seconds = {}, {}
        for side, lm in sides.items():
            times = []
            for _ in range(args.repeats):
                fresh = copy.deepcopy(asked)  # stock adds to the stop sequences
                started = clock()
                texts[side] = lm.generate_until(fresh, disable_tqdm=True)
                times.append(clock() - started)
            seconds[side] = min(times)
            totals[side] += seconds[side]
        differing = sum(one != other for one, other in zip(texts["stock"], texts["ours"], strict=True))
        print(
            f"{name}: {len(asked)} documents, stock {seconds['stock']:.1f} s, ours {seconds['ours']:.1f} s, "
            f"ratio {seconds['stock'] / seconds['ours']:.2f}, {differing} texts differ",
            flush=True,
        )
    print(
        f"all: stock {totals['stock']:.1f} s, ours {totals['ours']:.1f} s, ratio {totals['stock'] / totals['ours']:.2f}"
    )


def requests(recipe: RecallRecipe, name: str) -> list[Instance]:
    """The requests of a task, with all lengths mixed."""
    documents = [(task, row) for task in recipe.tasks(name) for row in task.dataset["test"]]
    documents.sort(key=lambda each: each[1]["index"])
    found = []
    for number, (task, row) in enumerate(documents):
        context = task.fewshot_context(row, 0, gen_prefix=task.doc_to_prefix(row))
        found.append(task.construct_requests(row, context, metadata=(name, number, 1)))
    return found


if __name__ == "__main__":
    main()
