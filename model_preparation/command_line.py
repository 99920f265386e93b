"""What all commands share: flags in two spellings, a --config file, one-line errors and exit codes.

Exit codes: 0 done, 1 a fault of an input or the machine, 2 wrong usage, 130 Ctrl-C, 141 nobody reads the output,
143 SIGTERM.
"""

import argparse
import contextlib
import gc
import io
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from model_preparation import chinese_help, flags_file, interrupts
from model_preparation.errors import SurgeryError
from model_preparation.io.complete_file import write_file
from model_preparation.io.tensors.dtypes import MODEL_DTYPES
from model_preparation.llamba.lazy_registration import register_never
from model_preparation.terminal import Escaping, escaped
from model_preparation.versions import __version__


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser that also takes `--output-dir` for `--output_dir`, and flags from a --config file."""

    def __init__(self, **kwargs):
        self._words: dict[str, Any] = {}  # {dest of a flag: the words that the user gave for the flag}
        self.list_keys: tuple[str, ...] = ()  # keys of a --config file that are not flags, but lists of mappings
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)

    def parse_args(self, args=None, namespace=None):  # type: ignore[override]
        words = sys.argv[1:] if args is None else list(args)
        for word in words:
            if not _is_text(word):
                self.error(f"{word!r} is not UTF-8. Rename the file, or give another path to it")
        if "--config" in self._option_string_actions:
            return self._parse_with_config(words)
        return super().parse_args(words, namespace)

    def add_config_flag(self) -> None:
        """Add `--config`: a YAML file may then give flags, and `save_config` saves all flags that were used."""
        self.add_argument(
            "--config",
            type=Path,
            metavar="FILE",
            help="take flags from this YAML file: lines such as `batch_size: 8`, `tasks: [mmlu]`, `overwrite: true`. "
            "A flag on the command line overrides the file. All settings used are saved with the result, in a file "
            "whose name ends with config.yaml",
        )

    def _parse_with_config(self, words: list[str]) -> argparse.Namespace:
        global _parser_used
        self._words.clear()
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        finder.add_argument("--config", type=Path)
        namespace = argparse.Namespace()
        with contextlib.suppress(argparse.ArgumentError):  # parse_args below reports the same error
            config = finder.parse_known_args(words)[0].config
            if config is not None:
                self._read_config(flags_file.read_entries(config.expanduser(), self.list_keys), words, namespace)
        parsed = super().parse_args(words, namespace)
        del parsed.config
        _parser_used = None if self._words.pop("config", None) is None else self
        return parsed

    def _read_config(
        self, entries: Mapping[str, flags_file.Entry], words: list[str], namespace: argparse.Namespace
    ) -> None:
        """Put the entries of a file into `namespace`, except those that the command line overrides."""
        actions = [self._option_string_actions.get(word.partition("=")[0]) for word in words]
        given = {action for action in actions if action is not None}
        for group in self._mutually_exclusive_groups:
            if given.intersection(group._group_actions):
                given.update(group._group_actions)
            both = [_key(action) for action in group._group_actions if _key(action) in entries]
            if len(both) > 1:
                place = entries[both[1]].place
                raise SurgeryError(f"{place}: {both[1]} cannot be used with {both[0]}. Remove one of them.")
        for key, entry in entries.items():
            if key in self.list_keys:
                setattr(namespace, key, entry)
                continue
            action = self.check_entry(key, entry, argparse.Namespace() if self.flag_named(key) in given else namespace)
            action.required = False
            if action in given:
                self._words.pop(action.dest, None)

    def flag_named(self, key: str) -> argparse.Action | None:
        """The action of the flag that a key of a --config file names; None if there is no such flag."""
        return None if key in ("help", "config") else self._option_string_actions.get(f"--{key}")

    def check_entry(self, key: str, entry: flags_file.Entry, namespace: argparse.Namespace) -> argparse.Action:
        """Put the value of a key into `namespace`, as the flag of that name would. Return the flag's action.

        Raises:
            SurgeryError: if there is no such flag, or the flag does not take the value. The message names the place and
                the key.
        """
        action = self.flag_named(key)
        if action is None:
            flags = [flag.removeprefix("--") for flag in self._option_string_actions]
            known = [flag for flag in flags if "-" not in flag and self.flag_named(flag)]
            raise SurgeryError(f"{entry.place}: there is no key {key!r}.{flags_file.nearest(key, known)}")
        value, flag, what = entry.value, action.option_strings[0], f"{entry.place}: {key}"
        if isinstance(value, dict):
            raise SurgeryError(f"{what} has keys in it. Give a value that {flag} takes.")
        if action.nargs == 0 and value not in ("true", "false"):
            raise SurgeryError(f"{what} is {value!r}. Give true or false.")
        if value == []:
            raise SurgeryError(f"{what} is an empty list. Give a value, or remove the line.")
        is_repeatable = action.nargs is None and not isinstance(action, argparse._StoreAction)
        if isinstance(value, list) and action.nargs is None and not is_repeatable:
            raise SurgeryError(f"{what} is a list. Give one value.")
        texts = value if isinstance(value, list) else [value]
        if not hasattr(namespace, action.dest) and action.default is not argparse.SUPPRESS:
            setattr(namespace, action.dest, action.default)
        parts: list[list[Any]] = [[text] for text in texts] if is_repeatable else [texts]
        if action.nargs == 0:
            parts = [[]] if value == "true" else []
        try:
            for part in parts:
                action(self, namespace, self._get_values(action, part), flag)
        except argparse.ArgumentError as error:
            raise SurgeryError(f"{what}: {error.message}. Give a value that {flag} takes.") from error
        return action

    def _get_values(self, action, arg_strings):
        """Do what argparse does, and note the given words for `save_config`."""
        if action.option_strings:
            is_more = isinstance(action.default, list | dict) and not isinstance(action, argparse._StoreAction)
            before = self._words.get(action.dest, []) if is_more else []
            is_one = action.nargs is None and not is_more
            self._words[action.dest] = (
                True if action.nargs == 0 else arg_strings[0] if is_one else [*before, *arg_strings]
            )
        return super()._get_values(action, arg_strings)

    def is_given(self, dest: str) -> bool:
        """Whether the command line or the --config file has this flag."""
        return dest in self._words

    def flags_used(self) -> dict[str, Any]:
        """{key in a --config file: the given value, or else the default} of every flag."""
        actions = [action for action in self._actions if action.default is not argparse.SUPPRESS]
        flags = {_key(action): self._words.get(action.dest, action.default) for action in actions}
        return {key: str(value) if isinstance(value, Path) else value for key, value in flags.items()}

    def format_help(self) -> str:
        if chinese_help.is_wanted():
            typed_for = {typed: module for module, typed in TYPED_FOR.items()}
            chinese_help.translate(self, typed_for.get(self.prog, Path(self.prog).stem.replace("-", "_")))
        return as_typed(super().format_help())

    def refuse(self, args: argparse.Namespace, names: Iterable[str], why: str) -> None:
        """If a flag of `names` is not at its default, print the flag and `why`, and exit with code 2 (wrong usage)."""
        flags = {action.dest: action for action in self._actions if action.option_strings}
        for name in names:
            default = flags[name].default
            default = self._get_value(flags[name], default) if isinstance(default, str) else default
            if getattr(args, name) != default:
                self.error(f"{flags[name].option_strings[0]} {why}")

    def add_argument(self, *flags: str, **kwargs):
        hyphenated = [flag.replace("_", "-") for flag in flags if flag.startswith("--") and "_" in flag]
        action = super().add_argument(*flags, *hyphenated, **kwargs)
        if hyphenated:
            # --help shows only the spelling with underscores, but the parser accepts both.
            action.option_strings = list(flags)
        return action


def _key(action: argparse.Action) -> str:
    """The key in a --config file that stands for a flag."""
    return action.option_strings[0].removeprefix("--") if action.option_strings else action.dest


# The command's parser, if --config was given.
_parser_used: CommandParser | None = None


def save_config(path: Path, used: Mapping[str, Any] = MappingProxyType({})) -> None:
    """If --config was given, write all flags with their values to a file that --config can read.

    Args:
        used: {flag's name: value} for values that the command used in place of given values or defaults.

    Raises:
        OSError: from the file system.
    """
    if _parser_used is not None:
        note = f"# All settings of {_parser_used.prog}, version {__version__}.\n"
        flags = {**_parser_used.flags_used(), **used}
        given = {key: value for key, value in flags.items() if value not in (None, "", [], {})}
        write_file(path, note + flags_file.as_yaml(given))


# {script's name without .py: what the user types for it, such as "layer-surgery build"}. `layer-surgery` fills it.
TYPED_FOR: dict[str, str] = {}


def as_typed(text: str) -> str:
    """The text with the commands as the user types them: `layer-surgery build`, if `layer-surgery` was started."""
    script = re.compile(r"(?<![\w./])(?:python |\./)?(\w+)\.(?:py|sh)\b(?!/)")
    return script.sub(lambda match: TYPED_FOR.get(match[1], match[0]), text) if TYPED_FOR else text


def _is_text(word: object) -> bool:
    """Whether a word of the command line is UTF-8. Python passes other bytes as lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in str(word))


