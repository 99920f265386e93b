"""Names of tensors as torch's wrappers change them."""

from collections.abc import Mapping

from torch import Tensor

_WRAPPER_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and of torch.compile


def without_wrapper_prefixes(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict without the prefixes `module.` and `_orig_mod.`, in whatever order a name has them."""
    names = {}
    for name in state_dict:
        bare = name
        while bare.startswith(_WRAPPER_PREFIXES):
            bare = bare.partition(".")[2]
        names[bare] = state_dict[name]
    return names
