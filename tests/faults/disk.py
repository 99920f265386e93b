"""What a power cut may leave of a folder, worked out from the changes that a program made in it.

In: the folder as it was, and every change, in order (injector.Note). Out: trees of files as they may be found after a
cut at any moment. After ALICE (Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014).

A change is one of *names* (something is created, linked, renamed or removed) or of *content* (bytes are written, a file
gets longer or shorter). What fsync was called for is there. Of the rest, each file system may lose:

ext4 (data=ordered)
    Changes of names reach the disk in the order in which they were made, so a first part of them is there.
    fsync of a file or folder keeps all changes of names up to the last one about this file or folder.
    Content may reach the disk later, even after a rename, for each file on its own. So a file that has its
    name may be empty; or have its length and zeros; or its beginning; or some of its blocks, in any order.
    In a file that was there before, any block is the old one or the new one.
XFS
    The same, but a file does not get longer before bytes at its new end are there, unless space was reserved for it.
unordered
    The weakest that POSIX allows. Changes of names are lost or kept in any order; only those of the same name in the
    same folder keep theirs. fsync of a folder keeps those made in it, and nothing else does: a synced file may have no
    name. Anything may stand in the place of missing bytes.

More may be lost here than on a real disk: ext4 writes a file's content before it replaces another by rename
(auto_da_alloc), and commits all changes of names at any fsync; neither is counted on. Less may be lost than in ALICE's
weakest model, which takes renames apart: here a rename, or a swap of two names, is there as a whole or not at all, as a
journal has it. Permissions are always those of the end. Times are not kept.
"""

import os
import random
import stat
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from pathlib import Path

from blake3 import blake3

from tests.faults.injector import Note

_BLOCK = 4096
_SWAP = 2  # RENAME_EXCHANGE
_NOTHING_TO_KEEP = ("sync_file_range", "chown", "lchown", "fchown", "fchownat", "utime", "utimes", "futimesat")
_NOTHING_TO_KEEP += ("utimensat", "setxattr", "lsetxattr", "fsetxattr", "chmod", "fchmod", "fchmodat")

Entry = tuple[int, str]  # a folder, and a name in it


@dataclass(frozen=True)
class Found:
    """A file or folder after a cut: its permissions and kind; of a file, what is in it, and a digest of that."""

    mode: int
    content: bytes | None
    digest: str


Tree = dict[str, Found]  # by path


@dataclass(frozen=True)
class FileSystem:
    """What a cut may do.

    Attributes:
        in_order: changes of names keep their order.
        losses: what may be left of content that was not synced; see `Disk._left`.
        grows_first: a file may get longer before the bytes are there.
    """

    in_order: bool
    losses: tuple[str, ...]
    grows_first: bool


FILE_SYSTEMS = {
    "ext4": FileSystem(True, ("lost", "written", "length", "zeros", "torn", "blocks"), True),
    "xfs": FileSystem(True, ("lost", "written", "length", "torn", "blocks"), False),
    "unordered": FileSystem(False, ("lost", "written", "length", "zeros", "foreign", "torn", "blocks"), True),
}


@dataclass(frozen=True)
class NameChange:
    """Call number `at` put a file or folder at each of `entries`, or removed it (None).

    Attributes:
        about: files and folders. Where changes keep their order, an fsync of one of them keeps this change.
    """

    at: int
    entries: dict[Entry, int | None]
    about: Collection[int]


@dataclass(frozen=True)
class ContentChange:
    """At call number `at`, `data` was written at `offset`; or, if that is -1, the file's length was set."""

    at: int
    offset: int
    data: bytes
    size_bytes: int


@dataclass(frozen=True)
class Cut:
    """One way in which the power may fail.

    Attributes:
        at: the number of calls made before.
        names: of the changes of names, the numbers of those that are there.
        loss: one of `FileSystem.losses`, or "any": one is drawn for each file.
        only: the one file that this happens to; None for all.
        seed: of what is drawn.
    """

    at: int
    names: frozenset[int]
    loss: str
    only: int | None
    seed: int


