"""One job of a distillation on Ray: it trains some layers and saves them in the work folder. distill.py starts it."""

from pathlib import Path

from model_preparation.command_line import CommandParser, layer_index, run
from model_preparation.devices import choose_device


def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--donor_folder", type=Path, required=True)
    parser.add_argument("--layers", type=layer_index, nargs="+", required=True)
    parser.add_argument("--memory_limit", type=float, required=True, metavar="BYTES")
    args = parser.parse_args()
    device = choose_device()

    from model_preparation.hub.sources import resolve
    from model_preparation.train.distill.donor import Donor
    from model_preparation.train.distill.layers_in_turn import train_layers
    from model_preparation.train.distill.work_folder import WorkFolder

    donor = Donor.open(resolve(str(args.donor_folder)), device)
    train_layers(WorkFolder(args.work), donor, args.layers, args.memory_limit)


if __name__ == "__main__":
    run(main)
