"""A donor's layers: extracted into files of their own, or in the donor's own files.

`LayerStore` reads and checks a folder that extract.py wrote. `ModelLayers` has the same methods for a donor's own
folder, for plans that write nothing. `LlamaFiles` gives a donor's tensors their names in LlamaForCausalLM, whichever
class saved them. Donors of other kinds have the same names.
"""

import operator
import shlex
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, SupportsIndex

from model_preparation.checkpoint.model_configs import check_kind, config_from_dict, layer_shapes, read_config
from model_preparation.errors import SurgeryError
from model_preparation.hub.sources import Source, check_recorded
from model_preparation.io.digests import FILE_FIELDS, fault_of
from model_preparation.io.progress import bar
from model_preparation.io.tensors.pt_dict import dict_ranges
from model_preparation.io.tensors.sharded_weights import TensorFiles
from model_preparation.io.tensors.tensor_ranges import PickedTensor, StoredTensor, TensorRange
from model_preparation.io.untrusted.not_a_model import what_it_is
from model_preparation.io.untrusted.untrusted_files import check_fields, inside, read_json, regular_file
from model_preparation.llamba.donor_kinds import KINDS, picked_heads

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FORMAT_VERSION = 1
METADATA = "metadata.json"
ROTARY = "rotary_emb.pt"
TOKENIZER = "tokenizer"
HEAD = "lm_head.weight"

_METADATA_FIELDS = {
    "model_name": str,
    "source": dict,
    "config": dict,
    "generation_config": (dict, NoneType),
    "layers": dict,
    "files": dict,
}
_PREFIX = "model."
# The prefixes in files of other classes: LlamaModel, LLaVA's published files, newer multimodal models, SmolVLM.
_OTHER_PREFIXES = ("", "language_model.model.", "model.language_model.", "model.text_model.", "language_model.")
_OTHER_HEAD = f"language_model.{HEAD}"


