"""What strangers name (defects, prompts, objects, repositories) is text in a card: no code, no HTML, no YAML key."""

import ast
import json
from collections import Counter

import pytest
import yaml
from folders import make_metadata, write_lines
from markdown_it import MarkdownIt

from defectfill.runs import cards
from defectfill_scripts import prepare_data


PAYLOADS = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<!-- x", "</code></pre><svg/onload=alert(1)>",
    "`<img src=x>`", "``<img src=x>``", "```\n<img src=x>\n```", "~~~\n<img src=x>", "`", "a ` b `` c",
    "a | b", r"a \| b", r"\|<img src=x>", "`|<img src=x>|`", "|\n|---|\n| x |", "[a](javascript:alert(1))",
    "![a](http://evil.example/x.png)", "[a]: http://evil.example", "<http://evil.example>", "https://evil.example/x",
    "www.evil.example", "a\n# heading", "a\n---\nlicense: mit\n---\nb", "---", "# x", "- x", "1. x", "> x", "    x",
    'x"); import os; os.system("id"); ("', 'x")\nimport os\n("', '"""', "'''", "x\\", "${7*7}", "{{ 7*7 }}",
    "{% raw %}", "$$x$$", "&lt;b&gt;", "&#60;b&#62;", "license: mit", "!!python/object:os.system", "*a* **b** _c_",
    "a\u2028b", "a\u202eb", "a\x1b[31mb", "a\rb", "é Kratzer 刮痕 😀",
]  # fmt: skip
QUIET = {"text", "softbreak", "code_inline", "strong_open", "strong_close"}  # the last two are of no payload


def nodes(card: str) -> list:
    """The Markdown tokens of a card's body, those inside paragraphs too."""
    body = card.split("\n---\n", 1)[1]
    found = MarkdownIt("commonmark", {"html": True}).enable("table").parse(body)
    return [inner for token in found for inner in (token, *(token.children or ()))]


def kinds(card: str) -> list[str]:
    """All but the text: what a page would make of a card."""
    return [token.type for token in nodes(card) if token.type not in ("text", "code_inline")]


def links(card: str) -> list[str]:
    return [token.attrs["href"] for token in nodes(card) if token.type == "link_open"]


def snippet(card: str) -> ast.Module:
    (code,) = (token.content for token in nodes(card) if token.type == "fence")
    return ast.parse(code)


def literals(card: str) -> list[str]:
    return [node.value for node in ast.walk(snippet(card)) if isinstance(node, ast.Constant)]


def model_card(folder, text: str, defect: str = "hole") -> str:
    record = {
        "base": text, "revision": text, "object": text, "defect_prompts": {defect: text, "b": "A photo of b"},
        "steps": 1, "resolution": 512, "zoom": None, "rank": 4, "conv_rank": 0, "alpha": 4.0, "lora_targets": text,
        "seed": 0,
    }  # fmt: skip
    errors = {"defect": {"999": 0.5, "400": 0.0625}, "object": {"999": 9.0, "400": 9.0}, "variance": 0.25}
    measures = {when: {"x0_error": errors} for when in ("before", "after")} | {"held_out": {}}
    cards.write_model_card(folder, record, measures, 2, 1, text)
    return (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("text", PAYLOADS)
def test_a_model_card_shows_foreign_text_as_text(tmp_path, text, monkeypatch):
    (tmp_path / "plain").mkdir()
    plain = model_card(tmp_path / "plain", "words")
    card = model_card(tmp_path, text, defect=text)
    assert kinds(card) == kinds(plain) and links(card) == links(plain)
    head = yaml.safe_load(card.split("---\n")[1] if "\n---\nlicense" not in text else card.split("\n---\n")[0][4:])
    assert head.keys() == yaml.safe_load(plain.split("---\n")[1]).keys() and head["base_model"] == text
    assert ast.dump(ast.parse(ast.unparse(snippet(plain)).replace("'words'", repr(text)))) == ast.dump(snippet(card))
    assert literals(card).count(text) == 4  # base, revision, repository and prompt


def test_a_model_card_shows_how_well_noise_was_removed(tmp_path):
    rows = [
        line
        for line in model_card(tmp_path, "words").splitlines()
        if line.startswith(("| images", "| training", "| held"))
    ]
    assert rows == [
        "| images | t = 999 | t = 400 | variance |",
        "| training, before | 0.500 | 0.062 | 0.250 |",
        "| training, after | 0.500 | 0.062 | 0.250 |",
    ]


@pytest.mark.parametrize("text", PAYLOADS)
def test_a_dataset_card_shows_foreign_text_as_text(tmp_path, text):
    def card(words: str, folder) -> str:
        folder.mkdir()
        counts = Counter({(words, words, "train"): 1, (words, "good", "good"): 2})
        cards.write_dataset_card(folder, counts, "parquet", "auto", words, words, Counter(kept=1), words)
        return (folder / "README.md").read_text(encoding="utf-8")

    plain, told = card("words", tmp_path / "a"), card(text, tmp_path / "b")
    of_source = text.startswith("https://")  # which is a link if it is one
    assert kinds(plain) == [k for k in kinds(told) if not of_source or not k.startswith("link_")]
    assert links(told) == [text] * of_source
    assert ast.dump(ast.parse(ast.unparse(snippet(plain)).replace("'words'", repr(text)))) == ast.dump(snippet(told))
    head = yaml.safe_load(told[4:].split("\n---\n\n# ")[0])
    assert head.keys() == {"license", "task_categories", "tags", "size_categories", "configs"}


@pytest.mark.parametrize("text", PAYLOADS)
def test_a_cards_words_are_those_of_the_name(text):
    """As they are shown, but for line ends and characters that are not printable."""
    shown = MarkdownIt("commonmark").enable("table").parse(f"| a |\n|---|\n| {cards.markdown_text(text)} |")
    cells = [token for token in shown if token.type == "inline"]
    assert len(cells) == 2 and {child.type for child in cells[1].children} <= {"text", "text_special"}
    words = "".join(child.content for child in cells[1].children)
    assert words == cards.one_line(" ".join(text.split()))
    if text.isprintable() and text == " ".join(text.split()):
        assert ast.literal_eval(cards.python_string(text)) == text


def test_a_bare_address_is_no_link_where_pages_make_links_of_them():
    assert "https:" not in cards.markdown_text("https://evil.x") and "www." not in cards.markdown_text("www.evil.x")


def test_names_in_annotations_reach_a_published_card_as_text(tmp_path):
    evil = 'x"); import os; ("<img src=x onerror=alert(1)>`|\n---\nlicense: mit\n---\n'
    root = make_metadata(tmp_path / "data", "metadata.jsonl")
    lines = [json.loads(line) for line in (root / "metadata.jsonl").read_text().splitlines()]
    write_lines(root / "metadata.jsonl", [line | {"defect": evil} if i < 2 else line for i, line in enumerate(lines)])
    argv = [str(root), "--output_dir", str(tmp_path / "out"), "--source", evil, "--license", "other"]
    prepare_data.main(prepare_data.parse_args(argv))
    card = (tmp_path / "out/README.md").read_text()
    assert not {"html_inline", "html_block"} & set(kinds(card)) and card.count("\n---\n") == 1
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "other"
