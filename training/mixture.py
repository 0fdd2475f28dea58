"""Sources x views with rates: a deterministic order of conversations that a step number is enough to resume.

    python -m training.mixture RECIPE [key=value ...]     rows, epochs and answer tokens per source and view, and the first items

A mixture file names sources and, for each, the views it is shown in and at which rate it is drawn:

    sources:
      twins:
        problems: data/twins/train.jsonl
        turns: 5                            # up to 5 questions about one picture make one conversation (default 1)
        views: {vision: 0.6, both: 0.2, text: 0.2}

`rate` is the chance that the next conversation comes from this source in this view; the rates of a mixture sum to 1. Within a
source and view, conversations are drawn in shuffled epochs: each once before any comes again.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass as checked
from rich.markup import escape
from rich.table import Table

from data_prep import libraries
from data_prep.problem import Problem, ProblemError, Prompt, View, partners, possible_views, read_problems, render
from data_prep.provenance import file_sha256
from training.config import _STRICT, Count, Recipe, RecipeError, build, find_beside, load_recipe, read_yaml

Rate = Annotated[float, Field(gt=0, le=1)]


@checked(config=_STRICT, frozen=True)
class Source:
    problems: str                               # JSONL, relative to the working folder or beside the mixture
    views: dict[str, Rate]
    turns: Count = 1


@checked(config=_STRICT, frozen=True)
class MixtureFile:
    sources: dict[str, Source]


class Draw(NamedTuple):
    """What is drawn next: up to `turns` problems that share a picture and facts, in one view."""
    source: str
    view: View
    problems: tuple[int, ...]                   # places in the source's file


@dataclass
class Part:
    """One source in one view."""
    source: str
    view: View
    rate: float
    turns: int
    units: list[tuple[int, ...]] = field(repr=False)    # conversations to draw from: places of problems in the source's file


class Mixture:
    """The order of conversations of one recipe, a pure function of (mixture, data, seed, number of the draw)."""

    def __init__(self, path: str | Path, *, seed: int, draws: int, skip_bad: bool = False) -> None:
        """
        Args:
            path: the mixture file.
            seed: of the order.
            draws: how many conversations the run needs (steps x batch). The order of the first n does not depend on it.
            skip_bad: leave bad rows of problem files out.

        Raises:
            RecipeError: the file is wrong, a problem file is missing, or a source cannot be shown in a view.
            ProblemError: a problem file has a bad row.
        """
        self.path = Path(path)
        self.seed = seed
        spec: MixtureFile = build(MixtureFile, read_yaml(self.path), self.path)
        total = sum(rate for source in spec.sources.values() for rate in source.views.values())
        if abs(total - 1) > 1e-6:
            raise RecipeError(f"{self.path}: the rates sum to {total:.6g}; they must sum to 1")
        self.problems: dict[str, list[Problem]] = {}
        self.partners: dict[str, list[Problem | None]] = {}
        self.hashes: dict[str, str] = {str(self.path): file_sha256(self.path)}      # of everything the order depends on
        self.parts: list[Part] = []
        for name, source in spec.sources.items():
            file = find_beside(source.problems, self.path.resolve().parent)
            if file is None:
                raise RecipeError(f"{self.path}: sources.{name}.problems: no such file: {source.problems}")
            problems = read_problems(file, verify="header", skip_bad=skip_bad)
            self.problems[name], self.partners[name] = problems, partners(problems)
            self.hashes[source.problems] = file_sha256(file)
            self.parts += [self._part(name, source, view, rate) for view, rate in source.views.items()]
        self._entries, self._turns = self._plan(draws)

    def _part(self, name: str, source: Source, view: str, rate: float) -> Part:
        if view not in View.__members__:
            raise RecipeError(f"{self.path}: sources.{name}.views: no such view: {view}; views: {', '.join(View.__members__)}")
        if source.turns > 1 and view == View.rendered:
            raise RecipeError(f"{self.path}: sources.{name}: a rendered picture holds one question, so turns must be 1")
        problems = self.problems[name]
        able = [i for i, (p, other) in enumerate(zip(problems, self.partners[name])) if View(view) in possible_views(p, other)]
        if not able:
            raise RecipeError(f"{self.path}: sources.{name}.views: no problem of {source.problems} can be shown as {view}")
        if source.turns == 1:
            units = [(i,) for i in able]
        else:
            shared: dict[tuple, list[int]] = {}
            for i in able:
                shared.setdefault((problems[i].image, problems[i].facts), []).append(i)
            units = [tuple(group) for group in shared.values()]
        return Part(name, View(view), rate, source.turns, units)

    def _plan(self, draws: int) -> tuple[np.ndarray, np.ndarray]:
        """For each draw the part it comes from, and the how-manieth draw of that part it is."""
        edges = np.cumsum([part.rate for part in self.parts])
        entries = np.searchsorted(edges / edges[-1], np.random.default_rng(self.seed).random(draws), side="right")
        turns = np.zeros(draws, dtype=np.int64)
        for i in range(len(self.parts)):
            mine = entries == i
            turns[mine] = np.arange(mine.sum())
        return entries, turns

    def __len__(self) -> int:
        return len(self._entries)

    def draw(self, number: int) -> Draw:
        """The conversation with this number, counted from 0 over all ranks. No picture is opened."""
        i = int(self._entries[number])
        part, turn = self.parts[i], int(self._turns[number])
        epoch, place = divmod(turn, len(part.units))
        unit = part.units[self._order(i, epoch)[place]]
        if len(unit) > 1:
            unit = tuple(np.random.default_rng([self.seed, i, epoch, place]).permutation(unit)[:part.turns].tolist())
        return Draw(part.source, part.view, unit)

    def _order(self, part: int, epoch: int) -> np.ndarray:
        if getattr(self, "_cached", None) is None:
            self._cached: dict[int, tuple[int, np.ndarray]] = {}
        if self._cached.get(part, (None,))[0] != epoch:
            order = np.random.default_rng([self.seed, part, epoch]).permutation(len(self.parts[part].units))
            self._cached[part] = (epoch, order)
        return self._cached[part][1]

    def conversation(self, draw: Draw) -> tuple[list[dict], tuple, list[Prompt]]:
        """Chat messages with the answers, the pictures, and the prompts they were made from.

        The picture and the facts are shown once, in the first turn; the later turns are questions alone.
        """
        problems = self.problems[draw.source]
        prompts = [render(problems[i], draw.view if turn == 0 else View.blind, self.partners[draw.source][i])
                   for turn, i in enumerate(draw.problems)]
        messages = [message for prompt in prompts
                    for message in (*prompt.messages, {"role": "assistant", "content": prompt.answer})]
        return messages, prompts[0].images, prompts

    def table(self, encoder=None, sample: int = 100) -> Table:
        """Rows, epochs and tokens per source and view. Tokens are means over up to `sample` conversations."""
        drawn = Counter(self._entries.tolist())
        table = Table("source", "view", "rate", "turns", "conversations", "drawn", "epochs", "tokens", "image tokens",
                      "answer tokens", title=escape(f"{self.path}: {len(self)} draws"), title_justify="left")
        for i, part in enumerate(self.parts):
            tokens = [f"{mean:.0f}" for mean in self.mean_tokens(part, encoder, sample)] if encoder else ["-"] * 3
            table.add_row(escape(part.source), part.view.value, f"{part.rate:g}", str(part.turns), str(len(part.units)), str(drawn[i]),
                          f"{drawn[i] / len(part.units):.2f}", *tokens)
        return table

    def mean_tokens(self, part: Part, encoder, sample: int = 100) -> tuple[float, float, float]:
        """Tokens, image tokens among them and trained tokens of a conversation of this part, over up to `sample` of them."""
        picks = np.linspace(0, len(part.units) - 1, min(sample, len(part.units))).astype(int)
        rows = []
        for pick in picks:
            messages, images, _ = self.conversation(Draw(part.source, part.view, part.units[pick][:part.turns]))
            row = encoder.encode(messages, images)
            rows.append((len(row), (row.ids == encoder.image_id).sum(), row.trained.sum()))
        return tuple(np.mean(rows, axis=0).tolist())


def load_mixture(recipe: Recipe) -> Mixture:
    """The mixture of a recipe, as long as its run."""
    return Mixture(recipe.data.mixture, seed=recipe.seed, draws=recipe.steps * recipe.batch, skip_bad=recipe.data.skip_bad)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.mixture", description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--items", type=int, default=5, help="how many of the first items to print")
    args = parser.parse_intermixed_args(argv)
    try:
        from training.collate import load_encoder

        recipe = load_recipe(args.recipe, args.overrides)
        mixture = load_mixture(recipe)
        encoder = load_encoder(recipe.model)
    except (RecipeError, ProblemError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    console = libraries.console()
    console.print(mixture.table(encoder))
    for number in range(min(args.items, len(mixture))):
        draw = mixture.draw(number)
        messages, _, _ = mixture.conversation(draw)
        ids = ", ".join(mixture.problems[draw.source][i].id for i in draw.problems)
        console.rule(escape(f"{number}: {draw.source} {draw.view.value}: {ids}"))
        for message in messages:
            content = message["content"]
            text = content if isinstance(content, str) else "".join(p.get("text", "<picture>\n") for p in content)
            console.print(f"[bold]{message['role']}[/bold]: ", end="")
            console.print(text, markup=False, highlight=False)


if __name__ == "__main__":
    main()
