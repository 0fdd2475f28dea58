"""eval.parse: every form an answer takes, and every way in which known parsers went wrong."""

from __future__ import annotations

import random
import string

import pytest

from eval.parse import Number, parse_choice, parse_number, parse_open, same_answer

FOUR, TEN, TWENTY = tuple("ABCD"), tuple("ABCDEFGHIJ"), tuple("ABCDEFGHIJKLMNOPQRST")
COLOURS, YES_NO, TRUTH = ("red", "blue"), ("yes", "no"), ("true", "false")


@pytest.mark.parametrize("text", [
    "B", "b", "(B)", "(b)", "[B]", "B.", "B)", "B:", " B\n", "**B**", "`B`", "\uff22", "$B$", "B. blue", "B) blue",
    "B blue", "B: blue", "B - blue", "(B) blue", "The answer is B", "the answer is: (B).", "Answer: B", "answer = B",
    "Answer B", "**Answer:** B", "**Answer: B**", "### Answer:\nB", "Final answer: **B**.", "Answer:\n\nB",
    "\\boxed{B}", "so $\\boxed{\\text{B}}$.", "Answer: \\boxed{B}", "Answer: B, since A is wrong",
    "Answer: B. The other is worse", "The answer is B, not C", "The correct option is B.", "Option B", "I choose B.",
    "It's B.", "B is correct", "B because it is round", "I would go with B", "Option A is wrong, option B is right",
    "<think>A or C</think>B",
    "B<|im_end|>", "B</s>", "blue", "It is blue.", "Answer: A\nno, wait\nAnswer: B",
])
def test_b_in_all_its_forms(text):
    assert parse_choice(text, FOUR, ("red", "blue", "green", "dark red")) == "B"


@pytest.mark.parametrize("text", [
    "", "   ", "%%% lorem qwz", "B or C", "A and B", "A, B", "A,B", "A/B", "A B", "ABCD", "Both A and B", "A, B, C, D",
    "The answer is B or C", "The answer is not B", "The answer isn't B", "Answer: I don't know", "Answer:", "\\boxed{B",
    "A. red\nB. blue", "A. red B. blue", "Vitamin C helps", "<think>B", "E", "Answer: E", "the answer is a",
    "A) blue", "red or blue", "red, blue", "red\nblue", "neither red nor blue", "not blue", "bluest", "reddish",
])
def test_none_rather_than_a_guess(text):
    assert parse_choice(text, FOUR, ("red", "blue", "green", "dark red")) is None


@pytest.mark.parametrize("text, choices, options, wanted", [
    ("The answer is B", TWENTY, None, "B"),                 # first letter by re.match gave T
    ("Answer: B", TWENTY, None, "B"),                       # ... and A here
    ("Answer: A) Increase", TEN, None, "A"),                # letters as substrings: A and I
    ("Answer: A) Increase", TEN, ("Increase", *"bcdefghij"), "A"),
    ("(B)", FOUR, None, "B"),                               # raw equality to the letter
    ("A dog", FOUR, None, None),                            # an article is no label
    ("A dog", FOUR, ("cat", "dog", "cow", "hen"), "B"),
    ("A dog", FOUR, ("dog", "cat", "cow", "hen"), "A"),     # label and text say the same
    ("A cat and a dog", FOUR, ("cat", "dog", "cow", "hen"), None),
    ("I see a dog", TEN, None, None),                       # neither is a pronoun
    ("I think it is B.", TEN, None, "B"),
    ("B, I think", TEN, None, "B"),
    ("I", TEN, None, "I"),
    ("Answer: a", FOUR, None, "A"),
    ("A", ("A", "B"), ("B", "A"), "A"),                     # option texts that are letters: the label counts
])
def test_faults_of_known_parsers(text, choices, options, wanted):
    assert parse_choice(text, choices, options) == wanted


@pytest.mark.parametrize("text, choices, wanted", [
    ("The shape is RED.", COLOURS, "red"),
    ("blue, not red", COLOURS, "blue"),
    ("Red. The blue one is larger.", COLOURS, "red"),
    ("The answer is blue because the red circle is small", COLOURS, "blue"),
    ("red is not left of blue", COLOURS, None),
    ("dark blue", ("blue", "dark blue"), "dark blue"),      # the longest match
    ("a red circle", ("red circle", "circle"), "red circle"),
    ("above", ("above", "below"), "above"),
    ("C++ is it", ("C++", "Go"), "C++"),
    ("a4", ("a4", "b4"), "a4"),
    ("Yes", YES_NO, "yes"), ("No.", YES_NO, "no"), ("Yes, there is no circle", YES_NO, "yes"),
    ("There is no circle", YES_NO, None), ("No circle is there", YES_NO, None), ("No, it isn't.", YES_NO, "no"),
    ("yes or no", YES_NO, None), ("Yes/No", YES_NO, None), ("yes, no", YES_NO, None), ("No. Yes.", YES_NO, None),
    ("There is no square, so the answer is yes.", YES_NO, "yes"),
    ("True", TRUTH, "true"), ("The statement is false.", TRUTH, "false"), ("not true", TRUTH, None),
])
def test_texts_and_yes_no(text, choices, wanted):
    assert parse_choice(text, choices) == wanted


