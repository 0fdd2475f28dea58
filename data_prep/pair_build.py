"""The pair of one problem: its prompt, and the negatives that are asked for. The command is data_prep.pairs."""

import io
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from data_prep import images
from data_prep.images import ProblemError
from data_prep.pair import Pair
from data_prep.pair_answers import CONTINUED, most_likely
from data_prep.pair_filters import Tally
from data_prep.problem import Problem, Prompt, View, render, shown_pictures
from data_prep.read import replacing
from data_prep.twins.worlds import FAMILIES

KINDS = ("other_answer", "language_prior", "other_image", "symmetric")
PICTURED = KINDS[2:]                    # those that need a counterfactual picture
PRIORS = ("blind", "gray", CONTINUED)
COUNTERFACTUALS = "counterfactuals"     # folder of their pictures, below that of the problem's own


@dataclass(frozen=True)
class Wanted:
    """What is asked for; data_prep.pairs says what each kind is.

    Raises ProblemError when a choice contradicts the kinds, or would change nothing.
    """

    kinds: tuple[str, ...]
    view: str = "vision"                # of the prompt: vision or both
    seed: int = 0
    other_answer: str = "option"        # option: drawn; model: what the model says
    prior: str = "blind"                # one of PRIORS
    prior_wrong: bool = False           # of a closed question the most likely wrong option, where the most likely one is right

    def __post_init__(self) -> None:
        if self.view == "both" and (pictured := [kind for kind in PICTURED if kind in self.kinds]):
            raise ProblemError(f"--kinds {','.join(pictured)}: in view both the facts stand beside the picture, and would "
                               "contradict another one; take --view vision")
        if "other_answer" not in self.kinds and self.other_answer != "option":
            raise ProblemError(f"--other-answer {self.other_answer}: goes with --kinds other_answer")
        if "language_prior" not in self.kinds and self.prior != "blind":
            raise ProblemError(f"--prior {self.prior}: goes with --kinds language_prior")
        if self.prior_wrong and ("language_prior" not in self.kinds or self.prior == CONTINUED):
            raise ProblemError("--prior-wrong: chooses among options, so it goes with --kinds language_prior and "
                               "--prior blind or gray")

    @property
    def ways(self) -> dict[str, str]:
        """{field of the pair: how the model is asked for it}: a view, or CONTINUED."""
        found = {}
        if "other_answer" in self.kinds and self.other_answer == "model":
            found["rejected"] = self.view
        if "language_prior" in self.kinds:
            found["rejected_prior"] = self.prior
        return found

    @property
    def pictured(self) -> bool:
        return any(kind in self.kinds for kind in PICTURED)


class Negative(NamedTuple):
    """A worse answer before the filters."""

    text: str
    how: str                # for meta: where it comes from
    option: bool            # one of the choices of a closed question
    cut: bool = False       # generated, and ended by the token budget


def pair_of(problem: Problem, wanted: Wanted, said: Callable[[Problem, str], dict] | None, tally: Tally) -> Pair | None:
    """The problem's pair, its counterfactual picture written below its root; None when no negative is left.

    said: (problem, way) -> what the model said, as data_prep.pair_answers.Answers.get has it; None where no model is asked.
    Raises ProblemError when a picture cannot be read, or a counterfactual is none.
    """
    prompt = render(problem, wanted.view)
    found, negatives, meta = {}, [], {"problem": problem.id, "view": wanted.view}
    if isinstance(problem.meta.get("kind"), str):
        meta["kind"] = problem.meta["kind"]
    for field, kind, negative in _answers(problem, prompt, wanted, said):
        if tally.fit(field, negative.text, (prompt.answer, problem.answer), option=negative.option, cut=negative.cut):
            found[field], meta[field] = negative.text, negative.how
            negatives.append(kind)
    if wanted.pictured and (other := _other_picture(problem, wanted.seed)):
        found["rejected_images"], meta["changed"] = (other.name,), other.changed
        negatives += [kind for kind in PICTURED if kind in wanted.kinds]
        tally.made["rejected_images"] += 1      # exact by construction: nothing to filter
        if "symmetric" in wanted.kinds:
            found["rejected_images_answer"] = _as_said(prompt, other.answer)
            if "other_answer" not in wanted.kinds:
                found["rejected"], meta["rejected"] = found["rejected_images_answer"], "counterfactual"
                tally.made["rejected"] += 1
    if not found:
        return None
    meta["negatives"] = negatives
    return Pair(problem.id, problem.group, problem.source, problem.license, tuple(prompt.messages), prompt.answer, meta=meta,
                images=shown_names(problem, prompt, wanted.view), root=problem.root, max_pixels=problem.max_pixels, **found)


