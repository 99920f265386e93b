"""How much disk space ten checkpoints of one base take (three for --shape half), against the size of their files.

Prints seconds, GB of files and GB taken on the disk after each build. On a file system that shares extents (XFS,
Btrfs), the checkpoints take the space of one checkpoint and of the grafted layers. On other file systems they take the
space of all their files. Base and layers may be on another disk.

    python benchmarks/sharing_room.py --models /mnt/scratch --folder /mnt/xfs --shape 1b
"""

import argparse
import os
import shutil
import subprocess
from itertools import combinations
from pathlib import Path

from measuring import PACKAGE, timed
from random_models import SHAPES, prepared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="where base and layers are; made if missing")
    parser.add_argument("--folder", type=Path, required=True, help="where the checkpoints go, on the disk to measure")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    args = parser.parse_args()
    base, layers_dir, layers = prepared(args.shape, args.models)
    checkpoints = args.folder / "sharing_room"
    shutil.rmtree(checkpoints, ignore_errors=True)
    before, logical_bytes = used_bytes(args.folder), 0
    chosen = [combination for size in (1, 2) for combination in combinations(layers, size)]
    for number, combination in enumerate(chosen, start=1):
        out = checkpoints / "_".join(combination)
        command = [PACKAGE / "create_replaced_model_checkpoint.py", "--base", base, "--llama_layers_dir", layers_dir]
        seconds, _ = timed([*command, "--layers", *combination, "--output_dir", out])
        logical_bytes += sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        taken_bytes = used_bytes(args.folder) - before
        ratio = f"taken / files = {taken_bytes / logical_bytes:.3f}"
        print(f"{number:>2} checkpoints: {seconds:5.1f} s   {logical_bytes / 1e9:7.3f} GB of files   "
              f"{taken_bytes / 1e9:7.3f} GB taken   {ratio}", flush=True)  # fmt: skip
    shutil.rmtree(checkpoints)


def used_bytes(folder: Path) -> int:
    """Bytes in use on the folder's file system."""
    subprocess.run(["sync", "-f", folder], check=True)
    stat = os.statvfs(folder)
    return (stat.f_blocks - stat.f_bfree) * stat.f_frsize


if __name__ == "__main__":
    main()
