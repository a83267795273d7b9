"""Write the documents that follow from the code: docs/errors.md and docs/help/.

    python scripts/write_docs.py

For contributors, after a change of flags or codes; a test says when they are out of date.
"""

import argparse
import contextlib
import importlib
import os
from pathlib import Path

import defectfill.quiet  # noqa: F401

from defectfill.markdown import markdown_table
from defectfill_dataset.codes import CODES
from defectfill_dataset.commands import Parser


COMMANDS = ("train_defectfill", "generate_defectfill", *(
    f"defectfill_scripts.{name}"
    for name in (
        "check_data", "prepare_data", "preview_masks", "run_objects", "export_generated", "merge_lora", "gpu_check",
        "evaluate_defectfill", "sort_blind",
    )
))  # fmt: skip
SUBCOMMANDS = {"defectfill_scripts.evaluate_defectfill": ("detect", "quality", "run")}


def errors_page() -> str:
    """docs/errors.md."""
    text = "# Errors and notes\n\nA message begins with a code and, mostly, the file or flag, and ends with the fix.\n"
    for group, codes in CODES.items():
        text += f"\n## {group}\n\n" + markdown_table([("code", "meaning"), *codes.items()])
    return text


def help_text(module: str) -> str:
    """What the command and its subcommands print for --help, 100 columns wide."""
    shown: list[str] = []
    name, parts = module.rpartition(".")[2], SUBCOMMANDS.get(module, ())
    original, columns = argparse.ArgumentParser.format_help, os.environ.get("COLUMNS")

    def record(parser: argparse.ArgumentParser) -> str:
        parser.prog = " ".join([f"{name}.py", *parts[len(shown) - 1 : len(shown)]])
        shown.append(original(parser))
        return ""

    os.environ["COLUMNS"] = "102"  # argparse keeps two free
    argparse.ArgumentParser.format_help = record  # type: ignore[method-assign]
    try:
        for part in [[], *([part] for part in parts)]:
            with contextlib.suppress(SystemExit):
                importlib.import_module(module).parse_args([*part, "--help"])
    finally:
        argparse.ArgumentParser.format_help = original  # type: ignore[method-assign]
        os.environ.pop("COLUMNS") if columns is None else os.environ.update(COLUMNS=columns)
    return "".join(line.rstrip() + "\n" for line in "\n\n".join(shown).splitlines())


def documents() -> dict[str, str]:
    """Each file, relative to docs/, with its text."""
    helps = {f"help/{module.rpartition('.')[2]}.txt": help_text(module) for module in COMMANDS}
    return {"errors.md": errors_page(), **helps}


def main(input_args: list[str] | None = None) -> None:
    Parser(description=__doc__).parse_args(input_args)
    folder = Path(__file__).resolve().parents[1] / "docs"
    (folder / "help").mkdir(exist_ok=True)
    for name, text in documents().items():
        (folder / name).write_text(text)
    print(f"{folder}: errors.md, help/")


if __name__ == "__main__":
    main()
