"""Reads the donor of a distillation layer by layer."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig

from model_preparation.checkpoint.llamba_init import open_donor
from model_preparation.hub.sources import Source
from model_preparation.io.tensors.sharded_weights import TensorFiles
from model_preparation.llamba.donor_kinds import KINDS


@dataclass(frozen=True)
class Donor:
    """A donor in a folder, and the device that its layers run on."""

    folder: Path
    files: TensorFiles
    config: PreTrainedConfig
    device: str

    @classmethod
    def open(cls, source: Source, device: str) -> "Donor":
        """Open a source; raises SurgeryError if it is no donor."""
        return cls(source.folder, *open_donor(source), device)

    def layer(self, index: int) -> nn.Module:
        """Layer `index` in float32. It must run without a cache."""
        with torch.device("meta"):
            layer = KINDS[self.config.model_type].transformers_class("DecoderLayer")(self.config, index)
        tensors = {
            name: tensor.to(self.device, torch.float32)
            for name, tensor in self.files.with_prefix(f"model.layers.{index}.")
            if not name.endswith("rotary_emb.inv_freq")  # old files have this tensor in every layer
        }
        layer.load_state_dict(tensors, assign=True)
        return layer.eval().requires_grad_(False)
