"""eval.quantity: numbers as models and data sets write them, and what two tasks take for the same."""

import math
import random
import string

import pytest

from eval.quantity import Quantity, plain, quantity, read_quantity
from eval.tasks.mathverse import same_rounded
from eval.tasks.pgps9k import near

S2, S3, PI = math.sqrt(2), math.sqrt(3), math.pi


@pytest.mark.parametrize("text, value", [
    ("48", 48), ("-5", -5), ("\u22125", -5), (".5", 0.5), ("1,234.5", 1234.5), ("1{,}234", 1234), ("3/4", 0.75),
    ("\\frac{3}{4}", 0.75), ("\\dfrac34", 0.75), ("-\\frac{1}{2}", -0.5), ("\\frac{1+3}{2}", 2),
    ("\\frac{\\frac{1}{2}}{4}", 0.125),
    ("2\\frac{1}{2}", 2.5), ("2 1/2", 2.5), ("2\u00bd", 2.5), ("2^\\frac{1}{2}", S2), ("6/\\frac{1}{2}", 12),
    ("\\sqrt{3}", S3), ("\u221a3", S3), ("2\u221a3", 2 * S3), ("2 \\sqrt { 3 }", 2 * S3), ("\\frac{\\sqrt{3}}{2}", S3 / 2),
    ("sqrt(12)", 2 * S3), ("4\\sqrt{2}\\sqrt{3}", 4 * S2 * S3), ("10 - 2\\sqrt{3}", 10 - 2 * S3),
    ("\\pi", PI), ("36\u03c0", 36 * PI), ("\\frac{3\\pi}{2}", 1.5 * PI), ("2pi/3", 2 * PI / 3), ("144 \\pi", 144 * PI),
    ("3^2", 9), ("5\u00b2", 25), ("1.5 \\times 10^3", 1500), ("2\\cdot 3", 6), ("2 * 3 * 4", 24), ("8 \\div 2", 4),
    ("2^{-1}", 0.5), ("-2^2", -4), ("2(3 + 4)", 14), ("\\left(2\\right)(3)", 6), ("6/2*3", 9), ("7 - 2 - 1", 4),
    ("60\u00b0", 60), ("60^\\circ", 60), ("60^{\\circ}", 60), ("60 degrees", 60), ("12 cm", 12), ("12cm^2", 12),
    ("9.5 in.", 9.5),
    ("36\\pi \\text{ cm}^2", 36 * PI), ("48 \\mathrm{~cm}^{3}", 48), ("8\\,\\mathrm{m}", 8), ("100 sq. units", 100),
    ("1.5 square inches", 1.5), ("5 cubic meters", 5), ("113.097$ units $^{2}$", 113.097),
    ("x = 60", 60), ("$h=58$", 58), ("Surface Area $=9236.28 \\mathrm{~m}^{2}$", 9236.28), ("AB = 2 \\cdot 3 = 6", 6),
    ("x \\approx 3.46", 3.46), ("The length of AB is 2\\sqrt{3} units.", 2 * S3), ("It is approximately 7.5 cm", 7.5),
    ("There are 42 apples", 42), ("$16 \\sqrt{3}$ cm", 16 * S3), ("twelve", 12),
])  # fmt: skip
def test_quantities(text, value):
    assert quantity(text).value == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("text", [
    "", "gamma", "5x", "5 x", "x^2 + 1", "\\pi r^2", "2 pi rods", "1:64", "(3, 4)", "30 or 31", "30, 31", "x = 3, y = 4", "3 4",
    "not 42", "isn't 42", "1/0", "\\frac{1}{0}", "\\sqrt{-1}", "9^9^9", "(-1)^(1/2)", "\\sqrt[3]{8}", "2 +", "2 3/4 5", "3 5/2",
    "\\frac{1}", "__import__('os').getcwd()", "2**3", "0x10", "f(x) = (x + 4)^2", "(" * 300 + "1" + ")" * 300, "x < 3", "12x",
    "1e400", "A = 3; B = 4",
])  # fmt: skip
def test_no_quantity(text):
    assert quantity(text) is None


