"""How good a model is on text: bits per byte and perplexity, embeddings and how faithful they are."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import Refused, UsageError
from ..modes import evaluating
from ..progress import track
from .batches import Batch, collate, encode, windows

if TYPE_CHECKING:
    from torch import Tensor, nn

Pooling = Literal["mean", "cls", "last"]
LONGEST_DEFAULT = 2048  # tokens; a longer context must be asked for, since its cost grows with the square


def causal(model: nn.Module, tokenizer: Any, texts: Sequence[str], *, context: int | None = None, batch_size: int = 8) -> dict[str, Any]:
    """Code length of texts under a causal language model. No sliding window: tokens near the start of a window see little context.

    Every text stands alone. Its tokens are cut into windows of `context` - 1, each behind BOS, and each token is predicted exactly once. A
    tokenizer without BOS: the last token of one window stands in front of the next, and the first token of a text, which nothing
    predicts, is charged log2(vocabulary) bits in `bits_per_byte` and left out of `perplexity`.

    Args:
        model: called as `model(input_ids=, attention_mask=)`, returning logits or an object with `.logits` (B, T, vocabulary).
        tokenizer: a transformers tokenizer, or a callable as for `batches`.
        texts: the texts. Not token ids: bytes would be unknown.
        context: tokens in a window, BOS included; by default what model and tokenizer allow, at most 2048.
        batch_size: windows per forward pass. Changes memory and rounding only.

    Returns:
        `bits_per_byte` (all bits over UTF-8 bytes), `perplexity` (2 to the bits per predicted token; infinite beyond float64), `tokens` (predicted), `unpredicted`
        (charged as above), `bytes`, `texts`, `bos`, `context`.

    Raises:
        UsageError: no texts, token ids, or a context below 2.
        Refused: logits that are not finite.

    Example:
        >>> import torch
        >>> class Uniform(torch.nn.Module):
        ...     def forward(self, input_ids, attention_mask):
        ...         return torch.zeros(*input_ids.shape, 256)
        >>> def letters(text, add_special_tokens=True):
        ...     return {"input_ids": list(text.encode())}
        >>> causal(Uniform(), letters, ["hello"], context=4)["bits_per_byte"]  # doctest: +ELLIPSIS
        8.0...
    """
    import torch
    from torch.nn.functional import cross_entropy

    _texts_only(texts)
    limit = context or min(_limit(model, tokenizer), LONGEST_DEFAULT)
    if limit < 2:
        raise UsageError(f"evaluate.causal: expected a context of at least 2 tokens, found {limit}.")
    bos = getattr(tokenizer, "bos_token_id", None)
    rows: list[list[int]] = []
    unpredicted = 0
    for text in texts:
        ids = encode(text, tokenizer)[1]
        if bos is not None:
            rows += windows(([bos], ids, []), limit) if ids else []
        elif ids:
            unpredicted += 1
            rows += [ids[at : at + limit] for at in range(0, len(ids) - 1, limit - 1)]
    if not rows:
        raise UsageError("evaluate.causal: no token of these texts can be predicted: too short for a tokenizer without BOS.")
    rows.sort(key=len, reverse=True)  # stable; rows of one length share a batch, so little is padded
    bits, tokens, vocabulary = 0.0, 0, 1
    place = _device(model)
    with evaluating(model), torch.no_grad():
        for at in track(range(0, len(rows), batch_size), "evaluating"):
            batch = collate(rows[at : at + batch_size], tokenizer)
            logits = _call(model, batch, place)
            logits = getattr(logits, "logits", logits)
            vocabulary = logits.shape[-1]
            for row, ids in enumerate(rows[at : at + batch_size]):  # row by row: float32 logits of a whole batch may not fit
                target = torch.tensor(ids[1:], device=logits.device)
                nats = cross_entropy(logits[row, : len(ids) - 1].float(), target, reduction="none").double().sum().item()
                if not math.isfinite(nats):
                    raise Refused(f"{type(model).__name__}: the logits are not finite on the evaluation text (window {at + row}).")
                bits += nats / math.log(2)
                tokens += len(ids) - 1
    size = sum(len(t.encode("utf-8", "surrogatepass")) for t in texts)
    return {
        "bits_per_byte": (bits + unpredicted * math.log2(vocabulary)) / size,
        "perplexity": 2 ** (bits / tokens) if bits / tokens < 1024 else math.inf,
        "tokens": tokens,
        "unpredicted": unpredicted,
        "bytes": size,
        "texts": len(texts),
        "bos": bos is not None,
        "context": limit,
    }


def embed(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    pooling: Pooling = "mean",
    batch_size: int = 32,
    normalise: bool = True,
    max_length: int | None = None,
) -> Tensor:
    """Embeddings of texts by an encoder: its last hidden state, pooled. Longer texts are cut at `max_length`.

    Args:
        model: called as `model(input_ids=, attention_mask=)`, returning an object with `.last_hidden_state`, or that tensor.
        tokenizer: as for `batches`.
        texts: N texts, or token-id lists.
        pooling: "mean" over the tokens, "cls" the first token, "last" the last token.
        batch_size: rows per forward pass. Changes memory and rounding only.
        normalise: scale each embedding to length 1.
        max_length: tokens per text; by default what model and tokenizer allow, and `sentence_bert_config.json` beside them.

    Returns:
        (N, d) float32 on the CPU, in the order of the texts.

    Raises:
        UsageError: no texts, or one without any token.
        Refused: an embedding that is not finite.
    """
    import torch

    if not texts:
        raise UsageError("evaluate.embed: expected at least one text, found none.")
    limit = max_length or _limit(model, tokenizer)
    cut = [windows(encode(t, tokenizer), limit)[:1] for t in texts]
    if [] in cut:
        raise UsageError(f"evaluate.embed: text {cut.index([])} has no tokens.")
    rows = [row for (row,) in cut]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    place = _device(model)
    parts: list[Tensor] = []
    with evaluating(model), torch.no_grad():
        for at in track(range(0, len(order), batch_size), "embedding"):
            batch = collate([rows[i] for i in order[at : at + batch_size]], tokenizer)
            hidden = _call(model, batch, place)
            hidden = getattr(hidden, "last_hidden_state", hidden).float()
            parts.append(pool(hidden, batch.attention_mask.to(place), pooling).cpu())
    found = torch.cat(parts)
    out = torch.empty_like(found)
    out[torch.tensor(order)] = found
    bad = (~torch.isfinite(out).all(dim=1)).nonzero().flatten().tolist()
    if bad:
        raise Refused(f"{type(model).__name__}: the embedding of text {bad[0]} is not finite.")
    return torch.nn.functional.normalize(out, dim=-1) if normalise else out


def pool(hidden: Tensor, mask: Tensor, pooling: Pooling = "mean") -> Tensor:
    """(B, T, d) hidden states and a (B, T) mask of right-padded rows -> (B, d)."""
    import torch

    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
    if pooling != "mean":
        raise UsageError(f"pooling: expected 'mean', 'cls' or 'last', found {pooling!r}.")
    weight = mask.to(hidden.dtype).unsqueeze(-1)
    return (hidden * weight).sum(1) / weight.sum(1).clamp_min(1)


def embeddings(reference: Tensor, other: Tensor) -> dict[str, float]:
    """How faithful embeddings are to those of the original model. No labels, no ranking quality: only agreement.

    Args:
        reference: (N, d) of the original.
        other: (N, d) of the changed model, for the same texts.

    Returns:
        `cosine` (mean over texts), `cosine_p05` (its 5% quantile), `nearest_neighbour` (share of texts whose nearest other text by
        `other` is also a nearest one by `reference`; ties within 1e-6 count), `texts`.

    Raises:
        UsageError: the shapes differ or there are no rows.

    Example:
        >>> import torch
        >>> embeddings(torch.eye(3), 2 * torch.eye(3))["cosine"]
        1.0
    """
    import torch
    from torch.nn.functional import normalize

    if reference.shape != other.shape or reference.ndim != 2 or not len(reference):
        found = f"{tuple(reference.shape)} and {tuple(other.shape)}"
        raise UsageError(f"evaluate.embeddings: expected two (N, d) tensors of one shape, found {found}.")
    a, b = normalize(reference.double(), dim=1), normalize(other.double(), dim=1)
    cosine = (a * b).sum(1)
    agree = 0
    for at in range(0, len(a), 1024):  # rows of the similarity matrix held at once
        rows = torch.arange(at, min(at + 1024, len(a)))
        like_a, like_b = a[rows] @ a.T, b[rows] @ b.T
        for like in (like_a, like_b):
            like[torch.arange(len(rows)), rows] = -torch.inf
        chosen = like_a.gather(1, like_b.argmax(1, keepdim=True)).squeeze(1)
        agree += int((chosen >= like_a.amax(1) - 1e-6).sum()) if len(a) > 1 else len(rows)
    return {
        "cosine": cosine.mean().item(),
        "cosine_p05": torch.quantile(cosine, 0.05).item(),
        "nearest_neighbour": agree / len(a),
        "texts": len(a),
    }


def _texts_only(texts: Sequence[Any]) -> None:
    if isinstance(texts, str) or not texts or not all(isinstance(t, str) and t for t in texts):
        raise UsageError("evaluate.causal: expected a list of non-empty texts; token ids have no bytes to count.")


def _limit(model: Any, tokenizer: Any) -> int:
    """Longest input that model, tokenizer and a `sentence_bert_config.json` beside either allow."""
    config = getattr(model, "config", None)
    found = [getattr(config, n, None) for n in ("max_position_embeddings", "n_positions")] + [getattr(tokenizer, "model_max_length", None)]
    for folder in (getattr(config, "_name_or_path", ""), getattr(tokenizer, "name_or_path", "")):
        file = Path(folder or ".") / "sentence_bert_config.json"
        if folder and file.is_file():
            try:
                loaded = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise Refused(f"{file}: not JSON ({error}). Repair or remove it.") from error
            found.append(loaded.get("max_seq_length") if isinstance(loaded, dict) else None)
    limits = [int(v) for v in found if isinstance(v, int) and 0 < v < 10**9]
    return min(limits, default=512)


def _device(model: nn.Module) -> Any:
    import torch

    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _call(model: nn.Module, batch: Batch, place: Any) -> Any:
    more = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}  # a cache only costs memory here
    return model(input_ids=batch.input_ids.to(place), attention_mask=batch.attention_mask.to(place), **more)
