"""The mixer of a Mamba block: projections, causal convolution, scan and gate. It skips padding.

Source of the computation and the names ("upstream"): cartesia-ai/edge,
cartesia_pytorch/Llamba/mixers/discrete_mamba2.py.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache_llamba import LlambaCache
from .configuration_llamba import LlambaConfig
from .ssd import NEVER, product_dtype, scan, step

# Tokens that go through a mixer at once on a CPU. Their intermediate values fit into the CPU's caches, and into memory
# that the allocator reuses. Between 256 and 1,024 tokens, the speed differs by less than 5%.
BLOCK_TOKENS = 512
SHORT = 8  # up to this many tokens, a sum of shifted products is faster than conv2d


class PaddingLayout(NamedTuple):
    """How to move the real tokens of each row before its padding, and back. L is the number of tokens in a row."""

    order: Tensor  # (batch, L) int64: entry i is the old position of the token that moves to position i
    inverse: Tensor  # (batch, L) int64: entry i is the new position of the token at the old position i
    is_padding: Tensor  # (batch, L) bool: after moving, whether position i is padding
    lengths: Tensor  # (batch,) int64: real tokens per row

    @classmethod
    def of(cls, attention_mask: Tensor | None, length: int) -> "PaddingLayout | None":
        """The layout of the last `length` columns of a 2-D mask; None if these columns have no padding."""
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


class CausalConv1d(nn.Conv1d):
    """A depthwise convolution over tokens. Only `forward` reads its weights, so hooks can load them just before."""

    def forward(self, window: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Convolve the last `length` tokens of a window, without activation. Sums are float32 or wider.

        Args:
            window: (batch, kernel_size + length, channels), the inputs of earlier tokens, then of these tokens.
            position_ids: (batch, length), each token's place in its document. Earlier documents count as zeros.

        Returns:
            (batch, length, channels) in the dtype `product_dtype(window)`.
        """
        taps = self.kernel_size[0]
        length, dtype = window.shape[1] - taps, product_dtype(window)
        by_onednn = window.device.type == "cpu" and dtype != torch.float64 and torch.backends.mkldnn.is_available()
        if by_onednn and length > SHORT and position_ids is None:
            # As an image one pixel high, (batch, channels, 1, taps - 1 + length), with the channels last in memory.
            # conv1d would transpose the input, and takes 2 to 25 times as long.
            image = window[:, 1:].to(dtype).unsqueeze(1).permute(0, 3, 1, 2)
            bias = None if self.bias is None else self.bias.to(dtype)
            out = F.conv2d(image, self.weight.to(dtype).unsqueeze(2), bias, groups=self.groups)
            return out.squeeze(2).transpose(1, 2)
        sums = torch.promote_types(dtype, torch.float32)
        window, weight = window.to(sums), self.weight.to(sums).squeeze(1).t()  # weight: (taps, channels)
        if length == 1 and position_ids is None:
            out = (window[:, 1:] * weight).sum(1, keepdim=True)
        else:
            out = torch.zeros_like(window[:, taps:])
            for shift, tap in enumerate(weight, start=1):
                inputs = window[:, shift : shift + length]
                if position_ids is not None:
                    inputs = inputs.masked_fill((position_ids < taps - shift).unsqueeze(-1), 0)
                out = torch.addcmul(out, inputs, tap)
        return (out if self.bias is None else out + self.bias.to(sums)).to(dtype)


