"""Restricts this process: no network, no writing outside one folder. Reading a stranger's file needs neither.

Systems differ, so each restriction is tried. The process cannot undo a restriction. Call `enter` before any thread
starts. This module uses only the standard library.

Sources: Linux's man pages user_namespaces(7), seccomp(2), landlock(7); headers linux/filter.h, linux/seccomp.h,
linux/audit.h, linux/landlock.h.
"""

import ctypes
import os
import platform
import struct
from pathlib import Path

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, _PR_SET_NO_NEW_PRIVS = 22, 2, 38

# By machine: its AUDIT_ARCH, and the system calls that can open a connection: socket, io_uring_setup.
_FORBIDDEN_CALLS = {"x86_64": (0xC000003E, (41, 425)), "aarch64": (0xC00000B7, (198, 425))}
_X32_CALLS = 0x40000000  # x86_64's second set of call numbers starts here
_LOAD, _JUMP_IF_EQUAL, _JUMP_IF_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | 13  # EACCES

# These call numbers are the same on every machine.
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_WRITE_ACCESS = 0b1_1111_1111_0010  # write to, remove and make files and folders of every kind
_WRITE_FILE, _REFER, _TRUNCATE = 1 << 1, 1 << 13, 1 << 14
_SCOPE_SOCKETS_AND_SIGNALS = 0b11


def enter(writable: Path) -> dict[str, bool]:
    """Restrict this process; returns which restrictions hold.

    Args:
        writable: the only folder in which the process may still make, change or remove files.

    Returns:
        "namespace": a network of its own, with only its own loopback. "sockets": the system calls that can
        open a connection are refused. "files": writing outside `writable` is refused, except to /dev/null.
        All are False on other systems than Linux.
    """
    if platform.system() != "Linux":
        return {"namespace": False, "sockets": False, "files": False}
    libc = ctypes.CDLL(None, use_errno=True)
    namespace = libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) == 0
    # Without root's rights, the next two steps need this flag. It also stops started programs from gaining rights.
    libc.prctl(_PR_SET_NO_NEW_PRIVS, *map(ctypes.c_ulong, (1, 0, 0, 0)))
    return {"namespace": namespace, "files": _refuse_writing(libc, writable), "sockets": _refuse_sockets(libc)}


def _refuse_sockets(libc: ctypes.CDLL) -> bool:
    """Install a system call filter. It also refuses Unix sockets with a path, which a namespace does not refuse."""
    if platform.machine() not in _FORBIDDEN_CALLS:
        return False
    architecture, calls = _FORBIDDEN_CALLS[platform.machine()]
    # A jump gives the number of instructions to skip; the last instruction refuses.
    checks = [(_JUMP_IF_EQUAL, call) for call in calls] + [(_JUMP_IF_AT_LEAST, _X32_CALLS)]
    program = [(_LOAD, 0, 0, 4), (_JUMP_IF_EQUAL, 0, len(checks) + 2, architecture), (_LOAD, 0, 0, 0)]
    program += [(check, len(checks) - position, 0, value) for position, (check, value) in enumerate(checks)]
    program += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _REFUSE)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *instruction) for instruction in program))
    filter_ = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))
    return libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(_SECCOMP_MODE_FILTER), filter_, *map(ctypes.c_ulong, (0, 0))) == 0


def _refuse_writing(libc: ctypes.CDLL, writable: Path) -> bool:
    """Refuse writing by Landlock. A new enough kernel also refuses signals to other processes."""
    version = libc.syscall(ctypes.c_long(_LANDLOCK_CREATE_RULESET), None, ctypes.c_size_t(0), ctypes.c_uint(1))
    if version < 1:
        return False
    access = _WRITE_ACCESS | (_REFER if version >= 2 else 0) | (_TRUNCATE if version >= 3 else 0)
    rules = struct.pack("=QQQ", access, 0, _SCOPE_SOCKETS_AND_SIGNALS)[: 24 if version >= 6 else 8]
    ruleset = libc.syscall(
        ctypes.c_long(_LANDLOCK_CREATE_RULESET), rules, ctypes.c_size_t(len(rules)), ctypes.c_uint(0)
    )
    if ruleset < 0:
        return False
    try:
        for path, permitted in ((writable, access), (Path(os.devnull), _WRITE_FILE)):
            place = os.open(path, os.O_PATH)
            try:
                rule = (ctypes.c_int(1), struct.pack("=Qi", permitted, place), ctypes.c_uint(0))
                if libc.syscall(ctypes.c_long(_LANDLOCK_ADD_RULE), ctypes.c_int(ruleset), *rule) != 0:
                    return False
            finally:
                os.close(place)
        return libc.syscall(ctypes.c_long(_LANDLOCK_RESTRICT_SELF), ctypes.c_int(ruleset), ctypes.c_uint(0)) == 0
    finally:
        os.close(ruleset)
