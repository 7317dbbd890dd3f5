"""Compress a small click-through model by Atomic Feature Mimicking, embedding tables and MLP layers alike.

    python examples/afm_ctr.py            # about twenty seconds on one core
    python examples/afm_ctr.py --quick    # a few seconds, a weaker model

The data are made here: users, items and contexts have hidden traits in a few dimensions, and a click follows from how they meet. Prints the area
under the ROC curve on held-out clicks before and after, for AFM, for plain SVD, and for AFM on the MLP alone.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import eckart as ek

FIELDS = (800, 500, 120, 24)  # entries of user, item, shop and hour
TRAITS, WIDTH = 3, 32


class Click(nn.Module):
    """Embedding tables of every field, joined and fed to an MLP; returns the logit of a click."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(n, WIDTH) for n in FIELDS)
        for table in self.tables:
            nn.init.normal_(table.weight, std=0.01)  # torch's default of 1 would leave more noise than signal in every direction
        self.hidden = nn.Linear(WIDTH * len(FIELDS), 128)
        self.deep = nn.Linear(128, 64)
        self.logit = nn.Linear(64, 1)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, fields) ids -> (B,)."""
        joined = torch.cat([t(ids[:, i]) for i, t in enumerate(self.tables)], dim=1)
        return self.logit(self.deep(self.hidden(joined).relu()).relu()).squeeze(-1)


def clicks(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """(ids, clicked): popular entries come up more often, as they do in logs. The world is the same for every seed."""
    world, g = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    traits = [torch.randn(n, TRAITS, generator=world) for n in FIELDS]
    ids = torch.stack([(n * torch.rand(count, generator=g) ** 2).long() for n in FIELDS], dim=1)
    user, item, shop, hour = (t[ids[:, i]] for i, t in enumerate(traits))
    score = (user * item).sum(1) + 0.5 * (item * hour).sum(1) + user[:, 0] + shop[:, 1] + hour[:, 2]
    chance = (score - 1).sigmoid()
    return ids, (torch.rand(count, generator=g) < chance).float()


def train(model: nn.Module, ids: Tensor, clicked: Tensor, epochs: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    g = torch.Generator().manual_seed(1)
    for _ in range(epochs):
        for rows in torch.randperm(len(ids), generator=g).split(512):
            loss = nn.functional.binary_cross_entropy_with_logits(model(ids[rows]), clicked[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.no_grad()
def auc(model: nn.Module, ids: Tensor, clicked: Tensor) -> float:
    """Share of (clicked, not clicked) pairs that the model puts in the right order."""
    order = model(ids).argsort().argsort().double() + 1
    hits = int(clicked.sum())
    return (order[clicked == 1].sum().item() - hits * (hits + 1) / 2) / (hits * (len(ids) - hits))


def main(quick: bool = False, keep: float = 0.1) -> dict[str, float]:
    """Trains, compresses, prints; returns the areas."""
    ids, clicked = clicks(40_000 if quick else 300_000, seed=1)
    held = clicks(10_000 if quick else 50_000, seed=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Click()
    train(model, ids, clicked, epochs=3 if quick else 4)
    calib = list(ids[:8192].split(512))
    everything = ek.target.Linears(embeddings=True)
    found = {"original": auc(model, *held)}
    print(f"{'original':24} {found['original']:.4f} AUC, {sum(p.numel() for p in model.parameters()):,} parameters")
    for name, recipe in {
        "afm, tables and MLP": ek.get_recipe("afm").with_(target=everything),
        "svd, tables and MLP": ek.get_recipe("svd").with_(target=everything),
        "afm, MLP alone": ek.get_recipe("afm"),
    }.items():
        made = ek.compress(model, recipe, keep, calib=calib)
        found[name] = auc(made.model, *held)
        print(f"{name:24} {found[name]:.4f} AUC, {made.report['sizes']['total_after']:,} parameters")
    return found


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--quick", action="store_true")
    main(ap.parse_args().quick)
