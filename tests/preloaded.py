"""A `python` for shell scripts that has torch and transformers imported already, to save most of the time.

In: the path for the program. Out: a program there that takes a script, `-c CODE` or `-m MODULE` with
arguments, as python does. The program sends these to a server, with its folder, environment and streams. The
server forks a process that runs them. The program passes on SIGINT and SIGTERM. The server that
`_start_server` starts has imported nothing of this project. Any other arguments go to the usual interpreter.
"""

import atexit
import contextlib
import ctypes
import fcntl
import gc
import importlib
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

_IMPORTED = (
    *("hypothesis", "torch", "transformers.trainer", "transformers.models.llama.modeling_llama", "accelerate", "peft"),
    *("lm_eval.evaluator", "lm_eval.tasks", "nltk", "datasets", "matplotlib.figure", "scipy.stats", "jinja2"),
    *("rich.progress", "blake3"),
)
_LARGE_PAGE = 2 << 20
_MADV_COLLAPSE = 25  # of Linux's mman.h
_CLIENT = """\
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect(sys.argv[1])
asked = {"python": sys.argv[2], "argv": sys.argv[3:], "cwd": os.getcwd(), "environ": dict(os.environ)}
asked = json.dumps(asked).encode()
socket.send_fds(server, [len(asked).to_bytes(4, "big")], [0, 1, 2])
server.sendall(asked)
child = int.from_bytes(server.recv(4), "big")
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda sent, _: os.kill(child, sent))
sys.exit(server.recv(1)[0])
"""