def layer_index(text: str) -> int:
    """Read one value of --layers.

    Raises:
        argparse.ArgumentTypeError: if it is not an integer of at least 0.
    """
    try:
        index = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a layer index (an integer such as 11)") from None
    if index < 0:
        raise argparse.ArgumentTypeError(f"{index} is negative; layers are counted from 0")
    return index


def heads_of_layer(text: str) -> tuple[int, list[int]]:
    """Read a part of --heads, such as 13:16,17 -> (13, [16, 17]).

    Raises:
        argparse.ArgumentTypeError: if it has another form, or names a head twice.
    """
    layer, colon, heads = text.partition(":")
    try:
        found = [int(head) for head in heads.split(",")]
        if not colon or min(found) < 0:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not LAYER:HEAD[,HEAD...], such as 13:16,17,18") from None
    if len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r} names a head more than once")
    return layer_index(layer), sorted(found)


def heads_of_donor(text: str) -> tuple[str, int, list[int]]:
    """Read a part of --heads, with a donor's name or without: B:13:16 -> ("B", 13, [16]), 13:16 -> ("", 13, [16])."""
    name, _, heads = text.partition(":") if text.count(":") == 2 else ("", "", text)
    return name, *heads_of_layer(heads)


class HeadsByLayer(argparse.Action):
    """The action of `--heads`: the command gets {layer: heads}; with donors' names, {name: {layer: heads}}."""

    def __call__(self, parser, namespace, values, option_string=None):
        layers = [layer for _, layer, _ in values]
        if twice := [layer for layer in layers if layers.count(layer) > 1]:
            raise argparse.ArgumentError(
                self, f"layer {twice[0]} is given twice: give all its heads at once, such as {twice[0]}:0,1"
            )
        by_name: dict[str, dict[int, list[int]]] = {}
        for name, layer, heads in values:
            by_name.setdefault(name, {})[layer] = heads
        if "" in by_name and len(by_name) > 1:
            raise argparse.ArgumentError(self, f"layer {min(by_name[''])} needs its donor's name too: NAME:LAYER:HEAD")
        setattr(namespace, self.dest, by_name.get("", by_name))


