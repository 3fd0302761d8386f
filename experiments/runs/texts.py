"""Numbers and tables as texts, which are the same in files, on terminals and on pages."""

from collections.abc import Collection, Mapping, Sequence


def per_cent(share: float | None, unit: str = "", none: str = "-", digits: int = 2) -> str:
    """A share of 1, in per cent.

    >>> per_cent(0.12345), per_cent(0.5, " %", digits=0), per_cent(None)
    ('12.35', '50 %', '-')
    """
    return none if share is None else f"{100 * share:.{digits}f}{unit}"


def points(difference: float | None, none: str = "-") -> str:
    """A difference of shares, in percentage points, with its sign.

    >>> points(0.125), points(-0.01)
    ('+12.50', '-1.00')
    """
    return none if difference is None else f"{100 * difference:+.2f}"


def interval(low: float | None, high: float | None) -> str:
    """An interval of such differences.

    >>> interval(-0.01, 0.02), interval(None, None)
    ('-1.00 to +2.00', '-')
    """
    return "-" if low is None else f"{points(low)} to {points(high)}"


def mean_and_std(found: Mapping[str, float | None]) -> str:
    """The `mean` of shares and their `std`, the standard deviation if it is known, in per cent.

    >>> mean_and_std({"mean": 0.5, "std": 0.02}), mean_and_std({"mean": 0.5, "std": None})
    ('50.00 ± 2.00', '50.00')
    """
    spread = "" if found["std"] is None else f" ± {per_cent(found['std'])}"
    return per_cent(found["mean"]) + spread


def p_value(p: float | None) -> str:
    """The p-value of a test, or that none was made.

    >>> p_value(0.04321), p_value(1e-9), p_value(None)
    ('0.043', '< 0.001', '-')
    """
    if p is None:
        return "-"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def markdown_table(
    titles: Sequence[str], rows: Sequence[Sequence[str]], words: Collection[str]
) -> str:
    """A table of GitHub's Markdown.

    Args:
        titles: the titles of the columns.
        rows: their cells.
        words: titles of the columns that are no numbers; numbers are aligned to the right.

    >>> print(markdown_table(["arm", "mean"], [["plain", "50.00"]], ["arm"]))
    | arm | mean |
    | --- | ---: |
    | plain | 50.00 |
    """
    rule = ["---" if title in words else "---:" for title in titles]
    return "\n".join(f"| {' | '.join(row)} |" for row in [titles, rule, *rows])
