"""Which module may import which: the rooms that CONTRIBUTING.md describes."""

import ast
import graphlib
import re

from offline import ROOT


FILES = [*ROOT.glob("*.py"), *(f for room in ("defectfill*", "scripts") for f in ROOT.glob(f"{room}/**/*.py"))]


def module_name(file) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__").replace("scripts", "defectfill_scripts", 1)


MODULES = {module_name(file): file for file in FILES}


def imports(name: str, in_functions: bool = True) -> set[str]:
    """What a module imports: modules of ours in full, of others as they are written."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    tree = ast.parse(MODULES[name].read_text())
    for node in ast.walk(tree) if in_functions else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            members = {f"{source}.{alias.name}" for alias in node.names}
            found |= (members & MODULES.keys()) | ({source} if members - MODULES.keys() else set())
    return found


ARROWS = {name: imports(name) for name in MODULES}


def floor(name: str) -> int:
    """0 for the data, 1 for the method, 2 for what carries a run, 3 for the commands."""
    if name.startswith(("defectfill.runs", "defectfill.evaluation", "defectfill.drawn")):
        return 2
    return {"defectfill_dataset": 0, "defectfill": 1}.get(name.partition(".")[0], 3)


def test_no_room_imports_one_above_it():
    assert {"defectfill.selection", "defectfill.runs.flags", "train_defectfill"} < MODULES.keys()
    above = [(a, b) for a, found in ARROWS.items() for b in found & MODULES.keys() if floor(b) > floor(a)]
    assert above == []


def test_no_circle():
    graphlib.TopologicalSorter({name: ARROWS[name] & MODULES.keys() - {name} for name in MODULES}).prepare()


def test_no_script_imports_another():
    """But two that measure training and generation; what several need is in the library."""
    assert {(a, b) for a, found in ARROWS.items() for b in found & MODULES.keys() if floor(b) == 3} == {
        ("defectfill_scripts.ablate", "train_defectfill"),
        ("defectfill_scripts.benchmark", "train_defectfill"),
        ("defectfill_scripts.benchmark", "generate_defectfill"),
    }


def test_one_module_of_the_library_knows_the_command_line():
    assert [name for name in MODULES if name.partition(".")[0] == "defectfill" and "argparse" in ARROWS[name]] == [
        "defectfill.runs.flags"
    ]


def test_training_does_without_the_scorers_libraries():
    """A function that scores imports them when it is called."""
    needed, found = ["train_defectfill"], {}
    while needed:
        name = needed.pop()
        found[name] = imports(name, in_functions=False)
        needed += (found[name] & MODULES.keys()) - found.keys()
    assert len(found) > 10
    assert not {b for names in found.values() for b in names if b == "lpips" or b.startswith("skimage.metrics")}


def test_no_test_module_imports_another():
    """What several need has a module named for what it makes; a fixture comes by its name."""
    files = [*ROOT.glob("tests/**/test_*.py")]
    imported = re.compile(r"^\s*(?:from|import) (?:tests\.)?((?:test_|conftest)\w*)", re.M)
    assert len(files) > 20 and {f.name: found for f in files if (found := imported.findall(f.read_text()))} == {}
