"""Random damage to the files that this project reads.

Each function takes a file's bytes and a `random.Random`, and returns other bytes. Functions for a format keep the rest
of the file right (lengths, CRCs, offsets), so that the damage gets past the first checks. fuzz.py and some tests use
these functions.
"""

import io
import json
import pickletools
import struct
import zipfile
from random import Random

INTERESTING = [0, 1, 2, 7, 8, 63, 64, 127, 255, 256, 1023, 4096, 65535, 65536, 1 << 24, (1 << 31) - 1, 1 << 31]
INTERESTING += [(1 << 32) - 1, 1 << 32, 10**9, 10**12, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
NAMES = ["../secret.json", "/etc/hostname", "..\\secret.json", "", ".", "..", "a/../../secret.json", "x\0y", "fifo"]
NAMES += ["/dev/zero", "link", "C:secret", "\ud800", "n" * 5000, "checkpoint_info.json", "model.pt", "layer_00.pt"]
GLOBALS = ["posix\nsystem", "os\nsystem", "builtins\neval", "__builtin__\nset"]
GLOBALS += ["builtins\nbytearray", "_codecs\nencode"]
GLOBALS += ["torch\nSize", "torch\ndevice", "torch\nTensor", "torch\nLongStorage", "torch\nByteStorage"]
GLOBALS += ["torch._utils\n_rebuild_parameter", "torch._utils\n_rebuild_sparse_tensor", "collections\nOrderedDict"]
GLOBALS += ["torch.nn.modules.sparse\nEmbedding", "torch._utils\n_rebuild_meta_tensor_no_storage", "sys\nexit"]
GLOBALS += ["torch.storage\nUntypedStorage", "torch._tensor\n_rebuild_from_type_v2", "collections\nCounter"]


CONFIG_KEYS = ["auto_map", "_attn_implementation", "attn_implementation", "to_dict", "quantization_config"]
CONFIG_KEYS += ["layer_types", "llama_layers", "llama_cfg", "dtype", "_name_or_path", "configuration_files"]
CONFIG_KEYS += ["rope_scaling", "head_dim"]


def mutate(name: str, data: bytes, rng: Random) -> bytes:
    """The bytes of the file `name` with 1, 2 or 4 faults, most of them faults of the file's format."""
    kinds = [any_bytes]
    if name.endswith((".pt", ".bin")):
        kinds += [zip_numbers, zip_entries, pickle_opcodes, pickle_opcodes]
    elif name.endswith(".json"):
        kinds += [json_values] * 4
    elif name.endswith(".safetensors"):
        kinds += [safetensors_header] * 4
    kind = rng.choice(kinds)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        try:
            data = kind(data, rng)
        except (ValueError, KeyError, IndexError, struct.error, zipfile.BadZipFile, RecursionError, OverflowError):
            data = any_bytes(data, rng)  # an earlier fault left nothing that this kind understands
    return data


def any_bytes(data: bytes, rng: Random) -> bytes:
    """Flip, overwrite, remove, repeat or insert bytes anywhere, or cut off the end."""
    if not data:
        return rng.randbytes(8)
    place = rng.randrange(len(data))
    length = rng.choice([1, 2, 4, 8, 100, 5000])
    kind = rng.randrange(6)
    if kind == 0:
        return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]
    if kind == 1:
        number = rng.choice(INTERESTING) & (1 << 32) - 1
        return data[:place] + struct.pack("<I", number) + data[place + 4 :]
    if kind == 2:
        return data[:place] + data[place + length :]
    if kind == 3:
        return data[:place] + data[place : place + length] * rng.choice([2, 3, 50]) + data[place + length :]
    if kind == 4:
        return data[:place] + rng.randbytes(length) + data[place:]
    return data[:place]


def zip_numbers(data: bytes, rng: Random) -> bytes:
    """Put another number into a local header, a data descriptor, or an entry or end record of the directory."""
    signature = rng.choice([b"PK\x03\x04", b"PK\x01\x02", b"PK\x01\x02", b"PK\x05\x06", b"PK\x07\x08"])
    places = [i for i in range(len(data) - 46) if data.startswith(signature, i)] if len(data) < 50_000 else []
    start = rng.choice(places) if places else max(data.rfind(signature), 0)
    field = start + 4 + 2 * rng.randrange(21)
    size = rng.choice([2, 4, 4, 8])
    number = rng.choice([*INTERESTING, len(data), start, rng.randrange(len(data) + 1)]) & (1 << 8 * size) - 1
    return data[:field] + number.to_bytes(size, "little") + data[field + size :]


