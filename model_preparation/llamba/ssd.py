"""The scan inside a mixer (SSD, state space duality): linear attention with a scalar decay per head and token.

There are H value heads, in G groups. Value head h is in group g = h // (H / G), and its log decay is
l_t = -softplus(a_t) <= 0:
    S_t = exp(l_t) S_{t-1} + x_t B_t^T        y_t = S_t C_t
`scan` computes a whole sequence in chunks, `step` one token. State and decay are at least float32. The function
`product_dtype` chooses the dtype of the factors in `scan`'s matrix products. `scan` and `step` take exponentials only
of sums of l. These sums are never positive, so nothing overflows. The original Llamba code (see mixer.py)
divides x by softplus(a); this code does not.
Source: Mamba-2, Dao and Gu 2024 (arXiv 2405.21060), section 6, the block decomposition of a semiseparable matrix.
"""

import functools
import importlib
import importlib.util
import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Longer chunks cost more in the (chunk x chunk) products than they save in steps between chunks.
MAX_CHUNK = 64
LOG2_E = math.log2(math.e)
NEVER = -1e4  # a log decay that leaves nothing of the state: its exp is 0 in any dtype, and its sums stay finite
HAVE_FLOAT64 = ("cpu", "cuda")  # types of devices; MPS and most NPUs have no float64


