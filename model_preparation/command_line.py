"""What every command shares: flags in both spellings, and one way to end.

Exit codes: 0 done, 1 an input or the machine is at fault, 2 wrong usage, 130 interrupted, 143 terminated.
"""

import argparse
import contextlib
import gc
import io
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from model_preparation import interrupts
from model_preparation.errors import SurgeryError
from model_preparation.io.tensors.dtypes import MODEL_DTYPES
from model_preparation.terminal import Escaping, escaped


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser in which `--output_dir` may also be written `--output-dir`, and defaults show in --help."""

    def __init__(self, **kwargs):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(**kwargs)

    def parse_args(self, args=None, namespace=None):  # type: ignore[override]
        for word in sys.argv[1:] if args is None else args:
            if not _is_text(word):
                self.error(f"{word!r} is not UTF-8. Rename what it names, or call it by another path")
        return super().parse_args(args, namespace)

    def refuse(self, args: argparse.Namespace, names: Iterable[str], why: str) -> None:
        """End the command, as for wrong usage, if one of these was given: `why` says that it does nothing here."""
        flags = {action.dest: action.option_strings[0] for action in self._actions if action.option_strings}
        for name in names:
            default = self.get_default(name)
            if getattr(args, name, default) != default:
                self.error(f"{flags[name]} {why}")

    def add_argument(self, *flags: str, **kwargs):
        hyphenated = [flag.replace("_", "-") for flag in flags if flag.startswith("--") and "_" in flag]
        action = super().add_argument(*flags, *hyphenated, **kwargs)
        if hyphenated:
            # --help shows the guide's spelling only; both are accepted.
            action.option_strings = list(flags)
        return action


def _is_text(word: object) -> bool:
    """Whether a word of the command line can be written down; bytes that are not UTF-8 arrive as lone surrogates."""
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


def score(text: str) -> float:
    """Read --score, a fraction of 1.

    Raises:
        argparse.ArgumentTypeError: if it is not one.
    """
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not between 0 and 1, such as 0.57")


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


def add_layers_flag(parser: CommandParser, *, required: bool, help: str) -> None:
    """Add `--layers`: distinct indices from 0, in any order; the command gets them sorted."""

    class SortedDistinct(argparse.Action):
        def __call__(self, parser, namespace, values, option_string=None):
            repeated = sorted({index for index in values if values.count(index) > 1})
            if repeated:
                raise argparse.ArgumentError(self, f"layer {', '.join(map(str, repeated))} is given more than once")
            setattr(namespace, self.dest, sorted(values))

    parser.add_argument(
        "--layers", nargs="+", type=layer_index, metavar="N", required=required, action=SortedDistinct, help=help
    )


def add_dtype_flag(parser: CommandParser, *, help: str) -> None:
    """Add `--dtype`, the name of a dtype that a model can run in."""
    parser.add_argument("--dtype", choices=MODEL_DTYPES, help=help)


def default_folder(name: str) -> Path:
    """Where a command looks for `name` by default: beside the package in a checkout, else in the current folder."""
    beside = Path(__file__).resolve().parents[1]
    return beside / name if (beside / "pyproject.toml").is_file() else Path(name)


def add_device_flags(parser: CommandParser) -> None:
    """Add `--gpu N` (the guide's) and `--device NAME` (anything torch.device takes)."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--gpu",
        type=number(int, least=0),
        metavar="N",
        help="CUDA device to use (default: 0; the CPU where there is none)",
    )
    group.add_argument("--device", metavar="NAME", help="any torch device instead: cpu, cuda:1, mps, ...")


# Of the garbage collector, in new objects. Libraries make a million of them while they are imported, all of which stay:
# with Python's own 700, walking through them again and again is a quarter of the time that imports take.
_COLLECT_AFTER = 100_000


def run(main: Callable[[], None]) -> None:
    """Run a command's `main` and exit: errors the user can mend are one line on stderr, never a traceback."""
    gc.set_threshold(_COLLECT_AFTER)
    streams = sys.stdout, sys.stderr
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character is no reason to fail
    try:
        sys.stdout, sys.stderr = map(Escaping, streams)
        _run(main)
    finally:
        sys.stdout, sys.stderr = streams
        gc.freeze()  # what is left goes with the process; walking through it once more takes up to a second


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
        sys.exit(_report(f"{reason} Choose a GPU with more free memory by --gpu N, or --device cpu."))
    except OSError as error:
        # The file system's own refusals (disk full, no permission) name the file; a traceback would add nothing.
        where = f" ({error.filename})" if error.filename else ""
        sys.exit(_report(f"{error.strerror or error}{where}."))
    sys.stdout.flush()


def _report(message: str) -> int:
    print(f"error: {escaped(message)}", file=sys.stderr, flush=True)
    return 1
