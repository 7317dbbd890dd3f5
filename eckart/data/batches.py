"""From texts to padded batches of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import Refused, UsageError
from .texts import Texts

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """Token ids of a few texts, padded on the right.

    Args:
        input_ids: (B, T) int64.
        attention_mask: (B, T) int64, 1 at tokens and 0 at padding.
        weights: optional (B, T) weights of the tokens in statistics, not negative; None counts every token once.
        bos: every row starts with the tokenizer's begin-of-sequence token.
    """

    input_ids: Tensor
    attention_mask: Tensor
    weights: Tensor | None = None
    bos: bool = False


def batches(texts: Texts, tokenizer: Any = None, *, max_length: int = 512, batch_size: int = 8, split_long: bool = False) -> list[Batch]:
    """Batches in the order of the texts. It neither shuffles nor packs: a row is one text, or one window of it.

    Texts get the tokenizer's own special tokens, BOS among them where it adds one; nothing is added to token-id lists.

    Args:
        texts: texts, or token-id lists.
        tokenizer: a transformers tokenizer, or any callable `(text, add_special_tokens=...) -> {"input_ids": [...]}`; token-id lists need
            none. Its `model_max_length` limits `max_length`.
        max_length: longest row, special tokens included.
        batch_size: rows per batch.
        split_long: cut a long text into windows, each with the special tokens, instead of dropping what is beyond `max_length`.

    Returns:
        The batches; the last one may have fewer rows.

    Raises:
        UsageError: max_length or batch_size below 1, texts without a tokenizer.
        Refused: max_length leaves no room beside the special tokens.

    Example:
        >>> [b.input_ids.tolist() for b in batches([[5, 6, 7], [8], [9]], max_length=2, batch_size=2)]
        [[[5, 6], [8, 0]], [[9]]]
    """
    if batch_size < 1 or max_length < 1:
        raise UsageError(f"batches: expected batch_size and max_length of at least 1, found {batch_size} and {max_length}.")
    limit = min(max_length, int(getattr(tokenizer, "model_max_length", None) or max_length))
    rows: list[list[int]] = []
    for text in texts:
        found = windows(encode(text, tokenizer), limit)
        rows += found if split_long else found[:1]
    return [collate(rows[at : at + batch_size], tokenizer) for at in range(0, len(rows), batch_size)]


def encode(text: str | Sequence[int], tokenizer: Any) -> tuple[list[int], list[int], list[int]]:
    """(special tokens in front, the text's own tokens, special tokens behind)."""
    if not isinstance(text, str):
        return [], [int(i) for i in text], []
    if tokenizer is None:
        raise UsageError("batches: texts need a tokenizer; pass token-id lists to do without.")
    full = _ids(tokenizer, text, True)
    body = _ids(tokenizer, text, False)
    for at in range(len(full) - len(body) + 1):
        if full[at : at + len(body)] == body:
            return full[:at], body, full[at + len(body) :]
    return [], full, []


def _ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    quiet = {"verbose": False} if hasattr(tokenizer, "model_max_length") else {}  # no warning about texts that are cut here
    return [int(i) for i in tokenizer(text, add_special_tokens=special, **quiet)["input_ids"]]


def windows(encoded: tuple[list[int], list[int], list[int]], limit: int) -> list[list[int]]:
    """The text's tokens cut into rows of at most `limit`, each with the special tokens; a text without tokens gives one row of these."""
    front, body, behind = encoded
    room = limit - len(front) - len(behind)
    if room < 1:
        raise Refused(f"max_length {limit}: no room beside {len(front) + len(behind)} special tokens. Raise it.")
    return [front + body[at : at + room] + behind for at in range(0, max(len(body), 1), room) if front or body or behind]


def collate(rows: Sequence[Sequence[int]], tokenizer: Any = None) -> Batch:
    """One batch of rows, padded on the right with the tokenizer's padding token, else its end token, else 0."""
    import torch

    names = ("pad_token_id", "eos_token_id")
    pad = next((int(v) for n in names if isinstance(v := getattr(tokenizer, n, None), int)), 0)
    bos = getattr(tokenizer, "bos_token_id", None)
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad, dtype=torch.int64)
    mask = torch.zeros((len(rows), width), dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[i, : len(row)] = 1
    return Batch(ids, mask, bos=bos is not None and all(row[0] == bos for row in rows))
