"""The folder NAME.distilling beside NAME keeps the finished work of a distillation, so that the same command resumes.

    settings.json           the settings of the run, in two parts: "text" and "training"
    drawn_NNN.safetensors   a batch of text that the donor wrote
    tokens.safetensors      all tokens, for training and held out
    layer_NN.safetensors    a finished layer: its mixer, float32, and its record (errors and losses)
    states_for_layer_NN.partial
                            a folder for hidden states that are larger than the memory limit

Only one run at a time uses the folder. Each file appears whole or not at all.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from model_preparation.errors import SurgeryError
from model_preparation.io.complete_file import make_folder, sync, write_file
from model_preparation.io.folder_lock import take
from model_preparation.io.result_inputs import differences
from model_preparation.io.untrusted.untrusted_files import read_json, without_links

_SETTINGS, _TOKENS = "settings.json", "tokens.safetensors"


class WorkFolder:
    """The work folder of one distillation."""

    def __init__(self, folder: Path):
        self.folder = folder

    @classmethod
    def beside(cls, target: Path) -> "WorkFolder":
        """The work folder of the distillation that makes `target`."""
        target = target.resolve()
        return cls(target.with_name(f"{target.name}.distilling"))

    @contextmanager
    def held(self, text: Mapping[str, Any], training: Mapping[str, Any], *, restart: bool) -> Iterator[None]:
        """Lock the folder for a `with` block. Then check that these settings made its tokens and layers.

        Args:
            text: the settings that change the tokens; JSON values.
            training: all other settings that change the weights; JSON values.
            restart: first remove the layers, and the tokens if they were made with other settings.

        Raises:
            SurgeryError: if another run uses the folder, if other settings made its tokens or layers, or if
                no distillation made the folder.
        """
        hold = take(without_links(self.folder))
        try:
            self._check_ours()
            make_folder(self.folder)
            asked = {"text": dict(text), "training": dict(training)}
            if (self.folder / _SETTINGS).exists():
                self._take_settings(asked, restart=restart)
            else:
                self._write_settings(asked)
            yield
        finally:
            hold.release()

    def settings(self) -> dict[str, Any]:
        """The settings of the run, "text" and "training" together."""
        found = self._read_settings()
        return found["text"] | found["training"]

    def remove(self) -> None:
        """Remove the folder. settings.json goes last, because it marks the folder as the work of a distillation."""
        if self.folder.is_dir():
            self._empty()
            (self.folder / _SETTINGS).unlink(missing_ok=True)
            self.folder.rmdir()

    def tokens(self) -> dict[str, Tensor] | None:
        """The saved tokens as fields of `TokenData`, or None if no tokens were saved."""
        return self._load(_TOKENS)

    def keep_tokens(self, tokens: Tensor, weights: Tensor | None) -> None:
        self._write(_TOKENS, {"tokens": tokens} | ({} if weights is None else {"weights": weights}))

    def drawn(self, number: int) -> Tensor | None:
        """Batch `number` of text that the donor wrote, (sequences, length) int64, or None if it was not saved."""
        found = self._load(f"drawn_{number:03d}.safetensors")
        return None if found is None else found["tokens"]

    def keep_drawn(self, number: int, tokens: Tensor) -> None:
        self._write(f"drawn_{number:03d}.safetensors", {"tokens": tokens})

    def remove_drawn(self) -> None:
        """Remove all batches of text that the donor wrote."""
        for path in self.folder.glob("drawn_*.safetensors"):
            path.unlink()

    def has_layer(self, index: int) -> bool:
        """Whether the layer is finished."""
        return self._layer(index).is_file()

    def mixer(self, index: int) -> dict[str, Tensor]:
        """The tensors of a finished layer's mixer, float32, by name relative to the layer."""
        return load_file(self._layer(index))

    def record(self, index: int) -> dict[str, Any]:
        """The record of a finished layer: errors before and after, losses, seconds."""
        with safe_open(self._layer(index), "pt") as file:
            return json.loads(file.metadata()["record"])

    def keep_layer(self, index: int, mixer: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Save a finished layer. It is on the disk when this returns."""
        self._write(self._layer(index).name, dict(mixer), {"record": json.dumps(record)})

    def _layer(self, index: int) -> Path:
        return self.folder / f"layer_{index:02d}.safetensors"

    def _load(self, name: str) -> dict[str, Tensor] | None:
        path = self.folder / name
        return load_file(path) if path.is_file() else None

    def _write(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        write_file(self.folder / name, save(contiguous, metadata))

    def _read_settings(self) -> dict[str, Any]:
        path = self.folder / _SETTINGS
        try:
            found = read_json(path)
            if not all(isinstance(found.get(part), dict) for part in ("text", "training")):
                raise ValueError("text or training is missing")
            return found
        except (OSError, ValueError) as error:
            raise SurgeryError(f"{path} cannot be read ({error}). Add --restart to begin again.") from error

    def _write_settings(self, settings: Mapping[str, Any]) -> None:
        write_file(self.folder / _SETTINGS, json.dumps(settings, indent=2) + "\n")

    def _check_ours(self) -> None:
        """Raise SurgeryError if the folder has files but no settings, because then no distillation made it."""
        names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        if names and not any(name.startswith(_SETTINGS) for name in names):
            raise SurgeryError(
                f"{self.folder} holds other files ({', '.join(sorted(names)[:3])}), but this run needs that folder. "
                "Move them elsewhere, or choose another --output_dir."
            )

    def _take_settings(self, asked: Mapping[str, Any], *, restart: bool) -> None:
        """Write the run's settings. If other settings made tokens or layers, remove these or raise SurgeryError."""
        asked = json.loads(json.dumps(asked))
        try:
            found = self._read_settings()
        except SurgeryError:
            if not restart:
                raise
            found = {"text": {}, "training": {}}
        other_text = differences(found["text"], asked["text"])
        other_training = differences(found["training"], asked["training"])
        layers = list(self.folder.glob("layer_*.safetensors"))
        tokens = [*self.folder.glob(_TOKENS), *self.folder.glob("drawn_*.safetensors")]
        odd = [*(other_text if tokens or layers else []), *(other_training if layers else [])]
        if odd and not restart:
            raise SurgeryError(
                f"{self.folder} was begun with other settings: {'; '.join(odd)}. Give those settings, add --restart to "
                f"begin again{'' if other_text else ' (the tokens are kept)'}, or choose another --output_dir."
            )
        if other_text:
            self._empty()
        elif restart:
            for path in layers:
                path.unlink()
            sync(self.folder)
        if other_text or other_training:
            self._write_settings(asked)

    def _empty(self) -> None:
        """Remove everything except the settings."""
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != _SETTINGS:
                path.unlink()
        sync(self.folder)  # the files must be gone before the settings change
