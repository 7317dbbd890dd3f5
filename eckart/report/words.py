"""Numbers as a reader wants them: few digits, units, no false precision."""

from __future__ import annotations

MINUS = "\u2212"
NARROW = "\u202f"  # narrow no-break space between number and unit
NONE = "\u2013"


def number(value: float | int | None, digits: int = 4) -> str:
    """Significant digits, plain notation where it is short.

    Example:
        >>> number(0.84412345), number(1234567), number(0.0000123), number(None)
        ('0.8441', '1,234,567', '1.23e−5', '–')
    """
    if value is None:
        return NONE
    if isinstance(value, int) or (float(value).is_integer() and abs(value) >= 1000):
        return f"{int(value):,}".replace("-", MINUS)
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 1e6:
        whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
        first = 0 if whole else _zeros(value)
        text = f"{value:,.{max(0, digits - whole + first)}f}"
    else:
        mantissa, exponent = f"{value:.{digits - 2}e}".split("e")
        text = f"{mantissa}e{int(exponent)}"
    return text.replace("-", MINUS)


def _zeros(value: float) -> int:
    """Zeros between the point and the first digit of a number below 1."""
    count, rest = 0, abs(value)
    while rest < 0.1 and count < 4:
        rest, count = rest * 10, count + 1
    return count


def large(value: int | None) -> str:
    """A count with a decimal unit.

    Example:
        >>> large(999), large(10616832), large(22_700_000_000)
        ('999', '10.6 M', '22.7 B')
    """
    return _unit(value, ("", "k", "M", "B", "T"), " ")


def size(value: int | None) -> str:
    """Bytes with a decimal unit, as disks and the Hub count them.

    Example:
        >>> size(90888945)
        '90.9 MB'
    """
    return _unit(value, ("B", "kB", "MB", "GB", "TB", "PB"), " ")


def _unit(value: int | None, units: tuple[str, ...], gap: str) -> str:
    if value is None:
        return NONE
    amount, step = float(value), 0
    while amount >= 999.5 and step < len(units) - 1:
        amount, step = amount / 1000, step + 1
    text = f"{amount:.0f}" if step == 0 or amount >= 99.95 else f"{amount:.1f}"
    return f"{text}{gap}{units[step]}" if units[step] else text


def percent(share: float | None, digits: int = 1) -> str:
    """A share as a percentage.

    Example:
        >>> percent(0.6), percent(None)
        ('60.0%', '–')
    """
    return NONE if share is None else f"{100 * share:.{digits}f}%".replace("-", MINUS)


def signed(value: float, digits: int = 3) -> str:
    """A change, with its sign."""
    return number(value, digits) if value <= 0 else f"+{number(value, digits)}"


def several(count: int, word: str, plural: str = "") -> str:
    """`1 matrix`, `36 matrices`."""
    return f"{count:,} {word if count == 1 else plural or word + 's'}"
