"""KIND: W(c) written out for every class in float64, per sample and merged; gradients that stop at other classes' triples."""

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import nn

import eckart as ek
from eckart.errors import Refused, UsageError
from eckart.nn.gated import Gated, gate, owners

GROUPS = 4


def parts_of(rank: int) -> list[list[int]]:
    """Triples of W(c), by hand: the first half, and the c-th part of the others."""
    half = rank // 2
    each = [list(map(int, x)) for x in np.array_split(np.arange(half, rank), GROUPS)]
    return [[*range(half), *part] for part in each]


def w_of(world, b, c: int) -> torch.Tensor:
    """(W without its leading triples) + those of the class, as trained."""
    left, core, right = (t.detach().double() for t in (b.left, b.core, b.right))
    rest = world.W - (world.U[:, : b.rank] * world.S[: b.rank]) @ world.Vh[: b.rank]
    keep = parts_of(b.rank)[c]
    return rest + (left[:, keep] * core[keep]) @ right[keep]


def moved(world, adapted):
    model, b = adapted(world.make(), "kind", 16)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in b.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    return model, b


def test_open_it_is_the_layer(world, adapted) -> None:
    model, b = adapted(world.make(), "kind", 16)
    assert torch.equal(model(world.x), world.make()(world.x))
    want = (world.U[:, :16] * world.S[:16]) @ world.Vh[:16]
    assert torch.allclose(b.gain_matrix().detach().double(), want, atol=1e-5)
    assert sum(p.numel() for p in b.parameters()) == 16 * (sum(world.shape) + 1)


def test_one_class_at_a_time_and_each_sample_its_own(world, adapted) -> None:
    model, b = moved(world, adapted)
    x = world.x.double()
    want = [x @ w_of(world, b, c).T + world.bias for c in range(GROUPS)]
    for c in range(GROUPS):
        with gate(model, c):
            assert torch.allclose(model(world.x).double(), want[c], atol=1e-4)
    classes = torch.arange(len(x)) % GROUPS
    mixed = torch.stack([want[c][i] for i, c in enumerate(classes.tolist())])
    with gate(model, classes):
        assert torch.allclose(model(world.x).double(), mixed, atol=1e-4)
        tokens = world.x[:, None].expand(-1, 3, -1)
        assert torch.allclose(model(tokens).double(), mixed[:, None].expand(-1, 3, -1), atol=1e-4)
    soft = torch.softmax(torch.randn(len(x), GROUPS, generator=torch.Generator().manual_seed(1)), 1)
    base = 16 // 2
    shared = world.W - (world.U[:, :16] * world.S[:16]) @ world.Vh[:16]
    shared = shared + (b.left[:, :base] * b.core[:base] @ b.right[:base]).detach().double()
    parts = torch.stack([x @ (w_of(world, b, c) - shared).T for c in range(GROUPS)], 1)
    with gate(model, soft):
        blended = x @ shared.T + world.bias + (soft[:, :, None] * parts).sum(1)
        assert torch.allclose(model(world.x).double(), blended, atol=1e-4)
    assert b.opening is None


def test_a_class_leaves_the_gradients_of_others_at_zero(world, adapted) -> None:
    model, b = moved(world, adapted)
    for opening in (2, torch.full((len(world.x),), 2)):
        model.zero_grad()
        with gate(model, opening):
            model(world.x).square().sum().backward()
        on = torch.zeros(16, dtype=torch.bool)
        on[parts_of(16)[2]] = True
        assert not b.left.grad[:, ~on].any()
        assert not b.core.grad[~on].any()
        assert not b.right.grad[~on].any()
        assert b.left.grad[:, on].norm(dim=0).min() > 0


def test_a_fixed_class_merges_and_a_gate_per_sample_does_not(world, adapted) -> None:
    model, b = moved(world, adapted)
    with gate(model, torch.zeros(len(world.x), dtype=torch.long)), pytest.raises(Refused, match="another part of it for each sample"):
        model.merge_adapter()
    with gate(model, 1):
        a, left = b.lora()
        assert torch.allclose((left @ a).detach(), b.delta_matrix().detach(), atol=1e-5)
        merged = model.merge_and_unload()[0].weight.detach().double()
    assert torch.allclose(merged, w_of(world, b, 1), atol=1e-4)


def test_convolutions() -> None:
    net = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2))
    x = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    model = ek.adapt(net, "kind", rank=8, target=["0"]).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(1.3)
        with gate(model, [0, 1, 3]):
            mixed = model(x)
        for i, c in enumerate([0, 1, 3]):
            with gate(model, c):
                assert torch.allclose(mixed[i], model(x)[i], atol=1e-5)


@pytest.mark.parametrize("lazily", [False, True])
def test_a_reloaded_adapter_has_its_groups(world, adapted, tmp_path, lazily) -> None:
    model, _ = moved(world, adapted)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(world.make(), tmp_path, low_cpu_mem_usage=lazily).eval()
    for found in (model, again):
        assert "owner" not in str(list(found.state_dict()))
    with torch.no_grad(), gate(model, 3), gate(again, 3):
        assert torch.equal(again(world.x), model(world.x))


def test_learning_classes_apart() -> None:
    """Two classes that want opposite outputs: shared triples cannot serve both, their own can."""
    g = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 12))
    x = torch.randn(64, 12, generator=g)
    classes = torch.arange(64) % 2
    target = (x @ torch.randn(12, 12, generator=g) / 4) * (1 - 2 * classes)[:, None]
    losses = {}
    for name, opening in (("gated", classes), ("blind", None)):
        model = ek.adapt(nn.Sequential(nn.Linear(12, 12)), "kind", rank=12, settings=["form.groups=2"])
        model.base_model.model[0].base_layer.load_state_dict(net[0].state_dict())
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
        for _ in range(150):
            with gate(model, opening):
                loss = (model(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses[name] = loss.item()
    assert losses["gated"] < 0.5 * losses["blind"]


def test_what_cannot_be_opened(world, adapted) -> None:
    model, _ = adapted(world.make(), "kind", 8)
    with pytest.raises(UsageError, match="expected a group number from 0 to 3, found 4"), gate(model, 4):
        pass
    with pytest.raises(UsageError, match=r"\(B, 4\) weights, found shape \(2, 3\)"), gate(model, torch.ones(2, 3)):
        pass
    with pytest.raises(UsageError, match="found \\[7\\]"), gate(model, [7]):
        pass
    with gate(model, [0, 1]), pytest.raises(UsageError, match="opened for 2 samples, and the layer sees 50"):
        model(world.x)
    with pytest.raises(UsageError, match="has no gated adapter"), gate(world.make(), 0):
        pass
    with pytest.raises(UsageError, match="form.gated: expected a share"):
        ek.adapt(world.make(), "kind", rank=4, settings=["form.shared=0"])
    assert all(m.opening is None for m in model.modules() if isinstance(m, Gated))


def test_triples_are_divided() -> None:
    assert owners(16, 0.5, 4) == [-1] * 8 + [0, 0, 1, 1, 2, 2, 3, 3]
    assert owners(1, 0.5, 4) == [-1]
    assert owners(3, 0.01, 4) == [-1, 0, 2]
