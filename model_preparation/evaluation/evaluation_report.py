"""A checkpoint is scored, and what came of it is shown and, for programs, written into a file.

In: the parsed flags of `evaluation_flags`, and the tasks they name. Out, on the terminal: groups, scores, and where the
results are.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from model_preparation.checkpoint.checkpoint_info import INFO
from model_preparation.command_line import save_config
from model_preparation.errors import SurgeryError
from model_preparation.evaluation.evaluate import evaluate_checkpoint
from model_preparation.evaluation.tasks import MMLU, Tasks
from model_preparation.io.new_file import write_file
from model_preparation.io.sync import make_folder


def evaluate_and_print(tasks: Tasks, args: argparse.Namespace, *, device: str, dtype: torch.dtype | None) -> None:
    """Score `args.checkpoint` and print the groups, the scores, and where the results are.

    Raises:
        SurgeryError, OSError: as `evaluate_checkpoint`.
    """
    shots = "" if args.num_fewshot is None else f", {args.num_fewshot}-shot"
    source = "" if tasks.questions is None else f", MMLU's questions from {tasks.questions.source}"
    print(f"\nEvaluating   {' '.join(tasks.names)}{shots}{source}", flush=True)
    if args.result_json is not None:  # an hour later would be the wrong time to find that it cannot be made
        if args.result_json.expanduser().is_dir():
            raise SurgeryError(f"--result_json {args.result_json} is a folder. Name a file.")
        make_folder(args.result_json.expanduser().parent)
    started = time.perf_counter()
    result = evaluate_checkpoint(
        args.checkpoint,
        tasks=tasks,
        limit=args.limit,
        num_fewshot=args.num_fewshot,
        batch_size=args.batch_size,
        device=device,
        dtype=dtype,
        seed=args.seed,
        parallelize=args.parallelize,
        results_dir=args.results_dir,
        tokenizer=args.tokenizer,
        sources=args.source,
    )
    if args.result_json is not None:
        write_file(args.result_json.expanduser(), json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    save_config(Path(result["results_dir"]) / "config.yaml")
    if "put_aside" in result:
        print(f"Put aside    results of another model ({'; '.join(result['differing'])}), to {result['put_aside']}")
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
        print(f"{'MMLU' if name == MMLU else name} score   {_score(row)}")
    if tasks.names == (MMLU,) and not result["entered"] and (args.checkpoint / INFO).is_file():
        print("checkpoint_info.json keeps what it says: it has a score of more questions, or cannot be written.")
    print(f"Results are in {result['results_dir']}", flush=True)


def _score(row: dict[str, Any]) -> str:
    if row["score"] is None:
        return f"none ({row['questions']} questions)"
    stderr = "" if row["stderr"] is None else f" ± {row['stderr']:.4f}"
    metric = "" if row["metric"] == "acc,none" else f"{row['metric'].removesuffix(',none')} "
    return f"{metric}{row['score']:.4f}{stderr} ({row['questions']} questions)"
