"""Which layers each method of healing trains."""

from model_preparation.errors import SurgeryError
from model_preparation.llamba import LlambaConfig


def trained_layers(config: LlambaConfig, method: str) -> list[int]:
    """Indices of the layers that `method` trains, sorted.

    Raises:
        SurgeryError: for "grafted" and "neighbours" if no layer and no head is grafted.
    """
    if method in ("full", "lora"):
        return list(range(config.n_layer))
    grafted = {*config.llama_layers, *map(int, config.llama_heads)}
    if not grafted:
        raise SurgeryError(f"No layers are grafted, so method {method} has nothing to train. Use --method full.")
    if method == "neighbours":
        grafted |= {index + step for index in grafted for step in (-1, 1)}
    return sorted(grafted & set(range(config.n_layer)))
