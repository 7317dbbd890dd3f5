"""Every example in a docstring runs, and every public function of the top level has one."""

import doctest
import importlib
import pkgutil

import pytest

import eckart as ek

MODULES = sorted(m.name for m in pkgutil.walk_packages(ek.__path__, "eckart.") if not m.name.endswith("__main__"))


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name) -> None:
    found = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert found.failed == 0


def test_every_module_says_what_it_is() -> None:
    for name in MODULES:
        assert (importlib.import_module(name).__doc__ or "").strip(), name
