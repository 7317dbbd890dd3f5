"""The frame around the code: pins, versions, Makefile, CI."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import eckart

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
PINS = {canonicalize_name(Requirement(line).name): next(iter(Requirement(line).specifier)).version for line in CONSTRAINTS}
EXTRAS = PROJECT["optional-dependencies"]
WANTED = [Requirement(r) for r in PROJECT["dependencies"] + EXTRAS["hf"] + EXTRAS["demo"] + EXTRAS["dev"]]


@pytest.mark.parametrize("requirement", WANTED, ids=str)
def test_every_requirement_is_pinned_within_its_range(requirement):
    version = PINS[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(version), version


def test_constraints_are_exact_and_sorted():
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line) for line in CONSTRAINTS)
    assert sorted(CONSTRAINTS) == CONSTRAINTS
    assert PINS["torch"] == "2.13.0"


def test_library_dependencies_are_ranges():
    assert all(s.operator == ">=" for r in PROJECT["dependencies"] for s in Requirement(r).specifier)


def test_one_version():
    assert eckart.__version__ == PROJECT["version"]
    assert f"\nversion: {PROJECT['version']}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_an_old_python_is_told(tmp_path):
    old = tmp_path / "python2"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 2.7.18" && exit 0\nexit 1\n')
    old.chmod(0o755)
    done = subprocess.run(["make", "demo", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "eckart needs Python 3.11 or newer" in done.stdout
    assert "Python 2.7.18" in done.stdout
    assert not (tmp_path / "venv").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_help_names_every_target():
    # --no-print-directory: under `make check` this make is a nested one, and would announce the folders that it enters and leaves
    shown = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    assert [line.split()[1] for line in shown.splitlines()] == phony


def test_ci_is_thin_and_ends_with_the_tests():
    script = (ROOT / ".ci/run").read_text()
    subprocess.run(["bash", "-n", ROOT / ".ci/run"], check=True)
    assert "set -euo pipefail" in script
    assert script.rstrip().endswith("make check"), "the last thing seen is pytest's closing line"
    check = re.search(r"^check: ([\w ]+)", (ROOT / "Makefile").read_text(), re.M)[1].split()
    assert check[-1] == "test"
    assert ".ci/run" in (ROOT / ".github/workflows/ci.yml").read_text()
