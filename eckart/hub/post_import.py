"""Tell transformers about eckart the moment its quantizer table exists, without importing transformers.

`install()` is what `import eckart` runs. If the table is already there it registers at once; and in any case it leaves a finder
on `sys.meta_path` that answers for that one module only, hands it to the ordinary loader, and registers when the loader is done.
"""

from __future__ import annotations

import importlib
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# `import transformers` is lazy and never runs this module; every way to load a model does.
TARGET = "transformers.quantizers.auto"
PEFT = "peft"


def install() -> None:
    """Make `from_pretrained` read eckart folders, now or as soon as transformers is imported, and PEFT know our adapters. Calling it twice is
    harmless.

    Example:
        >>> install()
    """
    for target, then in ((TARGET, _register), (PEFT, _register_peft)):
        _watch(target, then)
        if target in sys.modules:
            then()


def _register() -> None:
    try:
        plug = importlib.import_module("eckart.hub.quantizer")
        # absent while that very module is half-way through importing transformers: it registers itself at its end
        register = getattr(plug, "register", None)
        if register is not None:
            register()
    except Exception as error:
        version = getattr(sys.modules.get("transformers"), "__version__", "?")
        warnings.warn(
            f"eckart could not register with transformers {version}, so folders that eckart compressed will not load through "
            f"from_pretrained: {type(error).__name__}: {error}. Known to work: pip install 'eckart[hf]'.",
            RuntimeWarning,
            stacklevel=2,
        )


def _register_peft() -> None:
    try:
        importlib.import_module("eckart.hub.peft.register").register()
    except Exception as error:
        version = getattr(sys.modules.get("peft"), "__version__", "?")
        warnings.warn(
            f"eckart could not register with peft {version}, so adapters of ours will not load: {type(error).__name__}: {error}. "
            "Known to work: pip install 'peft==0.21.2'.",
            RuntimeWarning,
            stacklevel=2,
        )


def _watch(target: str, then: Callable[[], None]) -> None:
    """Call `then` after every execution of module `target`, reloads included; one finder per target."""
    stale = [f for f in sys.meta_path if _is_ours(f) and getattr(f, "target", None) == target]
    for finder in stale:  # left by an earlier copy of this module, before a reload
        sys.meta_path.remove(finder)
    sys.meta_path.insert(0, _Finder(target, then))


def _is_ours(finder: object) -> bool:
    # by name, not isinstance: a reload of this file makes a new class
    return type(finder).__name__ == _Finder.__name__ and type(finder).__module__ == __name__


class _Finder:
    def __init__(self, target: str, then: Callable[[], None]) -> None:
        self.target = target
        self._then = then
        self._local = threading.local()

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self.target or getattr(self._local, "busy", False):
            return None
        self._local.busy = True  # another tool's finder may ask all finders in its turn
        try:
            for finder in list(sys.meta_path):
                if finder is self or not hasattr(finder, "find_spec"):
                    continue
                spec = finder.find_spec(fullname, path, target)
                if spec is not None:
                    if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                        spec.loader = _Loader(spec.loader, self._then)  # pyright: ignore[reportAttributeAccessIssue]
                    return spec
            return None
        finally:
            self._local.busy = False


class _Loader:
    """The real loader, with a call after it. While the module runs, and ever after, the module shows the real one."""

    def __init__(self, inner: Any, then: Callable[[], None]) -> None:
        self._inner = inner
        self._then = then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._inner
        if module.__spec__ is not None:
            module.__spec__.loader = self._inner
        self._inner.exec_module(module)
        self._then()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_inner":
            raise AttributeError(name)
        return getattr(self._inner, name)
