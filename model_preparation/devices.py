"""Chooses the device of every command, prints it once, and tests it before anything is loaded."""

import os
from typing import TYPE_CHECKING

from model_preparation.errors import SurgeryError

if TYPE_CHECKING:
    import torch

OF_JOB = "MODEL_PREPARATION_DEVICE"  # environment variable with the device that Ray gave the job: cuda or cpu


def choose_device(gpu: int | None = None, device: str | None = None) -> str:
    """Return the device to run on, and print it: `device`, else CUDA device `gpu`, else CUDA device 0, else the CPU.

    If neither argument is given, a Ray job takes the device that Ray chose. A process of torchrun or accelerate takes
    the GPU whose number is its local rank.

    Raises:
        SurgeryError: if this machine lacks the named device, or if a launcher and a flag both choose a GPU.
            Without CUDA, `gpu` is no error: the CPU is taken.
    """
    import torch

    processes, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    if processes > 1 and (gpu is not None or device not in (None, "cpu", "cuda")):
        raise SurgeryError(
            f"The launcher gives each of its {processes} processes a GPU, so --gpu and --device cannot choose one. "
            "Leave these flags out, or give --device cpu."
        )
    device = device if device is not None or gpu is not None else os.environ.get(OF_JOB)
    note = ""
    if device is None and not torch.cuda.is_available():
        device, note = "cpu", " (torch sees no CUDA device"
        if torch.accelerator.is_available():
            found = torch.accelerator.current_accelerator()
            note += f", but {found}, which --device {found} uses"
        note += ")"
    elif device is None:
        index, count = rank if gpu is None else gpu, torch.cuda.device_count()
        if index >= count:
            raise SurgeryError(
                f"GPU {index} does not exist: torch sees CUDA devices 0 to {count - 1} here. "
                "Choose one of them by --gpu, or give --device cpu."
            )
        device = f"cuda:{index}"
    check_device(device)
    place = torch.device(device)
    if place.type == "cuda":
        place = torch.device("cuda", rank if place.index is None else place.index)
        note = f" ({torch.cuda.get_device_name(place)})"
    chosen = "cpu" if place.type == "cpu" else str(place)
    if os.environ.get("RANK", "0") == "0":  # only a launcher's first process prints
        shared = f", a GPU for each of {processes} processes" if place.type == "cuda" else f", {processes} processes"
        print(f"Device       {chosen}{note}{shared * (processes > 1)}", flush=True)
    return chosen


def check_device(device: "str | torch.device") -> None:
    """Raise SurgeryError unless torch knows the device, and can put numbers on it here."""
    import torch

    place, reason = None, "torch knows no such device"
    try:
        place = torch.device(device)
        reason = "this torch is built without it"
        torch.empty(0, device=place)
    except (AssertionError, NotImplementedError, ImportError, RuntimeError) as error:
        if place is not None and type(error) is RuntimeError:  # only the first sentence of the driver's message
            reason = str(error).strip().splitlines()[0].partition(". ")[0].rstrip(".")
        raise _unusable(device, reason) from error
    if place.type == "meta":
        raise _unusable(device, "it holds no numbers")


def _unusable(device: "str | torch.device", reason: str) -> SurgeryError:
    return SurgeryError(f"--device {device} cannot be used here: {reason}. Use --device cpu.")
