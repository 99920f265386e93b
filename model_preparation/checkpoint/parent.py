"""A checkpoint as the start of a further graft: its tensors, its own base, and the donors of its earlier grafts."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_preparation.checkpoint.checkpoint_info import (
    INFO,
    STATE_DICT,
    TENSOR_DIGESTS,
    formats_of,
    grafted_heads,
    read_info,
)
from model_preparation.errors import SurgeryError
from model_preparation.hub.sources import donors_of, folder_named, resolve, target_named, target_of
from model_preparation.io.result_inputs import differences
from model_preparation.io.tensors.sharded_weights import TensorFiles
from model_preparation.io.tensors.tensor_ranges import TensorRange

if TYPE_CHECKING:
    from model_preparation.llamba.configuration_llamba import LlambaConfig

_NOT_ORIGIN = ("name", "layers")  # fields of a donor's record that do not say where the donor comes from


class CheckpointFiles(TensorFiles):
    """The tensors of a checkpoint, in either format."""

    def __init__(self, folder: Path, info: Mapping[str, Any]):
        self._has_shards = "hf" in formats_of(info)
        super().__init__(folder)

    def _locate(self) -> dict[str, TensorRange]:
        if self._has_shards:
            return super()._locate()
        from model_preparation.checkpoint.model_digests import state_dict_ranges  # imports torch

        return state_dict_ranges(self.folder / STATE_DICT)


@dataclass(frozen=True)
class Parent:
    """The checkpoint that a graft starts from.

    Attributes:
        info: its checkpoint_info.json.
        config: the config of its model.
        files: its tensors.
        ungrafted: the layers whose graft is undone: they get the weights of the checkpoint's own base again.
        own_base: the tensors of the checkpoint's own base; None if no graft is undone.
    """

    folder: Path
    info: dict[str, Any]
    config: "LlambaConfig"
    files: CheckpointFiles
    ungrafted: list[int]
    own_base: TensorFiles | None

    @classmethod
    def at(cls, name: str, ungrafted: Collection[int], sources: Mapping[str, str] | None) -> "Parent | None":
        """The checkpoint in the folder that `name` means; None if `name` means no checkpoint.

        Raises:
            SurgeryError: if the checkpoint or its base cannot be read, or a layer in `ungrafted` is not grafted.
        """
        folder = folder_named(target_named(name, sources))
        if folder is None or not (folder / INFO).is_file():
            if ungrafted:
                raise SurgeryError(f"{name} is no checkpoint, so nothing in it is grafted. Leave --ungraft out.")
            return None
        from model_preparation.io.untrusted.untrusted_config import config_from  # imports transformers
        from model_preparation.llamba.configuration_llamba import LlambaConfig

        folder = folder.absolute()
        info = read_info(folder)
        try:
            config = config_from(info["config"], LlambaConfig)
        except ValueError as error:
            raise SurgeryError(f"{folder / INFO} describes no model ({error}). Build the checkpoint again.") from error
        grafted = {*config.llama_layers, *map(int, config.llama_heads)}
        if not grafted or not _records_enough(info, config, grafted):
            raise SurgeryError(
                f"{folder / INFO} is damaged, or an early version wrote it without facts that a further graft needs. "
                f"Build the checkpoint again: create_replaced_model_checkpoint.py --from_info {folder / INFO}"
            )
        if not_grafted := sorted(set(ungrafted) - grafted):
            raise SurgeryError(
                f"Not grafted in {folder}: {', '.join(map(str, not_grafted))}. Grafted are "
                f"{', '.join(map(str, sorted(grafted)))}. Give --ungraft only grafted layers."
            )
        own_base = None
        if ungrafted:
            advice = f"Put it back there, or build from a base instead of {folder}."
            own_base = TensorFiles(resolve(target_of(info["base_model"], advice), overrides=sources).folder)
        return cls(folder, info, config, CheckpointFiles(folder, info), sorted(ungrafted), own_base)

    @property
    def tokenizer(self) -> Path:
        """The folder of the checkpoint's tokenizer."""
        return self.folder / "tokenizer" if "pt" in formats_of(self.info) else self.folder

    def owners(self) -> dict[int, str]:
        """The owner of each grafted layer in words, by index, such as "llama's (heads 1, 2)"."""
        found = {int(index): f"{donor['id']}'s" for donor in donors_of(self.info) for index in donor["layers"]}
        heads = grafted_heads(self.info)
        return found | {index: f"{found[index]} (heads {', '.join(map(str, heads[index]))})" for index in heads}

    def check_own_base(self) -> None:
        """Raise SurgeryError unless `own_base` equals, to the bit, the base that the checkpoint was built from."""
        from model_preparation.checkpoint.model_digests import digests_as_recorded  # imports torch

        if self.own_base is None:
            return
        folder = self.own_base.folder
        if differing := differences(*digests_as_recorded(self.info["base_model"]["files"], folder)):
            raise SurgeryError(
                f"{folder} is not the base that {self.folder} was built from ({'; '.join(differing)}). "
                f"Put that base back there, or build from a base instead."
            )

    def donors(self, kept: Collection[int], added: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The record of each donor for checkpoint_info.json, the earliest donor first.

        Args:
            kept: the layers that stay grafted.
            added: the records of the donors of new layers.
        """
        found: list[dict[str, Any]] = []
        for donor in [*donors_of(self.info), *added]:
            layers = {i: digest for i, digest in donor["layers"].items() if donor in added or int(i) in kept}
            same = next((each for each in found if _origin(each) == _origin(donor)), None)
            if same is not None:
                layers = same["layers"] | layers
                same["layers"] = {index: layers[index] for index in sorted(layers, key=int)}
            elif layers:
                found.append({**donor, "layers": layers})
        return found


def _records_enough(info: Mapping[str, Any], config: "LlambaConfig", grafted: Collection[int]) -> bool:
    """Whether a checkpoint_info.json agrees with its config, and has every field that a further graft needs."""
    if (
        not {"base_model", "replacement_source", "digests", "dtype"} <= info.keys()
        or TENSOR_DIGESTS not in info["files"]
    ):
        return False
    named = {index for donor in donors_of(info) for index in donor["layers"]}
    return (
        (config.llama_layers, config.llama_heads) == (info["replaced_layers"], info.get("grafted_heads", {}))
        and named == {str(index) for index in grafted}
        and all("blake3" in entry for entry in info["base_model"]["files"].values())
    )


def _origin(donor: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in donor.items() if name not in _NOT_ORIGIN}
