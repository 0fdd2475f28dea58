"""What an open answer is worth as a number: "2\\sqrt{3}", "\\frac{3\\pi}{2} cm^2", "x = 60 degrees" -> a quantity.

Answers are found by eval.parse, as everywhere; this file only reads what was found (and eval.parse.PARSER_VERSION stands for
both). It evaluates nothing but the
grammar below (a model's output is never run as Python):

    sum     = ["+" | "-"] product {("+" | "-") product}
    product = power {["*" | "/"] power}               a missing sign multiplies: 2sqrt(3), 3(4 + 1), 4pi
    power   = atom ["^" ["-"] atom]
    atom    = number | "pi" | "sqrt" atom | "(" sum ")"
"""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

from eval.parse import clean, normalise, parse_number, parse_open, same_answer


class Quantity(NamedTuple):
    """A number and how it was written."""

    value: float
    places: int | None  # digits after the point of a plain number such as 3.46 (2) or 30 (0); None: 3/4, sqrt(2), 2pi


_REWRITES = [(re.compile(pattern), said) for pattern, said in (
    (r"\\(?:left|right|displaystyle|limits)(?![a-zA-Z])|\\[,;:!]|[{]\s*,\s*[}]", ""),
    (r"\\[ ]|~|\\q?quad(?![a-zA-Z])", " "),
    (r"\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))|\\degree(?![a-zA-Z])|[\u00b0\u00ba]", " degrees "),
    (r"\\(?:approx|simeq|doteq)(?![a-zA-Z])|\u2248", "="),
    (r"\\(?:times|cdot|ast)(?![a-zA-Z])|[\u00d7\u00b7\u22c5]", " * "),
    (r"\\div(?![a-zA-Z])|\u00f7", " / "),
    (r"\\pi(?![a-zA-Z])|\u03c0", " pi "),
    (r"\u221a|\\sqrt(?![a-zA-Z])", " sqrt"),
    (r"\u00b2", "^2"), (r"\u00b3", "^3"),
    (r"(\d)\s*\u00bd", r"(\1 + 1/2)"),
)]  # fmt: skip
_FRAC = re.compile(r"\\[dtc]?frac(?![a-zA-Z])\s*")
_MIXED = re.compile(r"(?<![\d.^])(\d+)\s+(\d+)\s*/\s*(\d+)(?!\s*[\d.(])")  # 2 1/2 is two and a half
_UNIT = (
    r"(?:(?:square|cubic|sq\.?|cu\.?)\s*)?(?:mm|cm|dm|km|m|in|inch(?:es)?|ft|feet|foot|yds?|yards?|miles?|units?|degrees?|deg"
    r"|met(?:er|re)s?|(?:centi|milli|kilo)met(?:er|re)s?|lit(?:er|re)s?|ml|l|seconds?|sec|minutes?|hours?)"
    r"(?:\s*\^?\s*\(?\{?[23]\}?\)?)?\.?"
)
_UNITS = re.compile(rf"(?:(?<=[\s\d)}}])|^)\s*\(?(?:{_UNIT})(?:\s+(?:squared|cubed))?\)?\s*$", re.I)
_LEAD = re.compile(r"^.*(?:=|\b(?:is|are|equals|equal\s+to|approximately|about|roughly)\b)\s*:?", re.I | re.S)
_DENIED = re.compile(r"\b(?:not|never|neither|nor|cannot)\b|n't\b", re.I)
_TOKEN = re.compile(r"\s*(\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+|pi\b|pi(?=sqrt|\d|\()|sqrt|[-+*/^(){}])", re.I)
_MATHS = re.compile(r"[\^*/=<>:{}\\]|sqrt|pi\b|\b[b-zB-Z]\b|\d[a-zA-Z]")
_LONGEST = 100  # characters of an expression; so its nesting stays shallow too


def plain(text: str) -> str:
    """LaTeX arithmetic in plain signs, so that markup stripped later changes no value: \\frac{1+x}{2} -> ((1+x)/(2))."""
    text = text.replace("\u2212", "-")
    for pattern, said in _REWRITES:
        text = pattern.sub(said, text)
    while match := _FRAC.search(text):
        top, after = _argument(text, match.end())
        bottom, after = _argument(text, after)
        mixed = (top + bottom).isdecimal() and re.search(r"(?<![\d.^])\d+\s*$", text[: match.start()])
        said = f" {top}/{bottom}" if mixed else f"(({top})/({bottom}))"
        text = text[: match.start()] + said + text[after:]
    return text


def _argument(text: str, start: int) -> tuple[str, int]:
    """(argument, where it ends) of a LaTeX command: a group in braces, or the next character (\\frac12)."""
    while start < len(text) and text[start] == " ":
        start += 1
    if start >= len(text) or text[start] != "{":
        return text[start : start + 1], start + 1
    depth, end = 1, start + 1
    while end < len(text) and depth:
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
    return text[start + 1 : end - (depth == 0)], end


