"""Make the small pair of the package: train the donor, distil the base from it, and score grafts.

The results are `tiny_llama`, `tiny_llamba`, the questions of `embedded_recall`, effect.json and effect.png. The code of
each stage is in embedded_pair/. After a stop, the same command continues: finished stages, layers and scores are kept.
"""

import argparse
import json
import shutil
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
EMBEDDED = REPOSITORY / "model_preparation" / "embedded"

EXAMPLES = """\
example:
  python scripts/make_embedded_pair.py
  python scripts/make_embedded_pair.py --seed 1 --output_dir local_models/pair --work_dir local_models/pair.work
  python scripts/make_embedded_pair.py --heads 8 --output_dir local_models/pair_of_8 --work_dir local_models/pair.work
"""

STEPS = 1200  # of the donor's training
QUESTIONS, QUESTIONS_SEED = 1000, 2026
TEXTS, TEXTS_SEED, SENTENCES = 768, 1, 40  # for the distillation of the base
STEPS_PER_LAYER, DISTILLED_BATCH, D_STATE, DISTILLED_RATE = 40, 16, 8, 3e-3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=EMBEDDED,
        metavar="DIR",
        help="folder of the pair (default: in the package, where it replaces the existing pair)",
    )
    parser.add_argument(
        "--work_dir",
        type=Path,
        default=REPOSITORY / "local_models" / "embedded_pair.work",
        metavar="DIR",
        help="folder of unfinished work and of the scored grafts, about 600 MB (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of training and distillation; each seed has its own folder in --work_dir (default: 0)",
    )
    parser.add_argument("--heads", type=int, choices=(1, 2, 4, 8), default=2, help="heads per donor layer (default: 2)")
    parser.add_argument(
        "--steps", type=int, default=STEPS, metavar="N", help="steps of the donor's training (default: %(default)s)"
    )
    parser.add_argument("--mixer_heads", type=int, metavar="N", help="heads of the base's mixers (default: as --heads)")
    parser.add_argument(
        "--d_state",
        type=int,
        default=D_STATE,
        metavar="N",
        help="columns of the state of a mixer head (default: %(default)s)",
    )
    args = parser.parse_args()
    options = {"heads": args.heads, "steps": args.steps, "mixer_heads": args.mixer_heads, "d_state": args.d_state}
    changed = [f" --{name} {value}" for name, value in options.items() if value != parser.get_default(name)]
    if changed and args.output_dir.resolve() == EMBEDDED:
        parser.error("a pair of other sizes or steps needs another --output_dir: the package has the default pair")

    from model_preparation.command_line import run

    mixer = {"d_state": args.d_state}
    if args.mixer_heads is not None:
        mixer |= {"n_v_heads": args.mixer_heads, "n_qk_heads": args.mixer_heads}
    folder = args.work_dir.resolve() / f"seed_{args.seed}_heads_{args.heads}_steps_{args.steps}"
    needed = [*changed, " --output_dir DIR"] if changed else []
    command = f"scripts/make_embedded_pair.py --seed {args.seed}" + "".join(needed)
    donor = {"seed": args.seed, "heads": args.heads, "steps": args.steps}
    run(lambda: make_pair(args.output_dir.resolve(), folder, donor, mixer, command))


def make_pair(output_dir: Path, work_dir: Path, trained: dict[str, int], mixer: dict[str, int], command: str) -> None:
    """Run the stages that are not done yet in `work_dir`, and copy their results into `output_dir`.

    Args:
        work_dir: the work folder of this donor. In it, each size of the base's mixers has its own folder.
        trained: the donor's seed, heads and steps.
        mixer: the sizes of the base's mixers that do not follow from the donor.
        command: the command that the cards name.
    """
    import torch
    from embedded_pair.cards import write_cards
    from embedded_pair.donor import PEOPLE, config, train_donor
    from embedded_pair.effect import measure, summary, write_effect
    from embedded_pair.questions import TASK, write_task
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from model_preparation import distill_llamba_base
    from model_preparation.embedded.recall import training_texts
    from model_preparation.io.complete_folder import new_folder

    torch.set_num_threads(1)  # more threads sum in another order, which gives another model, and save little time
    of_base = work_dir / "_".join(["mixers", *map(str, mixer.values())])
    donor, base, task = work_dir / "tiny_llama", of_base / "tiny_llamba", work_dir / TASK
    of_base.mkdir(parents=True, exist_ok=True)

    def progress() -> Progress:
        return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())

    write_task(task, QUESTIONS, PEOPLE, QUESTIONS_SEED)
    if not (donor / "config.json").is_file():
        with progress() as bars:
            train_donor(donor, work_dir / "donor_state.pt", progress=bars, **trained)
    distilled = {"steps_per_layer": STEPS_PER_LAYER, "batch_size": DISTILLED_BATCH, "learning_rate": DISTILLED_RATE}
    if not (base / "config.json").is_file():
        texts, _ = training_texts(TEXTS, PEOPLE, SENTENCES, torch.Generator().manual_seed(TEXTS_SEED))
        distill_llamba_base(str(donor), base, texts, **distilled, mixer=mixer, seed=trained["seed"])
    _name_donor(base / "distillation.json")
    with progress() as bars:
        effect = measure(donor, base, task, of_base / "grafts", layers=config().num_hidden_layers, progress=bars)
    write_cards(donor, base, effect, distilled | mixer, trained, command)

    for folder, mark in ((donor, "config.json"), (base, "config.json"), (task, "embedded_recall.yaml")):
        with new_folder(output_dir / folder.name, overwrite=True, marker_file=mark) as staging:
            shutil.copytree(folder, staging, dirs_exist_ok=True)
    write_effect(output_dir, effect)
    print(summary(effect))
    print(f"The pair is in {output_dir}")


def _name_donor(summary_file: Path) -> None:
    """Replace the donor's local folder in the distillation's summary by its name in the package."""
    from model_preparation.io.complete_file import write_file

    summary = json.loads(summary_file.read_text())
    summary["donor"] = {"hub": "embedded", "id": "tiny_llama", "revision": None}
    write_file(summary_file, json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