def zip_entries(data: bytes, rng: Random) -> bytes:
    """Write the archive anew, with an entry renamed, doubled, removed, cut, grown or exchanged, or all compressed."""
    entries = unzip(data)
    index = rng.randrange(len(entries))
    name, content = entries[index]
    kind = rng.randrange(7)
    if kind == 0:
        entries[index] = (
            name.partition("/")[0] + "/" + rng.choice([*NAMES, "constants.pkl", "DATA/0", "data/0"]),
            content,
        )
    elif kind == 1:
        entries.append((name, content))
    elif kind == 2:
        del entries[index]
    elif kind == 3:
        entries[index] = (name, content[: len(content) // 2])
    elif kind == 4:
        entries[index] = (name, content + bytes(rng.choice([1, 4, 4096])))
    elif kind == 5:
        other = rng.randrange(len(entries))
        entries[index], entries[other] = (name, entries[other][1]), (entries[other][0], content)
    return zip_of(entries, compressed=kind == 6)


def pickle_opcodes(data: bytes, rng: Random) -> bytes:
    """Change, drop, repeat, insert or exchange opcodes of data.pkl, in an archive that is otherwise right."""
    entries = unzip(data)
    index = next(i for i, (name, _) in enumerate(entries) if name.endswith("/data.pkl"))
    entries[index] = (entries[index][0], changed_pickle(entries[index][1], rng))
    return zip_of(entries)


def changed_pickle(content: bytes, rng: Random) -> bytes:
    starts = [place for _, _, place in pickletools.genops(content)]
    opcodes = [content[a:b] for a, b in zip(starts, [*starts[1:], len(content)], strict=True)]
    index = rng.randrange(1, len(opcodes))
    kind = rng.randrange(8)
    if kind == 0:
        opcodes[index] = b"c" + rng.choice(GLOBALS).encode() + b"\n"
    elif kind == 1:
        places = [i for i, opcode in enumerate(opcodes) if opcode[:1] in b"KMJ"]
        number = rng.choice(INTERESTING)
        opcodes[rng.choice(places)] = b"\x8a\x09" + (number * rng.choice([1, 1, -1])).to_bytes(9, "little", signed=True)
    elif kind == 2:
        del opcodes[index]
    elif kind == 3:
        opcodes[index:index] = opcodes[index : index + rng.randrange(1, 9)] * rng.choice([1, 2, 2000])
    elif kind == 4:
        other = rng.randrange(1, len(opcodes))
        opcodes[index], opcodes[other] = opcodes[other], opcodes[index]
    elif kind == 5:
        opcodes.insert(
            index, rng.choice([b"N", b"(", b"t", b"\x85" * 50_000, b"R", b"b", b"\x81", b"Q", b"0", b"2", b"e"])
        )
    elif kind == 6:
        text = rng.choice(NAMES).encode("utf-8", "surrogatepass")
        places = [i for i, opcode in enumerate(opcodes) if opcode[:1] == b"X"]
        opcodes[rng.choice(places)] = b"X" + struct.pack("<I", len(text)) + text
    else:
        payload = b"\x8c\x05posix\x94\x8c\x06system\x94\x93\x8c\x04true\x85R0"  # STACK_GLOBAL
        opcodes.insert(
            index, rng.choice([payload, b"(X\x04\0\0\0trueiposix\nsystem\n0", b"cposix\nsystem\n(X\x04\0\0\0truetR0"])
        )
    return b"".join(opcodes)


def json_values(data: bytes, rng: Random) -> bytes:
    """Replace a value by one of any type; drop, rename, add or repeat a key; nest deeply; write NaN or huge numbers."""
    value = json.loads(data)
    holders: list[tuple[dict | list, str | int]] = []
    waiting: list = [value]
    while waiting:
        item = waiting.pop()
        pairs = item.items() if isinstance(item, dict) else enumerate(item) if isinstance(item, list) else ()
        for key, inner in list(pairs):
            holders.append((item, key))
            waiting.append(inner)
    holder, key = rng.choice(holders)
    kind = rng.randrange(12)
    if kind < 6:
        holder[key] = odd_value(holder[key], rng)  # type: ignore[index]
    elif kind == 6:
        del holder[key]  # type: ignore[arg-type]
    elif kind == 7 and isinstance(holder, dict):
        holder[rng.choice([*NAMES, *map(str, INTERESTING)])] = holder.pop(key)  # type: ignore[arg-type]
    elif kind == 8 and isinstance(holder, dict):
        holder[rng.choice(CONFIG_KEYS)] = odd_value(None, rng)
    text = json.dumps(value)
    if kind == 9:
        text = '{"twice": 1, "twice": 2,' + text[1:]
    elif kind == 10:
        depth = rng.choice([70, 5000, 200_000])
        text = text.replace(": ", ": " + "[" * depth + "]" * depth + ', "x": ', 1)
    elif kind == 11:
        text = text.replace(
            ": ", ": " + rng.choice(["NaN", "1e999", "-Infinity", "9" * 5000, '"\\ud800"']) + ', "y": ', 1
        )
    return text.encode()


def odd_value(value: object, rng: Random) -> object:
    number = rng.choice(INTERESTING)
    long = "x" * number if number < 5000 else ""
    odd: list[object] = [None, True, False, number, -number, number + 0.5, rng.choice(NAMES), long, []]
    odd += [{}, [number], [[]], {"a": number}, [value], {"x": value}, str(value)[:99], "float64", "cuda:0", "bfloat16"]
    if isinstance(value, int) and not isinstance(value, bool):
        odd += [value + 1, value - 1, value * 2, -value, float(value)] * 3
    return rng.choice(odd)


def safetensors_header(data: bytes, rng: Random) -> bytes:
    """Change the header's JSON, and write its new length, or seldom a wrong length."""
    length = int.from_bytes(data[:8], "little")
    header = json_values(data[8 : 8 + length], rng)
    told = len(header) if rng.random() < 0.9 else rng.choice(INTERESTING)
    return told.to_bytes(8, "little") + header + data[8 + length :]


def unzip(data: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(info.filename, archive.read(info)) for info in archive.infolist()]


def zip_of(entries: list[tuple[str, bytes]], compressed: bool = False) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in entries:
            info = zipfile.ZipInfo(name.replace("\0", "_").encode("utf-8", "replace").decode())
            info.compress_type = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
            archive.writestr(info, content)
    return buffer.getvalue()
