"""No file of ours runs text or pickles, opens a shell, or asks a library to run a stranger's code."""

import ast

from offline import ROOT

import pytest
import yaml

from defectfill_dataset.text import Loader


FILES = [*ROOT.glob("*.py"), *(f for room in ("defectfill*", "scripts") for f in ROOT.glob(f"{room}/**/*.py"))]
RUN_CODE = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.hub.load", "torch.jit.load"}
UNPICKLE = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
SAFE_IF = {
    "torch.load": ("weights_only", "True", "False"),
    "np.load": ("allow_pickle", "False", "False"),
}  # or default
UNBOUNDED_XML = {"xml.etree.ElementTree", "xml.dom", "xml.sax", "lxml"}
NOTHING_BUT = {  # what a module may take of one that can do more
    "pickle": {"PickleError", "UnpicklingError"},  # errors, to be caught
    "xml.etree.ElementTree": {"Element", "ParseError"},
}


def within(name: str, names: set[str]) -> bool:
    return any(name == other or name.startswith(f"{other}.") for other in names)


def dangers(text: str) -> list[str]:
    """What a module does that could run the code of whoever wrote its input, "line: what"."""
    tree, found = ast.parse(text), []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and within(node.module or "", UNPICKLE | UNBOUNDED_XML):
            allowed = NOTHING_BUT.get(node.module, set())
            found += [(node, f"{node.module}.{alias.name}") for alias in node.names if alias.name not in allowed]
        elif isinstance(node, ast.Import):
            names = {alias.name for alias in node.names}
            found += [(node, name) for name in names if within(name, UNPICKLE - {"pickle"} | UNBOUNDED_XML)]
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
            found += [(node, ast.unparse(node))] if node.attr not in NOTHING_BUT["pickle"] else []
        elif isinstance(node, ast.Call):
            found += [(node, what) for what in dangers_of_call(node)]
    return [f"{node.lineno}: {what}" for node, what in found]


def dangers_of_call(call: ast.Call) -> list[str]:
    name = ast.unparse(call.func).replace("numpy.", "np.")
    given = {word.arg: ast.unparse(word.value) for word in call.keywords}
    found = [name] if name in RUN_CODE or name.startswith(("os.exec", "os.spawn")) else []
    found += [
        f"{word}={given[word]}" for word in ("shell", "trust_remote_code") if given.get(word, "False") != "False"
    ]
    found += [f"{word}={given[word]}" for word in ("custom_pipeline", "custom_revision") if word in given]
    if name in SAFE_IF:
        word, safe, default = SAFE_IF[name]
        found += [name] if given.get(word, default) != safe else []
    if name.startswith("yaml.") and "load" in name.lower() and name != "yaml.safe_load":
        loader = given.get("Loader") or (ast.unparse(call.args[1]) if len(call.args) > 1 else "")
        found += [name] if name != "yaml.load" or loader not in ("Loader", "yaml.SafeLoader") else []
    return found


def test_no_module_runs_the_code_of_its_input():
    found = {str(file.relative_to(ROOT)): dangers(file.read_text()) for file in FILES}
    assert len(found) > 100 and {name: lines for name, lines in found.items() if lines} == {}


def test_the_one_loader_of_yaml_makes_nothing_but_strings():
    assert issubclass(Loader, yaml.BaseLoader) and not issubclass(Loader, yaml.constructor.SafeConstructor)
    assert [f.name for f in FILES if "yaml.load(" in f.read_text()] == ["text.py"]


DANGEROUS = """eval(text)
exec(text)
compile(text, "x", "exec")
os.system(text)
os.execv(text, [])
subprocess.run(text, shell=True)
torch.load(file)
torch.load(file, weights_only=False)
np.load(file, allow_pickle=True)
numpy.load(file, allow_pickle=flag)
yaml.load(text)
yaml.load(text, yaml.FullLoader)
yaml.unsafe_load(text)
import shelve
import xml.etree.ElementTree as ET
from pickle import loads
pickle.load(file)
from_pretrained(name, trust_remote_code=True)
from_pretrained(name, custom_pipeline=name)""".splitlines()


@pytest.mark.parametrize("line", DANGEROUS)
def test_the_rule_finds(line):
    assert len(dangers(line)) == 1


def test_the_rule_leaves_alone():
    harmless = """model.eval()
re.compile(text)
subprocess.run([text], shell=False)
torch.load(file, weights_only=True)
np.load(file)
np.load(file, allow_pickle=False)
yaml.safe_load(text)
yaml.load(text, Loader)
import pickle
error = pickle.PickleError
from xml.etree.ElementTree import Element, ParseError"""
    assert dangers(harmless) == []
