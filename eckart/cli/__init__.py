"""The command line. Thin: a command parses, calls a verb, and prints. Listing and help work without importing torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from pkgutil import iter_modules
from typing import Literal

from cyclopts import CycloptsError

from ..errors import EckartError
from .base import app

for _file in iter_modules(__path__):  # each file adds its commands to the application
    import_module(f".{_file.name}", __name__)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, 2 usage, 3 refused input, 4 incomplete."""
    tokens = list(sys.argv[1:] if argv is None else argv)
    tokens = ["--dry-run=plan" if t == "--dry-run" else t for t in tokens]
    mode: Literal["auto", "none"] = "none" if {"--quiet", "--json"} & set(tokens) else "auto"
    from ..progress import shown

    try:
        with shown(mode):
            app(tokens, exit_on_error=False, print_error=True, result_action="return_value")
    except CycloptsError:
        sys.exit(2)
    except EckartError as error:
        print(f"eckart: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # the reader (`head`, `less`) has seen enough
        sys.stderr.close()
        sys.exit(0)
    except KeyboardInterrupt:
        print("eckart: interrupted; the same command goes on from here.", file=sys.stderr)
        sys.exit(4)
