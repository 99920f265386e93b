"""Whether a device can be used on this machine, asked before anything is loaded for it."""

from typing import TYPE_CHECKING

from model_preparation.errors import SurgeryError

if TYPE_CHECKING:
    import torch


def check_device(device: "str | torch.device") -> None:
    """Raise SurgeryError unless torch knows the device, and tensors with numbers in them can be on it here."""
    import torch

    place, reason = None, "torch knows no such device"
    try:
        place = torch.device(device)
        reason = "this torch is built without it"
        torch.empty(0, device=place)
    except (AssertionError, NotImplementedError, ImportError, RuntimeError) as error:
        if place is not None and type(error) is RuntimeError:  # the driver's words; torch's own are long
            reason = str(error).strip().splitlines()[0].partition(". ")[0].rstrip(".")
        raise _unusable(device, reason) from error
    if place.type == "meta":
        raise _unusable(device, "it holds no numbers")


def _unusable(device: "str | torch.device", reason: str) -> SurgeryError:
    return SurgeryError(f"--device {device} cannot be used here: {reason}. Use --device cpu.")
