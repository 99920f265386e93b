"""The donor's layers where its own files have them, as a `LayerStore` would once they are extracted.

In: the donor's folder. Out: its layers, to plan with; nothing is written.
"""

from collections.abc import Sequence
from pathlib import Path

from model_preparation.checkpoint.layer_store import LayerStore
from model_preparation.checkpoint.llama_files import LlamaFiles
from model_preparation.checkpoint.model_configs import layer_shapes, read_config
from model_preparation.hub.sources import Source
from model_preparation.io.tensors.tensor_ranges import TensorRange


class ModelLayers(LayerStore):
    """The layers of a Llama, by the methods that a plan uses.

    Raises:
        SurgeryError: as `read_config` and `LlamaFiles`.
    """

    def __init__(self, source: Source):
        self.folder = source.folder
        self.metadata = {"source": source.as_dict()}
        self.layers = {}  # none is extracted
        self.config = read_config(source.folder)
        self._files = LlamaFiles(source.folder)

    def ranges(self, index: int) -> dict[str, TensorRange]:
        return {name: self._files.ranges[whole] for name, whole in self._names(index).items()}

    def path(self, index: int) -> Path:
        return self.folder

    def check(self, layers: Sequence[int]) -> None:
        """Raise SurgeryError if a tensor is missing or has another shape than the config says; nothing is read."""
        for index in layers:
            for name, shape in layer_shapes(self.config).items():
                self._files.require(f"model.layers.{index}.{name}", shape)

    @property
    def tokenizer(self) -> Path:
        return self.folder

    def _names(self, index: int) -> dict[str, str]:
        return {name: f"model.layers.{index}.{name}" for name in layer_shapes(self.config)}
