"""Recipes to text and back, and every way to get it wrong."""

import pytest

from eckart.axes import Budget, Recipe, allocate, metric, score, source
from eckart.axes.border import from_dict, from_yaml, override, to_yaml
from eckart.errors import UsageError
from eckart.registry import get_recipe

BASE = Recipe(name="base", verb="compress", paper="-")


def test_round_trip_keeps_nested_choices() -> None:
    recipe = BASE.with_(
        metric=metric.Both(into=metric.InputScale(of="rms"), out=metric.GradGram(clamp=1e-2)),
        allocate=allocate.WaterFill(),
        budget=Budget(rank=0.5),
    )
    assert from_yaml(to_yaml(recipe)) == recipe


def test_override_reaches_nested_fields() -> None:
    changed = override(BASE, ["metric.kind=both", 'metric.out={"kind": "grad_gram"}', "metric.out.clamp=0.5", "budget.rank=8"])
    assert changed.metric == metric.Both(out=metric.GradGram(clamp=0.5))
    assert changed.budget == Budget(rank=8)


def test_another_form_leaves_the_roles_of_its_own_parts() -> None:
    found = override(get_recipe("svd_llm"), ["roles.coeff=train", "group.kind=same_input", "form.kind=shared_basis"])
    assert {part: role.kind for part, role in found.roles.items()} == {"coeff": "train"}
    assert override(get_recipe("svd_llm"), ["form.kind=pair"]).roles == get_recipe("svd_llm").roles


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("metrc.kind=identity", "no axis 'metrc'. Did you mean 'metric'"),
        ("metric.kind=inputgram", "Did you mean 'input_gram'"),
        ("metric.power=1", "metric=identity has no such field"),
        ("target.blocks=maybe", "target.blocks: Input should be a valid boolean"),
        ("budget.kep=0.5", "Did you mean 'keep'"),
        ("budget.keep=0", "expected a share in \\(0, 1\\]"),
        ("budget.keep=1.5", "expected a share in \\(0, 1\\]"),
        ("budget.rank=0", "at least 1"),
        ("budget.rank=1.5", "at least 1, or a share"),
        ("keep", "expected axis.field=value"),
        ("roles.middle=train", "form=pair has the parts up, down"),
    ],
)
def test_wrong_settings_say_what_is_wrong(setting: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        override(BASE, [setting])


def test_illegal_mixes_fail_at_construction_with_a_sentence() -> None:
    with pytest.raises(UsageError, match=r"allocate=water_fill needs 'additive'.*score=energy, score=measured_loss, score=predicted_loss"):
        BASE.with_(allocate=allocate.WaterFill(), score=score.MinMax())
    with pytest.raises(UsageError, match="belongs to the axis source"):
        BASE.with_(metric=source.Weights())
    with pytest.raises(UsageError, match="no field 'metrik'. Did you mean 'metric'"):
        BASE.with_(metrik=metric.Identity())


def test_two_budgets_are_refused() -> None:
    with pytest.raises(UsageError, match="exactly one of"):
        Budget(keep=0.5, rank=3)


def test_a_variant_says_what_differs() -> None:
    with pytest.raises(UsageError, match="wants a sentence"):
        BASE.with_(fidelity="variant")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"name": "x", "verb": "compress", "metrics": {}}, "Did you mean 'metric'"),
        ({"verb": "compress"}, "name: a recipe needs it"),
        ({"name": "x", "verb": "compress", "metric": 3}, "expected a mapping with `kind:`"),
        ({"name": "x", "verb": "compress", "budget": 3}, "expected a mapping such as"),
        ({"name": "x", "verb": "compress", "metric": {"kind": "both", "into": {"kind": "grad_gram"}}}, "grad_gram does not fit here"),
    ],
)
def test_wrong_yaml_is_refused(data: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        from_dict(data)


def test_yaml_does_not_construct_objects() -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        from_yaml("name: !!python/object/apply:os.system [echo]")
