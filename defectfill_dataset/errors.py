"""Wrong input, reported once and clearly."""

import collections
import dataclasses
import difflib
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something wrong with the input, or worth a look.

    Args:
        code: stable, DFnnn.
        where: the file, its line or annotation, or the flag.
        what: what is wrong there, with the value.
        fix: what to do about it.
        image: the one image of a dataset that cannot be used for it, relative to the object's folder; None where more
            is at stake, so that leaving out one image would not help.
    """

    code: str
    where: str
    what: str
    fix: str = ""
    image: str | None = None

    @classmethod
    def of_line(cls, line: str, image: str | None = None) -> "Problem":
        """From "DFnnn where: what"."""
        code, _, rest = line.partition(" ")
        where, _, what = rest.partition(": ")
        return cls(code, where, what, image=image)

    def __str__(self) -> str:
        return one_line(f"{self.code} {self.where}: {self.what}" + (f"; {self.fix}" if self.fix else ""))


class InputError(ValueError):
    """Input that a person must mend: one line a problem, each a stable code, the file or value, and the fix.

    Args:
        problems: `Problem`s, or their text: "DF145 test/hole/003.png: the mask marks no pixel; draw it or remove the
            pair".
    """

    def __init__(self, *problems: Problem | str):
        self.found = tuple(p if isinstance(p, Problem) else Problem.of_line(p) for p in problems)
        self.problems = tuple(dict.fromkeys(one_line(str(problem)) for problem in problems))
        super().__init__("\n".join(self.problems))


SHOWN = 20  # problems of one kind that a terminal shows


def folded(lines: Iterable[str], most: int = SHOWN) -> list[str]:
    """The lines, of each code (their first word) `most` and then how many more there are."""
    shown, counts = list[str](), collections.Counter[str]()
    lines = list(dict.fromkeys(lines))
    for line in lines:
        counts[line.split(" ", 1)[0]] += 1
        if counts[line.split(" ", 1)[0]] <= most:
            shown.append(line)
    return shown + [f"{code} and {n - most} more like these" for code, n in counts.items() if n > most]


def one_line(text: str) -> str:
    """The text with all that is not printable (line ends, escape codes, in names above all) spelt out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' Did you mean X?' for a close match, then everything that is known."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return f"{hint} Known: {', '.join(known) or 'none'}."
