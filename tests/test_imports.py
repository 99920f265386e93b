"""On small models, imports take most of a command's time. So these commands import only what they need."""

import logging
import sys
from pathlib import Path

import pytest
from importlinter.cli import lint_imports
from safetensors.torch import save_file

from model_preparation.checkpoint.grafted_model import empty_model
from model_preparation.checkpoint.model_configs import layer_shapes
from model_preparation.llamba import LlambaConfig, LlambaForCausalLM
from tests.conftest import PACKAGE, run_python, tiny_config, tiny_llama_cfg

# Runs a command, and prints which of the modules named were imported when it ended.
RUN = """
import runpy, sys
names, sys.argv = sys.argv[1].split(","), sys.argv[2:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
print("imported:", *(name for name in names if name in sys.modules))
"""
# transformers' models import these: compilers, symbolic algebra, distributed training.
HEAVY = ("torch._dynamo", "torch.distributed.tensor", "sympy", "scipy", "transformers.modeling_utils")


def imported(name: str, *args: object, of: tuple[str, ...], cwd: Path) -> list[str]:
    result = run_python("-c", RUN, ",".join(of), str(PACKAGE / f"{name}.py"), *map(str, args), cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1].removeprefix("imported:").split()


@pytest.mark.parametrize("args", [["clean_checkpoints", "--dir", "."], ["verify_checkpoint", "--files_only"]])
def test_neither_torch_nor_transformers(args, checkpoint_dir):
    name, *flags = args
    flags += [checkpoint_dir] if name == "verify_checkpoint" else []
    assert imported(name, *flags, of=("torch", "transformers", "numpy"), cwd=checkpoint_dir.parent) == []


def test_the_flags_of_a_distillation(tmp_path):
    assert imported("distill_llamba_base", "--help", of=("torch", "transformers"), cwd=tmp_path) == []


def test_a_dry_run_of_sharing(checkpoint_dir):
    flags = ["--checkpoint", checkpoint_dir, "--repo", "me/some-model", "--licence", "apache-2.0", "--dry_run"]
    assert imported("share_checkpoint", *flags, of=("torch", "transformers"), cwd=checkpoint_dir.parent) == []


def test_extracting_a_llamba_s_layers(tmp_path):
    tiny_config().save_pretrained(tmp_path / "base")
    state = LlambaForCausalLM(tiny_config()).state_dict()
    save_file(state, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    flags = ["--model_name", tmp_path / "base", "--output_dir", tmp_path / "layers"]
    assert imported("extract_layers", *flags, of=("torch", *HEAVY), cwd=tmp_path) == ["torch"]
    # This process has imported the model, so HEAVY names modules that the model does import.
    assert sys.modules.keys() >= set(HEAVY)


def test_weights_are_found_and_copied_without_torch(layers_dir, tmp_path):
    """So a build can write weights while other threads are importing torch and transformers."""
    code = f"""
import sys
from pathlib import Path
from model_preparation.checkpoint import build, checkpoint_folder, extract, graft_parts, layer_store, write_weights
from model_preparation.io.tensors.pt_writer import write_dict
parts = graft_parts.find_parts("tiny_llamba", [1, 3], {str(layers_dir)!r})
assert len(write_dict(Path("weights.pt"), parts.tensors)[1]) == len(parts.tensors) > 50
print("imported:", *(name for name in ("torch", "transformers", "numpy") if name in sys.modules))
"""
    result = run_python("-c", code, cwd=tmp_path)
    assert result.stdout == "imported:\n", result.stderr


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ssm_cfg": {"d_state": 4, "n_v_heads": 4, "n_qk_heads": 2, "d_conv": 3, "expand": 2, "bias": True}},
        {"ssm_cfg": {"d_state": 8, "n_v_heads": 2, "n_qk_heads": 1, "conv_bias": False}, "tie_embeddings": True},
        {"mlp_cfg": {"intermediate_size": 20, "bias": True}},
        {"llama_layers": [1], "llama_cfg": {**tiny_llama_cfg(), "attention_bias": True, "mlp_bias": True}},
        {"llama_layers": [1], "llama_heads": {"2": [1]}, "llama_cfg": tiny_llama_cfg()},
    ],
)
def test_shapes_said_without_the_model_are_the_model_s(changes):
    config: LlambaConfig = tiny_config(**changes)
    for index, layer in enumerate(empty_model(config).backbone.layers):
        wanted = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
        assert layer_shapes(config, index) == wanted


@pytest.mark.parametrize("other", ["torch", "transformers.generation.utils", "accelerate"])
def test_the_package_registers_its_classes(other, checkpoint_dir):
    """As soon as another package imports torch or transformers, even while that package is half imported."""
    code = (
        "import sys, model_preparation\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()\n"
        f"import {other}, torch\n"
        f"model = torch.load({str(checkpoint_dir / 'model.pt')!r})\n"
        "import transformers\n"
        "assert type(transformers.AutoConfig.for_model('llamba')) is model_preparation.LlambaConfig\n"
        "assert type(transformers.AutoModelForCausalLM.from_config(model.config)) is type(model)\n"
    )
    # It works from any folder, also from the package's own, where users start the commands.
    result = run_python("-c", code, cwd=PACKAGE if other == "torch" else PACKAGE.parent)
    assert result.returncode == 0, result.stderr


def test_the_package_registers_its_classes_where_the_others_came_first(checkpoint_dir, quick_python):
    code = (
        "import torch, transformers, sys\n"
        "assert 'model_preparation' not in sys.modules\n"
        "import model_preparation\n"
        f"model = torch.load({str(checkpoint_dir / 'model.pt')!r})\n"
        "assert type(transformers.AutoModelForCausalLM.from_config(model.config)) is type(model)\n"
    )
    result = run_python("-c", code, cwd=PACKAGE.parent, python=quick_python)
    assert result.returncode == 0, result.stderr


def test_imports_go_down_only():
    """The levels are in pyproject.toml."""
    known = [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    enabled = [logger for logger in known if not logger.disabled]
    assert lint_imports(str(PACKAGE.parent / "pyproject.toml"), no_cache=True) == 0
    for logger in enabled:
        logger.disabled = False  # lint_imports disables all loggers


def test_modules_are_found_under_their_earlier_paths(tmp_path, quick_python):
    code = """
import importlib, warnings
warnings.simplefilter("ignore", FutureWarning)
from model_preparation.earlier_names import _NOW
for old, (now, names) in _NOW.items():
    old, now = (importlib.import_module(f"model_preparation.{path}") for path in (old, now))
    assert all(getattr(old, before) is getattr(now, name) for before, name in names.items())
    public = [name for name in vars(now) if name[0] != "_"]
    assert public and all(getattr(old, name) is getattr(now, name) for name in public)
try:
    import model_preparation.files.text
except ModuleNotFoundError as error:
    print(error)
"""
    found = run_python("-c", code, cwd=tmp_path, python=quick_python)
    assert found.stdout == "No module named 'model_preparation.files.text'\n", found.stderr
