"""EVA against principal components in float64, and against PEFT's incremental ones on inputs with a clear spectrum."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.config import EvaConfig
from peft.tuners.lora.eva import get_eva_state_dict
from torch import nn

import eckart as ek

WIDTH = 30


class Net(nn.Module):
    """Two layers on one input, one on another: what q, k and the output projection are to an attention layer."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.q, self.k, self.o = nn.Linear(WIDTH, 20), nn.Linear(WIDTH, 18), nn.Linear(20, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(torch.tanh(self.q(x))) + self.k(x).sum(-1, keepdim=True)


def rows(count: int = 400, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(5)))[0]
    return torch.randn(count, WIDTH, generator=g) * (0.8 ** torch.arange(WIDTH)) @ basis + 0.3


def brute(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(components as rows, share of the variance) of centred rows, from their SVD."""
    centred = x.double() - x.double().mean(0)
    _, s, vh = torch.linalg.svd(centred, full_matrices=False)
    return vh, s.square() / centred.square().sum()


def layers(model: nn.Module) -> dict:
    return {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "eckart_branch")}


def inputs_of(x: torch.Tensor) -> dict[str, torch.Tensor]:
    model = Net()
    return {"q": x, "k": x, "o": torch.tanh(model.q(x)).detach()}


def test_right_factor_is_the_principal_components_and_nothing_changes() -> None:
    x = rows()
    model = ek.adapt(Net(), "eva", rank=4, calib=[x[:200], x[200:]])
    assert torch.equal(model(x), Net()(x))
    for name, layer in layers(model).items():
        b = layer.branch("default")
        want = brute(inputs_of(x)[name])[0][: b.rank]
        assert torch.allclose((b.right.double() @ want.T).abs(), torch.eye(b.rank, dtype=torch.float64), atol=1e-4)
        assert not b.left.any()


@pytest.mark.parametrize("rank", [2, 4, 6])
def test_ranks_are_the_best_of_all_layers_by_explained_variance(rank: int) -> None:
    x = rows()
    model = ek.adapt(Net(), "eva", rank=rank, calib=[x])
    every = sorted(((float(v), n) for n, rows_ in inputs_of(x).items() for v in brute(rows_)[1][: 2 * rank]), reverse=True)[: 3 * rank]
    found = model.peft_config["default"].ranks
    assert sum(found.values()) == 3 * rank
    for name in ("o",):
        assert found[name] == sum(n == name for _, n in every)
    # q and k tie: together they get what is left, one at most one more than the other
    assert abs(found["q"] - found["k"]) <= 1
    assert {n: layer.branch("default").rank for n, layer in layers(model).items()} == {n: r for n, r in found.items() if r}


def test_scale_stays_that_of_the_rank_that_was_asked_for() -> None:
    model = ek.adapt(Net(), "eva", rank=4, alpha=8, calib=[rows()])
    assert {layer.branch("default").scale for layer in layers(model).values()} == {2.0}


def test_same_ranks_and_components_as_peft(angles) -> None:
    x = rows(1200)
    batches = list(x.split(400))
    config = LoraConfig(r=4, target_modules=["q", "k", "o"], init_lora_weights="eva", eva_config=EvaConfig(rho=2.0, tau=0.999))
    theirs = get_eva_state_dict(
        Net(), batches, config, forward_fn=lambda model, batch: model(batch), prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )  # fmt: skip
    model = ek.adapt(Net(), "eva", rank=4, calib=batches)
    ranks = model.peft_config["default"].ranks
    assert {k: len(v) for k, v in theirs.items() if k == "o"} == {"o": ranks["o"]}
    assert sorted(len(v) for v in theirs.values()) == sorted(ranks.values())
    for name, layer in layers(model).items():
        r = min(layer.branch("default").rank, len(theirs[name])) - 1  # the last one is the least settled of an incremental method
        assert angles(layer.branch("default").right[:r].T, theirs[name][:r].T).max() < 0.1


class Given:
    """Covariances by layer."""

    def __init__(self, **matrices: torch.Tensor) -> None:
        self.matrices = matrices
        self.sites = {k: k for k in matrices}

    def get(self, stat: object, site: object) -> SimpleNamespace:
        return SimpleNamespace(covariance=lambda: self.matrices[site.name].double())


def test_a_layer_without_rank_gets_no_adapter(tmp_path) -> None:
    two = torch.zeros(WIDTH, WIDTH)
    two[0, 0], two[1, 1] = 3.0, 2.0
    model = ek.adapt(Net(), "eva", rank=1, target=["k", "o"], stats=Given(k=two, o=torch.eye(20)))
    assert model.peft_config["default"].ranks == {"k": 2, "o": 0}
    assert set(layers(model)) == {"k"}
    b = layers(model)["k"].branch("default")
    assert torch.allclose(b.right.abs(), torch.eye(2, WIDTH), atol=1e-6)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Net(), tmp_path)
    assert set(layers(again)) == {"k"}


def test_no_layer_gets_more_than_the_cap() -> None:
    one = torch.diag(0.5 ** torch.arange(WIDTH))
    model = ek.adapt(Net(), "eva", rank=2, target=["k", "o"], stats=Given(k=one, o=torch.eye(20)), settings=["allocate.cap=1.5"])
    assert model.peft_config["default"].ranks == {"k": 3, "o": 1}