@pytest.mark.parametrize("text, choices, wanted", [
    ("3", ("3", "4"), "3"), ("3.", ("3", "5"), "3"), ("3.0", ("3", "4"), "3"), ("There are 3 circles", ("3", "4"), "3"),
    ("three", ("3", "4"), "3"), ("the red one", ("1", "2"), None), ("13", ("3", "4"), None), ("3.5", ("3", "5"), None),
    ("-3", ("3", "4"), None), ("-3", ("-3", "3"), "-3"), ("\u22123", ("-3", "3"), "-3"), ("3-4", ("3", "4"), None),
    ("1,234", ("1234", "234"), "1234"), ("1,2,3", ("1", "2", "3"), None), ("3 red and 4 blue", ("3", "4"), None),
    ("3 of the 12", ("3", "4"), None), ("3/4", ("0.75", "3", "4"), "0.75"), ("\\frac{3}{4}", ("3/4", "1/4"), "3/4"),
    ("50%", ("50", "20"), "50"), ("50%", ("50", "0.5"), None), ("2 + 1 = 3", ("1", "2", "3"), "3"),
    ("The 3rd one", ("3", "4"), None), ("12:30", ("12", "30"), None), ("not 3", ("3", "4"), None),
])
def test_numbers_among_choices(text, choices, wanted):
    assert parse_choice(text, choices) == wanted


def test_a_number_may_name_its_label():
    assert parse_choice("It is 4", FOUR, ("3", "4", "5", "6")) == "B"


@pytest.mark.parametrize("text, wanted", [
    ("42", 42), ("-1,234.5", -1234.5), ("3/4", 0.75), ("1.5e3", 1500), (".5", 0.5), ("x = 7", 7), ("\u00bd", 0.5),
    ("It is 12 cm.", 12), ("twelve", 12), ("42 or 43", None), ("none", None), ("1/0", None), ("1/2/3", None),
    ("v1.2.3", None),
])
def test_numbers(text, wanted):
    found = parse_number(text)
    assert (found is None) if wanted is None else found.value == pytest.approx(wanted)


def test_percent_is_kept():
    assert parse_number("50 %") == Number(50.0, True) and parse_number("50%").value == 0.5


@pytest.mark.parametrize("said, gold, same", [
    ("42", "42.0", True), ("There are 42 apples", "42", True), ("42 or 43", "42", False), ("not 42", "42", False),
    ("1.0000001", "1", True), ("1.00001", "1", False), ("-3", "3", False), ("1,234", "1234", True),
    ("3/4", "0.75", True),
    ("50%", "50", True), ("50%", "0.5", True), ("0.5%", "0.5", False), ("three", "3", True), ("0", "0.0", True),
    ("The Cat.", "cat", True), ("cats", "cat", False), ("Yes, it is", "yes", True), ("No", "yes", False),
    ("Answer: Paris.", "paris", True), ("Because of this.\nAnswer: 7", "7", True), ("\\boxed{12}", "12", True),
    ("7\n\nThere are 8 others", "7", True), ("", "x", False), ("Room 4b", "4", False),
])
def test_open_answers(said, gold, same):
    assert same_answer(parse_open(said), gold) is same


def test_nothing_said_is_unparsed():
    assert parse_open(" \n") is None and parse_open("<think>hm") is None and same_answer(None, "x") is False


@pytest.mark.parametrize("choices, options", [((), None), (("A", "A"), None), (("A", "B"), ("x",))])
def test_wrong_choices_are_an_error(choices, options):
    with pytest.raises(ValueError):
        parse_choice("A", choices, options)


TASKS = [(FOUR, ("red", "blue", "green", "dark red")), (TEN, None), (COLOURS, None), (YES_NO, None), (TRUTH, None),
         (("3", "12", "4"), None), (("north-east", "north"), None)]


@pytest.mark.parametrize("choices, options", TASKS)
def test_fake_models(choices, options):
    rng = random.Random(0)
    golds = [rng.choice(choices) for _ in range(400)]
    oracle = [parse_choice(gold, choices, options) for gold in golds]
    assert oracle == golds
    constant = [parse_choice(choices[0], choices, options) for _ in golds]
    assert set(constant) == {choices[0]}
    blind = [parse_choice(rng.choice(choices), choices, options) for _ in golds]
    assert sum(a == b for a, b in zip(blind, golds)) / 400 == pytest.approx(1 / len(choices), abs=0.08)
    # digits and vowels left out, so that no choice can stand in it by accident
    letters = "bcdfghjklmpqvwxz".translate(str.maketrans("", "", "".join(choices).lower())) + "#%&"
    gibberish = [parse_choice(" ".join("".join(rng.choices(letters, k=5)) for _ in range(6)), choices, options)
                 for _ in golds]
    assert set(gibberish) == {None}


def test_any_text_is_read_without_an_error_or_a_made_up_choice():
    rng = random.Random(1)
    for _ in range(2000):
        text = "".join(rng.choices(string.printable + "\\boxed{}Answer:ABno", k=rng.randrange(40)))
        for choices, options in TASKS:
            assert parse_choice(text, choices, options) in (*choices, None)
        parse_open(text), parse_number(text), same_answer(text, "3")
