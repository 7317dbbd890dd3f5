"""LISA: which blocks train, that the others keep their bits, and that the optimiser forgets them."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import nn

import eckart as ek
from eckart.axes import refresh
from eckart.errors import Refused, UsageError
from eckart.hub.peft.glue import branches
from eckart.registry import get_recipe


class Net(nn.Module):
    """Five blocks between a table and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(5))
        self.head = nn.Linear(6, 11)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.layers:
            x = x + block(x)
        return self.head(x)


def net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


def ids(step: int) -> torch.Tensor:
    return torch.randint(0, 11, (4, 7), generator=torch.Generator().manual_seed(step))


def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten())


def sampled(blocks: int, every: int):
    return get_recipe("lisa").with_(refresh=(refresh.Sample(blocks=blocks, every=every),))


def test_blocks_take_turns_and_rest_without_a_trace() -> None:
    model = ek.adapt(net(), sampled(2, 3)).train()
    layers = dict(branches(model, "default"))
    assert sorted(layers) == [*("base_model.model.embed", "base_model.model.head"), *(f"base_model.model.layers.{i}.0" for i in range(5))]
    weights = {n: b.whole for n, b in layers.items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-2, weight_decay=0.1)
    seen = []
    with ek.glue(model).begin(optimizer) as glue:
        for step in range(12):
            on = {n for n, p in weights.items() if p.requires_grad}
            assert {n for n in on if "layers" not in n} == {"base_model.model.embed", "base_model.model.head"}
            assert len(on) == 4
            before = {n: p.detach().clone() for n, p in weights.items()}
            loss(model, ids(step)).backward()
            glue.before_step()
            optimizer.step()
            assert all(torch.equal(p, before[n]) == (n not in on) for n, p in weights.items())
            assert {n for n, p in weights.items() if optimizer.state.get(p)} == on
            glue.after_step()
            optimizer.zero_grad()
            now = {n for n, p in weights.items() if p.requires_grad}
            assert (now == on) or step % 3 == 2
            assert {n for n, p in weights.items() if optimizer.state.get(p)} == on & now  # at a draw too
            seen.append(frozenset(on))
    assert len(set(seen)) > 1
    assert all(p.requires_grad for p in weights.values())


def test_all_blocks_at_once_is_full_fine_tuning() -> None:
    """To the bit, beside a plain AdamW on the same weights, with and without blocks that are drawn."""
    ours = ek.adapt(net(), sampled(5, 2)).train()
    plain = ek.adapt(net(), get_recipe("lisa").with_(refresh=())).train()
    for model in (ours, plain):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        with ek.glue(model).begin(optimizer) as glue:
            for step in range(5):
                optimizer.zero_grad()
                loss(model, ids(step)).backward()
                glue.before_step()
                optimizer.step()
                glue.after_step()
    one, two = ours.state_dict(), plain.state_dict()
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_draws_are_uniform_and_depend_on_seed_and_number_alone() -> None:
    piece = refresh.Sample(blocks=2, every=1)
    names = [f"h.{i}.q" for i in range(6)] + [f"h.{i}.k" for i in range(6)] + ["head"]
    draws = [piece.drawn(names, 0, k) for k in range(600)]
    assert all(len(d) == 2 for d in draws)
    counts = Counter(b for d in draws for b in d)
    assert len(counts) == 6
    assert all(abs(c - 200) < 60 for c in counts.values())  # 200 expected, standard deviation 11.5
    assert draws == [piece.drawn(names, 0, k) for k in range(600)]
    assert draws != [piece.drawn(names, 1, k) for k in range(600)]
    assert draws[3] == piece.drawn(names[:6], 0, 3)


def test_beside_another_recipe_it_draws_the_blocks_of_its_factors() -> None:
    model = ek.adapt(net(), "pissa", rank=2, glue=[sampled(1, 2)], target=["0", "head"]).train()
    layers = dict(branches(model, "default"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with ek.glue(model).begin(optimizer):
        on = [n for n, b in layers.items() if b.left.requires_grad and b.right.requires_grad]
        assert len(on) == 2
        assert "base_model.model.head" in on


def test_tied_tables_are_left_alone_and_saved_weights_reload(tmp_path) -> None:
    from peft import PeftModel

    tied = net()
    tied.head.weight = nn.Parameter(torch.randn(11, 6, generator=torch.Generator().manual_seed(1)))
    tied.embed.weight = tied.head.weight
    assert sorted(dict(branches(ek.adapt(tied, "lisa"), "default"))) == [f"base_model.model.layers.{i}.0" for i in range(5)]
    model = ek.adapt(net(), "lisa")
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(generator=torch.Generator().manual_seed(2))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(net(), tmp_path)
    assert torch.equal(again.eval()(ids(0)), model.eval()(ids(0)))
    assert torch.allclose(copy.deepcopy(model).merge_and_unload()(ids(0)), model(ids(0)), atol=1e-4)


def test_what_cannot_be(tmp_path) -> None:
    with pytest.raises(UsageError, match="have no rank"):
        ek.adapt(net(), "lisa", rank=4)
    with pytest.raises(UsageError, match="blocks must be at least 1"):
        refresh.Sample(blocks=0)

    class Args:
        deepspeed, fsdp, world_size, ddp_find_unused_parameters = None, None, 2, None

    with pytest.raises(Refused, match="ddp_find_unused_parameters=True"):
        ek.glue(ek.adapt(net(), "lisa")).on_train_begin(Args(), None, None)
