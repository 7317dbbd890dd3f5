"""Cross Initialization: the encoder run by hand on mean embeddings, rows that train alone, and the penalty's gradient in closed form."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel
from torch import nn

import eckart as ek
from eckart.axes.penalty import Anchor
from eckart.errors import Refused, UsageError
from eckart.hub.peft.export import export_lora

pytestmark = pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")  # PEFT's; merging into a tied table is refused
PHRASES = [[5, 9, 30], [6, 7, 8, 40], [11, 12]]
NEW = (94, 95)  # the last two of 96


@pytest.fixture
def base(tiny_llama):
    return ek.load(tiny_llama).eval()


def branch_of(model):
    return model.base_model.model.model.embed_tokens.branch("default")


def start(base, **how):
    model = ek.adapt(base, "cross_init", rank=2, calib=PHRASES, **how)
    return model.eval(), branch_of(model)


def encoded(base, phrases, count: int) -> torch.Tensor:
    """The encoder on mean embeddings, through its own argument for that, which the search for rows does not use."""
    table = base.get_input_embeddings().weight
    mean = torch.stack([table[torch.tensor(p[:count])] for p in phrases]).mean(0)
    with torch.no_grad():
        return base.model(inputs_embeds=mean[None]).last_hidden_state[0]


def test_rows_begin_as_the_encoders_output(base) -> None:
    want = encoded(base, PHRASES, 2)
    _, b = start(copy.deepcopy(base))
    assert torch.allclose(b.rows.detach(), want, atol=1e-5)
    assert torch.equal(b.rows, b.initial_rows)
    table = base.get_input_embeddings().weight.detach()
    assert torch.equal(b.base_rows, table[-2:])
    assert float(want.norm(dim=1).min()) > 3 * float(table.norm(dim=1).max())  # the scale of the last norm, the point of the paper


def test_one_phrase_gives_its_own_states(base) -> None:
    with torch.no_grad():
        want = base.model(input_ids=torch.tensor([[5, 9, 30]])).last_hidden_state[0]
    model = ek.adapt(copy.deepcopy(base), "cross_init", rank=3, calib=[[5, 9, 30]])
    assert torch.allclose(branch_of(model).rows.detach(), want, atol=1e-5)


def test_only_sequences_with_new_tokens_change_and_they_read_the_rows(base) -> None:
    old, new = torch.tensor([[3, 4, 5, 6]]), torch.tensor([[3, 95, 94, 6]])
    with torch.no_grad():
        before = base(old).logits
        embeds = base.get_input_embeddings()(new)
        model, b = start(copy.deepcopy(base))
        assert torch.equal(model(old).logits, before)
        embeds[0, 1], embeds[0, 2] = b.rows[1], b.rows[0]
        want = base(inputs_embeds=embeds).logits
        assert torch.allclose(model(new).logits, want, atol=1e-4 * float(want.abs().max()))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 48
    assert {k for k, _ in b.named_parameters()} == {"rows"}


def test_chosen_tokens(base) -> None:
    model, b = start(copy.deepcopy(base), settings=["form.tokens=[7, 3]"])
    embedding = model.base_model.model.model.embed_tokens
    with torch.no_grad():
        found = embedding(torch.tensor([3, 4, 7]))
    assert torch.allclose(found[[2, 0]], b.rows, atol=1e-5)
    assert torch.equal(found[1], base.get_input_embeddings().weight[4])


@pytest.mark.parametrize("lazily", [False, True])
def test_reload_is_bit_equal(base, tiny_llama, tmp_path, lazily) -> None:
    model, b = start(base)
    with torch.no_grad():
        b.rows.add_(0.3)
        ids = torch.tensor([[3, 95, 94, 6]])
        want = model(ids).logits
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(ek.load(tiny_llama), tmp_path, low_cpu_mem_usage=lazily).eval()
        assert torch.equal(again(ids).logits, want)
        with again.disable_adapter():
            assert torch.equal(again(ids).logits, ek.load(tiny_llama).eval()(ids).logits)


class Untied(nn.Module):
    """A text model of its own making: a table, one layer, a state."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.place = nn.Embedding(8, 12)
            self.word = nn.Embedding(20, 12)
            self.mix = nn.Linear(12, 12)

    def forward(self, input_ids):
        from types import SimpleNamespace

        x = self.word(input_ids) + self.place(torch.arange(input_ids.shape[1]))
        return SimpleNamespace(last_hidden_state=torch.tanh(self.mix(x)).cumsum(1))


