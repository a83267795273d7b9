"""README and docs: the scripts take every command, every link leads somewhere, and what can run here runs."""

import ast
import importlib
import json
import re
import shlex
from pathlib import Path

from offline import ROOT

import pytest
from drawn import write_image, write_mask
from runs import generate, reset_accelerate
from toy_model import RESOLUTION

import generate_defectfill
import train_defectfill
from defectfill_dataset import InputError
from defectfill_dataset.codes import CODES
from defectfill_scripts import ablate, write_docs


PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")),
    *sorted((ROOT / "docs").glob("*.md")),
]
PAGES += [ROOT / "scripts/tiny_base/README.md"]
DEMO = ROOT / "scripts/demo.sh"
SCRIPT = re.compile(r"(?:scripts/)?(\w+)\.py$")
ELIDED = ["--image", "i", "--mask", "m", "--output_dir", "o"]  # stands for "..." in a command


def commands() -> list:
    """(page, module, words) of every command of ours in a bash block, and in the demo."""
    found = []
    for page in [*PAGES, DEMO]:
        text = page.read_text()
        for block in [text] if page == DEMO else re.findall(r"```bash\n(.*?)```", text, re.S):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line.replace("'", " "), comments=True)
                for place, word in enumerate(words):
                    if (match := SCRIPT.search(word)) and "pytest" not in words:
                        found.append(
                            pytest.param(match[1], words[place + 1 :], id=f"{page.name} {match[1]} {len(found)}")
                        )
    return found


@pytest.mark.parametrize("module, words", commands())
def test_every_command_is_taken(module, words):
    name = module if (ROOT / f"{module}.py").exists() else f"defectfill_scripts.{module}"
    script = importlib.import_module(name)
    words = [*(word for word in words if word != "..."), *(ELIDED if "..." in words else [])]
    if module == "train_defectfill" and "--output_dir" not in words:
        words += ["--output_dir", "o"]
    if module == "train_defectfill":
        words = [word for word in words if word not in ELIDED[:4]]
    if not hasattr(script, "parse_args"):
        pytest.skip("has no parser of its own to ask")
    try:
        script.parse_args(words)
    except InputError as error:
        assert str(error).startswith("DF160 --cases")  # a file of the reader's


def test_there_are_commands_to_check():
    assert len(commands()) >= 15
    demo = {command.values[0]: command.values[1] for command in commands() if DEMO.name in command.id}
    assert demo.keys() == {"make_demo_data", "train_defectfill", "generate_defectfill"}
    assert {*ablate.RECIPE} <= {*demo["train_defectfill"]}  # what is measured is what is shown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]*)(#[\w-]+)?\)", page.read_text()):
        path, anchor = target
        if path.startswith("http"):
            continue
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), path
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            assert anchor[1:] in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, anchor


def readme_command(script: str) -> list[str]:
    """The words after `script` in the README's road from five images."""
    text = (ROOT / "README.md").read_text().partition("## I have five images")[2]
    block = next(b for b in re.findall(r"```bash\n(.*?)```", text, re.S) if script in b)
    return shlex.split(block.replace("\\\n", " ").partition(script)[2])


def test_the_road_from_five_images_works(tmp_path, monkeypatch, base):
    """The README's two commands as they are, but for a toy base and few steps."""
    monkeypatch.chdir(tmp_path)
    for i in range(1, 6):
        write_image(Path(f"nut/images/{i}.jpg"), mask=write_mask(Path(f"nut/masks/{i}.png")))
    write_image(Path("nut/good/0.png")), write_image(Path("nut/good/1.png"))
    words = [*readme_command("train_defectfill.py"), "--pretrained_model_name_or_path", str(base)]
    words += f"--resolution {RESOLUTION} --max_train_steps 1 --train_batch_size 1 --validation_steps 0".split()
    words[words.index("bf16")] = "no"
    reset_accelerate()
    train_defectfill.main(train_defectfill.parse_args(words))
    split = json.loads(Path("lora-nut/split.json").read_text())
    assert len(split["train"]) == 5 and split["test"] == []
    words = readme_command("generate_defectfill.py")
    words[words.index("100")] = "4"
    generate(*words, *"--selection rmse --num_inference_steps 2 --num_candidates 2".split())
    assert len(list(Path("generated/images").iterdir())) == 4 and Path("generated/summary.html").exists()
    reset_accelerate()


def test_the_readme_is_a_page_and_no_book():
    assert len((ROOT / "README.md").read_text().split()) <= 1170
    assert generate_defectfill.__doc__ and train_defectfill.__doc__


def test_generated_documents_are_current():
    """After a change of flags or codes: python scripts/write_docs.py."""
    for name, text in write_docs.documents().items():
        assert (ROOT / "docs" / name).read_text() == text, f"docs/{name}: run python scripts/write_docs.py"


def test_every_code_is_in_the_table_and_is_used():
    """A code is a string of its own, for a Problem: no string holds one and more text."""
    folders = ("defectfill", "defectfill_dataset", "scripts")
    files = [*ROOT.glob("*.py"), *(file for folder in folders for file in (ROOT / folder).rglob("*.py"))]
    nodes = [node for f in files if f.name != "codes.py" for node in ast.walk(ast.parse(f.read_text()))]
    aside = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}  # docstrings
    aside |= {id(part) for node in nodes if isinstance(node, ast.Compare) for part in ast.walk(node)}
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and id(node) not in aside}
    used = [text for text in texts if re.search(r"DF\d{3}", str(text))]
    listed = [code for codes in CODES.values() for code in codes]
    assert sorted(used) == sorted(listed)


def test_every_flag_has_a_sentence_of_its_own():
    for name, text in write_docs.documents().items():
        for flag, help_text in re.findall(r"^  (--\w+)[^\n]*?(?:\s{2,}|\n\s{20,})(.*(?:\n {20,}.*)*)", text, re.M):
            words = " ".join(help_text.split())
            assert len(words) > 11 and words[0].isupper() or words.startswith("auto"), (name, flag, words)
            assert words.endswith(".") and not words.startswith(("Of ", "As in")), (name, flag, words)


def test_the_tests_that_hold_promises_exist():
    text = (ROOT / "docs/reliability.md").read_text()
    for file, name in re.findall(r"tests/([\w/]+\.py)::(\w+)", text):
        functions = {node.name for node in ast.walk(ast.parse((ROOT / "tests" / file).read_text()))
                     if isinstance(node, ast.FunctionDef)}  # fmt: skip
        assert name in functions, f"tests/{file}::{name}"
    rows = [f"P{n}" for n in range(1, 13)] + [f"F{n:02}" for n in range(1, 46)] + [f"S{n:02}" for n in range(1, 25)]
    assert re.findall(r"^\| ([PFS]\d+) \|", text, re.M) == rows
    assert not re.findall(r"^\|.*(?<!GPU only, )not held(?!: ).*", text, re.M)  # without why
