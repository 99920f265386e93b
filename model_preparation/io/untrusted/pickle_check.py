"""Checks the pickle in a .pt file before torch reads it, without running or building anything. Refuses unknown globals.

torch's weights_only unpickler checks the pickle again. But for some opcodes (STACK_GLOBAL, INST), torch's error has
only a number; this check names the global. This check also refuses calls that torch would run, such as
`bytearray(10**12)` or an Embedding of any size. It refuses tuples nested so deeply that hashing them
overflows the C stack. `globals_in` lists the globals of old pickled modules.

Sources: Python's pickletools for the opcodes, torch/_weights_only_unpickler.py for the opcodes that torch knows.
"""

import functools
import pickletools
import re
import zipfile
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from model_preparation.errors import SurgeryError
from model_preparation.io.tensors.dtypes import DType

MAX_PICKLE_BYTES = 16_000_000
_MAX_MODULE_PICKLE_BYTES = 64_000_000  # for an old layer, whose pickle has about 10 KB
_OLD_FORMAT_PICKLES = 4  # magic number, protocol, system, the object; the tensors come after them
_MAX_TUPLE_DEPTH, _MAX_TUPLE_ITEMS = 16, 1000  # with the items of nested tuples

DTYPE_OF_STORAGE = {
    "torch.DoubleStorage": DType("float64", 8),
    "torch.FloatStorage": DType("float32", 4),
    "torch.HalfStorage": DType("float16", 2),
    "torch.BFloat16Storage": DType("bfloat16", 2),
    "torch.LongStorage": DType("int64", 8),
    "torch.IntStorage": DType("int32", 4),
    "torch.ShortStorage": DType("int16", 2),
    "torch.CharStorage": DType("int8", 1),
    "torch.ByteStorage": DType("uint8", 1),
    "torch.BoolStorage": DType("bool", 1),
}
# Names of storages and dtypes, and of the function that rebuilds tensors of newer dtypes.
_NUMBERS = re.compile(
    r"torch\.(\w+Storage|q?u?int\d\w*|float\d\w*|complex\d+|storage\.UntypedStorage|_utils\._rebuild_tensor_v3)"
)
_TENSOR_BUILDERS = {"torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"}
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # torch.save's protocol has Python 2's names


@dataclass(frozen=True)
class Allowed:
    """Globals that a pickle may name: functions to call, classes to create without arguments, and constants."""

    functions: frozenset[str]
    classes: frozenset[str] = frozenset()
    constants: frozenset[str] = frozenset()

    def __contains__(self, name: str) -> bool:
        return name in self.functions or name in self.classes or name in self.constants or name in DTYPE_OF_STORAGE


# What the pickle of a state dict may name.
TENSORS = Allowed(
    functions=frozenset(_TENSOR_BUILDERS | {"torch._tensor._rebuild_from_type_v2", "collections.OrderedDict"}),
    constants=frozenset({"torch.Tensor", "torch.nn.parameter.Parameter"}),
)


@functools.cache
def allowed_in_module() -> Allowed:
    """What the pickle of a whole module of ours may name."""
    from model_preparation.llamba.safe_globals import SAFE_GLOBALS  # here, because these imports take seconds

    return Allowed(
        functions=TENSORS.functions | {"builtins.set"},
        classes=frozenset(f"{cls.__module__}.{cls.__qualname__}" for cls in SAFE_GLOBALS),
        constants=TENSORS.constants | {str(dtype) for dtype in DTYPE_OF_STORAGE.values()},
    )


@dataclass
class PickleScan:
    """What a pickle refers to: the size of each storage in bytes, by key, and the globals that it names."""

    storages: dict[str, int] = field(default_factory=dict)
    globals: set[str] = field(default_factory=set)


