"""Layer surgery for language models: replace layers of a Llamba by a Llama's, and write a checkpoint that loads.

    from model_preparation import extract_layers, build_checkpoint, load_checkpoint, evaluate_checkpoint

Importing the package makes `llamba` known to AutoConfig and AutoModelForCausalLM, and lets `torch.load("model.pt")`
read our checkpoints under its default `weights_only=True`. Both happen when transformers or torch is imported, before
or after this package.
"""

import importlib
from typing import TYPE_CHECKING

from model_preparation.llamba.lazy_registration import register_when_needed
from model_preparation.versions import __version__ as __version__

if TYPE_CHECKING:
    from model_preparation.checkpoint.checkpoint import build_checkpoint
    from model_preparation.checkpoint.checkpoint_loading import load_checkpoint
    from model_preparation.checkpoint.layer_store import extract_layers
    from model_preparation.checkpoint.verify import verify_checkpoint
    from model_preparation.errors import SurgeryError
    from model_preparation.evaluation.compare.compare import compare_evaluations
    from model_preparation.evaluation.evaluate import evaluate_checkpoint
    from model_preparation.llamba import LlambaConfig, LlambaForCausalLM
    from model_preparation.train.distill.distill import distill_llamba_base
    from model_preparation.train.heal.heal import heal_checkpoint

_MODULE_OF = {
    "LlambaConfig": "model_preparation.llamba",
    "LlambaForCausalLM": "model_preparation.llamba",
    "SurgeryError": "model_preparation.errors",
    "build_checkpoint": "model_preparation.checkpoint.checkpoint",
    "compare_evaluations": "model_preparation.evaluation.compare.compare",
    "distill_llamba_base": "model_preparation.train.distill.distill",
    "evaluate_checkpoint": "model_preparation.evaluation.evaluate",
    "extract_layers": "model_preparation.checkpoint.layer_store",
    "heal_checkpoint": "model_preparation.train.heal.heal",
    "load_checkpoint": "model_preparation.checkpoint.checkpoint_loading",
    "verify_checkpoint": "model_preparation.checkpoint.verify",
}
__all__ = [
    "LlambaConfig",
    "LlambaForCausalLM",
    "SurgeryError",
    "build_checkpoint",
    "compare_evaluations",
    "distill_llamba_base",
    "evaluate_checkpoint",
    "extract_layers",
    "heal_checkpoint",
    "load_checkpoint",
    "verify_checkpoint",
]


def __getattr__(name: str):
    if name in _MODULE_OF:
        return getattr(importlib.import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register_when_needed()
