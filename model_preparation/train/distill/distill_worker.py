"""A worker's part of a distillation: some layers of one that has begun. distill.py has it run for each job.

In: the work folder, the donor's folder, the layers. Out: the layers' files in the work folder.
"""

from pathlib import Path

from model_preparation.command_line import CommandParser, layer_index, run
from model_preparation.devices import choose_device


def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--donor_folder", type=Path, required=True)
    parser.add_argument("--layers", type=layer_index, nargs="+", required=True)
    parser.add_argument("--memory_limit", type=float, required=True)
    args = parser.parse_args()
    device = choose_device()

    from model_preparation.checkpoint.llamba_init import open_donor
    from model_preparation.hub.sources import resolve
    from model_preparation.train.distill.distill_block import train_layers
    from model_preparation.train.distill.distill_progress import LayerProgress
    from model_preparation.train.work_folder import WorkFolder

    work = WorkFolder(args.work)
    files, config = open_donor(resolve(str(args.donor_folder)))
    with LayerProgress(work.settings()["steps_per_layer"] * len(args.layers)) as progress:
        train_layers(
            work,
            files,
            config,
            args.layers,
            device=device,
            memory_limit_bytes=args.memory_limit * 1e9,
            progress=progress,
        )


if __name__ == "__main__":
    run(main)
