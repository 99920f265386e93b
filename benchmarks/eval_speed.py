"""How fast a checkpoint is scored on MMLU: our code against stock lm-eval (HFLM), on the same questions.

Each side is a separate process. It loads the checkpoint, answers all requests, and reports its seconds and its peak
resident memory. The seconds do not include imports, loading and building the prompts, which both sides do in the same
way. Prints questions per second, ratios, and for how many questions the chosen letter differs.

    python benchmarks/eval_speed.py --checkpoint CHECKPOINT --mmlu_data MMLU --num_fewshot 5 --subjects 3
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--mmlu_data", required=True, help="as test_checkpoint.py takes it")
    parser.add_argument("--num_fewshot", type=int, default=0)
    parser.add_argument("--limit", type=int, help="questions per subject")
    parser.add_argument("--subjects", type=int, default=57, help="number of subjects, evenly spread over the 57")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--batch_size", type=int, default=8, help="questions per forward pass, for both sides")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--side", choices=("ours", "stock"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args)))
        return
    sides = {}
    for side in ("ours", "stock"):
        command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
        output = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ).stdout
        sides[side] = json.loads(output.splitlines()[-1])
        found = sides[side]
        print(
            f"{side:<6} {found['questions']} questions in {found['seconds']:.1f} s: "
            f"{found['questions'] / found['seconds']:.2f} per second, peak {found['peak_gb']:.2f} GB "
            f"({found['peak_gb'] - found['loaded_gb']:.2f} above the loaded model), accuracy {found['accuracy']:.4f}",
            flush=True,
        )
    ours, stock = sides["ours"], sides["stock"]
    differing = sum(one != other for one, other in zip(ours["choices"], stock["choices"], strict=True))
    largest = max(abs(one - other) for one, other in zip(ours["values"], stock["values"], strict=True))
    above = (ours["peak_gb"] - ours["loaded_gb"]) / max(stock["peak_gb"] - stock["loaded_gb"], 1e-9)
    print(
        f"{args.num_fewshot}-shot: ours answers {stock['seconds'] / ours['seconds']:.2f} times as many questions per "
        f"second, with {ours['peak_gb'] / stock['peak_gb']:.2f} of the memory ({above:.2f} of what is used above the "
        f"loaded model); {differing} choices differ, largest difference of a log-likelihood {largest:.1e}"
    )


def measure(args: argparse.Namespace) -> dict:
    """One side's answers, seconds and memory."""
    import torch
    from lm_eval.models.huggingface import HFLM

    from model_preparation import load_checkpoint
    from model_preparation.evaluation.mmlu_questions import SUBJECTS
    from model_preparation.evaluation.scoring_lm import ScoringLM
    from model_preparation.evaluation.tasks import load_tasks

    torch.set_num_threads(args.threads)
    chosen = [f"mmlu_{SUBJECTS[57 * number // args.subjects]}" for number in range(args.subjects)]
    tasks = load_tasks(chosen, mmlu_data=args.mmlu_data, num_fewshot=args.num_fewshot)
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    model, tokenizer = load_checkpoint(args.checkpoint, dtype=dtype)
    with torch.no_grad():  # reads the mapped weights from the disk
        model(torch.ones(1, 8, dtype=torch.long))
    if args.side == "ours":
        lm = ScoringLM(model, tokenizer, args.batch_size)
    else:
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=args.batch_size)
    loaded_gb = peak_gb()
    requests = []
    for task in tasks.items:
        task.set_config(key="num_fewshot", value=args.num_fewshot)
        task.build_all_requests(limit=args.limit)
        requests.append(task.instances)
    started = time.perf_counter()
    if args.side == "ours":  # as evaluate_checkpoint asks, subject by subject
        answers = [answer for asked in requests for answer in lm.loglikelihood(asked, disable_tqdm=True)]
    else:
        answers = lm.loglikelihood([request for asked in requests for request in asked], disable_tqdm=True)
    seconds = time.perf_counter() - started
    values = [value for value, _ in answers]
    choices = [max(range(4), key=values[start : start + 4].__getitem__) for start in range(0, len(values), 4)]
    targets = [int(request.doc["answer"]) for asked in requests for request in asked[::4]]
    return {
        "questions": len(choices),
        "seconds": seconds,
        "loaded_gb": loaded_gb,
        "peak_gb": peak_gb(),
        "accuracy": sum(map(int.__eq__, choices, targets)) / len(targets),
        "choices": choices,
        "values": values,
    }


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    main()
