"""What makes a negative answer unfit for a preference pair. Pure functions on texts; no model, no file.

An answer that is no worse than the good one teaches the opposite of what the pair is for, and one that differs in its manner (a
refusal, half a sentence, three times the length) teaches the manner. The reasons, first hit first:

    empty               nothing was said
    cut off             the budget of tokens ended it: what the good one would be better at is ending
    equals the answer   the same words, in whatever case, punctuation and number words
    entails the answer  the good answer's words stand in it in a row: "it is red" for "red"
    refusal             "I cannot see the image", unless the good answer is one too
    length              less than half or more than twice as many words as the good answer
    nearly the same     at most one word in ten differs

The last two hold only where the longer of the two has at least 8 words. Shorter answers are names and numbers: "red" against
"dark blue" is twice as long and as good a contrast as any, and of fewer than ten words one alone is more than a tenth.

An option of a closed question is only asked whether it is the answer. That it is another one was settled by whoever wrote the
options: "10 cm" beside "10 mm", "red and blue" beside "red", "cannot be determined".
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Hashable, Sequence

from rich.table import Table

REASONS = ("empty", "cut off", "equals the answer", "entails the answer", "refusal", "length", "nearly the same")
MIN_WORDS = 8           # of the longer answer, for its length and its likeness to count
RATIO = (0.5, 2.0)      # words of the negative by words of the answer
NEAR = 0.1              # edit distance in words by words of the longer one

_NUMBER_WORDS = {word: str(value) for value, word in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen twenty".split())}
# Before a word. A capital A before a capital or a sign is a name: "A B", "A-5", "A + 3".
_ARTICLE = re.compile(r"(?<![\w'-])(?:(?:an?|the)\s+(?=\w)|(?:An?|AN|The|THE)\s+(?=[a-z]))")
# A number with its sign and decimals, a word, or a sign by itself. A hyphen after a letter or digit is no minus: "A-5", "3-5".
_TOKEN = re.compile(r"(?<![\w.])[-+]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)|[^\W_]+(?:'[^\W_]+)*|[^\w\s]")

_CANNOT = r"(?:cannot|can not|can't|could not|couldn't|am unable to|'m unable to|am not able to|'m not able to)"
_PICTURE = r"(?:image|picture|photo|photograph|figure|diagram|chart|drawing|visual)s?"
_GIVEN = r"(?:provided|given|attached|shown|available|visible|included|uploaded)"
REFUSALS = (            # what a model says that was asked about a picture it was not given
    r"\bas an? (?:\w+ )?(?:ai|assistant|language model)\b",
    r"\bi(?:'m| am) (?:just |only )?an? (?:\w+ )?(?:ai|assistant|language model)\b",
    rf"\b(?:i|we) ?{_CANNOT} (?:\w+ )?(?:see|view|access|look|open|display|determine|identify|tell|answer|assist|help|provide"
    r"|process|analy[sz]e|know|have)\b",
    rf"\b(?:i|we) (?:do not|don't) (?:\w+ )?(?:know\b|have (?:access|enough|the ability|any {_PICTURE})"
    rf"|see (?:an?|any|the) {_PICTURE})",
    r"^\W*(?:i(?:'m| am) )?(?:so |very )?sorry\b|\bi(?:'m| am) (?:so |very )?sorry\b|\bi apologi[sz]e\b|\bmy apologies\b",
    rf"\bno {_PICTURE} (?:\w+ )*?{_GIVEN}\b|\bthere is no {_PICTURE}\b",
    rf"\b{_PICTURE} (?:is|was|are|were)(?:n't| not) (?:\w+ )?{_GIVEN}\b",
    rf"\bwithout (?:seeing |access to |being able to see |more information about )?(?:an?|the|any) {_PICTURE}\b",
    r"\bplease (?:provide|upload|share|attach|send|describe)\b",
    rf"\bprovide (?:the|an?|more) (?:{_PICTURE}|information|context)\b",
    r"\b(?:cannot|can not|can't) be (?:determined|answered|known)\b|\b(?:it is|it's) (?:impossible|not possible) to\b",
)
_REFUSAL = re.compile("|".join(REFUSALS), re.IGNORECASE)


def normal(text: str) -> tuple[str, ...]:
    """The words of an answer in lower case: zero to twenty as digits, numbers with sign and decimals, no articles, and no
    punctuation; %, + and other signs that mean something are words."""
    text = _ARTICLE.sub("", unicodedata.normalize("NFKC", text).replace("\u2019", "'").replace("\u2212", "-"))
    return tuple(_number(token) for token in _TOKEN.findall(text.casefold())
                 if token == "%" or len(token) > 1 or not unicodedata.category(token).startswith("P"))


def _number(token: str) -> str:
    if not token[-1].isdecimal() or not re.fullmatch(r"[-+]?[\d,]*\.?\d+", token, re.ASCII):
        return _NUMBER_WORDS.get(token, token)
    token = token.replace(",", "").lstrip("+")
    if "." in token:
        token = token.rstrip("0").rstrip(".")
    sign, digits = ("-", token[1:]) if token.startswith("-") else ("", token)
    return sign + ("0" + digits if digits.startswith(".") else digits or "0")


def equals(negative: str, answer: str) -> bool:
    """The same words; where either has none ("?"), the same text."""
    said, meant = normal(negative), normal(answer)
    return said == meant if said and meant else negative.strip() == answer.strip()


def entails(negative: str, answer: str) -> bool:
    """The answer's words stand in the negative, one after the other.

    This errs towards taking too much for the answer: also "it is not red" and "two circles and a cross" hold "red" and "2".
    """
    said, meant = normal(negative), normal(answer)
    return bool(meant) and any(said[start:start + len(meant)] == meant for start in range(len(said) - len(meant) + 1))


def refuses(text: str) -> bool:
    """One of REFUSALS occurs in it."""
    return _REFUSAL.search(unicodedata.normalize("NFKC", text).replace("\u2019", "'")) is not None


def length_differs(negative: str, answer: str) -> bool:
    """The longer one has at least MIN_WORDS words, and the ratio of their words lies outside RATIO."""
    said, meant = len(negative.split()), len(answer.split())
    return max(said, meant) >= MIN_WORDS and not RATIO[0] * meant <= said <= RATIO[1] * meant


def nearly_same(negative: str, answer: str) -> bool:
    """The longer one has at least MIN_WORDS words, and at most NEAR of them differ."""
    said, meant = normal(negative), normal(answer)
    longer = max(len(said), len(meant))
    return longer >= MIN_WORDS and edit_distance(said, meant) <= NEAR * longer


def edit_distance(one: Sequence[Hashable], other: Sequence[Hashable]) -> int:
    """Fewest insertions, deletions and substitutions that make one of the other (Levenshtein); len(one) * len(other) steps."""
    row = list(range(len(other) + 1))
    for i, mine in enumerate(one, start=1):
        before, row = row, [i]
        for j, theirs in enumerate(other, start=1):
            row.append(min(row[-1] + 1, before[j] + 1, before[j - 1] + (mine != theirs)))
    return row[-1]


def unfit(negative: str, answers: Sequence[str], *, option: bool = False, cut: bool = False) -> str | None:
    """The first of REASONS for which a negative cannot stand against the good answer; None: it can.

    Args:
        answers: forms of the good answer; the first is the one that the pair has, others say the same ("B", "a red circle").
        option: the negative is one of the options of a closed question.
        cut: it was generated and did not come to an end.
    """
    if option:
        return "equals the answer" if negative == answers[0] else None
    checks = {
        "empty": lambda: not negative.strip(),
        "cut off": lambda: cut,
        "equals the answer": lambda: any(equals(negative, answer) for answer in answers),
        "entails the answer": lambda: any(entails(negative, answer) for answer in answers),
        "refusal": lambda: refuses(negative) and not any(map(refuses, answers)),
        "length": lambda: length_differs(negative, answers[0]),
        "nearly the same": lambda: nearly_same(negative, answers[0]),
    }
    return next((reason for reason in REASONS if checks[reason]()), None)


class Tally:
    """How many negatives of each field there were, and why some were dropped."""

    def __init__(self) -> None:
        self.made: Counter[str] = Counter()
        self.dropped: Counter[tuple[str, str]] = Counter()

    def fit(self, field: str, negative: str, answers: Sequence[str], *, option: bool = False, cut: bool = False) -> bool:
        """Whether the negative can be used; counted either way."""
        self.made[field] += 1
        reason = unfit(negative, answers, option=option, cut=cut)
        if reason:
            self.dropped[field, reason] += 1
        return reason is None

    def kept(self, field: str) -> int:
        return self.made[field] - sum(count for (name, _), count in self.dropped.items() if name == field)

    def counts(self) -> dict[str, dict[str, int]]:
        """{field: {"made", "kept" and each reason that occurred: number}}."""
        return {field: {"made": self.made[field], "kept": self.kept(field),
                        **{reason: self.dropped[field, reason] for reason in REASONS if self.dropped[field, reason]}}
                for field in sorted(self.made)}

    def table(self) -> Table:
        table = Table("negative", "made", "kept", *REASONS)
        for field, counts in self.counts().items():
            table.add_row(field, *(str(counts.get(column, 0) or "-") for column in ("made", "kept", *REASONS)))
        return table