def scan(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    initial_state: Tensor | None = None,
    D: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over a sequence.

    Args:
        x: values, (batch, length, H, P); P is the width of a head.
        log_decay: -softplus(a), (batch, length, H), float32 or wider.
        B: keys, (batch, length, G, N); N is the width of a head's state, and H is a multiple of G.
        C: queries, (batch, length, G, N).
        chunk_size: tokens per chunk, at most `MAX_CHUNK`. The value changes only the rounding of the result.
        initial_state: (batch, H, P, N), or None for zeros.
        D: (H,); D x is added to y.

    Returns:
        y (batch, length, H, P) and the final state (batch, H, P, N), in `log_decay`'s dtype.
    """
    if _is_for_kernel(x):
        y, state = _scan_flash_linear_attention(x, log_decay, B, C, initial_state)
        return y if D is None else y + D.to(y.dtype).unsqueeze(-1) * x, state
    dtype = log_decay.dtype
    batch, length, H, P = x.shape
    G, N = B.shape[2:]
    R = H // G  # value heads per group
    Q = min(chunk_size, MAX_CHUNK, length)
    chunks = -(-length // Q)

    def by_chunk(t: Tensor, to: torch.dtype) -> Tensor:
        """(batch, length, heads, width) -> (chunks * batch * heads, Q, width); zeros at the end change nothing."""
        if chunks * Q > length:
            t = F.pad(t, (0, 0, 0, 0, 0, chunks * Q - length))
        t = t.unflatten(1, (chunks, Q)).permute(1, 0, 3, 2, 4)
        return t.to(to, memory_format=torch.contiguous_format).reshape(-1, Q, t.shape[-1])

    def per_head(t: Tensor) -> Tensor:
        """(chunks * batch * G, ...) -> (chunks * batch * H, ...)"""
        return t if R == 1 else t.repeat_interleave(R, 0)

    products = product_dtype(x)
    x, B, C = by_chunk(x, products), by_chunk(B, products), by_chunk(C, products)
    # LOG2_E: exp2 replaces exp here, because exp takes 10 times as long on a CPU if its result is 0.
    log_decay = by_chunk(log_decay.clamp(min=NEVER).unsqueeze(-1), dtype) * LOG2_E  # (chunks * batch * H, Q, 1)

    # Within a chunk: attention with the decay between two tokens as its mask, and D on the diagonal.
    decay = segment_sum(log_decay).exp2_()  # (chunks * batch * H, Q, Q)
    scores = per_head(torch.bmm(C, B.transpose(1, 2)).to(dtype)) * decay
    if D is not None:
        scores.view(-1, H, Q, Q).diagonal(dim1=2, dim2=3).add_(D.to(dtype).unsqueeze(-1))
    y = torch.bmm(scores.to(products), x)

    # Each chunk adds its inputs to the state, decayed to the chunk's end.
    to_end = decay[:, -1].unsqueeze(-1)  # (chunks * batch * H, Q, 1)
    B, C = per_head(B), per_head(C)
    added = torch.bmm((x.to(dtype) * to_end).to(products).transpose(1, 2), B).to(dtype)  # (chunks * batch * H, P, N)

    # Between chunks: carry the state, and let every token read the state before its chunk.
    from_start = log_decay.cumsum(1).exp2_()  # (chunks * batch * H, Q, 1)
    state = x.new_zeros((batch, H, P, N), dtype=dtype) if initial_state is None else initial_state.to(dtype)
    state = state.flatten(0, 1)
    before = []
    for more, whole in zip(added.chunk(chunks), from_start[:, -1:].chunk(chunks), strict=True):
        before.append(state)
        state = torch.addcmul(more, state, whole)
    if chunks > 1 or initial_state is not None:
        carried = torch.cat(before).to(products).transpose(1, 2)
        y = torch.baddbmm(y, (C * from_start).to(products), carried)

    y = y.view(chunks, batch, H, Q, P).permute(1, 0, 3, 2, 4).to(dtype, memory_format=torch.contiguous_format)
    return y.reshape(batch, chunks * Q, H, P)[:, :length], state.view(batch, H, P, N)


def step(
    x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, state: Tensor, D: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run the recurrence for one token.

    Args:
        x: (batch, H, P). log_decay: (batch, H). B, C: (batch, G, N).
        state: (batch, H, P, N). It is changed in place if it has `log_decay`'s dtype and no gradients are recorded.
        D: (H,); D x is added to y.

    Returns:
        y (batch, H, P) and the new state (batch, H, P, N), in `log_decay`'s dtype.
    """
    dtype = log_decay.dtype
    repeats = x.shape[1] // B.shape[1]
    B, C, x = B.to(dtype), C.to(dtype), x.to(dtype)
    if repeats > 1:
        B, C = B.repeat_interleave(repeats, 1), C.repeat_interleave(repeats, 1)  # (batch, H, N)
    decay = log_decay.exp()[..., None, None]
    state = state.to(dtype) * decay if torch.is_grad_enabled() else state.to(dtype).mul_(decay)
    state = state.addcmul_(x.unsqueeze(-1), B.unsqueeze(-2))
    # C is the left factor: with C as a column on the right, bmm takes 7 times as long on a CPU.
    y = torch.bmm(C.reshape(-1, 1, C.shape[-1]), state.flatten(0, 1).transpose(1, 2)).view_as(x)
    return y if D is None else y.addcmul_(D.to(dtype).unsqueeze(-1), x), state


def segment_sum(values: Tensor) -> Tensor:
    """Sums over every span: out[:, i, j] = values[:, j+1] + ... + values[:, i], 0 on the diagonal, -inf above it.

    A span's sum is the difference of two running sums. In float32, small sums after a large value would be
    lost. So running sums are float64 on the devices in `HAVE_FLOAT64`. Each running sum is split into two
    numbers of the values' dtype: its rounded value, and the rounding error. On other devices, each span is
    summed by itself.

    Args:
        values: (n, Q, 1).

    Returns:
        (n, Q, Q), same dtype.
    """
    Q = values.shape[1]
    if values.device.type in HAVE_FLOAT64:
        sums = values.double().cumsum(1)
        high = sums.detach().to(values.dtype)
        low = (sums - high).to(values.dtype)
        spans = (high - high.transpose(1, 2)).add_(low).sub_(low.transpose(1, 2))
    else:
        spans = values.expand(-1, -1, Q).tril(-1).cumsum(1)
    return spans.add_(torch.full((Q, Q), -torch.inf, dtype=values.dtype, device=values.device).triu_(1))


def product_dtype(t: Tensor) -> torch.dtype:
    """The dtype of the factors in matrix products.

    It is t's own dtype if the optional kernel runs, or if t is bfloat16 on a CPU that multiplies bfloat16.
    Otherwise it is float32 or wider. Sums are always float32 or wider. With bfloat16 factors, each matrix
    product is rounded to bfloat16 once. The original code's kernels also round the factors. The state between
    chunks is float32 or wider.
    """
    if _is_for_kernel(t):
        return t.dtype
    if t.dtype == torch.bfloat16 and t.device.type == "cpu" and _cpu_has_bfloat16():
        return t.dtype
    return torch.promote_types(t.dtype, torch.float32)


@functools.cache
def _cpu_has_bfloat16() -> bool:
    return torch.cpu._is_avx512_bf16_supported()


def _is_for_kernel(t: Tensor) -> bool:
    """Whether the optional kernel runs on this tensor.

    The kernel rounds float32 to TF32, so it runs on float32 only under autocast.
    """
    is_half = t.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled("cuda")
    return t.is_cuda and is_half and _has_flash_linear_attention()


@functools.cache
def _has_flash_linear_attention() -> bool:
    return importlib.util.find_spec("fla") is not None


def _scan_flash_linear_attention(x, log_decay, B, C, initial_state):
    """`scan` by a Triton kernel of github.com/fla-org/flash-linear-attention (fla/ops/simple_gla)."""
    # An import statement would make transformers require `fla` for every checkpoint that has a copy of this file.
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
