"""A mixer's weights before its training: llamba_init.py makes them, and this file changes their number of rows.

If `d_state` is larger than the donor's `head_dim`, keys and queries get additional rows: random ones for
keys, and zeros for queries, so nothing changes at first. If `d_state` is smaller, rows are left out.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from model_preparation.checkpoint.llamba_init import llamba_config, mamba_layer, score_scale
from model_preparation.checkpoint.model_configs import heads_of
from model_preparation.errors import SurgeryError, one_line
from model_preparation.io.untrusted.untrusted_config import config_from
from model_preparation.llamba.configuration_llamba import LlambaConfig
from model_preparation.llamba.modeling_llamba import LlambaDecoderLayer

MIXER_FIELDS = ("d_state", "n_v_heads", "n_qk_heads", "d_conv")


def student_config(donor: PreTrainedConfig, mixer: Mapping[str, int] | None = None) -> LlambaConfig:
    """The config of the Llamba that is made from `donor`. `mixer` has sizes by name, from `MIXER_FIELDS`.

    Raises:
        SurgeryError: for a name that is not in `MIXER_FIELDS`, or sizes that do not fit each other.
    """
    config = llamba_config(donor)
    if unknown := sorted(set(mixer or {}) - set(MIXER_FIELDS)):
        raise SurgeryError(f"A mixer has no size {', '.join(unknown)}. Choose among {', '.join(MIXER_FIELDS)}.")
    fields: dict[str, Any] = config.file_fields()
    fields["ssm_cfg"] = {**fields["ssm_cfg"], **(mixer or {})}
    try:
        return config_from(fields, LlambaConfig)
    except ValueError as error:
        raise SurgeryError(f"These mixer sizes do not fit: {one_line(error)}. Choose other sizes.") from error


def student_tensors(
    attention_layer: Mapping[str, Tensor], donor: PreTrainedConfig, config: LlambaConfig, seed: int
) -> dict[str, Tensor]:
    """The Llamba layer's initial tensors, by name relative to the layer.

    With the donor's own sizes, they compute the same as the tensors of `mamba_layer`. But `mamba_layer` multiplies C by
    the scale of the scores. Here, B and C are each multiplied by the square root of this scale. Otherwise C would be
    very small, and one step of the optimizer, which changes all weights by similar amounts, would make C much larger.

    Args:
        attention_layer: the donor layer's tensors.
        donor: the donor's config.
        config: from `student_config`.
        seed: for the random rows.
    """
    tensors = dict(mamba_layer(attention_layer, donor))
    donor_heads, head_dim = heads_of(donor)
    heads, _ = heads_of(config)
    ssm, width = config.ssm_cfg, donor_heads * head_dim
    states, groups, taps = ssm["d_state"], ssm["n_qk_heads"], ssm["d_conv"]
    generator = torch.Generator().manual_seed(seed)
    # `head_of`: the donor's head for each value head of the mixer.
    # `group_of`: the donor's head for each key head, taken from the key head's first value head.
    head_of = torch.arange(heads) * donor_heads // heads
    group_of = head_of[:: heads // groups]
    balance = math.sqrt(score_scale(head_dim))

    def of_keys(rows: Tensor, factor: float, noise: float) -> Tensor:
        """(donor heads * head_dim, ...) -> (groups * d_state, ...), multiplied by `factor`.

        Added rows are `noise` * N(0, 1) * the root mean square of the multiplied rows.
        """
        by_head = rows.unflatten(0, (donor_heads, head_dim))[group_of] * factor
        missing = torch.randn((groups, max(0, states - head_dim), *rows.shape[1:]), generator=generator)
        missing = missing * noise * by_head.float().square().mean().sqrt()
        return torch.cat([by_head[:, :states], missing.to(rows)], 1).flatten(0, 1)

    for name in ("mixer.in_proj.weight", "mixer.in_proj.bias"):
        x, B, C, z, a = tensors[name].split([width, width, width, width, donor_heads])
        tensors[name] = torch.cat([x, of_keys(B, balance, 1.0), of_keys(C, 1 / balance, 0.0), z, a[head_of]])
    conv_dim = width + 2 * groups * states
    conv = tensors["mixer.conv1d.weight"].new_zeros(conv_dim, 1, taps)
    conv[:, :, -1] = 1  # the tap of the current token
    tensors["mixer.conv1d.weight"] = conv
    tensors["mixer.conv1d.bias"] = conv.new_zeros(conv_dim)
    tensors["mixer.D"] = conv.new_zeros(heads)
    return tensors


def student_layer(tensors: Mapping[str, Tensor], config: LlambaConfig, device: str) -> LlambaDecoderLayer:
    """A layer with copies of these tensors, float32, in eval mode."""
    with torch.device("meta"):
        layer = LlambaDecoderLayer(config, 0)
    copies = {name: tensor.to(device, torch.float32, copy=True) for name, tensor in tensors.items()}
    layer.load_state_dict(copies, assign=True)
    return layer.eval().requires_grad_(False)
