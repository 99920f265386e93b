"""Layer surgery for language models: replace layers of a Llamba with layers of its donor, and write a checkpoint.

    from model_preparation import extract_layers, build_checkpoint, load_checkpoint, evaluate_checkpoint

Importing the package registers `llamba` with AutoConfig and AutoModelForCausalLM, and lets `torch.load("model.pt")`
read our checkpoints with its default `weights_only=True`. Both happen as soon as transformers or torch is imported.
The order of the imports does not matter.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

from model_preparation.earlier_names import EarlierNames
from model_preparation.llamba.lazy_registration import register_when_needed
from model_preparation.versions import __version__ as __version__

if TYPE_CHECKING:
    from model_preparation.checkpoint.base_store import clean_checkpoints as clean_checkpoints
    from model_preparation.checkpoint.build import build_checkpoint as build_checkpoint
    from model_preparation.checkpoint.extract import extract_layers as extract_layers
    from model_preparation.checkpoint.inspect import inspect_checkpoint as inspect_checkpoint
    from model_preparation.checkpoint.load import load_checkpoint as load_checkpoint
    from model_preparation.checkpoint.rebuild import rebuild_checkpoint as rebuild_checkpoint
    from model_preparation.checkpoint.share import share_checkpoint as share_checkpoint
    from model_preparation.checkpoint.verify import verify_checkpoint as verify_checkpoint
    from model_preparation.errors import SurgeryError as SurgeryError
    from model_preparation.evaluation.compare.compare import compare_evaluations as compare_evaluations
    from model_preparation.evaluation.efficiency import measure_efficiency as measure_efficiency
    from model_preparation.evaluation.evaluate import evaluate_checkpoint as evaluate_checkpoint
    from model_preparation.evaluation.generation import generate_text as generate_text
    from model_preparation.llamba import LlambaConfig as LlambaConfig
    from model_preparation.llamba import LlambaForCausalLM as LlambaForCausalLM
    from model_preparation.search.search import search_layers as search_layers
    from model_preparation.train.distill.distill import distill_llamba_base as distill_llamba_base
    from model_preparation.train.heal.heal import heal_checkpoint as heal_checkpoint
    from model_preparation.train.heal.stages import heal_in_stages as heal_in_stages

_MODULE_OF = {
    "LlambaConfig": "llamba",
    "LlambaForCausalLM": "llamba",
    "SurgeryError": "errors",
    "build_checkpoint": "checkpoint.build",
    "clean_checkpoints": "checkpoint.base_store",
    "compare_evaluations": "evaluation.compare.compare",
    "distill_llamba_base": "train.distill.distill",
    "evaluate_checkpoint": "evaluation.evaluate",
    "extract_layers": "checkpoint.extract",
    "generate_text": "evaluation.generation",
    "heal_checkpoint": "train.heal.heal",
    "heal_in_stages": "train.heal.stages",
    "inspect_checkpoint": "checkpoint.inspect",
    "load_checkpoint": "checkpoint.load",
    "measure_efficiency": "evaluation.efficiency",
    "rebuild_checkpoint": "checkpoint.rebuild",
    "search_layers": "search.search",
    "share_checkpoint": "checkpoint.share",
    "verify_checkpoint": "checkpoint.verify",
}
__all__ = [*_MODULE_OF]


class _Package(ModuleType):
    """Its functions, such as `search_layers`, stay functions when the module of a command has the same name."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _MODULE_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str):
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


sys.meta_path.append(EarlierNames())
register_when_needed()
