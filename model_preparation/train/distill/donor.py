"""The Llama that is distilled, read layer by layer."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from model_preparation.checkpoint.llamba_init import open_donor
from model_preparation.hub.sources import Source
from model_preparation.io.tensors.tensor_files import TensorFiles


@dataclass(frozen=True)
class Donor:
    """A Llama in a folder, and the device that its layers run on."""

    folder: Path
    files: TensorFiles
    config: LlamaConfig
    device: str

    @classmethod
    def open(cls, source: Source, device: str) -> "Donor":
        """Raises SurgeryError if the source is no Llama."""
        return cls(source.folder, *open_donor(source), device)

    def layer(self, index: int) -> LlamaDecoderLayer:
        """A layer in float32, for running it without a cache."""
        with torch.device("meta"):
            layer = LlamaDecoderLayer(self.config, 0)
        tensors = {
            name: tensor.to(self.device, torch.float32)
            for name, tensor in self.files.with_prefix(f"model.layers.{index}.")
            if not name.endswith("rotary_emb.inv_freq")  # old files repeat it in every layer
        }
        layer.load_state_dict(tensors, assign=True)
        return layer.eval().requires_grad_(False)
