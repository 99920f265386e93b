"""What a tensor's numbers are like, and how two tensors differ: read piece by piece from their files.

In: where tensors lie. Out: a `Statistics`, or a `Difference`. A few megabytes are in memory at a time.
"""

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
    """Of a tensor's finite numbers; NaN where there are none.

    Attributes:
        std: around the mean, of all numbers (not of a sample).
        not_finite: how many are infinite or no numbers.
        blake3: of the bytes, as in tensor_digests.json.
    """

    mean: float
    std: float
    least: float
    most: float
    not_finite: int
    blake3: str


@dataclass(frozen=True)
class Difference:
    """Two tensors of one shape: the largest absolute difference, and that of all relative to the second one's norm."""

    largest: float
    relative: float


def statistics_of(place: TensorRange) -> Statistics:
    """Read a tensor once."""
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
    """Read two tensors of one shape once; their dtypes may differ."""
    largest = squares = norm = 0.0
    for a, b in zip(_pieces(ours), _pieces(theirs), strict=True):
        change = a.double() - b.double()
        largest = max(largest, change.abs().max().item())
        squares += change.square().sum().item()
        norm += b.double().square().sum().item()
    return Difference(largest, math.sqrt(squares / norm) if norm else math.nan)


def _pieces(place: TensorRange) -> Iterator[Tensor]:
    """The tensor's numbers in order, flat, some at a time."""
    mapped = MappedFiles()
    flat = mapped.tensor(place).reshape(-1)
    yield from flat.split(_PIECE_NUMBERS) if flat.numel() else ()
    mapped.forget(place)