def heads_by_layer(words: Iterable[str]) -> dict[int, list[int]]:
    """Parts of --heads -> {layer: heads}, layers and heads sorted. Several parts may name heads of one layer.

    Raises:
        argparse.ArgumentTypeError: if a part has another form, or names a head twice.
    """
    found: dict[int, set[int]] = {}
    for layer, heads in map(heads_of_layer, words):
        found.setdefault(layer, set()).update(heads)
    return {layer: sorted(found[layer]) for layer in sorted(found)}


def heads_text(heads: Mapping[int, Iterable[int]]) -> str:
    """{layer: heads} in the form of --heads, such as "13:16,17 15:11"."""
    return " ".join(f"{layer}:{','.join(map(str, of_layer))}" for layer, of_layer in heads.items())


def score(text: str) -> float:
    """Read --score, a number between 0 and 1.

    Raises:
        argparse.ArgumentTypeError: if it is something else.
    """
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not between 0 and 1: give a fraction such as 0.57")


def number(
    kind: type[int] | type[float], *, least: float = -math.inf, above: float = -math.inf, most: float = math.inf
) -> Callable[[str], float]:
    """A `type` for argparse: a finite number of `kind`, at least `least`, greater than `above`, at most `most`."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'an integer' if kind is int else 'a number'}") from None
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is not finite")
        if value < least:
            raise argparse.ArgumentTypeError(f"{text} is too small; it must be at least {least}")
        if value <= above:
            raise argparse.ArgumentTypeError(f"{text} is too small; it must be greater than {above}")
        if value > most:
            raise argparse.ArgumentTypeError(f"{text} is too large; it must be at most {most}")
        return value

    return read


def add_layers_flag(parser: CommandParser, *, required: bool, help: str, names: bool = False) -> None:
    """Add `--layers`: distinct indices from 0, in any order. The command gets a sorted list.

    With `names`, the user may also write NAME:N[,N...]. The command then gets {name: sorted list}.
    """

    def named(text: str) -> tuple[str, list[int]]:
        name, _, indices = text.rpartition(":") if names else ("", "", text)
        if name.isdecimal():
            raise argparse.ArgumentTypeError(f"{text!r} names heads of layer {name}; write --heads {text}")
        return name, [layer_index(index) for index in (indices.split(",") if name else [indices])]

    class SortedDistinct(argparse.Action):
        def __call__(self, parser, namespace, values, option_string=None):
            given = [index for _, indices in values for index in indices]
            repeated = sorted({index for index in given if given.count(index) > 1})
            if repeated:
                raise argparse.ArgumentError(self, f"layer {', '.join(map(str, repeated))} is given more than once")
            by_name: dict[str, list[int]] = {}
            for name, indices in values:
                by_name[name] = sorted([*by_name.get(name, []), *indices])
            if "" in by_name and len(by_name) > 1:
                raise argparse.ArgumentError(self, f"layer {by_name[''][0]} needs its donor's name too: NAME:LAYER")
            setattr(namespace, self.dest, by_name.get("", by_name))

    metavar = "N|NAME:N[,N...]" if names else "N"
    parser.add_argument(
        "--layers", nargs="+", type=named, metavar=metavar, required=required, action=SortedDistinct, help=help
    )


def add_dtype_flag(parser: CommandParser, *, help: str) -> None:
    """Add `--dtype`, the name of a dtype that a model can run in."""
    parser.add_argument("--dtype", choices=MODEL_DTYPES, help=help)


def default_folder(name: str) -> Path:
    """The default folder `name`: next to the package in a checkout of the repository, else in the current folder."""
    checkout = Path(__file__).resolve().parents[1]
    return checkout / name if (checkout / "pyproject.toml").is_file() else Path(name)


def add_device_flags(parser: CommandParser) -> None:
    """Add `--gpu N` and `--device NAME` (anything that torch.device takes)."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--gpu",
        type=number(int, least=0),
        metavar="N",
        help="CUDA device to use (default: 0; without CUDA, the CPU)",
    )
    group.add_argument("--device", metavar="NAME", help="any torch device instead: cpu, cuda:1, mps, ...")


