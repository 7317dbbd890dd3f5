"""`eckart eval`."""

from __future__ import annotations

from pathlib import Path

from .base import Json, Quiet, app, console, plain_table, print_json


@app.command(name="eval")
def evaluate(
    model: str, /, *, text: Path, against: str | None = None, context: int | None = None, batch_size: int = 8, device: str | None = None, as_json: Json = False, quiet: Quiet = False
) -> None:  # fmt: skip
    """Score a model on text: bits per byte for language models, fidelity of embeddings for encoders.

    Parameters
    ----------
    model:
        Folder or Hub id.
    text:
        .txt (a line per text) or .jsonl.
    against:
        The original, to compare with; needed for encoders.
    context:
        Tokens per window, BOS included.
    batch_size:
        Rows per forward pass.
    device:
        Where the models run.
    """
    from ..verbs.evaluate import evaluate as run

    found = run(model, text, against=against, context=context, batch_size=batch_size, device=device)
    if as_json:
        print_json(found)
        return
    table = plain_table(gap=2)
    for column in ("metric", "original", "this model"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for row in found["rows"]:
        table.add_row(row["metric"], "" if row["before"] is None else f"{row['before']:.4f}", f"{row['after']:.4f}")
    console().print(table)
    if not quiet:
        print(f"{found['rows'][0]['text']}: {found['rows'][0]['note']}")