def test_merged_and_exported_rows_are_rows_of_the_table(tmp_path) -> None:
    model = ek.adapt(Untied(), "cross_init", rank=2, calib=[[1, 2, 3], [4, 5, 6]]).eval()
    assert list(model.peft_config["default"].ranks) == ["word"]  # not the table of places
    b = model.base_model.model.word.branch("default")
    with torch.no_grad():
        b.rows.add_(0.1)
    ids = torch.tensor([[1, 18, 19, 2]])
    want = model(input_ids=ids).last_hidden_state
    export_lora(model, tmp_path / "lora")
    plain = PeftModel.from_pretrained(Untied(), tmp_path / "lora")
    assert torch.allclose(plain(input_ids=ids).last_hidden_state, want, atol=1e-5)
    table = Untied().word.weight
    merged = model.merge_and_unload()
    assert torch.equal(merged.word.weight[:18], table[:18])
    assert torch.allclose(merged.word.weight[18:], b.rows, atol=1e-6)
    assert torch.allclose(merged(input_ids=ids).last_hidden_state, want, atol=1e-5)


def test_merging_into_a_tied_table_is_refused(base) -> None:
    model, _ = start(base)
    with pytest.raises(Refused, match="shares its weight with"):
        model.merge_and_unload()


def test_the_penalty_is_the_mean_distance(base) -> None:
    model, b = start(base)
    step = torch.randn(2, 48, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD([b.rows], lr=1.0)
    with ek.glue(model).begin(optimizer) as glue:
        training = glue.trainings["default"]
        (penalty,) = training.recipe.penalty
        assert float(penalty.value(training).detach()) == 0.0
        glue.before_step()
        assert not b.rows.grad.any()  # smooth at zero: no push along rounding
        with torch.no_grad():
            b.rows.add_(step)
        assert float(penalty.value(training).detach()) == pytest.approx(1e-5 * float(step.norm(dim=1).mean()), rel=1e-4)
        glue.before_step()
        want = 1e-5 / 2 * step / step.norm(dim=1, keepdim=True)
        assert torch.allclose(b.rows.grad, want, rtol=1e-3, atol=1e-9)


def test_the_anchor_needs_a_beginning() -> None:
    model = ek.adapt(nn.Sequential(nn.Linear(6, 6)), ek.get_recipe("lora").with_(penalty=(Anchor(parts=("left",)),)), rank=2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    with ek.glue(model).begin(optimizer) as glue, pytest.raises(UsageError, match="does not hold where its left began"):
        glue.before_step()


def test_initialised_from_the_folder(tiny_llama, base, tmp_path) -> None:
    from safetensors.torch import load_file

    from eckart.hub.peft.offline import initialise

    initialise(tiny_llama, "cross_init", 2, out=tmp_path / "a", calib=PHRASES)
    start(base)[0].save_pretrained(tmp_path / "b")
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in "ab")
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[k], two[k], atol=1e-6) for k in one)


def test_refusals(base, tiny_llama) -> None:
    with pytest.raises(UsageError, match="cross_init measures encoded"):
        ek.adapt(base, "cross_init")
    with pytest.raises(Refused, match="3 rows of width 48 are wanted, and the source gives \\(2, 48\\)"):
        ek.adapt(base, "cross_init", rank=3, calib=PHRASES)
    with pytest.raises(UsageError, match="2 ids, and a rank of 1"):
        ek.adapt(base, "cross_init", rank=1, calib=PHRASES, settings=["form.tokens=[7, 3]"])
    with pytest.raises(UsageError, match="different ids from 0 to 95, found \\[7, 96\\]"):
        ek.adapt(base, "cross_init", rank=2, calib=PHRASES, settings=["form.tokens=[7, 96]"])
    with pytest.raises(UsageError, match=r"expected one embedding table \(target\), found model.layers.0.mlp.down_proj \(linear\)"):
        ek.adapt(base, "cross_init", rank=2, calib=PHRASES, target=["model.layers.0.mlp.down_proj"])
    with pytest.raises(UsageError, match="expected texts or lists of token ids \\(calib\\), found tensors"):
        ek.adapt(base, "cross_init", rank=2, calib=[torch.tensor([[3, 4]])])
    with pytest.raises(UsageError, match="cross_init: no layer is targeted"):
        ek.adapt(nn.Sequential(nn.Linear(4, 4)), "cross_init", rank=1, calib=[[1]])
    damaged = ek.load(tiny_llama)
    with torch.no_grad():
        damaged.model.norm.weight[0] = torch.nan
    with pytest.raises(Refused, match="states of the phrases are NaN"):
        ek.adapt(damaged, "cross_init", rank=2, calib=PHRASES)
