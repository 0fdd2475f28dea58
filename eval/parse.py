"""The one parser: what a model wrote -> the choice, number or words it gave, or None. Used for every view.

A parser that is kinder to one view than to another makes a modality gap out of nothing, so there is one, it sees no
view, and it never guesses: an answer that can be read in two ways is None ("unparsed"), counts as wrong, and is shown.

The order of reading, first hit wins:

1. what the model declares: the last `Answer: ...` line or `\\boxed{...}`, else the last "the answer is ...",
   else the last "the correct option is ...". If that cannot be read the result is None: nothing else is searched.
2. without a declaration, the whole text.

Inside either, labels ("B", "(B)", "B.", "option B") come before option texts, because the label is what was asked for.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

PARSER_VERSION = 1  # goes into run.json; raise it whenever any text could now be read differently

REL_TOL = 1e-6  # two numbers are the same answer within this relative difference

_BARE = {"a", "i"}  # labels that are also English words
_POLAR = {"yes", "no", "true", "false"}
_WORDS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
          "seventeen eighteen nineteen twenty").split()

_LATEX_WRAP = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|operatorname)\s*\{([^{}]*)\}")
_LATEX_FRAC = re.compile(r"\\[dt]?frac\s*\{\s*([^{}]+?)\s*\}\s*\{\s*([^{}]+?)\s*\}")
_LATEX_MATH = re.compile(r"\\[()\[\]]|(?<!\w)\$(?=[^$\n]*\$)|(?<=[^\s$])\$(?!\w)")
_EMPHASIS = re.compile(r"(?<!\w)(\*\*\*|\*\*|\*|__|_|`)(?=\S)(.+?)(?<=\S)\1(?!\w)")

_DECLARED = (
    re.compile(r"\banswer\s*[:=]\s*", re.I),
    re.compile(r"\banswer\s+(?:is|would\s+be|must\s+be|should\s+be)\b\s*:?\s*", re.I),
    re.compile(r"\b(?:correct|right|best|final)\s+(?:option|choice)\s*"
               r"(?:[:=]|\bis\b|\bwould\s+be\b|\bmust\s+be\b)\s*:?\s*", re.I),
)
# Where a reason or an aside begins; what stands before is the answer. A plain comma is no cut: "red, blue" names two.
_CUT = re.compile(r"[.;!?]\s+|,?\s+(?:because|since|as|so|which|given|explanation|reason)\b|\s+[-\u2013\u2014]\s+"
                  r"|\s+\((?!\w\))|,\s+(?:the|it|this|that|there)\b|\n", re.I)
_NEGATED = re.compile(r"(?:\bnot|n't|\bneither|\bnor|\bnever|\bexcept|\binstead\s+of|\brather\s+than|\bother\s+than)"
                      r"\s+(?:(?:the|a|an|in|at|on)\s+)?$", re.I)
_REJECTED = re.compile(r"\W*\s*(?:is|was)\s+(?:wrong|incorrect|not\s+(?:right|correct)|false)\b", re.I)
_EITHER = re.compile(r"\W*(?:/|\b(?:and|or)\b)\W*(?:yes|no|true|false)\b|\s*,\s*(?:yes|no|true|false)\W*$", re.I)
_DENIED = re.compile(r"\W*\s*(?:is\s+not|isn't|was\s+not|wasn't|cannot|can't|can\s+not)\b", re.I)

_NUMBER = re.compile(
    r"(?<![\w.,/])(?<!\d-)"
    r"(?P<sign>(?<!\w)[-+])?\s?"
    r"(?:(?P<num>\d+)\s?/\s?(?P<den>\d+)|(?P<whole>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
    r"(?P<exp>[eE][-+]?\d+)?)"
    r"(?!\w|[.,/-]\d|\s?/\s?\d)(?P<percent>\s?%)?")


class Number(NamedTuple):
    """A number as written: `face` is what stands before a percent sign, `percent` whether there is one."""

    face: float
    percent: bool

    @property
    def value(self) -> float:
        return self.face / 100 if self.percent else self.face


def clean(text: str) -> str:
    """Text without the typography that carries no answer: markdown emphasis, LaTeX wrappers, full-width letters."""
    text = unicodedata.normalize("NFKC", text)
    text = text.replace("\u2212", "-").replace("\u2044", "/").replace("\u2019", "'").replace("\\%", "%")
    text = re.sub(r"<\|[^|<>]*\|>|</?s>", " ", text)  # end-of-turn tokens of a decoder that kept them
    text = _LATEX_FRAC.sub(r"\1/\2", text)
    text = _LATEX_MATH.sub("", _LATEX_WRAP.sub(r"\1", text))
    text = re.sub(r"^[ \t]*#+[ \t]+", "", text, flags=re.M)
    for _ in range(2):  # emphasis may be nested: **_B_**
        text = _EMPHASIS.sub(r"\2", text)
    return text.strip()


def normalise(text: str) -> str:
    """Folded case, single spaces, no leading article, no punctuation at the edges (a sign or a percent stays)."""
    text = re.sub(r"\s+", " ", clean(text)).casefold()
    text = re.sub(r"^[\s\"'.,;:!?]+|[\s\"'.,;:!?]+$", "", text) or text
    return re.sub(r"^(?:a|an|the)\s+(?=\S)", "", text)


def parse_choice(text: str, choices: Sequence[str], options: Sequence[str] | None = None) -> str | None:
    """The member of `choices` that `text` gives as its answer, or None.

    choices: what may be said, distinct, e.g. ("A", "B") or ("red", "blue") or ("yes", "no") or ("3", "4").
    options: the option texts in the same order when the choices are labels; then either may be said.
    Raises ValueError when choices are empty or repeated, or options differ in number.
    """
    choices = tuple(choices)
    if not choices or len(set(choices)) != len(choices):
        raise ValueError(f"choices must be distinct and not empty: {choices!r}")
    if options is not None and len(options) != len(choices):
        raise ValueError(f"{len(choices)} choices but {len(options)} options")
    reader = _Reader(choices, tuple(options) if options is not None else choices)
    text = _without_thinking(text)
    declared = _declared(text)
    if declared is not None:
        return reader.read(clean(declared.text), alone=declared.colon, declared=True)
    return reader.read(clean(text), alone=True, declared=False)


def parse_number(text: str) -> Number | None:
    """The only number in `text`: 1,234 and -3 and 3/4 and 1.5e3 and 50%. None when there is none or more than one.

    A number word counts only when it is the whole text: "one" is mostly a pronoun ("the red one").
    """
    text = clean(text)
    word = normalise(text)
    if word in _WORDS:
        return Number(float(_WORDS.index(word)), False)
    if "=" in text:  # "2 + 1 = 3" says 3
        text = text.rsplit("=", 1)[1]
    found = {number for number, _ in _numbers(text)}
    return found.pop() if len(found) == 1 else None


def parse_open(text: str) -> str | None:
    """The answer to a question without options, as written: what the model declares, else its first line.

    None when nothing was said. The first line, because the prompt asks for a brief answer and reasons come after it.
    """
    text = _without_thinking(text)
    declared = _declared(text)
    said = clean(declared.text if declared is not None else text)
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if not lines:
        return None
    line = re.sub(r"^[\s\"']+|[\s\"'.,;:!]+$", "", lines[0])
    return line or None


def same_answer(pred: str | None, gold: str) -> bool:
    """Whether an open answer is the gold one: as numbers within a relative 1e-6 when gold is a number, else as words.

    "50%" is 0.5; it also equals a plain 50 (both are written above 1, so no fraction is meant). A prediction that holds
    several numbers, or a denied one, equals no number.
    """
    if pred is None:
        return False
    if normalise(pred) == normalise(gold):
        return True
    if normalise(gold) in _POLAR:
        pair = ("yes", "no") if normalise(gold) in ("yes", "no") else ("true", "false")
        return parse_choice(pred, pair) == normalise(gold)
    wanted = parse_number(gold) if _is_number(gold) else None
    if wanted is None:
        return False
    said = parse_number(pred)
    if said is None or any(_NEGATED.search(clean(pred)[:start]) for _, start in _numbers(clean(pred))):
        return False
    return _equal(said, wanted)


class _Declared(NamedTuple):
    text: str
    colon: bool  # "Answer: a" names a label; "the answer is a" may be a sentence cut short before its noun


def _declared(text: str) -> _Declared | None:
    text = _EMPHASIS.sub(r"\2", unicodedata.normalize("NFKC", text)).replace("**", "")
    marks = [(match.start(), match.end(), None) for match in _DECLARED[0].finditer(text)]
    marks += [(start, end, inner) for start, end, inner in _boxes(text)]
    if marks:
        _, end, inner = max(marks, key=lambda mark: mark[:2])
        return _Declared(inner if inner is not None else _line(text[end:]), True)
    for pattern in _DECLARED[1:]:
        found = list(pattern.finditer(text))
        if found:
            return _Declared(_line(text[found[-1].end():]), found[-1].group().rstrip().endswith(":"))
    return None


def _boxes(text: str) -> list[tuple[int, int, str]]:
    boxes = []
    for match in re.finditer(r"\\(?:boxed|fbox)\s*\{", text):
        depth, position = 1, match.end()
        while position < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            position += 1
        # an unclosed box was cut off: its content is not the answer yet
        boxes.append((match.start(), position, text[match.end():position - 1] if depth == 0 else ""))
    return boxes


def _line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if lines else ""


def _without_thinking(text: str) -> str:
    if "</think>" in text:
        return text.rsplit("</think>", 1)[1]
    return text.split("<think>", 1)[0] if "<think>" in text else text


def _numbers(text: str) -> list[tuple[Number, int]]:
    found = []
    for match in _NUMBER.finditer(text):
        if match["num"] is not None:
            if int(match["den"]) == 0:
                continue
            face = int(match["num"]) / int(match["den"])
        else:
            face = float(match["whole"].replace(",", "") + (match["exp"] or ""))
        if math.isfinite(face):
            found.append((Number(-face if match["sign"] == "-" else face, match["percent"] is not None), match.start()))
    return found


def _is_number(text: str) -> bool:
    text = clean(text)
    match = _NUMBER.fullmatch(text)
    return match is not None and (match["den"] is None or int(match["den"]) != 0)


def _equal(a: Number, b: Number) -> bool:
    if math.isclose(a.value, b.value, rel_tol=REL_TOL):
        return True
    return a.percent != b.percent and abs(a.face) > 1 and math.isclose(a.face, b.face, rel_tol=REL_TOL)


class _Reader:
    """Finds in a piece of cleaned text which of the choices it names."""

    def __init__(self, choices: tuple[str, ...], options: tuple[str, ...]):
        self.choices = choices
        self.labels = {choice.casefold(): choice for choice in choices if len(choice) == 1 and choice.isalpha()}
        # An option text that is a single letter is read as a label or not at all.
        self.texts = [(normalise(option), choice) for choice, option in zip(choices, options, strict=True)
                      if not (len(option.strip()) == 1 and option.strip().isalpha())]
        self.values = [(parse_number(text), choice) for text, choice in self.texts if _is_number(text)]
        self.words = [(text, choice) for text, choice in self.texts if not _is_number(text) and text]

    def read(self, text: str, *, alone: bool, declared: bool) -> str | None:
        """alone: a lower-case "a" on its own is the label A. declared: the text is known to be the answer."""
        if not text:
            return None
        said = self._named(text, alone)
        if len(said) > 1:
            # More than one is named: take the part before the reason begins, if that part is an answer and no more.
            head = _CUT.split(text, maxsplit=1)[0]
            if head != text and (declared or not self._lists(text)):
                said = self._named(head, alone) if declared else self._exactly(head)
        return said.pop() if len(said) == 1 else None

    def _named(self, text: str, alone: bool) -> set[str]:
        exact = self._exactly(text, alone)
        if exact:
            return exact
        labels = self._labelled(text)
        if labels:
            if len(labels) == 1 and self._contradicts(text, next(iter(labels))):
                return set()
            return labels
        return self._worded(text) if self.words or self.values else set()

    def _exactly(self, text: str, alone: bool = True) -> set[str]:
        """The choice that the text is, no word more."""
        letter = re.fullmatch(r"[\s\"'(\[{]*([A-Za-z])[\s\"')\]}.,:;!]*", text)
        if letter and letter[1].casefold() in self.labels:
            bare = letter[1] in _BARE and letter[0].strip() == letter[1]
            return set() if bare and not alone else {self.labels[letter[1].casefold()]}
        said = normalise(text)
        named = {choice for option, choice in self.texts if option == said}
        if not named and (number := parse_number(text)) is not None and (_is_number(text) or said in _WORDS):
            named = {choice for value, choice in self.values if _equal(number, value)}
        return named

    def _labelled(self, text: str) -> set[str]:
        """Labels in a form that can only be a label: never the article of "A dog" nor a letter inside a word."""
        found = set()
        for pattern in _LABEL_FORMS:
            for match in pattern.finditer(text):
                label = self.labels.get(match["label"].casefold())
                rejected = _NEGATED.search(text[:match.start()]) or _REJECTED.match(text[match.end("label"):])
                if label and not rejected:
                    found.add(label)
        if found:  # "A. red B. blue" lists, though only A begins a line
            found |= {self.labels[mark.casefold()] for mark in re.findall(r"(?<=\s)([A-Z])[.)](?=\s\w)", text)
                      if mark.casefold() in self.labels}
        lead = re.match(r"\s*([A-Z])\s+(\S.*)", text, re.S)
        if lead and (label := self.labels.get(lead[1].casefold())):
            # "B red" is label and text; "A red" is that only if red is option A, and "A red and a blue" is not
            own = [option for option, choice in self.texts if choice == label]
            if own and re.match(_bounded(own[0]) + r"\s*(?:$|[.,;:!?)\n]|because\b|since\b)", lead[2].casefold()):
                found.add(label)
        return found

    def _contradicts(self, text: str, label: str) -> bool:
        """Whether the label is followed by another option's text and nothing else: "B) red" where red is A."""
        rest = re.sub(r"^[\s(\[]*[A-Za-z][\s)\].:,-]+", "", text)
        named = {choice for option, choice in self.texts if option == normalise(rest)}
        return bool(named) and label not in named

    def _worded(self, text: str) -> set[str]:
        folded = re.sub(r"\s+", " ", text).casefold()
        spans = []
        for option, choice in self.words:
            pattern = _POLAR_FORMS.get(option) or re.compile(_bounded(option))
            spans += [(match.start(), match.end(), choice) for match in pattern.finditer(folded)]
        # the longest match: "dark blue" does not also say "blue"
        spans = [one for one in spans
                 if not any(other[0] <= one[0] and one[1] <= other[1] and other[1] - other[0] > one[1] - one[0]
                            for other in spans)]
        lead = [choice for start, end, choice in spans
                if start == 0 and choice.casefold() in _POLAR and not _EITHER.match(folded[end:])]
        if lead and not self._lists(text):  # "Yes, there is no circle": the first word answers
            return set(lead)
        found = set()
        for start, end, choice in spans:
            if _NEGATED.search(folded[:start]) or _REJECTED.match(folded[end:]):
                continue
            if _DENIED.match(folded[end:]):  # "red is not left of blue" answers nothing by itself
                return set()
            found.add(choice)
        return found | self._counted(folded)

    def _counted(self, text: str) -> set[str]:
        numbers = _numbers(text.rsplit("=", 1)[-1])
        if any(_NEGATED.search(text[:start]) for _, start in _numbers(text)):
            return set()
        named = {choice for value, choice in self.values if any(_equal(number, value) for number, _ in numbers)}
        # "3 of the 12" may mean either, though only 3 is a choice; two named choices are kept for the caller to see.
        return named if len({number for number, _ in numbers}) == 1 or len(named) > 1 else set()

    def _lists(self, text: str) -> bool:
        """Whether the text repeats the options ("A. red B. blue", or one a line) instead of choosing."""
        marks = {mark for mark in re.findall(r"(?:^|\s)\(?([A-Z])[).:](?=\s)", text) if mark.casefold() in self.labels}
        parts = [self._exactly(part) for part in re.split(r"\n|[.;]\s+", text) if part.strip()]
        return len(marks) > 1 or len(set().union(*parts)) > 1


