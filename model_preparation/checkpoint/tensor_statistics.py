"""Statistics of one tensor, and the difference of two tensors. Tensors are read in pieces."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from blake3 import blake3
from torch import Tensor

from model_preparation.io.tensors.tensor_ranges import MappedFiles, TensorRange, bytes_of

_PIECE_NUMBERS = 1 << 20


@dataclass(frozen=True)
class Statistics:
    """Statistics of a tensor's finite numbers; NaN if no number is finite.

    Attributes:
        std: the population's standard deviation.
        not_finite: how many numbers are infinite or NaN.
        blake3: the digest of all bytes, as in tensor_digests.json.
    """

    mean: float
    std: float
    least: float
    most: float
    not_finite: int
    blake3: str


@dataclass(frozen=True)
class Difference:
    """How two tensors differ. `largest` and `relative` are of the places where both numbers are finite.

    Attributes:
        largest: the largest absolute difference of two numbers at the same place.
        relative: the norm of the difference, divided by the norm of the second tensor; NaN if that is 0.
        not_finite: in how many places the numbers differ and at least one is not finite. NaN equals NaN.
    """

    largest: float
    relative: float
    not_finite: int


def statistics_of(place: TensorRange) -> Statistics:
    """Statistics of a tensor. It is read once."""
    digest = blake3()
    count, total, squares, least, most = 0, 0.0, 0.0, math.inf, -math.inf
    for piece in _pieces(place):
        digest.update(bytes_of(piece))
        numbers = piece.double()
        finite = numbers[torch.isfinite(numbers)]
        if finite.numel():
            count += finite.numel()
            total += finite.sum().item()
            squares += finite.square().sum().item()
            least, most = min(least, finite.min().item()), max(most, finite.max().item())
    if not count:
        return Statistics(math.nan, math.nan, math.nan, math.nan, place.numel, digest.hexdigest())
    mean = total / count
    std = math.sqrt(max(0.0, squares / count - mean**2))
    return Statistics(mean, std, least, most, place.numel - count, digest.hexdigest())


def difference_of(ours: TensorRange, theirs: TensorRange) -> Difference:
    """The difference of two tensors of the same shape. Their dtypes may differ. Each is read once."""
    largest = squares = norm = 0.0
    not_finite = 0
    for a, b in zip(_pieces(ours), _pieces(theirs), strict=True):
        a, b = a.double(), b.double()
        finite = torch.isfinite(a) & torch.isfinite(b)
        not_finite += int((~finite & (a != b) & ~(a.isnan() & b.isnan())).sum())
        a, b = a[finite], b[finite]
        change = a - b
        largest = max(largest, change.abs().max().item() if change.numel() else 0.0)
        squares += change.square().sum().item()
        norm += b.square().sum().item()
    return Difference(largest, math.sqrt(squares / norm) if norm else math.nan, not_finite)


def _pieces(place: TensorRange) -> Iterator[Tensor]:
    """The tensor's numbers in order, in flat pieces."""
    mapped = MappedFiles()
    flat = mapped.tensor(place).reshape(-1)
    yield from flat.split(_PIECE_NUMBERS) if flat.numel() else ()
    mapped.forget(place)
