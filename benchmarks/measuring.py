"""Times commands for the other benchmarks. Each command is a separate process, so its time includes imports."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "model_preparation"


def timed(arguments: list, sync: Path | None = None) -> tuple[float, float]:
    """Run Python with `arguments`. Return (seconds, peak resident GB). The time includes syncing the folder `sync`."""
    started = time.perf_counter()
    peak = peak_gb([sys.executable, *arguments])
    if sync is not None:
        sync_folder(sync)
    return time.perf_counter() - started, peak


def peak_gb(command: list) -> float:
    """Run a command. Return its peak resident memory in GB."""
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(process.stderr.read().decode() if process.stderr else "failed")
    return usage.ru_maxrss * 1024 / 1e9


def timed_copies(paths: Iterable[Path], target: Path, *, warm: bool) -> float:
    """Seconds that `cp` and fsync take for the files, one after the other. Each copy is removed before the next one."""
    seconds = 0.0
    for path in paths:
        (read_once if warm else forget)([path])
        started = time.perf_counter()
        subprocess.run(["cp", path, target], check=True)
        sync_folder(target)
        seconds += time.perf_counter() - started
        (target / path.name).unlink()
        if path.stat().st_size > 1e9:
            settle()
    return seconds


def timed_raw(sizes: Iterable[int], target: Path) -> float:
    """Seconds that `dd` takes to write files past the page cache, all at once, and to sync them.

    The sizes are rounded down to multiples of 4 MiB.
    """
    started = time.perf_counter()
    writers = []
    for number, size_bytes in enumerate(sizes):
        command = ["dd", "if=/dev/zero", f"of={target / str(number)}", "bs=4M", f"count={size_bytes >> 22}"]
        writers.append(subprocess.Popen([*command, "oflag=direct", "conv=fsync"], stderr=subprocess.DEVNULL))
    if any(writer.wait() for writer in writers):
        sys.exit(f"dd cannot write directly in {target}")
    seconds = time.perf_counter() - started
    for number in range(len(writers)):
        (target / str(number)).unlink()
    settle()
    return seconds


def remove(folder: Path) -> None:
    """Remove a folder if it exists, and wait until the disk has nothing left to do."""
    if folder.exists():
        shutil.rmtree(folder)
        settle()


def settle() -> None:
    """Wait until written files are on the disk and removed files are freed. Either would slow the next measurement."""
    os.sync()
    time.sleep(3)


def sync_folder(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def read_once(paths: Iterable[Path]) -> None:
    """Put the files into the page cache, as far as memory holds them."""
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 22):
                pass


def forget(paths: Iterable[Path]) -> None:
    """Drop the files from the page cache."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
