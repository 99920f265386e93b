"""A hook that tells Ray how to start a command's workers, so that they have torch imported already.

The hook runs in the command, whose own `python` is the one of tests/preloaded.py.
"""

import sys

# Ray brings its own psutil, and its workers crash with another that was imported before.
_START = (
    "import runpy, sys; [sys.modules.pop(name) for name in list(sys.modules) if name.startswith('psutil')]; "
    "del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
)


def environment(of_command: dict | None) -> dict:
    """The runtime environment of the command's workers."""
    return {**(of_command or {}), "py_executable": f'{sys.executable} -c "{_START}"'}
