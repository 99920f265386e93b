"""Whether other numbers of threads or block sizes write to a disk faster than `dd` does with two files at once.

All writes bypass the page cache. Prints GB/s for each number of threads and block size. Each run writes two files: the
file system allocates their space first, and the time includes syncing them.

    python benchmarks/disk_writers.py --folder /mnt/scratch --gigabytes 6
"""

import argparse
import mmap
import os
import threading
import time
from pathlib import Path

from measuring import settle, timed_raw

WAYS = [(1, 4), (2, 4), (3, 4), (4, 4), (8, 4), (16, 4), (4, 1), (16, 1), (4, 16)]  # threads, MB in a block


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where to write, on the disk to measure")
    parser.add_argument("--gigabytes", type=float, default=6.0, help="both files together (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=2)
    args = parser.parse_args()
    size_bytes = int(args.gigabytes * 1e9 / 2) >> 24 << 24  # of each file: a multiple of every block size
    for _ in range(args.runs):
        for threads, megabytes in WAYS:
            seconds = write(args.folder, size_bytes, threads, megabytes << 20)
            speed = 2 * size_bytes / seconds / 1e9
            print(f"{threads:2d} threads, blocks of {megabytes:2d} MB: {speed:.2f} GB/s", flush=True)
        speed = 2 * size_bytes / timed_raw([size_bytes] * 2, args.folder) / 1e9
        print(f"dd, both files at once: {speed:.2f} GB/s", flush=True)


def write(folder: Path, size_bytes: int, threads: int, block_bytes: int) -> float:
    """Seconds to write two files, a block of each in turn, past the page cache, and to sync them."""
    paths = [folder / str(number) for number in range(2)]
    started = time.perf_counter()
    descriptors = [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT) for path in paths]
    for descriptor in descriptors:
        os.posix_fallocate(descriptor, 0, size_bytes)
    places = iter([(descriptor, at) for at in range(0, size_bytes, block_bytes) for descriptor in descriptors])
    lock = threading.Lock()

    def work() -> None:
        block = mmap.mmap(-1, block_bytes)
        block[:] = os.urandom(1 << 16) * (block_bytes >> 16)
        while True:
            with lock:
                place = next(places, None)
            if place is None:
                return
            os.pwrite(place[0], block, place[1])

    writers = [threading.Thread(target=work) for _ in range(threads)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    for descriptor in descriptors:
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = time.perf_counter() - started
    for path in paths:
        path.unlink()
    settle()
    return seconds


if __name__ == "__main__":
    main()
