"""The lock, constraints.txt, beside what is installed.

python tests/lock.py tests.xml    # what differs, and which tests of a JUnit file failed inside of that
"""

import importlib.metadata
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


ROOT = Path(__file__).resolve().parents[1]
OURS = {"defectfill", "pip"}


def read_requirements(path: Path) -> list[Requirement]:
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in path.read_text().splitlines())
    return [Requirement(line) for line in lines if line]


def read_lock(python: str | None = None) -> dict[str, str]:
    """Version by name, for this Python or another version of it ("3.12.0") on Linux x86-64."""
    platform = {"sys_platform": "linux", "platform_machine": "x86_64"}
    if python:
        platform |= {"python_version": python.rsplit(".", 1)[0], "python_full_version": python}
    pins = [pin for pin in read_requirements(ROOT / "constraints.txt") if pin.marker.evaluate(platform)]
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}


def differences() -> dict[str, str]:
    """What is installed otherwise than locked: name -> "0.21.2 -> 0.22.0"."""
    lock = read_lock()
    found = {canonicalize_name(d.name): d.version for d in importlib.metadata.distributions()}
    return {
        name: f"{lock.get(name, 'not locked')} -> {version}"
        for name, version in sorted(found.items())
        if name not in OURS and lock.get(name) != version
    }


def failures(report: Path, differing: dict[str, str]) -> list[str]:
    """A line for each test that failed, with the differing packages in its traceback."""
    names = {module: canonicalize_name(of[0]) for module, of in importlib.metadata.packages_distributions().items()}
    lines = []
    for case in ElementTree.parse(report).iter("testcase"):
        for problem in [*case.findall("failure"), *case.findall("error")]:
            inside = {names.get(module) for module in re.findall(r"site-packages/(\w+)", problem.text or "")}
            found = [f"{name} {differing[name]}" for name in sorted(inside & differing.keys())]
            where = f"{case.get('classname')}::{case.get('name')}"
            lines.append(f"{where}: inside of {', '.join(found) or 'nothing that differs'}")
    return lines


if __name__ == "__main__":
    differing = differences()
    failed = failures(Path(sys.argv[1]), differing)
    print(f"\n{len(differing)} packages differ from constraints.txt")
    print(*(f"  {name} {change}\n" for name, change in differing.items()), sep="", end="")
    print(f"{len(failed)} tests failed")
    print(*(f"  {line}\n" for line in failed), sep="", end="")