def quantity(text: str) -> Quantity | None:
    """The number that an answer gives, without its unit; None when it gives none, several, or one in variables.

    What stands before the last "=" or "is" is left away. In other prose ("12 of the rods") the only number counts.
    Angles stay in degrees: a degree sign is a unit like any other. A ratio a:b is no number.
    """
    text = clean(plain(text)).rstrip(" .,;")
    lead = match[0] if (match := _LEAD.match(text)) else ""
    if _DENIED.search(text) or (lead.count("=") > 1 and re.search(r"[,;]|\b(?:and|or)\b", lead)):  # x = 3, y = 4
        return None
    text = _MIXED.sub(_mixed, text.removeprefix(lead)).strip()
    while (rest := _UNITS.sub("", text)) != text:
        text = rest.strip()
    try:
        value = _evaluate(text)
    except (ValueError, ArithmeticError):  # no expression, or one without a value: 1/0, sqrt(-1), 9^9^9
        words = re.search(r"[A-Za-z]{2}", text) and not _MATHS.search(text)
        if not words or (number := parse_number(text)) is None:
            return None
        return Quantity(number.face, None)
    bare = re.fullmatch(r"[-+]?\s*(?:[\d,]+(?:\.(\d+))?|\.(\d+))", text)
    return Quantity(value, len(bare[1] or bare[2] or "") if bare else None)


def _mixed(match: re.Match) -> str:
    whole, top, bottom = match.groups()
    return f"({whole} + {top}/{bottom})" if int(top) < int(bottom) else match[0]


def read_quantity(said: str, gold: str, agree: Callable[[Quantity, Quantity], bool]) -> tuple[str | None, bool]:
    """(what the model's text gives as its answer, whether that is the gold one) for an open question.

    When gold has a quantity, `agree(prediction, gold)` decides, and an answer without one is None ("unparsed").
    Otherwise (an expression in x, a ratio) both are compared as texts without their spaces.
    """
    pred, gold = parse_open(plain(said)), parse_open(plain(gold)) or gold
    if pred is None or "%" in pred + gold:
        return pred, same_answer(pred, gold)
    wanted = quantity(gold)
    if wanted is None:
        return pred, _squeezed(pred) == _squeezed(gold)
    given = quantity(pred)
    return (pred, agree(given, wanted)) if given is not None else (None, False)


def _squeezed(text: str) -> str:
    return re.sub(r"[\s{}$]", "", normalise(text))


def _evaluate(text: str) -> float:
    """The value of an expression in the grammar above; ValueError when it is none."""
    tokens, position = [], 0
    if len(text) > _LONGEST:
        raise ValueError("too long")
    while position < len(text):
        if not (match := _TOKEN.match(text, position)):
            raise ValueError(text)
        tokens.append(match[1].lower().replace("{", "(").replace("}", ")"))
        position = match.end()
    parser = _Expression(tokens)
    value = parser.sum()
    if parser.tokens or not math.isfinite(value):
        raise ValueError(text)
    return value


class _Expression:
    """Recursive descent over the tokens, which are used up from the left."""

    def __init__(self, tokens: list[str]):
        self.tokens = tokens[::-1]  # the next one stands last

    def next_is(self, *wanted: str) -> bool:
        return bool(self.tokens) and self.tokens[-1] in wanted

    def sum(self) -> float:
        sign = -1 if self.next_is("-", "+") and self.tokens.pop() == "-" else 1
        value = sign * self.product()
        while self.next_is("+", "-"):
            value += (1 if self.tokens.pop() == "+" else -1) * self.product()
        return value

    def product(self) -> float:
        value, before = self.power()
        while self.tokens and not self.next_is("+", "-", ")"):
            sign = self.tokens.pop() if self.next_is("*", "/") else ""
            factor, number = self.power()
            if not sign and before and number:
                raise ValueError("two numbers side by side are no product")
            value, before = (value / factor if sign == "/" else value * factor), number
        return value

    def power(self) -> tuple[float, bool]:
        """(value, whether it is a bare number)."""
        value, number = self.atom()
        if self.next_is("^"):
            self.tokens.pop()
            sign = -1 if self.next_is("-") and self.tokens.pop() else 1
            value, number = math.pow(value, sign * self.atom()[0]), False
        return value, number

    def atom(self) -> tuple[float, bool]:
        token = self.tokens.pop() if self.tokens else ""
        if token == "pi":
            return math.pi, False
        if token == "sqrt":
            return math.sqrt(self.atom()[0]), False
        if token == "(":
            value = self.sum()
            if not self.next_is(")"):
                raise ValueError("an open bracket")
            self.tokens.pop()
            return value, False
        return float(token.replace(",", "")), True  # ValueError for a sign and for the end
