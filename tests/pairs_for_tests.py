"""Preference pairs about the twins of the tests, with exact counterfactual pictures."""

from dataclasses import replace
from pathlib import Path

from data_prep.pair import Pair, write_pairs
from data_prep.problem import read_problems, render
from data_prep.twins.counterfactual import counterfactual


def pairs_of(folder: Path, count: int = 24) -> list[Pair]:
    """Pairs of the first problems that have a counterfactual; its picture is written beside theirs."""
    found = []
    for problem in read_problems(folder / "train.jsonl"):
        other = counterfactual(problem, seed=0)
        if other is None or len(found) == count:
            continue
        other.picture.save(folder / "images" / other.name)
        wrong = [option for option in problem.options if option not in (problem.answer, other.answer)]
        prompt = render(problem, "vision")
        found.append(Pair(
            id=problem.id, group=problem.group, source=problem.source, license=problem.license, prompt=tuple(prompt.messages),
            chosen=prompt.answer, rejected=other.answer, rejected_prior=(wrong or [other.answer])[0], images=problem.pictures,
            rejected_images=(f"images/{other.name}",), rejected_images_answer=other.answer, root=folder))
    return found


def without(pair: Pair, *fields: str) -> Pair:
    return replace(pair, **{field: () if field == "rejected_images" else None for field in fields})


def written(folder: Path, pairs: list[Pair], name: str = "pairs.jsonl") -> Path:
    write_pairs(folder / name, pairs)
    return folder / name
