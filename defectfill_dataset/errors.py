"""Wrong input, told once and clearly."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Input that a person must mend: one line a problem, each a stable code, the file or value, and the fix.

    Args:
        problems: for example "DF145 test/hole/003.png: the mask marks no pixel; draw it or remove the pair".
    """

    def __init__(self, *problems: str):
        self.problems = tuple(one_line(problem) for problem in problems)
        super().__init__("\n".join(self.problems))


def one_line(text: str) -> str:
    """The text with all that is not printable (line ends, escape codes, in names above all) spelt out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' Did you mean X?' for a close match, then everything that is known."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return f"{hint} Known: {', '.join(known) or 'none'}."