def _answers(problem: Problem, prompt: Prompt, wanted: Wanted, said: Callable[[Problem, str], dict] | None,
             ) -> Iterator[tuple[str, str, Negative]]:
    """(field, kind, worse answer) that the kinds ask for."""
    asked = wanted.ways
    if "rejected" in asked:
        row = said(problem, asked["rejected"])
        own = most_likely(prompt, row) if prompt.choices else None
        how = "generated" if own is None else "most likely wrong option" if own == prompt.answer else "most likely option"
        yield "rejected", "other_answer", _negative(prompt, row, how, wrong=True)
    elif "other_answer" in wanted.kinds and prompt.choices:
        wrong = [choice for choice in prompt.choices if choice != prompt.answer]
        drawn = random.Random(f"other_answer\0{wanted.seed}\0{problem.id}").choice(wrong)
        yield "rejected", "other_answer", Negative(drawn, "drawn option", True)
    if "rejected_prior" in asked:
        row = said(problem, asked["rejected_prior"])
        yield "rejected_prior", "language_prior", _negative(prompt, row, wanted.prior, wrong=wanted.prior_wrong)


def _negative(prompt: Prompt, row: dict[str, Any], how: str, *, wrong: bool) -> Negative:
    if "scores" in row:
        return Negative(most_likely(prompt, row, wrong=wrong), how, True)
    return Negative(row["text"], how, False, row["finish"] == "length")


def shown_names(problem: Problem, prompt: Prompt, view: str) -> tuple[str, ...]:
    """Paths of the pictures of a prompt in the order of its image parts, which markers in the text may change."""
    names = list(shown_pictures(problem, View(view)))
    if len(names) < 2:
        return tuple(names)
    loaded = (images.load(images.picture_path(problem.root, name), problem.max_pixels) for name in names)
    pixels = [(picture.size, picture.tobytes()) for picture in loaded]
    found = []
    for picture in prompt.images:       # equal pictures are as good as each other
        place = pixels.index((picture.size, picture.tobytes()))
        found.append(names.pop(place))
        del pixels[place]
    return tuple(found)


class _Other(NamedTuple):
    name: str       # path relative to the problem's root
    answer: str     # the option that is right for it
    changed: str


def has_world(problem: Problem) -> bool:
    """Whether it is one of the twins, for which there may be an exact counterfactual."""
    return problem.source in FAMILIES and None not in (problem.facts, problem.options) and len(problem.pictures) == 1


def _other_picture(problem: Problem, seed: int) -> _Other | None:
    """A picture for which another option is right, written beside the problem's own; None where there is none."""
    if not has_world(problem):
        return None
    from data_prep.twins.counterfactual import counterfactual

    found = counterfactual(problem, seed=seed)
    if found is None:
        return None
    if found.answer == problem.answer or found.answer not in problem.options:
        raise ProblemError(f"{problem.id}: the counterfactual's answer {found.answer!r} is no other option of it")
    name = PurePosixPath(problem.image).parent / COUNTERFACTUALS / found.name
    found.picture.save(drawn := io.BytesIO(), format="PNG", optimize=False)
    _store(problem.root / name, drawn.getvalue())
    return _Other(str(name), found.answer, found.changed)


def _store(file: Path, data: bytes) -> None:
    if not file.exists() or file.read_bytes() != data:
        with replacing(file) as out:
            out.write(data)


def _as_said(prompt: Prompt, option: str) -> str:
    """An option as the prompt asks for it: its letter or its text."""
    return prompt.choices[prompt.options.index(option)]
