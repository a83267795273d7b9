"""Wrong input, reported once and clearly."""

import collections
import dataclasses
import difflib
import errno
from collections.abc import Iterable
from pathlib import Path


SHOWN = 20  # problems of one kind that a terminal shows
# A disk that is full, or beyond a quota or limit, that failed, or that cannot be written.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something wrong with the input, or worth a look.

    Args:
        code: stable, a key of `codes.CODES`.
        where: the file, its line or annotation, or the flag; empty if it is of the dataset as a whole.
        what: what is wrong there, with the value.
        fix: what to do about it.
        image: the one image of a dataset that cannot be used for it, relative to the object's folder; None where more
            is at stake, so that leaving out one image would not help.
    """

    code: str
    where: str | Path
    what: str
    fix: str = ""
    image: str | None = None

    def __str__(self) -> str:
        """One line, as "DF145 test/hole/003.png: its mask is empty; mark the area, or remove the pair"."""
        where, fix = f"{self.where}: " if self.where else "", f"; {self.fix}" if self.fix else ""
        return one_line(f"{self.code} {where}{self.what}{fix}")


class InputError(ValueError):
    """Input that a person must mend; its text is that of its problems, a line each.

    Args:
        problems: all that is wrong with the input.
        advice: what to do about all of it, the last line.
    """

    def __init__(self, *problems: Problem, advice: str = ""):
        super().__init__(*problems)
        self.problems, self.advice = problems, advice

    def __str__(self) -> str:
        return self.text(most=len(self.problems))

    def text(self, most: int = SHOWN) -> str:
        """`folded` problems, and the advice."""
        return "\n".join(folded(self.problems, most) + [self.advice] * bool(self.advice))


class RunError(RuntimeError):
    """A run that cannot go on though its input was right; its text is that of its problem, one line.

    Args:
        alone: only this one of the processes knows of it.
    """

    def __init__(self, problem: Problem, alone: bool = False):
        super().__init__(str(problem))
        self.problem, self.alone = problem, alone


def disk_error(error: BaseException | None) -> OSError | None:
    """The error of a disk that an error follows from, if any: libraries wrap them in their own."""
    while error:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            return error
        error = error.__cause__ or error.__context__
    return None


def folded(problems: Iterable[Problem], most: int = SHOWN) -> list[str]:
    """The text of each problem once, of each code `most` and then how many more there are."""
    shown, counts = list[str](), collections.Counter[str]()
    for text, problem in {str(problem): problem for problem in problems}.items():
        counts[problem.code] += 1
        if counts[problem.code] <= most:
            shown.append(text)
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