# The number of new objects after which the garbage collector runs. Imports make a million objects that stay.
# Python 3.11's default is 700. With this default, the collector would take a quarter of the imports' time.
_COLLECT_AFTER = 100_000


def run(main: Callable[[], None]) -> None:
    """Run a command's `main`. An error that the user can solve is one line on stderr, never a traceback."""
    gc.set_threshold(_COLLECT_AFTER)
    register_never()
    streams = sys.stdout, sys.stderr
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # do not fail if a terminal cannot show a character
    try:
        sys.stdout, sys.stderr = map(Escaping, streams)
        _run(main)
    finally:
        sys.stdout, sys.stderr = streams
        gc.freeze()  # the process ends now, and a last run of the garbage collector would take up to a second


def _run(main: Callable[[], None]) -> None:
    interrupts.watch()
    try:
        main()
        interrupts.check()
    except SurgeryError as error:
        sys.exit(_report(str(error)))
    except KeyboardInterrupt:
        _report("interrupted.")
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)  # the reader of our output went away
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; naming it would import torch
            raise
        reason = str(error).splitlines()[0]
        sys.exit(_report(f"{reason} Choose a GPU with more free memory by --gpu N, or use --device cpu."))
    except OSError as error:
        # Errors of the file system (disk full, no permission) are clear without a traceback.
        where = f" ({error.filename})" if error.filename else ""
        sys.exit(_report(f"{error.strerror or error}{where}."))
    sys.stdout.flush()


def _report(message: str) -> int:
    print(f"error: {escaped(as_typed(message))}", file=sys.stderr, flush=True)
    return 1
