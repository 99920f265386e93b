"""Several documents in one row: finds them by their positions, and makes masks so that they do not see each other."""

import torch
from torch import Tensor

from .cache_llamba import LlambaCache


def token_places(hidden_states: Tensor, attention_mask: Tensor | None, cache: LlambaCache | None) -> Tensor:
    """For each token, cached ones first: how many real tokens are before it in its row.

    The result is (batch or 1, past + length). Its numbers at padding have no meaning.
    """
    if attention_mask is not None:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    past = cache.get_seq_length() if cache is not None else 0
    return torch.arange(past + hidden_states.shape[1], device=hidden_states.device).unsqueeze(0)


def has_several_documents(position_ids: Tensor, places: Tensor, attention_mask: Tensor | None) -> bool:
    """Whether a document begins after the first token of a row.

    Args:
        position_ids: (batch or 1, length).
        places: (batch or 1, length), the `token_places` of the same tokens.

    Raises:
        ValueError: if a position is lower than its place, and positions neither count up by one nor start
            again at 0.
    """
    real = torch.ones_like(places, dtype=torch.bool)
    if attention_mask is not None:
        real = attention_mask[:, -places.shape[1] :].bool()
    if not bool(((position_ids < places) & real).any()):
        return False
    position_ids, places, real = torch.broadcast_tensors(position_ids, places, real)
    for row, (positions, is_real) in enumerate(zip(position_ids, real, strict=True)):
        positions = positions[is_real]
        wrong = (positions[1:] != positions[:-1] + 1) & (positions[1:] != 0)
        if bool(wrong.any()):
            at = int(wrong.nonzero()[0])
            raise ValueError(
                f"position_ids of row {row} go from {int(positions[at])} to {int(positions[at + 1])}: "
                "they must count up by one, or start again at 0 where a document begins"
            )
    return True


def visible(position_ids: Tensor, places: Tensor, is_packed: bool, window: int | None):
    """A mask function that transformers combines with the causal mask.

    It is true for keys in the query's document that are also in the query's window, and for all keys after the
    query.
    The window is the query and the `window` - 1 real tokens before it; padding is not counted.
    Returns None if every key before the query is visible.
    """
    if not is_packed and window is None:
        return None
    past = places.shape[1] - position_ids.shape[1]
    own_places = places[:, past:]
    # (batch or 1, length): the place of the first token that is visible
    first = own_places - position_ids if is_packed else torch.zeros_like(own_places)
    if window is not None:
        first = first.maximum(own_places - window + 1)
    rows = max(len(first), len(places))
    first, places = first.expand(rows, -1), places.expand(rows, -1)

    def mask(batch, head, query, key):
        row = batch if rows > 1 else 0
        return places[row, key] >= first[row, query - past]

    return mask
