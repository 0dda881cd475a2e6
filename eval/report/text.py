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
