"""Answers to the twins' questions from their facts alone; written without a look at how the questions are made."""

import re

NUMBER = {word: n for n, word in enumerate("zero one two three four five six seven eight nine".split())}


def solve(family: str, facts: str, question: str, options: tuple[str, ...]) -> str:
    """The answer, from the words alone. AssertionError when they do not settle it or the question is unknown.

    facts: all of them, or those that matter; "none." where no fact does.
    """
    sentences = [] if facts == "none." else facts[:-1].split(". ")
    at = {place: values.split() for place, values in (sentence.split(" ", 1) for sentence in sentences)}

    def is_it(pattern: str):
        return re.fullmatch(pattern, question)

    def xy(place: str) -> tuple[int, int]:
        return "ABCDEFGHI".index(place) % 3, "ABCDEFGHI".index(place) // 3

    if (
        found := is_it(r"What colour is the shape at (\w)\?")
        or is_it(r"Which number is at (\w)\?")
        or is_it(r"How tall is the (\w+) bar\?")
        or is_it(r"Which way does the arrow at (\w) point\?")
    ):
        return at[found[1]][0]
    if found := is_it(r"Which shape is at (\w)\?"):
        return at[found[1]][1]
    if found := is_it(r"How many bars are taller than (\w+)\?"):
        count = sum(NUMBER[values[0]] > NUMBER[found[1]] for values in at.values())
        return next(word for word, n in NUMBER.items() if n == count)
    if found := is_it(r"How many (?:shapes are|cells hold|arrows point) (\w+)\?"):
        count = sum(values[0] == found[1] for values in at.values())
        return next(word for word, n in NUMBER.items() if n == count)
    if is_it(r"Which of these (colours is there|heights has a bar|numbers is there|ways does an arrow point)\?"):
        return one(option for option in options if option in {values[0] for values in at.values()})
    if found := is_it(r"Which bar is taller, (\w+) or (\w+)\?") or is_it(
        r"Which holds the larger number, (\w) or (\w)\?"
    ):
        first, second = (NUMBER[at[place][0]] for place in found.groups())
        assert first != second
        return found[1] if first > second else found[2]
    if found := is_it(r"Which cell has the same colour as (\w)\?") or is_it(
        r"Which arrow points the same way as (\w)\?"
    ):
        return one(option for option in options if option != found[1] and option in at and at[option][0] == at[found[1]][0])
    if found := is_it(r"Which bar is just right of the (\w+) bar\?"):
        order = list(at)
        return order[order.index(found[1]) + 1]
    if found := is_it(r"Which is (further left|higher up), (\w+) or (\w+)\?"):
        axis = 0 if found[1] == "further left" else 1
        first, second = (
            xy(one(place for place, values in at.items() if values[0] == name))[axis] for name in found.groups()[1:]
        )
        assert first != second
        return found[2] if first < second else found[3]
    if found := is_it(r"To which cell does the arrow at (\w) lead\?"):
        (x, y), (dx, dy) = (
            xy(found[1]),
            {"up": (0, -1), "down": (0, 1), "left": (-1, 0), "right": (1, 0)}[at[found[1]][0]],
        )
        assert 0 <= x + dx < 3 and 0 <= y + dy < 3
        return "ABCDEFGHI"[x + dx + 3 * (y + dy)]
    raise AssertionError(f"{family}: unknown question: {question}")


def one(items) -> str:
    found = list(items)
    assert len(found) == 1, found
    return found[0]