class LayerStore:
    """A folder written by `extract_layers`.

    Args:
        hint: the model to extract, for the error message about a missing metadata.json; None if it is unknown.

    Attributes:
        metadata: the fields of the folder's metadata.json.

    Raises:
        SurgeryError: if metadata.json is missing, unreadable, or has an unknown format version.
    """

    def __init__(self, folder: str | Path, hint: str | None = "llama"):
        self.folder = Path(folder).expanduser()
        path = self.folder / METADATA
        if not path.is_file():
            raise SurgeryError(_without_metadata(self.folder, hint))
        try:
            self.metadata: dict[str, Any] = read_json(path)
            version = self.metadata["format_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise SurgeryError(f"{path} is not metadata of extracted layers ({error}). {self._advice()}") from error
        if version != FORMAT_VERSION:
            raise SurgeryError(
                f"{path} has format version {version}; this program knows {FORMAT_VERSION}. "
                "Update model_preparation, or extract the layers again with this version."
            )
        try:
            check_fields(self.metadata, _METADATA_FIELDS)
            self.layers: dict[int, dict] = {int(index): entry for index, entry in self.metadata["layers"].items()}
            for entry in [*self.layers.values(), *self.metadata["files"].values()]:
                check_fields(entry, FILE_FIELDS)
            for entry in self.layers.values():
                check_fields(entry, {"file": str})
            check_recorded(self.metadata["source"])
        except (ValueError, TypeError, AttributeError) as error:
            raise SurgeryError(f"{path} is damaged ({error}). {self._advice()}") from error

    @cached_property
    def config(self) -> "PreTrainedConfig":
        """The config of the layers' model.

        Raises:
            SurgeryError: if the config describes neither a donor nor a Llamba.
        """
        try:
            return config_from_dict(self.metadata["config"])
        except (ValueError, TypeError, AttributeError) as error:
            raise SurgeryError(f"{self.folder / METADATA} is damaged ({error}). {self._advice()}") from error

    @property
    def stores(self) -> list["LayerStore"]:
        """One store per donor."""
        return [self]

    def config_of(self, index: int) -> "PreTrainedConfig":
        """The config of the donor that gave a layer."""
        return self.config

    @property
    def tokenizer(self) -> Path:
        """The folder of the donor's tokenizer, if it has one."""
        return self.folder / TOKENIZER

    def check_is_donor(self) -> None:
        """Raise SurgeryError unless the layers are a donor's."""
        check_kind(self.config.model_type, f"{self.folder} holds layers of")

    def ranges(self, index: int) -> dict[str, TensorRange]:
        """Where the tensors of one layer lie in its file, by name. Call `check` before you trust them."""
        return dict_ranges(self.path(index), self._advice())

    def head_ranges(self, index: int, heads: Sequence[int]) -> dict[str, StoredTensor]:
        """Where the tensors of a layer's `heads` lie, by name in `HeadAttention`. torch is not imported.

        Raises:
            SurgeryError: if the donor has no such head, or the layer differs from the kind and sizes in metadata.json.
        """
        config, stored = self.metadata["config"], self.ranges(index)
        num_heads, num_kv_heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
        head_dim, width = config.get("head_dim"), config.get("hidden_size")
        if head_dim is None and type(width) is type(num_heads) is int and num_heads > 0:
            head_dim = width // num_heads  # Qwen2's config does not have it
        sizes = (num_heads, num_kv_heads, head_dim)
        if not all(type(size) is int and size > 0 for size in sizes) or num_heads % num_kv_heads:
            raise SurgeryError(
                f"Single heads cannot be taken from the layers in {self.folder} (num_attention_heads, "
                f"num_key_value_heads, head_dim: {', '.join(map(str, sizes))}). Give a donor's layers. "
                f"{self._advice()}"
            )
        check_heads(index, heads, num_heads)
        found: dict[str, StoredTensor] = {}
        kind = KINDS.get(config.get("model_type"), KINDS["llama"])  # a Llamba's layers are refused later
        for name, picked in picked_heads(heads, num_heads, num_kv_heads, head_dim, kind).items():
            place = stored.get(name if picked is None else f"self_attn.{name}")
            fits = place is not None and (
                picked is None or (picked[0] < len(place.shape) and max(picked[1]) < place.shape[picked[0]])
            )
            if place is None or not fits:
                raise SurgeryError(
                    f"{self.path(index)} does not hold the attention that metadata.json describes ({name}). "
                    f"{self._advice()}"
                )
            found[name] = place if picked is None else PickedTensor(place, tuple(picked[1]), picked[0])
        return found

    def describe(self) -> list[str]:
        """The lines of the plan: one for each donor."""
        return [f"Donor        {self.metadata['source']['id']} (layers in {self.folder})"]

    def records(self, layers: Sequence[int]) -> list[dict[str, Any]]:
        """The record of each donor of these layers, for checkpoint_info.json."""
        digests = {str(index): self.layers[index]["sha256"] for index in layers}
        return [{"name": self.metadata["model_name"], **self.metadata["source"], "layers": digests}]

    def path(self, index: int) -> Path:
        """A layer's file.

        Raises:
            SurgeryError: if the layer was not extracted, or its file is missing.
        """
        path = self.folder / layer_file(index)
        if index not in self.layers or not path.is_file():
            raise SurgeryError(f"Layer file not found: {path}. {self._advice()}")
        return regular_file(path)

    def check(self, layers: Sequence[int]) -> None:
        """Compare the files of these layers with their recorded SHA-256.

        Raises:
            SurgeryError: for the first file that is missing, cut or changed.
        """
        paths = [self.path(index) for index in layers]
        with ThreadPoolExecutor() as readers:
            faults = readers.map(fault_of, paths, (self.layers[index] for index in layers))
            for path, fault in zip(paths, faults, strict=True):
                if fault:
                    raise SurgeryError(f"{path} is {fault}. {self._advice()}")

    def faults(self) -> list[str]:
        """Check every file of the folder; returns a line for each missing or changed one."""
        recorded = {entry["file"]: entry for entry in self.layers.values()} | self.metadata["files"]
        found = []
        with bar(f"Verifying {self.folder}", len(recorded)) as advance:
            for name, entry in recorded.items():
                if fault := fault_of(inside(self.folder, name), entry):
                    found.append(f"{self.folder / name} is {fault}.")
                advance(1)
        return found

    def _advice(self) -> str:
        metadata = getattr(self, "metadata", None)
        origin = {"model_name": "llama"} | (metadata if isinstance(metadata, dict) else {})
        # Quoted, because a stranger may have chosen the names, and people paste commands.
        flags = f"--model_name {shlex.quote(str(origin['model_name']))}"
        if isinstance(source := origin.get("source"), dict) and source.get("legacy"):
            flags = f"--from_legacy {shlex.quote(str(source.get('path')))} --trust_pickle"
        here = shlex.quote(str(self.folder))
        return f"Extract it again: python extract_layers.py {flags} --output_dir {here} --overwrite"


class LayersOfSeveral(LayerStore):
    """Layers of several donors; the first donor gives the config. There is no donor if a build only undoes grafts.

    Args:
        layers: for each donor, its extracted layers and the indices of the layers that it gives.
    """

    def __init__(self, layers: Sequence[tuple[LayerStore, Sequence[int]]]):
        self._stores = layers
        self._of = {index: store for store, indices in layers for index in indices}
        self.layers = {index: store.layers[index] for index, store in self._of.items() if index in store.layers}
        if not layers:
            return
        first = layers[0][0]
        self.folder, self.metadata, self.config = first.folder, first.metadata, first.config

    @property
    def stores(self) -> list[LayerStore]:
        return [store for store, _ in self._stores]

    def config_of(self, index: int) -> "PreTrainedConfig":
        return self._of[index].config

    def ranges(self, index: int) -> dict[str, TensorRange]:
        return self._of[index].ranges(index)

    def head_ranges(self, index: int, heads: Sequence[int]) -> dict[str, StoredTensor]:
        return self._of[index].head_ranges(index, heads)

    def describe(self) -> list[str]:
        return [line for store, _ in self._stores for line in store.describe()]

    def records(self, layers: Sequence[int]) -> list[dict[str, Any]]:
        return [record for store, own in self._stores for record in store.records([i for i in own if i in layers])]

    def path(self, index: int) -> Path:
        return self._of[index].path(index)

    def check(self, layers: Sequence[int]) -> None:
        for store, own in self._stores:
            store.check([index for index in own if index in layers])


class ModelLayers(LayerStore):
    """The layers of a donor in its own files. Only the methods that a plan needs are available.

    Raises:
        SurgeryError: as `read_config`, `check_kind` and `LlamaFiles`.
    """

    def __init__(self, source: Source):
        self.folder = source.folder
        self.layers = {}  # no layer is extracted
        self.config = read_config(source.folder)
        check_kind(self.config.model_type, f"{source.folder} is")
        self.metadata = {"source": source.as_dict(), "config": self.config.to_dict()}
        self._files = LlamaFiles(source.folder)

    def ranges(self, index: int) -> dict[str, TensorRange]:
        return {name: self._files.ranges[f"model.layers.{index}.{name}"] for name in layer_shapes(self.config)}

    def path(self, index: int) -> Path:
        return self.folder

    def check(self, layers: Sequence[int]) -> None:
        """Raise SurgeryError if a tensor is missing, or its shape differs from the config; no tensor is read."""
        for index in layers:
            for name, shape in layer_shapes(self.config).items():
                self._files.require(f"model.layers.{index}.{name}", shape)

    @property
    def tokenizer(self) -> Path:
        return self.folder


class LlamaFiles(TensorFiles):
    """The tensors of the donor in `folder`, by their names in LlamaForCausalLM.

    Raises:
        SurgeryError: as `TensorFiles`.
    """

    def _locate(self) -> dict[str, TensorRange]:
        found = super()._locate()
        prefixes = (_PREFIX, *_OTHER_PREFIXES)
        prefix = next((each for each in prefixes if f"{each}layers.0.input_layernorm.weight" in found), _PREFIX)
        if prefix == _PREFIX:
            return found
        renamed = {}
        for name, place in found.items():
            if name in (HEAD, _OTHER_HEAD):
                renamed[HEAD] = place
            elif name.startswith(prefix):
                renamed[_PREFIX + name[len(prefix) :]] = place
        return renamed


def text_part(folder: Path) -> dict[str, Any]:
    """`config` and `state_dict` for `from_pretrained`, if the donor is the text part of a multimodal model; else {}."""
    text = read_json(folder / "config.json").get("text_config")
    if not isinstance(text, dict) or text.get("model_type") not in KINDS:
        return {}
    config, files = read_config(folder), LlamaFiles(folder)
    return {"config": config, "state_dict": {name: files[name] for name in files.ranges}}


def without_head(folder: Path) -> SurgeryError:
    """The error for a model that must predict tokens but was saved from LlamaModel."""
    return SurgeryError(
        f"{folder} has no {HEAD}: it was saved without its head, from LlamaModel. Its layers can be extracted, but it "
        "predicts no tokens. Give the folder of the whole model, saved from LlamaForCausalLM."
    )


def _without_metadata(folder: Path, donor: str | None) -> str:
    """The message for a folder without metadata.json: what the folder is instead, and what to run."""
    path, here = folder / METADATA, shlex.quote(str(folder))
    if (folder / "config.json").is_file():
        layers = shlex.quote(f"{folder.absolute()}_layers")
        return (
            f"{folder} is a model's folder. Extract its layers, and give their folder: "
            f"python extract_layers.py --model_name {here} --output_dir {layers}"
        )
    if old := next(folder.glob("*layer*.pt*"), None):
        imported = shlex.quote(f"{folder.absolute()}_imported")
        return (
            f"{path} is missing. If {old.name} and the other files are whole modules of an older program, import them: "
            f"python extract_layers.py --from_legacy {here} --output_dir {imported}. "
            "If not, extract the donor's layers again."
        )
    if folder.is_dir() and any(folder.iterdir()) and (what := what_it_is(folder)):
        return what
    return (
        f"{path} is missing. Extract the donor's layers first: "
        f"python extract_layers.py --model_name {shlex.quote(donor or 'DONOR')} --output_dir {here}"
    )


def layer_file(index: int) -> str:
    """The file name of a layer."""
    return f"layer_{index:02d}.pt"


def sorted_layers(layers: Iterable[SupportsIndex], what: str = "layer") -> list[int]:
    """Indices of layers (or of heads: `what`), sorted, as Python's integers. NumPy's and torch's are accepted.

    Raises:
        SurgeryError: if no index is given, an index is given twice, or an index is no integer.
    """
    try:
        chosen = sorted(operator.index(index) for index in layers)
    except TypeError as error:
        raise SurgeryError(f"{layers!r:.80} are no indices of {what}s. Give integers, such as [11, 13].") from error
    if not chosen:
        raise SurgeryError(f"No {what} is given. Name them, for example --layers 11 13 17 21, or --heads 13:16,17,18.")
    if len(set(chosen)) != len(chosen):
        raise SurgeryError(f"A {what} is given more than once in {chosen}. Name each {what} once.")
    return chosen


def check_heads(index: int, heads: Sequence[int], total: int) -> None:
    """Raise SurgeryError if the donor, which has `total` query heads, lacks one of the `heads`."""
    if outside := [head for head in heads if not 0 <= head < total]:
        raise SurgeryError(
            f"Head {outside[0]} of layer {index} is out of range: the donor has heads 0 to {total - 1}. "
            "Choose --heads from these."
        )


def check_range(layers: Sequence[int], total: int, model: str) -> None:
    """Raise SurgeryError if an index lies outside a model of `total` layers."""
    outside = [index for index in layers if not 0 <= index < total]
    if outside:
        raise SurgeryError(
            f"Layer {', '.join(map(str, outside))} is out of range: {model} has layers 0 to {total - 1}. "
            "Choose layers from these."
        )
