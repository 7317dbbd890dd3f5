"""The README's marked examples run, in order, in an empty folder."""

from pathlib import Path

from scripts import check_docs

ROOT = Path(__file__).resolve().parents[1]


def test_examples_run(tmp_path):
    assert check_docs.run_page(ROOT / "README.md", tmp_path) is None
    assert (tmp_path / "smaller" / "config.json").is_file()


def test_it_starts_with_the_two_commands_and_has_examples():
    _, blocks = check_docs.split((ROOT / "README.md").read_text())
    assert blocks[0].code == "make demo\nmake test\n"
    assert sum(b.run for b in blocks) >= 2


def test_its_commands_exist():
    """Every `eckart COMMAND --option` that the README shows is known to the command line's own help."""
    _, blocks = check_docs.split((ROOT / "README.md").read_text())
    reference = (ROOT / "docs/cli.md").read_text()
    shown = [line.split() for b in blocks for line in b.code.splitlines() if line.startswith("eckart ")]
    assert shown
    for _, command, *rest in shown:
        section = reference.partition(f"## eckart {command}\n")[2].partition("\n## ")[0]
        assert section, command
        for option in (word for word in rest if word.startswith("-")):
            assert f" {option} " in section, f"{command} {option}"
