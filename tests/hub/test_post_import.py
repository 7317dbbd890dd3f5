"""Registration at any order of imports, and the danger it protects from."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest

from eckart.hub import post_import

ROOT = Path(__file__).resolve().parents[2]


def python(code: str, *args: Any) -> subprocess.Popen[str]:
    # -P and an explicit path: what the test folder holds must not be importable by accident
    prelude = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    command = [sys.executable, "-P", "-W", "error::RuntimeWarning", "-c", prelude + code, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def said(process: subprocess.Popen[str]) -> str:
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    return text


STRANGER_FIRST = """
from transformers import AutoModel
assert not any(name.split(".")[0] == "eckart" for name in sys.modules)
factored, dense = sys.argv[1:]
try:
    AutoModel.from_pretrained(factored)
except RuntimeError as error:
    print("refused:", error)
else:
    raise SystemExit("a stranger filled the model with random numbers")
model, info = AutoModel.from_pretrained(dense, output_loading_info=True)
assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
import eckart
model, info = AutoModel.from_pretrained(factored, output_loading_info=True)
assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
print(type(model.pooler.dense).__name__)
"""

ECKART_FIRST = """
import eckart
assert not {"torch", "transformers", "numpy"} & set(sys.modules), "import eckart is no longer light"
import transformers
assert "transformers.quantizers.auto" not in sys.modules and "torch" not in sys.modules
model = transformers.AutoModel.from_pretrained(sys.argv[1])
print(type(model.pooler.dense).__name__)
import importlib
auto = sys.modules["transformers.quantizers.auto"]
assert type(auto.__loader__).__name__ == type(auto.__spec__.loader).__name__ == "SourceFileLoader"
importlib.reload(auto)  # its tables start empty again
assert "eckart" in auto.AUTO_QUANTIZER_MAPPING and "eckart" in auto.AUTO_QUANTIZATION_CONFIG_MAPPING
"""

PLUG_FIRST = """
from eckart.hub.attach import attach
import eckart.hub.quantizer  # imports transformers half-way through its own import
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
assert AUTO_QUANTIZER_MAPPING["eckart"] is eckart.hub.quantizer.EckartQuantizer
"""


def test_every_order_of_imports(saved: Any, tiny: Any, factorise: Any, tmp_path: Any) -> None:
    from eckart.hub.attach import attach, dequantize

    model = attach(factorise(tiny("bert"), 6))
    model.save_pretrained(tmp_path / "factored")
    dequantize(model).save_pretrained(tmp_path / "dense")
    running = [python(STRANGER_FIRST, tmp_path / "factored", tmp_path / "dense"), python(ECKART_FIRST, tmp_path / "factored")]
    stranger, ours, _ = (said(p) for p in [*running, python(PLUG_FIRST)])
    assert "refused:" in stranger
    assert stranger.strip().endswith("LowRankLinear")
    assert ours.strip().endswith("LowRankLinear")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A package `watched_pkg` with a module `inner`, and a list that counts the calls of its hook."""
    (tmp_path / "watched_pkg").mkdir()
    (tmp_path / "watched_pkg" / "__init__.py").write_text("")
    (tmp_path / "watched_pkg" / "inner.py").write_text("TABLE = {}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    calls: list[str] = []
    # called when the module has run, not before
    post_import._watch("watched_pkg.inner", lambda: calls.append(str(sys.modules["watched_pkg.inner"].TABLE)))
    yield calls
    for name in [n for n in sys.modules if n.startswith("watched_pkg")]:
        del sys.modules[name]


class TestFinder:
    def test_it_calls_once_per_execution(self, package: list[str]) -> None:
        import watched_pkg

        assert package == []
        inner = importlib.import_module("watched_pkg.inner")
        importlib.import_module("watched_pkg.inner")
        assert package == ["{}"]
        importlib.reload(inner)
        assert package == ["{}"] * 2
        del sys.modules["watched_pkg.inner"]
        importlib.import_module("watched_pkg.inner")
        assert package == ["{}"] * 3
        importlib.reload(watched_pkg)
        assert package == ["{}"] * 3

    def test_it_leaves_no_trace(self, package: list[str]) -> None:
        spec = importlib.util.find_spec("watched_pkg.inner")
        assert spec is not None
        assert spec.origin.endswith("inner.py")
        assert spec.loader.get_source("watched_pkg.inner") == "TABLE = {}\n"  # delegated
        assert not hasattr(spec.loader, "no_such_thing")
        assert package == []  # looking is not importing
        inner = importlib.import_module("watched_pkg.inner")
        assert type(inner.__loader__) is type(inner.__spec__.loader) is importlib.machinery.SourceFileLoader
        assert inspect.getsource(inner) == "TABLE = {}\n"
        assert importlib.util.find_spec("watched_pkg.no_such_module") is None

    def test_a_module_that_fails_is_not_announced(self, package: list[str], tmp_path: Path) -> None:
        (tmp_path / "watched_pkg" / "inner.py").write_text("raise ValueError('broken')\n")
        with pytest.raises(ValueError, match="broken"):
            importlib.import_module("watched_pkg.inner")
        assert package == []
        assert "watched_pkg.inner" not in sys.modules

    def test_a_missing_module_stays_missing(self, package: list[str], tmp_path: Path) -> None:
        (tmp_path / "watched_pkg" / "inner.py").unlink()
        with pytest.raises(ModuleNotFoundError, match=r"watched_pkg\.inner"):
            importlib.import_module("watched_pkg.inner")

    def test_other_finders_that_ask_everyone(self, package: list[str]) -> None:
        class Curious:
            asked = 0

            def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
                if name == "watched_pkg.inner" and self.asked == 0:
                    self.asked += 1
                    return importlib.util.find_spec(name)  # asks all finders, ours included
                return None

        sys.meta_path.insert(1, Curious())
        importlib.import_module("watched_pkg.inner")
        assert package == ["{}"]

    def test_several_threads(self, package: list[str]) -> None:
        threads = [threading.Thread(target=importlib.import_module, args=("watched_pkg.inner",)) for _ in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(60)
        assert package == ["{}"]


class TestInstall:
    def ours(self) -> list[Any]:
        return [f for f in sys.meta_path if type(f).__name__ == "_Finder" and type(f).__module__ == post_import.__name__]

    def test_it_is_idempotent_and_survives_a_reload(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
        for _ in range(3):
            post_import.install()
        assert sorted(f.target for f in self.ours()) == ["peft", "transformers.quantizers.auto"]
        old = type(self.ours()[0])
        importlib.reload(post_import)
        post_import.install()
        assert sorted(f.target for f in self.ours()) == ["peft", "transformers.quantizers.auto"]
        assert type(self.ours()[0]) is not old  # the new code is in force

    def test_it_registers_at_once_when_transformers_is_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from transformers.quantizers import auto

        monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
        monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "eckart", raising=False)
        monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "eckart", raising=False)
        post_import.install()
        assert "eckart" in auto.AUTO_QUANTIZER_MAPPING
        assert "eckart" in auto.AUTO_QUANTIZATION_CONFIG_MAPPING

    def test_a_transformers_it_cannot_plug_into(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from eckart.hub import quantizer

        def broken() -> None:
            raise ImportError("no such table")

        monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
        monkeypatch.setattr(quantizer, "register", broken)
        with pytest.warns(RuntimeWarning, match="could not register with transformers .*no such table"):
            post_import.install()  # and `import eckart` goes on
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            monkeypatch.setattr(quantizer, "register", lambda: None)
            post_import.install()
