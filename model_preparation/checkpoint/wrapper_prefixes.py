"""Removes the prefixes that torch's wrappers put before the names of tensors."""

from collections.abc import Mapping

from torch import Tensor

_WRAPPER_PREFIXES = ("module.", "_orig_mod.")  # from DistributedDataParallel and from torch.compile


def without_wrapper_prefixes(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict without the prefixes `module.` and `_orig_mod.`, even if a name has several."""
    names = {}
    for name in state_dict:
        bare = name
        while bare.startswith(_WRAPPER_PREFIXES):
            bare = bare.partition(".")[2]
        names[bare] = state_dict[name]
    return names
