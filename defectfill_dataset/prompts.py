"""The two prompts of a defect type, and where its phrase sits among their tokens."""

import dataclasses
from collections.abc import Iterable, Sequence

import torch

from .errors import InputError, Problem


MOST_TOKENS = 77  # that the text encoders of Stable Diffusion 1 and 2 read


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt and the phrase that stands for [V*] in it: the text is `before + phrase + after`."""

    before: str
    phrase: str
    after: str

    @property
    def text(self) -> str:
        return self.before + self.phrase + self.after


@dataclasses.dataclass(frozen=True)
class PromptPair:
    """P_def and P_obj of one defect type."""

    defect: Prompt
    object: Prompt


@dataclasses.dataclass(frozen=True)
class TokenizedPrompts:
    """Every distinct prompt of a run.

    Args:
        input_ids: (P, L) token ids, padded to the tokenizer's length.
        phrase_weights: (P, L), 1/n on the n tokens of the phrase, 0 elsewhere.
        index: the row of each prompt.
    """

    input_ids: torch.Tensor
    phrase_weights: torch.Tensor
    index: dict[Prompt, int]


def to_words(name: str) -> str:
    """A folder name as words: 'metal_nut' becomes 'metal nut'."""
    return " ".join(name.replace("_", " ").replace("-", " ").split())


def build_prompts(
    defects: Sequence[str],
    object_words: str,
    phrase: str | None = None,
    defect_prompt: str = "A photo of {phrase}",
    object_prompt: str = "A {object} with {phrase}",
) -> dict[str, PromptPair]:
    """P_def and P_obj of each defect type.

    Args:
        defects: the defect types' folder names.
        phrase: what stands for [V*]; `{defect}` and `{object}` in it are their names as words. Default: `sks` for one
            type (the paper's rare word), `{defect}` for several.
        defect_prompt: P_def, with `{phrase}`.
        object_prompt: P_obj, with `{phrase}` and `{object}`.

    Raises:
        InputError: a template without `{phrase}` (DF173), or several types named alike (DF172).
    """
    if phrase is None:
        phrase = "sks" if len(defects) == 1 else "{defect}"
    for flag, template in (("--defect_prompt", defect_prompt), ("--object_prompt", object_prompt)):
        if template.count("{phrase}") != 1:
            raise InputError(Problem("DF173", f"{flag} '{template}'", "must hold {phrase} exactly once"))
    if len(defects) > 1 and "{defect}" not in phrase:
        what = f"would name {len(defects)} defect types ({', '.join(defects)}) alike"
        fix = "put {defect} in it, or train one type with --defect"
        raise InputError(Problem("DF172", f"--phrase '{phrase}'", what, fix))

    def prompt(template: str, defect: str) -> Prompt:
        before, after = template.replace("{object}", object_words).split("{phrase}")
        words = phrase.replace("{object}", object_words).replace("{defect}", to_words(defect))
        return Prompt(before, words, after)

    pairs = {d: PromptPair(prompt(defect_prompt, d), prompt(object_prompt, d)) for d in defects}
    alike: dict[str, list[str]] = {}
    for defect, pair in pairs.items():
        alike.setdefault(pair.object.text.casefold(), []).append(defect)
    fix = "rename the folders, or choose one with --defect"
    problems = [
        Problem("DF172", ", ".join(names), f"all become '{pairs[names[0]].object.text}'", fix)
        for names in alike.values()
        if len(names) > 1
    ]
    if problems:
        raise InputError(*problems)
    return pairs


def tokenize_prompts(tokenizer, pairs: Iterable[PromptPair]) -> TokenizedPrompts:
    """Token ids of every distinct prompt, and the place of its phrase among them.

    Raises:
        InputError: a prompt that does not fit the tokenizer's length (DF174), or whose phrase's tokens do not stand
            in it where the template says (DF171).
    """
    prompts = list(dict.fromkeys(prompt for pair in pairs for prompt in (pair.defect, pair.object)))
    rows = [_tokenize(tokenizer, prompt) for prompt in prompts]
    input_ids, weights = (torch.stack(column) for column in zip(*rows))
    return TokenizedPrompts(input_ids, weights, {prompt: row for row, prompt in enumerate(prompts)})


def _tokenize(tokenizer, prompt: Prompt) -> tuple[torch.Tensor, torch.Tensor]:
    """(L,) ids of the prompt and (L,) weights of its phrase, found and proved by token ids."""
    length = tokenizer.model_max_length
    ids = tokenizer(prompt.text).input_ids
    if len(ids) > length:
        what = f"{len(ids)} tokens, but the text encoder reads {length}"
        fix = "its end would be lost. Shorten the prompt or the phrase"
        raise InputError(Problem("DF174", f"'{prompt.text}'", what, fix))
    wanted = tokenizer(prompt.phrase, add_special_tokens=False).input_ids
    start = 1 + len(tokenizer(prompt.before, add_special_tokens=False).input_ids)  # 1: the start-of-text token
    if not wanted or ids[start : start + len(wanted)] != wanted:
        alone, inside = (tokenizer.convert_ids_to_tokens(tokens) for tokens in (wanted, ids))
        what = f"'{prompt.phrase}' alone is {alone}, but the prompt is {inside}"
        raise InputError(Problem("DF171", f"'{prompt.text}'", what, "set the phrase apart with spaces"))
    padded = tokenizer(prompt.text, padding="max_length", max_length=length).input_ids
    weights = torch.zeros(length)
    weights[start : start + len(wanted)] = 1 / len(wanted)
    return torch.tensor(padded), weights
