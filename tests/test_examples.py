"""examples/: a script for each public function, each of which runs and says what it found."""

import json
import threading
from pathlib import Path

import model_preparation
from tests.conftest import run_python
from tests.upload_hub import TOKEN, UploadHub

EXAMPLES = Path(__file__).parents[1] / "examples"
FUNCTIONS = [name for name in model_preparation.__all__ if name[0].islower()]
# These run first, because other examples need their results.
FIRST = ["extract_layers", "build_checkpoint", "evaluate_checkpoint"]
# Runs all examples in one process, because imports take longer than the examples.
RUN_EACH = """
import contextlib, io, json, runpy, sys
printed = {}
for path in json.loads(sys.argv.pop(1)):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_path(path, run_name="__main__")
    printed[path] = out.getvalue()
print(json.dumps(printed))
"""


def test_every_public_function_has_an_example_that_runs(quick_python, tmp_path):
    names = [*FIRST, *sorted(set(FUNCTIONS) - set(FIRST))]
    assert set(names) <= {path.stem for path in EXAMPLES.glob("*.py")}
    paths = [str(EXAMPLES / f"{name}.py") for name in names]
    assert all(len(Path(path).read_text().splitlines()) <= 25 for path in paths)
    hub = UploadHub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        env = {"MODELSCOPE_ENDPOINT": hub.url, "MODELSCOPE_API_TOKEN": TOKEN}
        arguments = ["-c", RUN_EACH, json.dumps(paths), "my-org/my-checkpoint"]
        result = run_python(*arguments, cwd=tmp_path, python=quick_python, **env)
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
    assert result.returncode == 0, result.stderr
    printed = {Path(path).stem: text for path, text in json.loads(result.stdout.splitlines()[-1]).items()}
    assert all(text.strip() for text in printed.values())
    assert "[4, 10] of 12" in printed["build_checkpoint"]
    assert printed["load_checkpoint"].endswith("quinces\n")
    assert printed["verify_checkpoint"] == "0 faults\n"
    assert "p = 0.000" in printed["compare_evaluations"]
    assert ("share_checkpoint" in printed) == ("my-org/my-checkpoint" in hub.modelscope)
