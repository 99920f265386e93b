"""NAME.distilling beside NAME: what a distillation has done so far, so that the same command goes on from there.

In: the settings that decide on the weights. Out: a folder held by one run at a time, with
    settings.json           what is asked for
    drawn_NNN.safetensors   a batch of text of the donor's own
    tokens.safetensors      all tokens that are trained on and held out
    layer_NN.safetensors    the mixer of a finished layer, float32, and its record
Each file appears whole or not at all.
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
from model_preparation.files.new_file import write_file
from model_preparation.files.partial_folder import take
from model_preparation.training.distill_data import TokenData
from model_preparation.untrusted.untrusted_files import read_json

_SETTINGS, _TOKENS = "settings.json", "tokens.safetensors"


class WorkFolder:
    """The folder of one distillation; see above."""

    def __init__(self, folder: Path):
        self.folder = folder

    @classmethod
    def beside(cls, target: Path) -> "WorkFolder":
        """That of the distillation that makes `target`."""
        target = target.resolve()
        return cls(target.with_name(f"{target.name}.distilling"))

    @contextmanager
    def held(self, settings: Mapping[str, Any], *, restart: bool) -> Iterator[None]:
        """Keep other runs out, and see that what is there is of the same settings.

        Args:
            settings: JSON's kinds of values, all that decides on the weights.
            restart: remove what is there first.

        Raises:
            SurgeryError: if another run is at it, or it is of other settings, which are named.
        """
        hold = take(self.folder)
        try:
            if restart:
                self._check_ours()
                self.remove()
            self.folder.mkdir(exist_ok=True)
            if (self.folder / _SETTINGS).exists():
                self._check(settings)
            else:
                self._check_ours()
                write_file(self.folder / _SETTINGS, json.dumps(settings, indent=2) + "\n")
            yield
        finally:
            hold.release()

    def settings(self) -> dict[str, Any]:
        """Those of the distillation that is going on here."""
        return self._read_settings()

    def remove(self) -> None:
        """Remove all of it; the settings last, as they tell what the rest is."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != _SETTINGS:
                    path.unlink()
            (self.folder / _SETTINGS).unlink(missing_ok=True)
            self.folder.rmdir()

    def tokens(self) -> TokenData | None:
        """The tokens, if they were kept."""
        path = self.folder / _TOKENS
        return TokenData(**load_file(path)) if path.is_file() else None

    def keep_tokens(self, data: TokenData) -> None:
        tensors = {"tokens": data.tokens} if data.weights is None else vars(data)
        self._write(_TOKENS, dict(tensors))

    def drawn(self, number: int) -> Tensor | None:
        """Batch `number` of the donor's own text, (sequences, length) int64, if it was kept."""
        path = self.folder / f"drawn_{number:03d}.safetensors"
        return load_file(path)["tokens"] if path.is_file() else None

    def keep_drawn(self, number: int, tokens: Tensor) -> None:
        self._write(f"drawn_{number:03d}.safetensors", {"tokens": tokens})

    def forget_drawn(self) -> None:
        """Remove all batches."""
        for path in self.folder.glob("drawn_*.safetensors"):
            path.unlink()

    def has_layer(self, index: int) -> bool:
        """Whether the layer is finished."""
        return self._layer(index).is_file()

    def mixer(self, index: int) -> dict[str, Tensor]:
        """The tensors of a finished layer's mixer, float32, by name relative to the layer."""
        return load_file(self._layer(index))

    def record(self, index: int) -> dict[str, Any]:
        """What was told of a finished layer when it was kept."""
        with safe_open(self._layer(index), "pt") as file:
            return json.loads(file.metadata()["record"])

    def keep_layer(self, index: int, mixer: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Keep a finished layer, on the disk when this returns."""
        self._write(self._layer(index).name, dict(mixer), {"record": json.dumps(record)})

    def _layer(self, index: int) -> Path:
        return self.folder / f"layer_{index:02d}.safetensors"

    def _write(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        write_file(self.folder / name, save(contiguous, metadata))

    def _read_settings(self) -> dict[str, Any]:
        path = self.folder / _SETTINGS
        try:
            return read_json(path)
        except (OSError, ValueError) as error:
            raise SurgeryError(f"{path} cannot be read ({error}). Add --restart to begin anew.") from error

    def _check_ours(self) -> None:
        """Raise SurgeryError if the folder has files in it and none of them says that a distillation made it."""
        names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        if names and not any(name.startswith(_SETTINGS) for name in names):
            raise SurgeryError(
                f"{self.folder} holds other files ({', '.join(sorted(names)[:3])}), and the work is to be kept there. "
                "Move them elsewhere, or choose another --output_dir."
            )

    def _check(self, settings: Mapping[str, Any]) -> None:
        found = self._read_settings()
        asked = json.loads(json.dumps(settings))
        odd = [name for name in sorted(found.keys() | asked.keys()) if found.get(name) != asked.get(name)]
        if odd:
            differing = ", ".join(
                f"{name} {_short(found.get(name))} there, {_short(asked.get(name))} now" for name in odd
            )
            raise SurgeryError(
                f"{self.folder} was begun with other settings: {differing}. Run it with those, add --restart to begin "
                "anew, or choose another --output_dir."
            )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
