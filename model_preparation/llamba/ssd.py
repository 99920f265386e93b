"""The scan inside a mixer: linear attention with a scalar decay per head and token.

Per value head h of group g = h // (H / G), with log decay l_t = -softplus(a_t) <= 0:
    S_t = exp(l_t) S_{t-1} + x_t B_t^T        y_t = S_t C_t
`scan` does a whole sequence in chunks, `step` one token. Both work in at least float32 whatever they are given, and
take exp only of sums of l, which are never positive: nothing can overflow and nothing is divided by softplus(a).
Source: Mamba-2, Dao and Gu 2024 (arXiv 2405.21060), section 6, the block decomposition of a semiseparable matrix.
"""

import functools
import importlib
import importlib.util

import torch
from torch import Tensor

# Longer chunks spend more on the (chunk x chunk) part than they save in steps between chunks.
MAX_CHUNK = 64


def scan(
    x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, chunk_size: int, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over a sequence.

    Args:
        x: values, (batch, length, H, P).
        log_decay: -softplus(a), (batch, length, H), float32 or wider.
        B: keys, (batch, length, G, N), G dividing H.
        C: queries, (batch, length, G, N).
        chunk_size: tokens per chunk; the result does not depend on it beyond rounding.
        initial_state: (batch, H, P, N), or None for zeros.

    Returns:
        y (batch, length, H, P) and the final state (batch, H, P, N), in `log_decay`'s dtype.
    """
    if x.is_cuda and _has_flash_linear_attention():
        return _scan_flash_linear_attention(x, log_decay, B, C, initial_state)
    dtype = log_decay.dtype
    batch, length, H, P = x.shape
    G, N = B.shape[2:]
    R = H // G  # value heads per group
    Q = min(chunk_size, MAX_CHUNK, length)
    chunks = -(-length // Q)

    def chunked(t: Tensor, *head_shape: int) -> Tensor:
        """(batch, length, heads...) -> (batch, chunks, Q, *head_shape); zeros at the tail: no input, no decay."""
        t = torch.nn.functional.pad(t, (0, 0) * (t.dim() - 2) + (0, chunks * Q - length))
        return t.view(batch, chunks, Q, *head_shape)

    x = chunked(x.to(dtype), G, R, P).permute(0, 1, 3, 4, 2, 5)  # (batch, chunks, G, R, Q, P)
    B = chunked(B.to(dtype), G, N).permute(0, 1, 3, 2, 4)  # (batch, chunks, G, Q, N)
    C = chunked(C.to(dtype), G, N).permute(0, 1, 3, 2, 4)
    log_decay = chunked(log_decay, G, R).permute(0, 1, 3, 4, 2)  # (batch, chunks, G, R, Q)

    # Within a chunk: attention with the decay between two tokens as its mask.
    decay = segment_sum(log_decay).exp_()  # (batch, chunks, G, R, Q, Q)
    y = ((C @ B.transpose(-1, -2)).unsqueeze(3) * decay) @ x

    # What each chunk adds to the state: its inputs, decayed to the chunk's end.
    added = (x * decay[..., -1, :, None]).transpose(-1, -2) @ B.unsqueeze(3)  # (batch, chunks, G, R, P, N)

    # Between chunks: carry the state, and let every token read what came before its chunk.
    from_start = log_decay.cumsum(-1).exp()  # (batch, chunks, G, R, Q)
    state = x.new_zeros(batch, G, R, P, N) if initial_state is None else initial_state.to(dtype).view(batch, G, R, P, N)
    carried = []
    for chunk in range(chunks):
        carried.append(state)
        state = from_start[:, chunk, ..., -1, None, None] * state + added[:, chunk]
    before = torch.stack(carried, 1)  # (batch, chunks, G, R, P, N)
    y = y + (C.unsqueeze(3) @ before.transpose(-1, -2)) * from_start.unsqueeze(-1)

    y = y.permute(0, 1, 4, 2, 3, 5).reshape(batch, chunks * Q, H, P)[:, :length]
    return y, state.reshape(batch, H, P, N)


def step(x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token of the recurrence.

    Args:
        x: (batch, H, P). log_decay: (batch, H). B, C: (batch, G, N). state: (batch, H, P, N).

    Returns:
        y (batch, H, P) and the new state (batch, H, P, N), in `log_decay`'s dtype.
    """
    dtype = log_decay.dtype
    repeats = x.shape[1] // B.shape[1]
    B = B.to(dtype).repeat_interleave(repeats, 1)  # (batch, H, N)
    C = C.to(dtype).repeat_interleave(repeats, 1)
    state = log_decay.exp()[..., None, None] * state.to(dtype) + x.to(dtype).unsqueeze(-1) * B.unsqueeze(-2)
    return (state @ C.unsqueeze(-1)).squeeze(-1), state


def segment_sum(values: Tensor) -> Tensor:
    """Sums over every span: out[..., i, j] = values[j+1] + ... + values[i], 0 on the diagonal, -inf above it.

    Summed span by span: differences of one running sum would lose the small spans after a large value.

    Args:
        values: (..., Q).

    Returns:
        (..., Q, Q), same dtype.
    """
    Q = values.shape[-1]
    below = torch.ones(Q, Q, dtype=torch.bool, device=values.device).tril(-1)
    spans = values.unsqueeze(-1).expand(*values.shape, Q).masked_fill(~below, 0).cumsum(-2)
    return spans.masked_fill(below.T, -torch.inf)


@functools.cache
def _has_flash_linear_attention() -> bool:
    return importlib.util.find_spec("fla") is not None


def _scan_flash_linear_attention(x, log_decay, B, C, initial_state):
    """`scan` by a Triton kernel of github.com/fla-org/flash-linear-attention (fla/ops/simple_gla)."""
    # Not an import statement: transformers takes those of a checkpoint's own files for packages that must be installed.
    chunk_simple_gla = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla
    repeats = x.shape[2] // B.shape[2]
    y, state = chunk_simple_gla(
        q=C.repeat_interleave(repeats, 2).to(x.dtype),
        k=B.repeat_interleave(repeats, 2).to(x.dtype),
        v=x.contiguous(),
        g=log_decay,
        scale=1.0,
        initial_state=None if initial_state is None else initial_state.transpose(-1, -2).contiguous(),
        output_final_state=True,
    )
    return y.to(log_decay.dtype), state.transpose(-1, -2)
