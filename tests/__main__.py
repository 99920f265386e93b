"""`python -m tests ARGUMENTS` runs `pytest ARGUMENTS` with workers forked from a process that has torch."""

import sys
import tempfile
from pathlib import Path

from tests.preloaded import preloaded_python, serve

with preloaded_python(serve) as put, tempfile.TemporaryDirectory() as folder:
    import pytest

    put(Path(folder, "python"))

    class ForkedWorkers:
        def pytest_xdist_setupnodes(self, specs):
            for spec in specs:
                spec.python = str(Path(folder, "python"))

    flags = ("-W", "ignore::pytest.PytestAssertRewriteWarning")  # hypothesis is imported, and its asserts are not ours
    flags += ("-p", "no:anyio")  # whose plugin nothing here uses
    sys.exit(pytest.main([*sys.argv[1:], *flags], plugins=[ForkedWorkers()]))
