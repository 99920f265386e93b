"""The mixer of a Mamba block: projections, causal convolution, scan, gate; and how it passes over padding.

In: hidden states, and the cache of what came before. Out: hidden states of the same shape, the cache brought forward.
Source: cartesia-ai/edge, cartesia_pytorch/Llamba/mixers/discrete_mamba2.py, for what is computed and for the names.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache_llamba import LlambaCache
from .configuration_llamba import LlambaConfig
from .ssd import scan, step


class PaddingLayout(NamedTuple):
    """How to move each row's real tokens to the front, in order, and back. L is the length of the current segment."""

    order: Tensor  # (batch, L) int64: position in the segment of the i-th token after moving
    inverse: Tensor  # (batch, L) int64: where a position of the segment moved to
    is_padding: Tensor  # (batch, L) bool, after moving
    lengths: Tensor  # (batch,) int64: real tokens per row

    @classmethod
    def of(cls, attention_mask: Tensor | None, length: int) -> "PaddingLayout | None":
        """The layout of the last `length` columns of a 2-D mask; None where none of them is padding."""
        if attention_mask is None:
            return None
        if attention_mask.dim() != 2:
            raise ValueError(f"attention_mask must be (batch, tokens), not {tuple(attention_mask.shape)}")
        real = attention_mask[:, -length:].bool()
        if bool(real.all()):
            return None
        order = real.int().argsort(dim=1, descending=True, stable=True)
        lengths = real.sum(1)
        is_padding = torch.arange(length, device=real.device) >= lengths.unsqueeze(1)
        return cls(order, order.argsort(dim=1), is_padding, lengths)


class LlambaMixer(nn.Module):
    """Discrete Mamba-2: out = out_proj(y * silu(z + z_bias)), y = S C + D x, S = exp(-softplus(a)) S + x B^T.

    Rows of `in_proj`, in order: x (d_inner), B and C (n_qk_heads * d_state each), z (d_inner), a (n_v_heads). x, B and
    C go through one causal depthwise convolution first. State and decay are float32 whatever the weights' dtype.
    """

    def __init__(self, config: LlambaConfig, layer_idx: int):
        super().__init__()
        ssm = config.ssm_cfg
        self.layer_idx = layer_idx
        self.d_inner = config.d_inner
        self.d_state, self.d_conv, self.chunk_size = ssm["d_state"], ssm["d_conv"], ssm["chunk_size"]
        self.n_v_heads, self.n_qk_heads = ssm["n_v_heads"], ssm["n_qk_heads"]
        self.has_activation = ssm["activation"] != "identity"
        self.conv_dim = self.d_inner + 2 * self.n_qk_heads * self.d_state

        self.in_proj = nn.Linear(config.d_model, self.conv_dim + self.d_inner + self.n_v_heads, bias=ssm["bias"])
        # With biases in_proj carries z's; upstream has no z_bias parameter then.
        self.z_bias = None if ssm["bias"] else nn.Parameter(torch.zeros(self.d_inner))
        self.conv1d = nn.Conv1d(
            self.conv_dim,
            self.conv_dim,
            self.d_conv,
            groups=self.conv_dim,
            padding=self.d_conv - 1,
            bias=ssm["conv_bias"],
        )
        self.D = nn.Parameter(torch.ones(self.n_v_heads))
        self.out_proj = nn.Linear(self.d_inner, config.d_model, bias=ssm["bias"])

    def forward(
        self, hidden_states: Tensor, cache: LlambaCache | None = None, padding: PaddingLayout | None = None
    ) -> Tensor:
        """
        Args:
            hidden_states: (batch, length, d_model).
            cache: read for what came before and updated in place.
            padding: where this segment has padding; it then enters neither the convolution nor the state.

        Returns:
            (batch, length, d_model) in the same dtype. At padding the values are finite and meaningless.
        """
        if padding is not None:
            hidden_states = _take(hidden_states, padding.order)
        batch, length, _ = hidden_states.shape
        conv_state, state = (None, None) if cache is None else cache.layers[self.layer_idx].states()

        xBC, z, a = self.in_proj(hidden_states).split([self.conv_dim, self.d_inner, self.n_v_heads], dim=-1)
        dtype = torch.promote_types(xBC.dtype, torch.float32)
        if conv_state is None:
            window = F.pad(xBC, (0, 0, self.d_conv, 0))  # (batch, d_conv + length, conv_dim)
        else:
            window = torch.cat([conv_state.transpose(1, 2), xBC], dim=1)
        x, B, C = self._convolve(window).split(
            [self.d_inner, self.n_qk_heads * self.d_state, self.n_qk_heads * self.d_state], dim=-1
        )
        x = x.view(batch, length, self.n_v_heads, -1)  # (batch, L, H, P)
        B = B.view(batch, length, self.n_qk_heads, self.d_state)  # (batch, L, G, N)
        C = C.view(batch, length, self.n_qk_heads, self.d_state)
        log_decay = -F.softplus(a.to(dtype))  # (batch, L, H)
        if padding is not None:
            # No input and no decay: the state passes through padding unchanged.
            x = x.masked_fill(padding.is_padding[:, :, None, None], 0)
            log_decay = log_decay.masked_fill(padding.is_padding[:, :, None], 0)

        if length == 1 and state is not None:
            y, state = step(x[:, 0], log_decay[:, 0], B[:, 0], C[:, 0], state)
            y = y.unsqueeze(1)
        else:
            y, state = scan(x, log_decay, B, C, self.chunk_size, state)
        if cache is not None:
            self._remember(cache, window, state, padding)

        y = (y + self.D.to(dtype).unsqueeze(-1) * x).reshape(batch, length, self.d_inner)
        gate = z if self.z_bias is None else z + self.z_bias
        out = self.out_proj((y * F.silu(gate.to(dtype))).to(hidden_states.dtype))
        return out if padding is None else _take(out, padding.inverse)

    def _convolve(self, window: Tensor) -> Tensor:
        """Causal depthwise convolution: (batch, d_conv + length, conv_dim) -> (batch, length, conv_dim), in float32.

        A sum of shifted products: on CPUs 3 to 6 times faster in float32 than conv1d with its transposes, and exact to
        float32 in bfloat16.
        """
        length = window.shape[1] - self.d_conv
        dtype = torch.promote_types(window.dtype, torch.float32)
        window = window.to(dtype)
        taps = self.conv1d.weight.to(dtype).squeeze(1).unbind(-1)  # d_conv of (conv_dim,)
        out = window[:, 1 : length + 1] * taps[0]
        for shift, tap in enumerate(taps[1:], start=2):
            out = torch.addcmul(out, window[:, shift : shift + length], tap)
        if self.conv1d.bias is not None:
            out = out + self.conv1d.bias.to(dtype)
        return F.silu(out) if self.has_activation else out

    def _remember(self, cache: LlambaCache, window: Tensor, state: Tensor, padding: PaddingLayout | None) -> None:
        """Keep the last d_conv real inputs of the convolution and the state."""
        if padding is None:
            last = window[:, -self.d_conv :]
        else:
            columns = padding.lengths[:, None] + torch.arange(self.d_conv, device=window.device)
            last = _take(window, columns)
        cache.update_conv_state(last.transpose(1, 2), self.layer_idx, conv_kernel_size=self.d_conv)
        cache.update_recurrent_state(state, self.layer_idx)


def _take(values: Tensor, positions: Tensor) -> Tensor:
    """Pick tokens per row: values (batch, L, width), positions (batch, M) -> (batch, M, width)."""
    return values.gather(1, positions.unsqueeze(-1).expand(-1, -1, values.shape[-1]))