def _start_server(place: str, lock: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1"}  # read when libraries are imported
    folder = Path(place).parent
    with (folder / "log").open("w") as log:
        subprocess.run(
            [sys.executable, __file__, place, lock], env=environment, cwd=folder, check=True, stdout=log, stderr=log
        )


@contextlib.contextmanager
def preloaded_python(start: Callable[[str, str], None] = _start_server) -> Iterator[Callable[[Path], None]]:
    """Yields a function that puts the program at a path. The program works until the context ends.

    All processes of a test run have one server. It ends when none of them uses it any more.

    Args:
        start: starts the server. With `serve`, the server is forked from this process. This process then has
            the imports too.
    """
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    run = os.environ.setdefault("PRELOADED_BY", run[:16])  # a socket's path has at most 107 bytes
    folder = Path(tempfile.gettempdir()) / f"python-{run}"
    place, client = folder / "socket", folder / "client.py"

    def put(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        quick = f'exec "{sys.executable}" -S -E "{client}" "{place}" "$0" "$@"'
        path.write_text(
            f'#!/bin/sh\n[ "$1$2" = -u-c ] && shift\n'  # execnet gives -u, but does not need it
            f'case "$1" in */ray/*) ;; -c|-m|*.py) {quick};; esac\n'
            f'exec "{sys.executable}" "$@"\n'
        )
        path.chmod(0o755)

    with contextlib.ExitStack() as stack:
        with (folder.parent / f"{folder.name}.lock").open("w") as lock:  # one worker at a time, for a moment
            fcntl.flock(lock, fcntl.LOCK_EX)
            folder.mkdir(mode=0o700, exist_ok=True)
            if not place.exists():
                client.write_text(_CLIENT)
                (folder / "used").touch()
                start(str(place), lock.name)
            used = stack.enter_context((folder / "used").open("w"))
            fcntl.flock(used, fcntl.LOCK_SH)
            fcntl.flock(lock, fcntl.LOCK_UN)  # a server forked from here has the file open too
        yield put


def use_large_pages() -> None:
    """Collapse this process's memory into pages of 2 MB, where Linux can (6.1 and newer): its forks take half the time.

    A fork copies an entry for each page. What is written to afterwards is in small pages again.
    """
    if sys.platform != "linux":
        return
    madvise = ctypes.CDLL(None).madvise
    for mapping in Path("/proc/self/maps").read_text().splitlines():
        place, rights, _, _, inode, *_ = mapping.split()
        if rights.startswith("rw") and inode == "0":
            start, end = (int(address, 16) for address in place.split("-"))
            for page in range(-(-start // _LARGE_PAGE) * _LARGE_PAGE, end - _LARGE_PAGE + 1, _LARGE_PAGE):
                madvise(ctypes.c_void_p(page), ctypes.c_size_t(_LARGE_PAGE), _MADV_COLLAPSE)  # an error changes nothing


def skip_side_work() -> None:
    """Leave out side work of libraries: it takes two seconds in each evaluation of all subjects."""
    if "torch.utils" in sys.modules:
        importlib.import_module("torch.utils.collect_env").get_pretty_env_info = lambda: "a machine"  # it asks pip
    if "datasets" in sys.modules:  # the real one pickles every table to name a cache that nobody uses
        random_one = importlib.import_module("datasets.fingerprint").generate_random_fingerprint
        importlib.import_module("datasets.arrow_dataset").generate_fingerprint = lambda dataset: random_one()


def serve(place: str, lock: str) -> None:
    """Import the libraries, and fork a server that answers until nobody uses it."""
    gc.set_threshold(20_000)  # with Python's 700, a fifth of the imports' time is spent on garbage
    for name in _IMPORTED:
        __import__(name)
    skip_side_work()
    gc.freeze()  # what is here stays, so no process forked from here looks through it for garbage
    use_large_pages()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(place)
        listening.listen()
        if os.fork() > 0:
            return
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that answer
        listening.settimeout(1)
        while True:
            try:
                connection, _ = listening.accept()
            except TimeoutError:
                if _ended(Path(place).parent, lock):
                    os._exit(0)
                continue
            connection.setblocking(True)
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listening.close()
                _answer(connection)
            connection.close()


def _ended(folder: Path, lock: str) -> bool:
    """Remove the folder and the lock if nobody uses the server or is about to."""
    with open(lock) as starting, (folder / "used").open() as used:
        try:
            for file in (starting, used):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        shutil.rmtree(folder)
        os.unlink(lock)
        return True


def _answer(connection: socket.socket) -> None:
    size, streams, _, _ = socket.recv_fds(connection, 4, 3)
    with connection.makefile("rb") as file:
        asked = json.loads(file.read(int.from_bytes(size, "big")))
    child = os.fork()
    if child == 0:
        connection.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        _become(**asked)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # of a client that was killed
        connection.sendall(child.to_bytes(4, "big"))
        threading.Thread(target=_end_with_the_client, args=(connection, child), daemon=True).start()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        connection.sendall(bytes([code % 256]))
    os._exit(0)


def _end_with_the_client(connection: socket.socket, child: int) -> None:
    if connection.recv(1) == b"":  # the client was killed
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def renew_threads() -> None:
    """Make torch's thread pool anew in a forked process. If two threads did this at once, one would fail."""
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        torch.set_num_threads(torch.get_num_threads())


def _become(python: str, argv: list[str], cwd: str, environ: dict[str, str]) -> None:
    renew_threads()
    os.setpgid(0, 0)  # Ray kills a lost worker's process group
    offline = environ.get("HF_HUB_OFFLINE") == "1"  # libraries read this variable only when they are imported
    for name in ("huggingface_hub.constants", "datasets.config"):
        sys.modules[name].HF_HUB_OFFLINE = offline  # type: ignore[attr-defined]
    os.chdir(cwd)
    sys.executable = python  # what the command starts is quick too
    os.environ.clear()
    os.environ.update(environ)
    kind, arguments = (argv[0], argv[1:]) if argv[0] in ("-c", "-m") else ("", argv)
    first = str(Path(arguments[0]).resolve().parent) if kind == "" else ""
    added = [path for path in environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [first, *added, *sys.path[1:]]
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
    code: object = 1
    try:
        sys.argv = ["-c", *arguments[1:]] if kind == "-c" else list(arguments)
        if kind == "-c":
            exec(compile(arguments[0], "<string>", "exec"), {"__name__": "__main__"})
        elif kind == "-m":
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(arguments[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


if __name__ == "__main__":
    serve(*sys.argv[1:])
