"""`evaluate`: how good a model is on text, and how faithful to another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..data import evaluate as measures
from ..data import load_texts
from ..errors import UsageError
from .host import is_causal, open_host


def evaluate(
    model: Any, texts: Any, *, against: Any = None, tokenizer: Any = None, context: int | None = None, batch_size: int = 8, max_length: int | None = None, device: str | None = None
) -> dict[str, Any]:  # fmt: skip
    """Bits per byte and perplexity of a causal model, or fidelity of an encoder's embeddings to the original's.

    It is no benchmark suite: for tasks use lm-evaluation-harness on the same folder.

    Args:
        model: folder, Hub id, or module.
        texts: list of texts or a path to a text or JSONL file.
        against: the original model; needed for encoders, optional for causal models, whose own score is given then as well.
        tokenizer: for a module that does not know its own.
        context: tokens per window, BOS included; None is the model's limit, at most 2048.
        batch_size: rows per forward pass.
        max_length: tokens per text, for encoders.
        device: where the models run.

    Returns:
        `kind` ("causal" or "embedding"), `rows` (metric, before, after, better, text, note: what a report shows), and the measured values
        under `model` and `against`.

    Raises:
        UsageError: an encoder without `against`.
        Refused: unreadable texts or model.
    """
    host = open_host(model, tokenizer, device)
    found: Any = load_texts(texts)
    file = Path(texts).name if isinstance(texts, str | Path) else ""
    count = f"{len(found)} texts"
    tok = host.tokenizer()
    live = host.live()
    other = open_host(against, tok, device).live() if against is not None else None
    if is_causal(live):
        after = measures.causal(live, tok, found, context=context, batch_size=batch_size)
        before = measures.causal(other, tok, found, context=context, batch_size=batch_size) if other is not None else None
        return {"kind": "causal", "model": after, "against": before, "rows": causal_rows(before, after, file or count)}
    if other is None:
        raise UsageError(
            f"{host.name} is an encoder: embedding fidelity compares it with the original. Give --against ORIGINAL (against=...)."
        )
    a = measures.embed(other, tok, found, max_length=max_length)
    b = measures.embed(live, tok, found, max_length=max_length)
    after = measures.embeddings(a, b)
    return {"kind": "embedding", "model": after, "against": None, "rows": embedding_rows(after, file or count, count if file else "")}


def causal_rows(before: dict[str, Any] | None, after: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Rows of the before/after table of a causal model."""
    how = f"{'BOS' if after['bos'] else 'no BOS'}, context {after['context']}, {after['tokens']:,} tokens"
    words = (("bits_per_byte", "bits per byte"), ("perplexity", "perplexity per token"))
    return [
        {"metric": w, "before": before[k] if before else None, "after": after[k], "better": "lower", "text": name, "note": how}
        for k, w in words
    ]


def embedding_rows(after: dict[str, Any], name: str, note: str) -> list[dict[str, Any]]:
    """Rows of the before/after table of an encoder; the original agrees with itself."""
    words = (
        ("cosine", "mean cosine to the original"),
        ("cosine_p05", "5% quantile of that cosine"),
        ("nearest_neighbour", "nearest-neighbour agreement"),
    )
    return [{"metric": w, "before": 1.0, "after": after[k], "better": "higher", "text": name, "note": note} for k, w in words]
