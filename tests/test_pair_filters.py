"""What is no negative, worked by hand."""

import pytest

from data_prep.pair_filters import (REASONS, Tally, edit_distance, entails, equals, length_differs, nearly_same, normal,
                                    refuses, unfit)

TEN = "the red circle is far above the two small squares"      # ten words, of which normal() leaves out two articles


@pytest.mark.parametrize("text, words", [
    ("It's a Red circle.", ("it's", "red", "circle")),
    ("  TWO\tapples,  1,000.50 pears ", ("2", "apples", "1000.5", "pears")),
    ("zero, twenty, twenty-one", ("0", "20", "20", "1")),
    ("\u22125.0", ("-5",)), ("+5", ("5",)), (".5", ("0.5",)), ("0.0", ("0",)), ("-0.50", ("-0.5",)), ("1.2.3", ("1.2", "3")),
    ("A-5", ("a", "5")), ("3-5", ("3", "5")), ("A", ("a",)), ("the A", ("a",)), ("A + B", ("a", "+", "b")),
    ("50%", ("50", "%")), ("x > 5", ("x", ">", "5")), ("1,0000", ("1", "0000")), ("?", ()), ("\uff32ed", ("red",)),
])
def test_normal(text, words) -> None:
    assert normal(text) == words


def test_equal_answers() -> None:
    assert equals("Two.", "2") and equals("A red Circle", "the red circle!") and equals("1,000", "1000.0")
    for negative, answer in (("-5", "5"), ("1.5", "15"), ("red circle", "circle red"), ("x > 5", "x < 5"), ("50%", "50"),
                             ("?", "!")):
        assert not equals(negative, answer), negative
    assert equals(" ?", "? ")


def test_entailed_answers() -> None:
    assert entails("It is red.", "red") and entails("there are two of them", "2")
    assert entails("the red circle, I think", "red circle") and entails("red", "red")
    assert entails("it is not red", "red")      # errs on this side; see its docstring
    for negative, answer in (("redder", "red"), ("red big circle", "red circle"), ("13", "3"), ("red", "dark red"),
                             ("red", "?")):
        assert not entails(negative, answer), negative


@pytest.mark.parametrize("text", [
    "I cannot see the image.", "I can\u2019t view pictures", "Unfortunately, I'm unable to view images.",
    "I am not able to access it",
    "As an AI language model, I have no eyes", "I'm just an AI assistant", "Sorry, but no.", "I'm sorry, that is unclear",
    "I don't have access to the picture", "I do not have enough information", "I do not know", "I don't see any image",
    "There is no image.", "No picture was provided.", "The image isn't visible here", "The image was not included",
    "Without seeing the picture one can only guess", "Please upload the photo", "It cannot be determined",
    "It is impossible to say", "My apologies",
])
def test_refusals(text) -> None:
    assert refuses(text) and refuses(text.upper())


@pytest.mark.parametrize("text", [
    "two", "The man cannot see the dog", "The sign says sorry, we are closed", "I do not see a circle", "no circle",
    "an image of a cat", "The picture is shown on a wall", "They know the answer", "a pleased cat",
])
def test_answers_are_no_refusals(text) -> None:
    assert not refuses(text)


def test_lengths_count_from_eight_words_on() -> None:
    assert not length_differs("one two three four five six seven", "one")       # 7 : 1, but short
    assert length_differs("one two three four five six seven eight", "one two three")       # 8 > 2 * 3
    assert not length_differs("one two three four five six seven eight", "one two three four")      # 8 = 2 * 4
    assert length_differs("a b c", "a b c d e f g h") and not length_differs("a b c d", "a b c d e f g h")


@pytest.mark.parametrize("one, other, distance", [
    ("", "", 0), ("abc", "", 3), ("", "abc", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("abc", "abc", 0),
    ("ab", "ba", 2),
])
def test_edit_distance(one, other, distance) -> None:
    assert edit_distance(one, other) == edit_distance(other, one) == distance


def test_edit_distance_of_words() -> None:
    assert edit_distance("it is red".split(), "it is dark red".split()) == 1


def test_nearly_the_same_is_one_word_in_ten() -> None:
    said = [f"w{number}" for number in range(10)]
    changed = [*said[:9], "other"]
    assert nearly_same(" ".join(changed), " ".join(said))                       # 1 of 10
    assert not nearly_same(" ".join(changed[1:]), " ".join(said[1:]))           # 1 of 9
    assert not nearly_same("other " + " ".join(changed[1:]), " ".join(said))    # 2 of 10
    assert not nearly_same("a red cat", "a red cat.")                           # short: for equality to find


@pytest.mark.parametrize("negative, answers, options, reason", [
    ("  ", ["red"], {}, "empty"),
    ("blue", ["red"], {"cut": True}, "cut off"),
    ("RED.", ["red"], {}, "equals the answer"),
    ("cross", ["B", "cross"], {}, "equals the answer"),
    ("it is a cross", ["B", "cross"], {}, "entails the answer"),
    ("I cannot see it", ["red"], {}, "refusal"),
    ("It cannot be determined", ["cannot be known"], {}, None),
    ("one two three four five six seven eight", ["red"], {}, "length"),
    (TEN.replace("far", "just"), [TEN], {}, None),              # one of eight words: an eighth
    (f"today {TEN} really", [TEN], {}, "entails the answer"),
    (f"{TEN} and three crosses".replace("far", "just"), [f"{TEN} and three crosses"], {}, "nearly the same"),     # of eleven
    ("dark blue", ["red"], {}, None),
    ("cross", ["cross"], {"option": True}, "equals the answer"),
    ("10 cm", ["10"], {"option": True}, None),                  # it entails, but the question itself tells the two apart
    ("cannot be determined", ["10"], {"option": True}, None),
])
def test_reasons(negative, answers, options, reason) -> None:
    assert unfit(negative, answers, **options) == reason


def test_tally() -> None:
    tally = Tally()
    assert tally.fit("rejected", "blue", ["red"]) and not tally.fit("rejected", "Red", ["red"])
    assert not tally.fit("rejected", "my apologies", ["red"]) and not tally.fit("rejected_prior", "", ["red"])
    tally.made["rejected_images"] += 1
    assert tally.counts() == {"rejected": {"made": 3, "kept": 1, "equals the answer": 1, "refusal": 1},
                              "rejected_images": {"made": 1, "kept": 1}, "rejected_prior": {"made": 1, "kept": 0, "empty": 1}}
    assert [column.header for column in tally.table().columns] == ["negative", "made", "kept", *REASONS]
    assert list(tally.table().columns[3].cells) == ["-", "-", "1"]