def scan(data: bytes, allowed: Allowed) -> PickleScan:
    """Check a pickle, and return what it refers to.

    Raises:
        ValueError: for globals or calls that are not allowed, with their names; for opcodes that torch.save never
            writes; for a pickle that is damaged or too large.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise ValueError(f"its data.pkl has {len(data)} bytes, more than {MAX_PICKLE_BYTES // 1_000_000} MB")
    machine = _Machine(allowed)
    complaint = None
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if complaint is None:
                try:
                    machine.step(opcode.name, argument)
                except ValueError as error:
                    complaint = str(error)
                except (IndexError, KeyError):
                    complaint = "its pickle is damaged"
            elif opcode.name in _BY_NAME:  # go on for these only: a global's name tells the user most
                machine.name(str(argument))
    except ValueError as error:
        complaint = complaint or str(error)
    if machine.refused:
        names = ", ".join(f"{name:.100}" for name in list(machine.refused)[:10])
        if all(map(_NUMBERS.fullmatch, machine.refused)):
            complaint = f"it holds numbers of a kind that is not known here ({names})"
        else:
            complaint = f"it names {names}, which could run code"
    if complaint is not None:
        raise ValueError(complaint)
    return machine.found


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass(frozen=True)
class _Tuple:
    items: tuple
    depth: int
    size: int


_Other = object  # floats, dicts, lists, results of calls: not checked further


class _Machine:
    """Imitates the unpickler's stack and memo. Globals, strings, integers and tuples are kept; others are `_Other`."""

    def __init__(self, allowed: Allowed):
        self.found = PickleScan()
        self.refused: dict[str, None] = {}  # names of refused globals, in the order of the pickle
        self._allowed = allowed
        self._stack: list = []
        self._marks: list[list] = []
        self._memo: dict[int, object] = {}

    def step(self, opcode: str, argument) -> None:
        if opcode in _VALUES:
            self._stack.append(argument)
        elif opcode in _EMPTY:
            self._stack.append(_Other())
        elif opcode in _SKIPPED:
            pass
        elif opcode in _PUT:
            self._memo[argument] = self._stack[-1]
        elif opcode == "MEMOIZE":
            self._memo[len(self._memo)] = self._stack[-1]
        elif opcode in _GET:
            self._stack.append(self._memo[argument])
        elif opcode == "MARK":
            self._marks.append(self._stack)
            self._stack = []
        elif opcode in _TUPLES:
            self._tuple(self._pop_mark() if opcode == "TUPLE" else self._pop(_TUPLES[opcode]))
        elif opcode in ("APPENDS", "SETITEMS"):
            self._pop_mark()
            self._stack[-1]  # raises IndexError if the list or dict is missing
        elif opcode in ("APPEND", "SETITEM", "BUILD"):
            self._pop(2 if opcode == "SETITEM" else 1)
            self._stack[-1]
        elif opcode == "GLOBAL":
            self._stack.append(self.name(argument))
        elif opcode in ("INST", "STACK_GLOBAL"):
            module, name = argument.split(" ", 1) if opcode == "INST" else self._pop(2)
            hidden = not isinstance(module, str) or not isinstance(name, str)
            self.name("unknown name" if hidden else f"{module} {name}")
            raise ValueError(f"its pickle has the opcode {opcode}, which torch.save never writes")
        elif opcode in ("REDUCE", "NEWOBJ"):
            self._call(opcode, *self._pop(2))
        elif opcode == "BINPERSID":
            self._storage(self._stack.pop())
        elif opcode == "STOP":
            self._stack.pop()
        else:
            raise ValueError(f"its pickle has the opcode {opcode}, which torch.save never writes")

    def _pop(self, count: int) -> list:
        if len(self._stack) < count:
            raise IndexError
        popped = self._stack[len(self._stack) - count :]
        del self._stack[len(self._stack) - count :]
        return popped

    def _pop_mark(self) -> list:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _tuple(self, items: Collection) -> None:
        inner = [item for item in items if isinstance(item, _Tuple)]
        depth = 1 + max((item.depth for item in inner), default=0)
        size = len(items) + sum(item.size for item in inner)
        if depth > _MAX_TUPLE_DEPTH or size > _MAX_TUPLE_ITEMS:
            raise ValueError("its pickle nests tuples too deeply")
        self._stack.append(_Tuple(tuple(items), depth, size))

    def name(self, argument: str) -> _Global:
        """Note and return the global in `argument`, which is "module name"."""
        module, _, rest = argument.partition(" ")
        name = f"{_PYTHON_2.get(module, module)}.{rest}"
        if name in self._allowed:
            self.found.globals.add(name)
        else:
            self.refused[ascii(name)[1:-1]] = None
        return _Global(name)

    def _call(self, opcode: str, callee: object, arguments: object) -> None:
        name = callee.name if isinstance(callee, _Global) else ""
        items = arguments.items if isinstance(arguments, _Tuple) else None
        if opcode == "NEWOBJ":
            fine = name in self._allowed.classes and items == ()
        else:
            fine = name in self._allowed.functions and items is not None
            if name == "torch._tensor._rebuild_from_type_v2":  # it calls its first argument
                builder = items[0] if items else None
                fine = isinstance(builder, _Global) and builder.name in _TENSOR_BUILDERS
        if not fine and (not name or name in self._allowed):
            raise ValueError(f"it calls {name or 'an object it made'} in a way torch.save never writes")
        self._stack.append(_Other())

    def _storage(self, reference: object) -> None:
        def refuse() -> NoReturn:
            raise ValueError("its pickle refers to a storage in a way torch.save never writes")

        if not isinstance(reference, _Tuple) or len(reference.items) != 5:
            refuse()
        kind, storage_class, key, _, count = reference.items
        if kind != "storage" or not isinstance(storage_class, _Global) or storage_class.name not in DTYPE_OF_STORAGE:
            refuse()
        if not isinstance(key, str) or not isinstance(count, int) or isinstance(count, bool) or count < 0:
            refuse()
        size_bytes = count * DTYPE_OF_STORAGE[storage_class.name].itemsize
        if self.found.storages.setdefault(key, size_bytes) != size_bytes:
            refuse()
        self._stack.append(_Other())