class Disk:
    """A folder and what was done to it.

    Attributes:
        said: what was printed, by the number of the call.
        calls: how many there were.
    """

    def __init__(self, folder: Path):
        """Read `folder` before anything is done in it."""
        self._folder = folder
        self._contents: dict[int, bytes] = {}  # before
        self._modes: dict[int, int] = {}
        self._entries: dict[Entry, int] = {}  # before
        self._names: list[NameChange] = []
        self._changes: dict[int, list[ContentChange]] = {}
        self._syncs: dict[int, list[int]] = {}  # numbers of calls, by what was synced
        self._quiet: list[int] = []  # cuts that are not in the middle of writing
        self._by_inode: dict[int, int] = {}
        self.said: list[tuple[int, str]] = []
        self.calls = 0
        self._find(folder)
        self._now = dict(self._entries)

    def _find(self, path: Path) -> int:
        found = path.lstat()
        if found.st_ino in self._by_inode:
            return self._by_inode[found.st_ino]
        number = self._new(found.st_ino, found.st_mode)
        if stat.S_ISDIR(found.st_mode):
            for child in path.iterdir():
                self._entries[number, child.name] = self._find(child)
        else:
            self._contents[number] = path.read_bytes()
        return number

    def _new(self, inode: int, mode: int) -> int:
        number = len(self._modes)
        self._by_inode[inode] = number
        self._modes[number] = mode
        self._changes[number] = []
        return number

    # --- Taking up what was done --------------------------------------------------------------------------------------

    def take(self, notes: Sequence[Note]) -> None:
        """Take up all changes."""
        for note in notes:
            inside = all(path.is_relative_to(self._folder) for path in note.paths)
            if not inside:
                self.said.append((self.calls, note.data.decode()))
                continue
            self._take(note, self.calls)
            self.calls += 1
            if note.offset < 0:
                self._quiet.append(self.calls)

    def _take(self, note: Note, at: int) -> None:
        name = note.name
        if name in ("open", "openat", "creat"):
            self._take_open(note, at)
        elif name in ("mkdir", "mkdirat"):
            self._rename(at, {self._entry(note.paths[0]): self._new(note.inode, note.mode)})
        elif name in ("link", "linkat"):
            self._rename(at, {self._entry(note.paths[1]): self._now[self._entry(note.paths[0])]})
        elif name in ("rename", "renameat", "renameat2"):
            old, new = map(self._entry, note.paths)
            if self._now[old] != self._now.get(new):
                self._rename(at, {old: self._now[new] if note.flags & _SWAP else None, new: self._now[old]})
        elif name in ("unlink", "unlinkat", "rmdir"):
            self._rename(at, {self._entry(note.paths[0]): None})
        elif name in ("fsync", "fdatasync"):
            self._syncs.setdefault(self._by_inode[note.inode], []).append(at)
        elif note.offset >= 0 or name in ("truncate", "ftruncate") or (name == "fallocate" and note.flags == 0):
            change = ContentChange(at, note.offset, note.data, note.size_bytes)
            self._changes[self._by_inode[note.inode]].append(change)
        elif name not in _NOTHING_TO_KEEP:
            raise NotImplementedError(f"{name} of {note.paths}")
        if note.inode in self._by_inode:
            self._modes[self._by_inode[note.inode]] = note.mode

    def _take_open(self, note: Note, at: int) -> None:
        if note.flags & os.O_TMPFILE == os.O_TMPFILE:
            self._new(note.inode, note.mode)  # it has no name
            return
        entry = self._entry(note.paths[0])
        if entry not in self._now:
            self._rename(at, {entry: self._new(note.inode, note.mode)})
        elif note.flags & os.O_TRUNC:
            self._changes[self._now[entry]].append(ContentChange(at, -1, b"", 0))

    def _rename(self, at: int, entries: dict[Entry, int | None]) -> None:
        moved = {number for entry, after in entries.items() for number in (after, self._now.get(entry))}
        about = frozenset(moved - {None} | {folder for folder, _ in entries})
        self._names.append(NameChange(at, entries, about))
        _apply(self._now, [self._names[-1]])

    def _entry(self, path: Path) -> Entry:
        folder = 0
        *parents, name = path.relative_to(self._folder).parts
        for parent in parents:
            folder = self._now[folder, parent]
        return folder, name

    # --- What may be left ---------------------------------------------------------------------------------------------

    def end(self) -> Cut:
        """No power failure: all is there."""
        return Cut(self.calls, frozenset(range(len(self._names))), "written", None, 0)

    def least(self, system: FileSystem, at: int) -> Cut:
        """Only what was synced is there."""
        return Cut(at, self._sure(system.in_order, at), "lost", None, 0)

    def draw(self, system: FileSystem, chance: random.Random) -> Cut:
        """Any cut, at any moment."""
        at = chance.choice(self._quiet) if chance.random() < 0.7 else chance.randint(0, self.calls)
        loss = chance.choice((*system.losses, "any"))
        pending = [number for number, changes in self._changes.items() if changes and self._is_pending(number, at)]
        only = chance.choice(pending) if pending and chance.random() < 0.5 else None
        return Cut(at, self._draw_names(system, at, chance), loss, only, chance.randrange(1 << 30))

    def _draw_names(self, system: FileSystem, at: int, chance: random.Random) -> frozenset[int]:
        made = [number for number, change in enumerate(self._names) if change.at < at]
        sure = self._sure(system.in_order, at)
        pending = [number for number in made if number not in sure]
        if system.in_order or not pending:
            return frozenset(made[: chance.randint(len(sure), len(made))])
        kind = chance.choice(("all", "least", "but one", "one", "some"))
        if kind == "all":
            return frozenset(made)
        if kind == "least":
            return sure
        one = chance.choice(pending)
        if kind == "but one":
            return frozenset(number for number in made if one not in self._needed(number))
        some = [one] if kind == "one" else chance.sample(pending, chance.randint(1, len(pending)))
        return sure.union(*map(self._needed, some))

    @cache  # noqa: B019 (there are few of these, and they live to the end)
    def _sure(self, in_order: bool, at: int) -> frozenset[int]:
        """The changes of names before call number `at` that are on the disk then."""
        sure: set[int] = set()
        for number, change in enumerate(self._names):
            whose = change.about if in_order else {folder for folder, _ in change.entries}
            if any(change.at < sync < at for one in whose for sync in self._syncs.get(one, ())):
                sure |= set(range(number + 1)) if in_order else self._needed(number)
        return frozenset(sure)

    @cache  # noqa: B019
    def _needed(self, number: int) -> frozenset[int]:
        """A change of names, and those of the same names before it."""
        change = self._names[number]
        needed = {number}
        for before in range(number):
            if self._names[before].entries.keys() & change.entries.keys():
                needed |= self._needed(before)
        return frozenset(needed)

    def _is_pending(self, number: int, at: int) -> bool:
        last_sync = max((sync for sync in self._syncs.get(number, ()) if sync < at), default=-1)
        return any(last_sync < change.at < at for change in self._changes[number])

    def tree(self, system: FileSystem, cut: Cut) -> Tree:
        """What is found after a cut."""
        entries = dict(self._entries)
        _apply(entries, [self._names[number] for number in sorted(cut.names)])
        tree: Tree = {}
        for path, number in _walk(entries):
            mode = self._modes[number]
            if stat.S_ISDIR(mode):
                tree[path] = Found(mode, None, "")
            else:
                loss = cut.loss if cut.only in (None, number) else "written"
                seed = cut.seed + number
                if loss == "any":
                    loss = random.Random(seed).choice(system.losses)
                if loss not in ("torn", "blocks"):
                    seed = 0  # nothing is drawn
                calls = [*(change.at for change in self._changes[number]), *self._syncs.get(number, ())]
                at = 1 + max((call for call in calls if call < cut.at), default=-1)
                content, digest = self._content(system.grows_first, number, at, loss, seed)
                tree[path] = Found(mode, content, digest)
        return tree

    def shape(self, tree: Tree) -> tuple[tuple[str, str], ...]:
        """Which files there are, and whether each is empty, broken, or whole: as before or at a sync."""

        def kind(content: bytes | None) -> str:
            if not content:
                return "folder" if content is None else "empty"
            return "whole" if content in self._whole else "broken"

        return tuple(sorted((path, kind(found.content)) for path, found in tree.items()))

    @cached_property
    def _whole(self) -> set[bytes]:
        """What each file was before, and at each sync."""
        found = set(self._contents.values())
        for number, syncs in self._syncs.items():
            found |= {self._left(True, number, sync, "written", random.Random()) for sync in syncs}
        return found

    @lru_cache(maxsize=1000)  # noqa: B019
    def _content(self, grows_first: bool, number: int, at: int, loss: str, seed: int) -> tuple[bytes, str]:
        content = self._left(grows_first, number, at, loss, random.Random(seed))
        return content, blake3(content).hexdigest()

    def _left(self, grows_first: bool, number: int, at: int, loss: str, chance: random.Random) -> bytes:
        """What is left of a file's content.

        Of what was not synced, "lost" leaves nothing, and "written" everything. "length" leaves only the lengths that
        were set. "zeros" and "foreign" leave the final length, with zeros or other bytes in it. "torn" leaves a first
        part, and "blocks" some blocks.
        """
        changes = [change for change in self._changes[number] if change.at < at]
        last_sync = max((sync for sync in self._syncs.get(number, ()) if sync < at), default=-1)
        synced = _written(self._contents.get(number, b""), [change for change in changes if change.at < last_sync])
        pending = [change for change in changes if change.at > last_sync]
        if loss == "lost" or not pending:
            return synced
        if loss == "torn":
            *before, last = pending[: chance.randint(1, len(pending))]
            torn = replace(last, data=last.data[: chance.randint(0, len(last.data))])
            return _written(synced, [*before, torn])
        written = _written(synced, pending)
        if loss == "written":
            return written
        length = _written(synced, [change for change in pending if change.offset < 0])
        if loss == "length":
            return length
        if loss == "foreign":
            return length + (b"ZmFr" * (len(written) // 4 + 1))[len(length) : len(written)]
        found = bytearray(length.ljust(len(written), b"\0"))
        if loss == "zeros":
            return bytes(found)
        end = len(length)
        for start in range(0, len(written), _BLOCK):
            if chance.random() < 0.5:
                found[start : start + _BLOCK] = written[start : start + _BLOCK]
                end = max(end, min(start + _BLOCK, len(written)))
        return bytes(found if grows_first else found[:end])


def _apply(entries: dict[Entry, int], changes: Sequence[NameChange]) -> None:
    for change in changes:
        for entry, number in change.entries.items():
            if number is None:
                entries.pop(entry, None)
            else:
                entries[entry] = number


def _walk(entries: dict[Entry, int]) -> Iterator[tuple[str, int]]:
    """(path, file or folder) of all that can be reached; folders before what is in them."""
    inside: dict[int, list[tuple[str, int]]] = {}
    for (folder, name), number in entries.items():
        inside.setdefault(folder, []).append((name, number))
    found = [("", 0)]
    while found:
        path, folder = found.pop()
        for name, number in inside.get(folder, ()):
            found.append((f"{path}{name}/", number))
            yield f"{path}{name}", number


def _written(content: bytes, changes: Sequence[ContentChange]) -> bytes:
    found = bytearray(content)
    for change in changes:
        end = change.size_bytes if change.offset < 0 else max(len(found), change.offset + len(change.data))
        found = found[:end].ljust(end, b"\0")
        if change.offset >= 0:
            found[change.offset : change.offset + len(change.data)] = change.data
    return bytes(found)


def put(tree: Tree, folder: Path) -> None:
    """Make the files and folders of a tree in an empty folder."""
    for name, found in tree.items():
        path = folder / name
        if found.content is None:
            path.mkdir()
        else:
            path.write_bytes(found.content)
        path.chmod(stat.S_IMODE(found.mode))


def digest_of(tree: Tree, top: str = "") -> str:
    """A digest of what is at `top`, or below it."""
    chosen = {path: found for path, found in tree.items() if path == top or path.startswith(f"{top}/") or not top}
    lines = sorted(f"{path}\0{found.mode}\0{found.digest}" for path, found in chosen.items())
    return blake3("\n".join(lines).encode(errors="surrogateescape")).hexdigest()
