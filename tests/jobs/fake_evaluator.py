"""A stand-in for `test_checkpoint.py --full_eval`: five subjects whose scores follow from the checkpoint's name.

Like the real one, it saves each subject's result at once, and a later run continues from there. A file
`behaviour` in the checkpoint may say what happens: "fail", "silent" (no result), "wait" (until a signal ends
this process), "remove NAME" (first the checkpoint NAME beside this one is deleted), "kill 3 once" or
"kill 3 always" (before the third subject, the process that started this one is killed).
"""

import argparse
import json
import os
import shutil
import signal
import sys
import zlib
from pathlib import Path

SUBJECTS = ("algebra", "biology", "chemistry", "design", "economics")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--results_dir", type=Path)
    parser.add_argument("--result_json", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=7)
    parser.add_argument("--full_eval", action="store_true", required=True)
    parser.add_argument("--skip_generation", action="store_true", required=True)
    parser.add_argument("--tasks", nargs="+")
    parser.add_argument("--batch_size")
    args = parser.parse_args()
    results = args.results_dir / args.checkpoint.name if args.results_dir else args.checkpoint / "evaluations"
    results.mkdir(parents=True, exist_ok=True)
    path = args.checkpoint / "behaviour"
    behaviour = path.read_text().split() if path.exists() else ["run"]
    with (results / "attempts").open("a") as attempts:
        attempts.write(f"{os.getpid()}\n")
    if behaviour[0] == "remove":
        shutil.rmtree(args.checkpoint.with_name(behaviour[1]))
    kept = True
    for number, subject in enumerate(SUBJECTS, start=1):
        file = results / f"{subject}.json"
        if file.exists():
            continue
        if behaviour[0] == "kill" and str(number) == behaviour[1] and is_due(results / "killed", behaviour[2]):
            os.kill(os.getppid(), signal.SIGKILL)
            signal.pause()  # the parent's death ends this process too
        print(f"{args.checkpoint.name}: {subject}", flush=True)
        with (results / "scored").open("a") as scored:
            scored.write(f"{subject}\n")
        file.write_text(json.dumps(zlib.crc32(f"{args.checkpoint.name} {subject}".encode()) % 1000 / 1000))
        kept = False
    if behaviour[0] == "fail":
        sys.exit("error: the logits are not finite. Build it again.")
    if behaviour[0] == "wait":
        signal.signal(signal.SIGTERM, lambda *_: ((results / "cleaned").touch(), sys.exit(143)))
        (results / "waiting").touch()
        while True:
            signal.pause()
    scores = [json.loads((results / f"{subject}.json").read_text()) for subject in SUBJECTS]
    score = sum(scores) / len(scores)
    result = {"score": score, "stderr": 0.01, "questions": args.limit * len(SUBJECTS), "kept": kept}
    if args.tasks and len(args.tasks) > 1:
        result |= {"score": None, "stderr": None, "tasks": {name: {"score": 0.25} for name in args.tasks}}
    if behaviour[0] != "silent":
        args.result_json.write_text(json.dumps(result))


def is_due(mark: Path, how_often: str) -> bool:
    if how_often == "once" and mark.exists():
        return False
    mark.touch()
    return True


if __name__ == "__main__":
    main()
