"""Which weights are trained.

In: a model and a method. Out: `requires_grad` set, and the names of the layers that change.
"""

from model_preparation.errors import SurgeryError
from model_preparation.llamba import LlambaForCausalLM
from model_preparation.llamba.configuration_llamba import LlambaConfig


def trained_layers(config: LlambaConfig, method: str) -> list[int]:
    """Indices of the layers that `method` trains, sorted.

    Raises:
        SurgeryError: for "grafted" and "neighbours" where nothing is grafted.
    """
    if method in ("full", "lora"):
        return list(range(config.n_layer))
    grafted = set(config.llama_layers)
    if not grafted:
        raise SurgeryError(
            f"No layers are grafted, so there is nothing to train by method {method}. Use --method full."
        )
    if method == "neighbours":
        grafted |= {index + step for index in grafted for step in (-1, 1)}
    return sorted(grafted & set(range(config.n_layer)))


def freeze_others(model: LlambaForCausalLM, method: str) -> None:
    """Let the weights that `method` trains have gradients: with "full" all, else those of layers only."""
    prefixes = tuple(f"backbone.layers.{index}." for index in trained_layers(model.config, method))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(method == "full" or name.startswith(prefixes))
