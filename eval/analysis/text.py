"""Numbers as the pages write them."""


def number(value: float | None, digits: int = 3) -> str:
    """1,234.568; — for None."""
    return "—" if value is None else f"{value:,.{digits}f}"


def signed(value: float | None, digits: int = 3) -> str:
    """+0.123 or −0.123 (a true minus sign), no sign for what rounds to zero, — for None."""
    if value is None:
        return "—"
    text = f"{abs(value):.{digits}f}"
    sign = "" if float(text) == 0 else "+" if value > 0 else "\N{MINUS SIGN}"
    return sign + text


def short_float(value: float) -> str:
    """A learning rate as people write it: 1e-3, 5e-4, 0.01 as 1e-2."""
    digits, exponent = f"{value:e}".split("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage without its sign: 59.4; — for None."""
    return number(None if value is None else 100 * value, digits)


def signed_percent(value: float | None, digits: int = 1) -> str:
    """A difference of shares in percentage points: +1.0 or −1.0."""
    return signed(None if value is None else 100 * value, digits)


def amount(value: float) -> str:
    """How much was trained: 4, 0.25, 1,200, 64M."""
    unit = "M" if value >= 1e6 else ""
    digits = f"{value / 1e6 if unit else value:,.2f}"
    return digits.rstrip("0").rstrip(".") + unit


def printable(text: str) -> str:
    """Generated text with what a page cannot hold (control characters, lone surrogates) or should
    not (marks that turn the direction of writing) replaced by the replacement character."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
