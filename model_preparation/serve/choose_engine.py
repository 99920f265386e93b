"""Chooses the engine that serves a checkpoint: vLLM, or the small server that needs only transformers."""

from model_preparation.errors import SurgeryError
from model_preparation.serve.vllm_versions import fault_of_vllm, installed_vllm


def choose_engine(asked: str, donor_type: str = "llama", has_heads: bool = False) -> str:
    """Return "vllm" or "transformers". "auto" means vLLM if it is installed and can serve a graft of this kind.

    Args:
        asked: "vllm", "transformers" or "auto".
        donor_type: the donor's `model_type`, such as "llama".
        has_heads: whether single heads are grafted.

    Raises:
        SurgeryError: if vLLM is asked for, but is missing or cannot serve a graft of this kind; or if vLLM would be
            taken, but its version cannot serve our models.
    """
    installed, unserved = installed_vllm(), fault_of_graft(donor_type, has_heads)
    if asked == "transformers" or (asked == "auto" and (installed is None or unserved)):
        return "transformers"
    if unserved:
        raise SurgeryError(unserved)
    if fault := fault_of_vllm(installed):
        raise SurgeryError(f"{fault} Or take the engine that does not need vLLM: --engine transformers")
    return "vllm"


def fault_of_graft(donor_type: str, has_heads: bool) -> str | None:
    """Why vLLM cannot serve a graft, and what to do; None if it can.

    Args:
        donor_type: the donor's `model_type`, such as "llama".
        has_heads: whether single heads are grafted.
    """
    if has_heads:
        fault = "The checkpoint has grafted heads. vLLM gives a layer one kind of cache, and these layers need two."
    elif donor_type != "llama":
        fault = f"The grafted layers come from a {donor_type} model. With vLLM, only a Llama's layers can be served."
    else:
        return None
    return f"{fault} Take the other engine: serve_checkpoint.py --engine transformers"
