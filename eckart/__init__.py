"""eckart: one spectral toolkit for neural networks.

    import eckart as ek

    small = ek.compress("path/to/model", recipe="svd_llm", keep=0.8, calib="texts.jsonl", out="small")
    model = ek.load("small")
    factors = ek.svd(matrix, rank=16)

Importing this is light: names below are loaded when first used. It also teaches transformers the format of our folders, so that
plain `AutoModel.from_pretrained` opens them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .hub.post_import import install as _install

if TYPE_CHECKING:
    from .axes import Budget as Budget
    from .axes import Recipe as Recipe
    from .hub.load import load as load
    from .hub.load import load_tokenizer as load_tokenizer
    from .hub.peft.adapt import adapt as adapt
    from .hub.peft.glue import glue as glue
    from .linalg import Certificate as Certificate
    from .linalg import Factors as Factors
    from .linalg import Operator as Operator
    from .linalg import svd as svd
    from .linalg import svdvals as svdvals
    from .registry import get_recipe as get_recipe
    from .registry import list_recipes as list_recipes
    from .store import verify as verify
    from .verbs.compress import compress as compress
    from .verbs.demo import demo_model as demo_model
    from .verbs.evaluate import evaluate as evaluate
    from .verbs.inspect import inspect as inspect
    from .verbs.search import search as search

__version__ = "0.1.0"

_WHERE = {
    "Budget": "axes",
    "Recipe": "axes",
    "load": "hub.load",
    "adapt": "hub.peft.adapt",
    "glue": "hub.peft.glue",
    "load_tokenizer": "hub.load",
    "Certificate": "linalg",
    "Factors": "linalg",
    "Operator": "linalg",
    "svd": "linalg",
    "svdvals": "linalg",
    "get_recipe": "registry",
    "list_recipes": "registry",
    "verify": "store",
    "compress": "verbs.compress",
    "demo_model": "verbs.demo",
    "evaluate": "verbs.evaluate",
    "inspect": "verbs.inspect",
    "search": "verbs.search",
}
_WHERE |= dict.fromkeys(("allocate", "core", "factor", "filter", "form", "gradient", "loss", "metric"), "axes")
_WHERE |= dict.fromkeys(("penalty", "refresh", "roles", "score", "source", "target", "variance"), "axes")
__all__ = [*_WHERE, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'eckart' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_WHERE[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


_install()
