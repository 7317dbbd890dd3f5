"""A branch against dense matrices in float64, on every kind of layer that can hold one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from eckart.errors import UsageError
from eckart.nn import cores
from eckart.nn.action import action_of
from eckart.nn.branch import LowRank
from eckart.nn.fused import Rows, fused_rows
from eckart.nn.split import Split

G = torch.Generator


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=G().manual_seed(seed))


def conv1d_gpt2(n: int, m: int) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(m, n)


LAYERS = {
    "linear": (lambda: nn.Linear(7, 5), lambda: rand(2, 3, 7, seed=9)),
    "gpt2 conv1d": (lambda: conv1d_gpt2(7, 5), lambda: rand(2, 3, 7, seed=9)),
    "embedding": (lambda: nn.Embedding(11, 5), lambda: torch.tensor([[0, 3, 10], [1, 1, 2]])),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), lambda: rand(2, 4, 8, seed=9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2), lambda: rand(2, 4, 9, 8, seed=9)),
    "conv2d reflected": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), lambda: rand(2, 4, 6, 6, seed=9)),
    "conv2d grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), lambda: rand(2, 4, 6, 6, seed=9)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2), lambda: rand(1, 2, 4, 4, 4, seed=9)),
}
CORES = {
    "none": None,
    "diag": cores.Diag(),
    "dense": cores.Dense(),
    "affine": cores.Affine(),
    "masked": cores.Masked(),
    "block": cores.Block(lead=0.5, inner=1),
}


def branch(layer: nn.Module, rank: int = 2, **how) -> LowRank:
    found = LowRank(action_of(layer), rank, **how)
    with torch.no_grad():
        for i, (name, t) in enumerate(sorted(found.parts().items())):
            t.copy_(rand(*t.shape, seed=i) if t.ndim else t)
            if name == "core_mask":
                t.copy_((t > 0).float())
    return found


def changed(layer: nn.Module, delta: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Module:
    """The layer with its weight changed by a matrix (out, in), in float64."""
    out = copy.deepcopy(layer).double()
    weight = out.weight.data
    if isinstance(layer, nn.Embedding) or type(layer).__name__ == "Conv1D":
        weight += delta.double().T
    else:
        weight += delta.double().reshape(weight.shape)
    if bias is not None:
        out.bias.data += bias.double()
    return out


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("kind", LAYERS)
def test_forward_is_the_layer_with_the_delta_in_its_weight(kind: str, core: str) -> None:
    make, data = LAYERS[kind]
    layer, x = make(), data()
    trained = ["left", "right", *[n for n in (CORES[core].names if CORES[core] else ()) if n not in CORES[core].fixed]]
    b = branch(layer, core=CORES[core], trained=trained, scale=0.7, minus="initial")
    want = changed(layer, b.delta_matrix())(x if not x.is_floating_point() else x.double())
    got = layer(x) + b(x)
    assert torch.allclose(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", LAYERS)
def test_storage_and_matrix_are_each_other(kind: str) -> None:
    layer = LAYERS[kind][0]()
    action, x = action_of(layer), LAYERS[kind][1]()
    matrix = action.to_matrix(layer.weight)
    assert tuple(matrix.shape) == (action.out, action.into)
    assert torch.equal(action.to_weight(matrix), layer.weight)
    assert torch.allclose(changed(layer, matrix.detach())(x if not x.is_floating_point() else x.double()),
        (layer(x) + action.whole(x, matrix)).double(), atol=1e-5)  # fmt: skip


def dense_core(kind: str, t: dict[str, torch.Tensor]) -> torch.Tensor:
    """The core as a matrix, written out entry by entry."""
    if kind == "diag":
        return torch.diag(t["core"])
    if kind == "dense":
        return t["core"]
    if kind == "masked":
        return torch.diag(t["core"] * t["core_mask"])
    if kind == "affine":
        return torch.diag(t["core_gain"] * t["core_values"] + t["core_shift"])
    s = t["core_values"]
    p = len(t["core_gain"])
    out = torch.zeros(len(s), len(s), dtype=s.dtype)
    for i in range(len(s)):
        for j in range(len(s)):
            if i < p and i == j:
                out[i, j] = t["core_gain"][i] * s[i] + t["core_shift"][i]
            elif i >= p and j >= p:
                out[i, j] = (s[i] if i == j else 0) + t["core_x"][i - p] @ t["core_y"][:, j - p]
    for i in range(len(s)):
        out[i, i] = max(float(out[i, i]), 0.0)
    return out


@pytest.mark.parametrize("core", [c for c in CORES if c != "none"])
def test_matrices_against_entry_by_entry_cores(core: str) -> None:
    b = branch(nn.Linear(7, 6), rank=4, core=CORES[core], trained=("left", "right"), scale=0.5, minus="initial")
    t = {k: v.detach().double() for k, v in b.parts().items()}
    c = dense_core(core, t)
    want = 0.5 * (t["left"] @ c @ t["right"] - t["initial_left"] @ c @ t["initial_right"])
    assert torch.allclose(b.delta_matrix().double(), want, atol=1e-5)


def test_relu_over_the_whole_block_or_nowhere() -> None:
    t = {"core_gain": torch.tensor([-1.0]), "core_shift": torch.zeros(1), "core_values": torch.tensor([2.0, 1.0, 3.0]),
         "core_x": torch.tensor([[1.0], [-1.0]]), "core_y": torch.tensor([[-5.0, 1.0]])}  # fmt: skip
    raw = torch.tensor([[-2.0, 0, 0], [0, -4.0, 1.0], [0, 5.0, 2.0]])
    for positive, want in (("none", raw), ("all", raw.relu()), ("diagonal", torch.tensor([[0.0, 0, 0], [0, 0.0, 1.0], [0, 5.0, 2.0]]))):
        assert torch.equal(cores.Block(0.3, 1, positive).value(t), want)


@pytest.mark.parametrize("trained", [("left",), ("right",), ("core",), ("left", "right"), ("left", "core", "right"), ()])
@pytest.mark.parametrize("kind", LAYERS)
def test_nothing_changes_at_the_start_to_the_last_bit(kind: str, trained: tuple[str, ...]) -> None:
    make, data = LAYERS[kind]
    b = branch(make(), core=cores.Diag(), trained=trained, minus="initial")
    with torch.no_grad():
        for name in b.copied:
            b.parts()[f"initial_{name}"].copy_(b.parts()[name])
    x = data()
    if not trained:  # everything frozen: the branch cannot be anything but what it began as
        assert b.copied == ()
    else:
        assert not b(x).any()


@pytest.mark.parametrize("trained", [("left",), ("right",), ("core",), ("left", "core")])
def test_one_difference_equals_two_products(trained: tuple[str, ...]) -> None:
    b = branch(nn.Linear(7, 5), core=cores.Diag(), trained=trained, minus="initial", scale=1.3)
    x = rand(4, 7, seed=3)
    assert torch.allclose(b(x), b.gain(x) - b.loss(x), atol=1e-5)


def test_roles_are_parameters_and_buffers() -> None:
    b = LowRank(action_of(nn.Linear(7, 5)), 2, cores.Affine(), trained=("core_gain", "core_shift"), minus="initial", kept=3)
    assert {k for k, _ in b.named_parameters()} == {"core_gain", "core_shift"}
    assert set(b.state_dict()) == {
        "left", "right", "core_gain", "core_shift", "core_values", "initial_core_gain", "initial_core_shift", "kept_left", "kept_right"
    }  # fmt: skip
    assert {v.dtype for v in b.parts().values()} == {torch.float32}


def test_kept_part_is_taken_away_whatever_the_branch_is() -> None:
    layer = nn.Linear(7, 5)
    b = branch(layer, minus="kept", kept=3)
    t = {k: v.detach().double() for k, v in b.parts().items()}
    want = t["left"] @ t["right"] - t["kept_left"] @ t["kept_right"]
    assert torch.allclose(b.delta_matrix().double(), want, atol=1e-5)
    assert torch.allclose(b.loss_matrix().double(), t["kept_left"] @ t["kept_right"], atol=1e-5)


@pytest.mark.parametrize("minus", ["nothing", "initial", "kept"])
@pytest.mark.parametrize("trained", [("left",), ("right",), ("left", "right")])
def test_thin_form_is_the_delta_at_the_promised_rank(minus: str, trained: tuple[str, ...]) -> None:
    b = branch(nn.Linear(9, 8), core=cores.Dense(), trained=trained, minus=minus, kept=2 if minus == "kept" else 0, scale=0.3)
    a, up = b.lora()
    assert torch.allclose(up @ a, b.delta_matrix(), atol=1e-5)
    assert a.shape[0] == (4 if minus == "kept" or (minus == "initial" and "right" in trained) else 2)


def test_mutate_leaves_the_loss_to_the_host() -> None:
    layer = nn.Linear(7, 5)
    b = branch(layer, minus="initial", policy="mutate")
    x = rand(3, 7, seed=2)
    mutated = changed(layer, -b.loss_matrix())
    assert torch.allclose(mutated(x.double()) + b(x).double(), changed(layer, b.delta_matrix())(x.double()), atol=1e-5)


def test_bias_changes_the_output_and_merges() -> None:
    for make, data in (LAYERS["linear"], LAYERS["conv2d"]):
        layer, x = make(), data()
        b = branch(layer, bias=True, trained=("left", "right", "bias"), minus="initial")
        want = changed(layer, b.delta_matrix(), b.bias_delta())(x.double())
        assert torch.allclose((layer(x) + b(x)).double(), want, atol=1e-5)


def test_dropout_drops_the_same_inputs_on_both_sides() -> None:
    b = branch(nn.Linear(200, 5), minus="initial", dropout=0.5)
    with torch.no_grad():
        b.initial_left.copy_(b.left)
        b.initial_right.copy_(b.right)
    assert b.training
    assert not b(rand(4, 200)).any()
    with torch.no_grad():
        b.left.mul_(2)
    assert not torch.equal(b(rand(4, 200)), b(rand(4, 200)))
    b.eval()
    assert torch.equal(b(rand(4, 200)), b(rand(4, 200)))


def test_half_precision_input_is_computed_in_float32() -> None:
    b = branch(nn.Linear(7, 5), minus="initial")
    x = rand(3, 7).bfloat16()
    assert b(x).dtype == torch.float32
    assert torch.allclose(b(x), b(x.float()))


def test_strided_inputs_cancel_too() -> None:
    b = branch(nn.Linear(7, 5), minus="initial")
    with torch.no_grad():
        b.initial_left.copy_(b.left)
        b.initial_right.copy_(b.right)
    assert not b(rand(2, 7, 9).movedim(1, -1)).any()


def test_gemma_scales_its_embedding() -> None:
    class Scaled(nn.Embedding):
        embed_scale = 3.0

        def forward(self, ids):
            return super().forward(ids) * self.embed_scale

    layer = Scaled(11, 5)
    b = branch(layer)
    ids = torch.tensor([[0, 4]])
    assert torch.allclose((layer(ids) + b(ids)).double(), changed(layer, b.delta_matrix())(ids), atol=1e-5)


class TestSplit:
    @pytest.mark.parametrize(
        "rows",
        [
            {"q": Rows(0, 4), "k": Rows(4, 2), "v": Rows(6, 2)},
            {"q": Rows(0, 2, 4, 2), "kv": Rows(2, 2, 4, 2)},
        ],
    )
    @pytest.mark.parametrize("transposed", [False, True])
    def test_blocks_are_those_rows_and_no_others(self, rows: dict[str, Rows], transposed: bool) -> None:
        layer = conv1d_gpt2(7, 8) if transposed else nn.Linear(7, 8)
        action = action_of(layer)
        blocks = {}
        for i, (name, r) in enumerate(rows.items()):
            blocks[name] = LowRank(type(action)(r.size, 7), 2, minus="initial", bias=True, trained=("left", "right", "bias"))
            with torch.no_grad():
                for j, t in enumerate(blocks[name].parts().values()):
                    t.copy_(rand(*t.shape, seed=10 * i + j))
        whole = Split(action, blocks, [r.index() for r in rows.values()])
        want = torch.zeros(8, 7)
        bias = torch.zeros(8)
        for name, r in rows.items():
            for at, row in enumerate(r.index().tolist()):
                want[row] = blocks[name].delta_matrix()[at]
                bias[row] = blocks[name].bias_delta()[at]
        assert torch.equal(whole.delta_matrix(), want)
        assert torch.equal(whole.bias_delta(), bias)
        x = rand(2, 3, 7, seed=5)
        assert torch.allclose((layer(x) + whole(x)).double(), changed(layer, want, bias)(x.double()), atol=1e-5)
        a, b = whole.lora()
        assert torch.allclose(b @ a, want, atol=1e-6)
        assert {k.split(".")[1] for k in whole.state_dict()} == set(rows)
        assert whole.parts().keys() == whole.state_dict().keys()

    def test_rows_missing_or_twice_are_refused(self) -> None:
        layer = nn.Linear(3, 4)
        block = LowRank(action_of(nn.Linear(3, 2)), 1)
        with pytest.raises(UsageError, match="each of the 4 rows once"):
            Split(action_of(layer), {"a": block, "b": block}, [torch.tensor([0, 1]), torch.tensor([1, 2])])


class TestFused:
    def test_known_layouts(self) -> None:
        llama = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
        assert {k: (r.start, r.size) for k, r in fused_rows("layers.0.qkv_proj", 32, llama).items()} == {
            "q": (0, 16),
            "k": (16, 8),
            "v": (24, 8),
        }
        neox = {"hidden_size": 8, "num_attention_heads": 2, "model_type": "gpt_neox"}
        assert fused_rows("x.query_key_value", 24, neox)["k"].index().tolist() == [4, 5, 6, 7, 16, 17, 18, 19]
        assert set(fused_rows("mlp.gate_up_proj", 10)) == {"gate", "up"}

    def test_what_is_not_sure_is_one_matrix(self) -> None:
        assert fused_rows("attn.q_proj", 12) is None
        assert fused_rows("x.query_key_value", 24, {"num_attention_heads": 2, "hidden_size": 8, "model_type": "falcon"}) is None
        assert fused_rows("x.qkv_proj", 33, {"hidden_size": 16, "num_attention_heads": 4}) is None
        assert fused_rows("h.c_attn", 10) is None

    def test_neox_layout_is_what_transformers_computes(self) -> None:
        from transformers import GPTNeoXConfig, GPTNeoXModel

        config = GPTNeoXConfig(
            hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8, vocab_size=8, use_cache=False
        )
        model = GPTNeoXModel(config).eval()
        name, layer = next((n, m) for n, m in model.named_modules() if n.endswith("query_key_value"))
        ids = torch.tensor([[1, 2, 3]])
        with torch.no_grad():
            # without queries attention is uniform, so keys do not matter any more; values always do
            rows = fused_rows(name, 24, config)
            layer.weight[rows["q"].index()] = 0
            layer.bias[rows["q"].index()] = 0
            base = model(ids).last_hidden_state
            layer.weight[rows["k"].index()] += rand(8, 8)
            assert torch.allclose(model(ids).last_hidden_state, base, atol=1e-6)
            layer.weight[rows["v"].index()] += rand(8, 8)
            assert not torch.allclose(model(ids).last_hidden_state, base, atol=1e-3)


class TestRefusals:
    @pytest.mark.parametrize("rank", [0, 6, -1])
    def test_rank(self, rank: int) -> None:
        with pytest.raises(UsageError, match=r"a 5x7 layer takes a rank from 1 to 5"):
            LowRank(action_of(nn.Linear(7, 5)), rank)

    def test_part(self) -> None:
        with pytest.raises(UsageError, match="no part is called \\['core'\\]"):
            LowRank(action_of(nn.Linear(7, 5)), 2, trained=("core",))

    def test_values(self) -> None:
        b = LowRank(action_of(nn.Linear(7, 5)), 2)
        with pytest.raises(UsageError, match="found \\['left'\\]"):
            b.fill({"left": torch.zeros(5, 2)})
        with pytest.raises(UsageError, match=r"left: expected shape \(5, 2\)"):
            b.fill({"left": torch.zeros(5, 3), "right": torch.zeros(2, 7)})

    def test_not_finite(self) -> None:
        b = LowRank(action_of(nn.Linear(7, 5)), 2)
        b.poison()
        assert sorted(b.poisoned()) == ["left", "right"]

    def test_layers_that_hold_none(self) -> None:
        class Special(nn.Linear):
            pass

        attention = nn.MultiheadAttention(4, 2)
        for layer in (nn.LayerNorm(3), Special(2, 2), attention.out_proj, nn.Embedding(4, 2, max_norm=1.0), nn.ConvTranspose2d(2, 2, 2)):
            assert action_of(layer) is None


@pytest.mark.parametrize(("m", "n"), [(1, 6), (6, 1), (1, 1)])
def test_one_row_or_column(m: int, n: int) -> None:
    layer = nn.Linear(n, m)
    b = branch(layer, rank=1, minus="initial")
    x = rand(3, n)
    assert torch.allclose((layer(x) + b(x)).double(), changed(layer, b.delta_matrix())(x.double()), atol=1e-5)