# Opcodes that push their argument. torch does not know those in the second line. They may push a part
# of a global's name.
_VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINSTRING"}
_VALUES |= {"SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "STRING", "BINSTRING"}
_BY_NAME = ("GLOBAL", "INST")
_EMPTY = {"NONE", "NEWTRUE", "NEWFALSE", "BINFLOAT", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"}
_SKIPPED = {"PROTO", "FRAME"}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "TUPLE": -1}


def globals_in(path: Path) -> set[str]:
    """Every class or function that would be imported to load a torch.save file, such as "collections.OrderedDict".

    If a file hides the name of a global, as only attackers do, the set has `HIDDEN_GLOBAL`.

    The file is a zip file (from torch 1.6 on), or several pickles in a row (from older versions).

    Raises:
        SurgeryError: if torch.save did not write the file.
    """
    try:
        with path.open("rb") as file:
            if zipfile.is_zipfile(file):
                return _globals_of(pickletools.genops(_pickle_of(file)))
            file.seek(0)
            return set().union(*(_globals_of(pickletools.genops(file)) for _ in range(_OLD_FORMAT_PICKLES)))
    except (ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
        raise SurgeryError(
            f"{path} is not a file that torch.save wrote ({' '.join(str(error).split())[:100]}). Copy it again."
        ) from error


def _pickle_of(file: BinaryIO) -> bytes:
    with zipfile.ZipFile(file) as archive:
        inner = {name.partition("/")[2]: name for name in archive.namelist()}
        if "constants.pkl" in inner:
            raise ValueError("it is a TorchScript program")
        if "data.pkl" not in inner:
            raise ValueError("it is a zip file without data.pkl")
        with archive.open(inner["data.pkl"]) as member:
            data = member.read(_MAX_MODULE_PICKLE_BYTES + 1)
    if len(data) > _MAX_MODULE_PICKLE_BYTES:
        raise ValueError(f"its pickle has more than {_MAX_MODULE_PICKLE_BYTES} bytes")
    return data


def _globals_of(operations: Iterable[tuple[Any, Any, Any]]) -> set[str]:
    """The globals of one pickle. Newer protocols push the module and the name separately, perhaps from the memo.

    Writers of pickles push both directly before they are used. Anything else counts as `HIDDEN_GLOBAL`.
    """
    found = set()
    memo: dict[int, str | None] = {}
    pushed: list[str | None] = []  # by the operations just before this one; None: it is not known, or no text
    for operation, argument, _ in operations:
        name = operation.name
        if name in _TEXT:
            pushed.append(argument)
        elif name in _GET:
            pushed.append(memo.get(argument))
        elif name == "MEMOIZE" or name in _PUT:
            memo[len(memo) if name == "MEMOIZE" else argument] = pushed[-1] if pushed else None
        elif name not in _SKIPPED:
            if name in _BY_NAME:
                found.add(argument.replace(" ", "."))
            elif name == "STACK_GLOBAL":
                names = [text for text in pushed[-2:] if text is not None]
                found.add(".".join(names) if len(names) == 2 else HIDDEN_GLOBAL)
            elif name in _REGISTERED:
                found.add(HIDDEN_GLOBAL)
            pushed = []
    return found


HIDDEN_GLOBAL = "a global whose name the file hides"
_REGISTERED = {"EXT1", "EXT2", "EXT4"}  # globals that have a number instead of a name
_TEXT = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE", "SHORT_BINSTRING", "BINSTRING", "STRING"}
_PUT = {"PUT", "BINPUT", "LONG_BINPUT"}
_GET = {"GET", "BINGET", "LONG_BINGET"}
