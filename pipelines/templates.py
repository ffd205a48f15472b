"""What class names are put into before the text tower reads them: named sets of templates.

A new set is one entry of TEMPLATE_SETS, or a file of the user's.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SLOT = "{}"
"""Where a template takes the name of the class."""

_NAME = re.compile(r"(?!c$)[A-Za-z0-9_]+")  # of an array in a store
_RESERVED = ("logit_scale",)
_JOINED_WORDS = re.compile(r"(?:[A-Z][a-z]+){2,}")


class TemplateError(ValueError):
    """Not a set of templates, and no file of one."""


@dataclass(frozen=True)
class TemplateSet:
    """Templates under the name that a store keeps their embeddings by."""

    name: str
    templates: tuple[str, ...]

    def fill(self, words: str) -> tuple[str, ...]:
        """The texts of one class, one of each template."""
        return tuple(template.replace(SLOT, words) for template in self.templates)


_PERFORMED = ("", "using ", "doing ", "during ", "performing ", "practicing ")
# data/prompts.md of openai/CLIP, Kinetics700; "a photo of" does without "a person" too, as do the others.
_CLIP_KINETICS = tuple(
    f"a {what} of {who}{SLOT}."
    for what in ("photo", "video", "example", "demonstration")
    for who in ("", *(f"a person {how}" for how in _PERFORMED))
)
_ACTIONCLIP = (  # utils/Text_Prompt.py at 31c34df; the paper says that there are 18
    "a photo of action {}",
    "a picture of action {}",
    "Human action of {}",
    "{}, an action",
    "{} this is an action",
    "{}, a video of action",
    "Playing action of {}",
    "{}",
    "Playing a kind of action, {}",
    "Doing a kind of action, {}",
    "Look, the human is {}",
    "Can you recognize the action of {}?",
    "Video classification of {}",
    "A video of {}",
    "The man is {}",
    "The woman is {}",
)

TEMPLATE_SETS = {
    one.name: one
    for one in (
        TemplateSet("label", (SLOT,)),  # DiST: "text.replace('"', '').strip()", base_dataset.py 104-107 at 4b3a09b
        TemplateSet("text4vis", ("a video of a person {}.",)),  # modules/text_prompt.py at d61b34d
        TemplateSet("actionclip", _ACTIONCLIP),
        TemplateSet("clip_kinetics", _CLIP_KINETICS),
    )
}
"""By name."""

EVERY_STORE = ("label", "text4vis", "actionclip")
"""The sets that `vcache extract` adds: those that heads classify by."""


ALL = "all"


def template_sets(words: Sequence[str]) -> list[TemplateSet]:
    """The sets that the words name, each as `template_set` takes it; "all" names all of vcache's own.

    Raises:
        TemplateError: a word names none.
    """
    return [one for word in words for one in (TEMPLATE_SETS.values() if word == ALL else [template_set(word)])]


def template_set(word: str) -> TemplateSet:
    """The set of that name, or that in a file: one template a line with {} for the name of the class, called as the file is.

    Raises:
        TemplateError: there is neither; a line has no {}, or the file's name cannot be that of an array.
    """
    if word in TEMPLATE_SETS:
        return TEMPLATE_SETS[word]
    path = Path(word).expanduser()
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise TemplateError(
            f"--templates {word}: neither a file nor a set of templates; there are: {', '.join(TEMPLATE_SETS)}."
        ) from error
    except OSError as error:
        raise TemplateError(f"--templates {word} cannot be read: {(error.strerror or str(error)).lower()}.") from error
    except ValueError as error:
        raise TemplateError(f"--templates {word} gives no templates: it is not UTF-8.") from error
    return TemplateSet(_checked_name(path), _checked_templates(path, lines))


def _checked_name(path: Path) -> str:
    if path.stem in TEMPLATE_SETS:
        raise TemplateError(f"{path}: {path.stem!r} is a set of vcache's own. Give the file another name.")
    if not _NAME.fullmatch(path.stem) or path.stem in _RESERVED:
        raise TemplateError(
            f"{path}: the set is called as the file is, and {path.stem!r} cannot be the name of an array. Rename the file: "
            "letters, digits and '_'."
        )
    return path.stem


def _checked_templates(path: Path, lines: Sequence[str]) -> tuple[str, ...]:
    templates = tuple(line.strip() for line in lines if line.strip())
    if not templates:
        raise TemplateError(f"{path} gives no templates: it is empty. Write one a line, as: a video of {SLOT}.")
    if odd := [number for number, line in enumerate(lines, 1) if line.strip() and SLOT not in line]:
        raise TemplateError(f"{path}, line {odd[0]}: a template has {SLOT} where the name of the class goes.")
    return templates


def class_words(class_name: str) -> str:
    """The name of a class as words, which is what a template takes.

    Double quotes go, as DiST takes them out ('"celebrating" a goal' keeps them in lists of Kinetics). "brush_hair" of HMDB-51 is
    brush hair, and "ApplyEyeMakeup" of UCF101 is Apply Eye Makeup, as CLIP's authors wrote them. The rest stays as it is: the
    tokenizer lowers the letters itself.
    """
    words = " ".join(class_name.replace('"', "").replace("_", " ").split())
    if _JOINED_WORDS.fullmatch(words):
        words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", words)
    return words or class_name
