"""Chooses the engine that serves a checkpoint: vLLM, or the small server that needs only transformers."""

from collections.abc import Mapping
from typing import Any

from model_preparation.errors import SurgeryError
from model_preparation.serve.vllm_versions import fault_of_vllm, installed_vllm


def choose_engine(asked: str, config: Mapping[str, Any]) -> str:
    """Return "vllm" or "transformers". "auto" means vLLM if it is installed and can serve the model.

    Args:
        asked: "vllm", "transformers" or "auto".
        config: the fields of the model's config, as in checkpoint_info.json.

    Raises:
        SurgeryError: if vLLM is asked for, but is missing or cannot serve the model; or if vLLM would be taken, but
            its version cannot serve our models.
    """
    installed, unserved = installed_vllm(), fault_of_model(config)
    if asked == "transformers" or (asked == "auto" and (installed is None or unserved)):
        return "transformers"
    if unserved:
        raise SurgeryError(unserved)
    if fault := fault_of_vllm(installed):
        raise SurgeryError(f"{fault} Or take the engine that does not need vLLM: --engine transformers")
    return "vllm"


def fault_of_model(config: Mapping[str, Any]) -> str | None:
    """Why vLLM cannot serve a model with this config, and what to do; None if it can."""
    donor_type = config.get("donor_type", "llama")
    activations = {config.get("mlp_cfg", {}).get("act_fn", "silu")}
    if config.get("llama_layers"):
        activations.add(config.get("llama_cfg", {}).get("hidden_act", "silu"))
    if config.get("llama_heads"):
        fault = "The checkpoint has grafted heads. vLLM gives a layer one kind of cache, and these layers need two."
    elif donor_type != "llama":
        fault = f"The grafted layers come from a {donor_type} model. With vLLM, only a Llama's layers can be served."
    elif config.get("other_llama_cfgs"):
        fault = "The donors of the grafted layers have different settings. vLLM's model has one setting for all layers."
    elif others := sorted(activations - {"silu"}):
        fault = f"The model's MLPs have the activation {', '.join(others)}. With vLLM, only silu can be served."
    else:
        return None
    return f"{fault} Take the other engine: serve_checkpoint.py --engine transformers"