@pytest.mark.parametrize("text, places", [
    ("30", 0), ("30.0", 1), ("9.86 cm", 2), (".125", 3), ("1,234.5", 1), ("-3.14", 2), ("3/4", None), ("2\\sqrt{3}", None),
])  # fmt: skip
def test_written_places(text, places):
    assert quantity(text).places == places


def test_plain_keeps_values_that_stripping_markup_would_change():
    assert plain("\\frac{1+x}{2}") == "((1+x)/(2))"
    assert plain("a\\frac{\\frac{1}{y}}{2}b") == "a((((1)/(y)))/(2))b"
    assert plain("\\boxed{60^\\circ}") == "\\boxed{60 degrees }" and plain("60^{\\circ}.") == "60 degrees ."
    assert "\\frac" not in plain("\\frac\\frac\\frac{"), "broken markup ends too"


@pytest.mark.parametrize("said, gold, right", [
    ("48", "48", True), ("48.4", "48", True), ("48.5", "48", False), ("47.5", "48", False),
    ("0", "0", True), ("0.001", "0", False),
    ("Answer: 2\\sqrt{3}", "3.464", True), ("\\boxed{\\frac{3\\pi}{2}}", "4.712", True), ("\\boxed{60^\\circ}", "60", True),
    ("so AB = 12 cm\nAnswer: 12 cm", "12", True), ("\\sqrt{3}", "3", False), ("2 \\pi", "2", False), ("48 or 49", "48", False),
    ("-48", "48", False), ("\\boxed{12", "12", False), ("<think>48</think>\\boxed{36}", "48", False),
])  # fmt: skip
def test_pgps9k_takes_one_per_cent(said, gold, right):
    assert read_quantity(said, gold, near)[1] is right


@pytest.mark.parametrize("said, gold, right", [
    ("30", "30", True), ("30.0", "30", True), ("31", "30", False), ("30.4", "30", False), ("29.99", "30", False),
    ("9.86", "9.86", True), ("9.8596", "9.86", True), ("9.865", "9.86", True), ("9.87", "9.86", False), ("9.9", "9.86", False),
    ("288\\pi", "904.78", True), ("904.32", "904.78", False), ("904.78", "288\\pi", True), ("3.46", "2\\sqrt{3}", True),
    ("3.5", "2\\sqrt{3}", False), ("3", "2\\sqrt{3}", False), ("0.33", "1/3", True), ("0.3", "1/3", False), ("0.75", "3/4", True),
    ("\\frac{6}{8}", "3/4", True), ("58", "$h=58$", True), ("9236.28 m^2", "Surface Area $=9236.28 \\mathrm{~m}^{2}$", True),
    ("1:64", "1:64", True), ("1 : 64", "1:64", True), ("64", "1:64", False),
    ("g(x)=(x+4)^2-5", "\\[g(x)=(x + 4)^2 - 5\\].", True),
    ("g(x)=(x+4)^2-6", "\\[g(x)=(x + 4)^2 - 5\\].", False), ("$x^2-3$", "x^{2}-3", True),
    ("50%", "50%", True), ("40%", "50%", False),
    ("3", "4 or 3", False), ("3/4", "3", False), ("3/4", "4", False),
])  # fmt: skip
def test_mathverse_takes_rounding_and_no_more(said, gold, right):
    assert read_quantity(said, gold, same_rounded)[1] is right


def test_an_answer_without_a_number_is_unparsed_where_one_is_asked_for():
    assert read_quantity("?? zxqv ~", "30", near) == (None, False)
    assert read_quantity("", "x^2", near) == (None, False)
    assert read_quantity("y^2", "x^2", near) == ("y^2", False), "an expression was asked for and one was given"


def test_whatever_a_model_writes_is_read_without_an_error():
    rng = random.Random(0)
    parts = [*string.printable]
    parts += ["\\frac{", "\\sqrt{", "}", "\\pi", "^", "\u221a", "\u00b0", "\\boxed{", "Answer: ", "sqrt", "(", "1/"]
    for _ in range(3000):
        text = "".join(rng.choices(parts, k=rng.randrange(60)))
        found = quantity(text)
        assert found is None or (isinstance(found, Quantity) and math.isfinite(found.value))
        read_quantity(text, "3", same_rounded)
