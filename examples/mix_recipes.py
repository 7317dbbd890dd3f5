"""Mix axes of published systems: one metric of one paper, the allocation of another, a budget of your own.

    python examples/mix_recipes.py

Prints predicted and measured quality of three mixes on the bundled model, and writes the best one to `build/mixed`.
"""

import sys
from pathlib import Path

import eckart as ek
from eckart.data import load_texts


def main(out: Path, texts: int = 24) -> None:
    model = ek.demo_model()
    calib = load_texts(model / "calibration.jsonl")[:texts]
    heldout = load_texts(model / "heldout.jsonl")[:texts]
    tokenizer = ek.load_tokenizer(model)
    svd_llm = ek.get_recipe("svd_llm")
    mixes = {
        "svd_llm as published": svd_llm,
        "its metric, water-filling": svd_llm.with_(score=ek.score.PredictedLoss(), allocate=ek.allocate.WaterFill()),
        "centred, mean kept, one energy": svd_llm.with_(
            metric=ek.metric.InputGram(centred=True, keep_mean=True), score=ek.score.Energy(), allocate=ek.allocate.SameEnergy()
        ),
    }
    bits = {}
    for name, recipe in mixes.items():
        small = ek.compress(model, recipe, keep=0.6, calib=calib).model
        bits[name] = ek.evaluate(small, heldout, tokenizer=tokenizer)["model"]["bits_per_byte"]
        print(f"{name:32} {bits[name]:.4f} bits per byte")
    best = min(bits, key=lambda n: bits[n])
    ek.compress(model, mixes[best], keep=0.6, calib=calib, out=out, overwrite=True)
    print(f"written: {out} ({best})")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/mixed"))