def _bounded(text: str) -> str:
    """A pattern for `text` as whole words; an edge that is no word character needs no boundary ("C++", "$5")."""
    body = r"\s".join(re.escape(part) for part in text.split())
    return (r"(?<![\w])" if re.match(r"\w", text) else "") + body + (r"(?![\w])" if re.search(r"\w$", text) else "")


# The second letter of a pair is no pronoun or article: "B, I think" names B alone.
_PAIR = r"(?<!\w)%s\s*(?:,|/|\b(?:or|and|nor)\b)\s*\(?%s(?!\w)(?!(?<=[AI])\s+[a-z])"
_LABEL_FORMS = (
    re.compile(r"(?<!\w)[(\[](?P<label>[A-Za-z])[)\]](?!\w)"),                         # (B)
    re.compile(r"(?:^|\n)\s*(?P<label>[A-Z])(?:\s*[).:]|\s*[,;](?!\S)|\s+-\s)"),       # B. red   A) Increase
    re.compile(r"(?:^|\n)\s*(?P<label>[A-Z])\s*(?=\n|$)"),                             # a line of its own
    re.compile(r"(?:^|\n)\s*(?P<label>[A-Z])\s+(?=(?:is|because|since)\b)"),           # B because ...
    re.compile(r"\b(?i:option|choice|letter)\s+(?P<label>[A-Z])(?!\w)"),
    re.compile(r"(?:\b(?:[Aa]nswer|is|be|choose|chose|pick|select|say|with|think)|'s)\s+(?P<label>[A-Z])"
               r"(?=\s*(?:$|[.,;!?)\n]|(?:because|since)\b))"),                        # it is B, because ...
    re.compile(_PAIR % ("(?P<label>[A-Z])", "[A-Z]")),                                 # A or B: both, so neither
    re.compile(_PAIR % ("[A-Z]", "(?P<label>[A-Z])")),
)

# "no" is also a determiner: "there is no circle" describes, it does not answer.
_POLAR_FORMS = {
    "no": re.compile(r"(?<!\w)no(?!\w)(?=\s*(?:$|[.,;:!?)\n-])"
                     r"|\s+(?:it|there|they|this|that|the|he|she|because|since)\b)"),
}
