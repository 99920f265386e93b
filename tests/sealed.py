"""What a build adds to a checkpoint for `verify`: tensor_digests.json, and the seal of checkpoint_info.json."""

import json
from pathlib import Path

import torch
from blake3 import blake3

from model_preparation.surgery.digests import describe_file
from model_preparation.surgery.seal import seal


def add_digests_and_seal(folder: Path) -> None:
    """Add them to a checkpoint that was built without."""
    info = json.loads((folder / "checkpoint_info.json").read_text())
    state_dict = torch.load(folder / "model_state_dict.pt", weights_only=True)
    donors = tuple(f"backbone.layers.{index}." for index in info["replaced_layers"])
    tensors = {
        name: {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "blake3": blake3(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest(),
            "from": "donor" if name.startswith(donors) else "base",
            "source_name": name,
        }
        for name, tensor in state_dict.items()
    }
    digests = folder / "tensor_digests.json"
    digests.write_text(json.dumps({"format_version": 1, "algorithm": "blake3", "tensors": tensors}, indent=2))
    info["files"][digests.name] = describe_file(digests)
    (folder / "checkpoint_info.json").write_bytes(seal(info))
