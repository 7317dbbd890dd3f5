"""What can go wrong, and the exit code of each.

A message names the tensor, file or option, says what was expected and what was found, and ends with the next command where there is one.
"""

from __future__ import annotations


class EckartError(Exception):
    """Base of everything eckart raises on purpose."""

    exit_code = 3


class UsageError(EckartError, ValueError):
    """The call itself is wrong: an unknown name, a value out of range, two options that exclude each other."""

    exit_code = 2


class Refused(EckartError, ValueError):
    """The input is not acceptable: a damaged or hostile file, a tensor that is not finite, an output that would destroy something."""

    exit_code = 3


class Incomplete(EckartError, RuntimeError):
    """A run stopped before its end; `resume` is the command that goes on with it."""

    exit_code = 4

    def __init__(self, message: str, resume: str = "") -> None:
        super().__init__(f"{message}\nGo on with: {resume}" if resume else message)
        self.resume = resume


def did_you_mean(word: str, known: object) -> str:
    """` Did you mean "pissa"?`, or an empty string when nothing known is near."""
    import difflib

    near = difflib.get_close_matches(word, [str(k) for k in known], n=3, cutoff=0.6)  # type: ignore[attr-defined]
    return f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
