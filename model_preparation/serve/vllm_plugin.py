"""Adds Llambas to vLLM, which calls `register` in each of its processes (entry point group `vllm.general_plugins`).

vllm_model.py, which has the model, is imported only when a Llamba is served.
"""

import logging

from model_preparation.serve.vllm_versions import fault_of_vllm, installed_vllm

_ARCHITECTURE = "LlambaForCausalLM"


def register() -> None:
    """Register `model_type: llamba` with vLLM. If the version of vLLM is not supported, only warn."""
    if fault := fault_of_vllm(installed_vllm()):
        logging.getLogger("vllm").warning("model_preparation: %s", fault)
        return
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS

    from model_preparation.llamba import registration  # noqa: F401  registers Llamba with AutoConfig
    from model_preparation.serve.vllm_config import LlambaArchitecture, LlambaSettings

    ModelRegistry.register_model(_ARCHITECTURE, "model_preparation.serve.vllm_model:ServedLlamba")
    MODELS_CONFIG_MAP[_ARCHITECTURE] = LlambaSettings
    MODEL_ARCH_CONFIG_CONVERTORS["llamba"] = LlambaArchitecture