class LlambaMixer(nn.Module):
    """Discrete Mamba-2: out = out_proj(y * silu(z + z_bias)), y = S C + D x, S = exp(-softplus(a)) S + x B^T.

    Rows of `in_proj`, in order: x (d_inner), B and C (n_qk_heads * d_state each), z (d_inner), a (n_v_heads). x, B and
    C go through one causal depthwise convolution first. State and decay are float32 or wider for weights of any dtype.
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
        self.replaced_channels = config.replaced_channels(layer_idx)

        self.in_proj = nn.Linear(config.d_model, self.conv_dim + self.d_inner + self.n_v_heads, bias=ssm["bias"])
        # If in_proj has a bias, the bias of z is a part of it, and upstream has no parameter z_bias.
        self.z_bias = None if ssm["bias"] else nn.Parameter(torch.zeros(self.d_inner))
        self.conv1d = CausalConv1d(
            self.conv_dim,
            self.conv_dim,
            self.d_conv,
            groups=self.conv_dim,
            padding=self.d_conv - 1,
            bias=ssm["conv_bias"],
        )
        self.D = nn.Parameter(torch.ones(self.n_v_heads))
        self.out_proj = nn.Linear(self.d_inner, config.d_model, bias=ssm["bias"])

    def __setstate__(self, state: dict) -> None:
        """Load from a pickle. Pickles of version 0.1 have a plain convolution."""
        super().__setstate__(state)
        if type(self.conv1d) is nn.Conv1d:
            self.conv1d.__class__ = CausalConv1d
        self.__dict__.setdefault("replaced_channels", [])  # grafted heads came with 0.4

    def forward(
        self,
        hidden_states: Tensor,
        cache: LlambaCache | None = None,
        padding: PaddingLayout | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            hidden_states: (batch, length, d_model).
            cache: the cache of the earlier tokens; updated in place.
            padding: where these tokens have padding. Padding enters neither the convolution nor the state.
            position_ids: (batch or 1, length), each token's place in its document. Where it is 0, state and convolution
                start anew. None if no document begins after the first token of a row.

        Returns:
            (batch, length, d_model) in the same dtype. At padding the values are finite and meaningless.
        """
        batch, length, width = hidden_states.shape
        if position_ids is not None:
            position_ids = position_ids.expand(batch, -1)
        if padding is not None:
            hidden_states = _take(hidden_states, padding.order)
            if position_ids is not None:  # no document begins at padding
                position_ids = position_ids.gather(1, padding.order).masked_fill(padding.is_padding, self.d_conv)
        conv_state, state = (None, None) if cache is None else cache.layers[self.layer_idx].states()
        inputs = self._zero_inputs(hidden_states) if conv_state is None else conv_state.transpose(1, 2)

        outputs: list[Tensor] = []
        last_inputs: list[Tensor] = []
        last_states: list = []
        rows, tokens = _block_of(hidden_states)
        for first in range(0, batch, rows):
            of_rows = slice(first, first + rows)
            row_inputs = inputs[of_rows]
            row_state = state if state is None or rows >= batch else state[of_rows]
            for start in range(0, length, tokens):
                block = hidden_states[of_rows, start : start + tokens]
                real = None if padding is None else (padding.lengths[of_rows] - start).clamp(0, block.shape[1])
                positions = None if position_ids is None else position_ids[of_rows, start : start + tokens]
                out, row_inputs, row_state = self._mix(block, row_inputs, row_state, real, positions)
                outputs.append(out.flatten(0, 1))
            last_inputs.append(row_inputs)
            last_states.append(row_state)
        if cache is not None:
            cache.layers[self.layer_idx].remember(_joined(last_inputs).transpose(1, 2), _joined(last_states))
        out = _joined(outputs).view(batch, length, width)
        return out if padding is None else _take(out, padding.inverse)

    def _zero_inputs(self, hidden_states: Tensor) -> Tensor:
        """The convolution's inputs before the first token, (batch, d_conv, conv_dim)."""
        return hidden_states.new_zeros(len(hidden_states), self.d_conv, self.conv_dim)

    def _mix(
        self,
        hidden_states: Tensor,
        inputs: Tensor,
        state: Tensor | None,
        real: Tensor | None,
        position_ids: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the mixer over one block of consecutive tokens.

        Args:
            hidden_states: (batch, length, d_model).
            inputs: the convolution's last d_conv inputs before the block, (batch, d_conv, conv_dim).
            state: the SSM state before the block, (batch, H, P, N), or None for zeros.
            real: (batch,), how many tokens of each row are real; padding comes after them. None: all are real.
            position_ids: (batch, length), as in `forward`, or None.

        Returns:
            The block's output (batch, length, d_model), and `inputs` and `state` after the block.
        """
        batch, length, _ = hidden_states.shape
        # The input is a matrix: with three dimensions, torch would copy the weights for each row.
        projected = self.in_proj(hidden_states.reshape(batch * length, -1)).view(batch, length, -1)
        xBC, z, a = projected.split([self.conv_dim, self.d_inner, self.n_v_heads], dim=-1)
        y, inputs, state = self._recur(xBC, a, inputs, state, real, position_ids)
        return self._gated(y, z, hidden_states.dtype), inputs, state

    def _recur(
        self,
        xBC: Tensor,
        a: Tensor,
        inputs: Tensor,
        state: Tensor | None,
        real: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The middle of `_mix`: convolution and recurrence.

        Returns:
            y (batch, length, d_inner), and `inputs` and `state` after the block.
        """
        batch, length, _ = xBC.shape
        dtype = torch.promote_types(xBC.dtype, torch.float32)
        window = torch.cat([inputs, xBC], dim=1)  # (batch, d_conv + length, conv_dim)
        convolved = self.conv1d(window, position_ids)
        if self.has_activation:
            convolved = F.silu(convolved)
        x, B, C = convolved.split(
            [self.d_inner, self.n_qk_heads * self.d_state, self.n_qk_heads * self.d_state], dim=-1
        )
        x = x.view(batch, length, self.n_v_heads, -1)  # (batch, L, H, P)
        B = B.view(batch, length, self.n_qk_heads, self.d_state)  # (batch, L, G, N)
        C = C.view(batch, length, self.n_qk_heads, self.d_state)
        log_decay = F.softplus(a.to(dtype)).neg()  # (batch, L, H)
        if position_ids is not None:
            log_decay = log_decay.masked_fill((position_ids == 0).unsqueeze(-1), NEVER)  # a document begins
        if real is None:
            inputs = window[:, -self.d_conv :]
        else:
            # At padding, nothing is added to the state and nothing decays, so the state stays the same.
            is_padding = (torch.arange(length, device=real.device) >= real.unsqueeze(1)).unsqueeze(-1)
            x = x.masked_fill(is_padding.unsqueeze(-1), 0)
            log_decay = log_decay.masked_fill(is_padding, 0)
            inputs = _take(window, real.unsqueeze(1) + torch.arange(self.d_conv, device=real.device))

        if length == 1 and state is not None:
            y, state = step(x[:, 0], log_decay[:, 0], B[:, 0], C[:, 0], state, self.D)
        else:
            y, state = scan(x, log_decay, B, C, self.chunk_size, state, self.D)
        return y.reshape(batch, length, self.d_inner), inputs, state

    def _gated(self, y: Tensor, z: Tensor, dtype: torch.dtype) -> Tensor:
        """Apply gate and output projection to y, (..., d_inner). Returns (..., d_model) in `dtype`."""
        gate = F.silu((z if self.z_bias is None else z + self.z_bias).to(y.dtype))
        y = y * gate
        for start, end in self.replaced_channels:
            y[..., start:end] = 0
        return self.out_proj(y.to(dtype))


def _block_of(hidden_states: Tensor) -> tuple[int, int]:
    """How many rows, and how many tokens of each, go through a mixer at once."""
    batch, length, _ = hidden_states.shape
    if hidden_states.device.type != "cpu":
        return batch, length
    return max(1, BLOCK_TOKENS // length), BLOCK_TOKENS


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _take(values: Tensor, positions: Tensor) -> Tensor:
    """Pick tokens per row: values (batch, L, width), positions (batch, M) -> (batch, M, width)."""
    return values.gather(1, positions.unsqueeze(-1).expand(-1, -1, values.shape[-1]))
