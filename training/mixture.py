"""Sources x views with rates: a deterministic order of conversations that the number of a draw is enough to resume.

    python -m training.mixture RECIPE [key=value ...]     rows, epochs and answer tokens per source and view, and the first items

A mixture file names sources and, for each, the views it is shown in and at which rate it is drawn:

    sources:
      twins:
        problems: data/twins/train.jsonl
        turns: 5                            # up to 5 questions about one picture make one conversation (default 1)
        views: {vision: 0.6, both: 0.2, text: 0.2}
        paired: true                        # the views go through the problems in one order: each is shown in all of them
        max_epochs: 3                       # then the source is used up in this view (default: it never is)
        rationale: true                     # answers say what leads to them (problems with meta.rationale)
        needs_picture: {scores: data/twins/train.blind.jsonl, min_gain: 0.1}    # against, max_blind: see data_prep.blind
        avoid: [data/twins/test.jsonl]      # leave out what occurs in these files, see data_prep.overlap

`rate` is the chance that the next conversation comes from this source in this view; the rates of a mixture sum to 1. Within a
source and view, conversations are drawn in shuffled epochs: each once before any comes again. So a small source with a high rate
is oversampled, and the table says by how much. A source that is used up leaves its rate to the others, in proportion; when all
are used up before the run ends, that is an error before it begins.
"""

import argparse
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass as checked
from rich.markup import escape
from rich.table import Table

from data_prep import libraries
from data_prep.problem import Problem, ProblemError, Prompt, View, partners, possible_views, read_problems, render
from training.config import Count, load_recipe
from training.order import Draw, Order, Part, Rate
from training.strict import STRICT, RecipeError, build, read_yaml

Needs = Callable[[View], Collection[View]]      # a drawn view -> the views a loss shows the same problems in as well


@checked(config=STRICT, frozen=True)
class NeedsPicture:
    """Keep the problems whose picture is worth something; arguments of data_prep.blind.needs_picture."""
    scores: str                                 # what python -m data_prep.blind wrote
    min_gain: float = 0.1
    against: Literal["blind", "shuffled", "both"] = "both"
    max_blind: float | None = None


@checked(config=STRICT, frozen=True)
class Source:
    problems: str                               # JSONL, relative to the working folder or beside the mixture
    views: dict[str, Rate]
    turns: Count = 1
    paired: bool = False
    max_epochs: Annotated[float, Field(gt=0)] | None = None
    rationale: bool = False
    needs_picture: NeedsPicture | None = None
    avoid: list[str] = field(default_factory=list)


@checked(config=STRICT, frozen=True)
class MixtureFile:
    sources: dict[str, Source]


class Mixture(Order):
    """The order of conversations of one mixture file, a pure function of (mixture, data, seed, number of the draw)."""

    def __init__(self, path: str | Path, *, seed: int | Sequence[int], draws: int, skip_bad: bool = False,
                 needs: Needs = lambda view: (), cache: dict[Path, list[Problem]] | None = None) -> None:
        """
        Args:
            path: the mixture file.
            seed: of the order; one number or several.
            draws: how many conversations are needed (steps x batch). The order of the first n does not depend on it.
            skip_bad: leave bad rows of problem files out.
            needs: the views in which a loss shows the problems of a drawn view as well; only problems that have them are drawn.
            cache: problem files that were read already, by path.

        Raises:
            RecipeError: the file is wrong, a problem file is missing, a source cannot be shown in a view, or is used up.
            ProblemError: a problem file has a bad row, or a filter's scores do not fit.
        """
        super().__init__(path, seed)
        values = read_yaml(self.path)
        if any(isinstance(source, dict) and "pairs" in source for source in (values.get("sources") or {}).values()):
            raise RecipeError(f"{self.path}: sources: holds pairs, which a recipe without a preference section cannot train on")
        spec: MixtureFile = build(MixtureFile, values, self.path)
        self.check_rates(rate for source in spec.sources.values() for rate in source.views.values())
        self.sources = spec.sources
        self.problems: dict[str, list[Problem]] = {}
        self.partners: dict[str, list[Problem | None]] = {}
        self.left_out: dict[str, list[str]] = {}        # per source: what its filters left out, in words
        cache = {} if cache is None else cache
        for name, source in spec.sources.items():
            file = self.file(f"sources.{name}.problems", source.problems)
            if file.resolve() not in cache:
                cache[file.resolve()] = read_problems(file, verify="header", skip_bad=skip_bad)
            self.problems[name] = self._filtered(name, source, cache[file.resolve()])
            self.partners[name] = partners(self.problems[name])
            self._add_parts(name, source, needs)
        self.begin(draws)

    def _filtered(self, name: str, source: Source, problems: list[Problem]) -> list[Problem]:
        """The problems that the source's filters keep."""
        self.left_out[name] = []
        if (wanted := source.needs_picture) is not None:
            from data_prep.blind import needs_picture

            scores = self.file(f"sources.{name}.needs_picture.scores", wanted.scores)
            kept = needs_picture(problems, scores, min_gain=wanted.min_gain, against=wanted.against, max_blind=wanted.max_blind)
            why = f"whose picture is worth less than {wanted.min_gain:g}"
            if wanted.max_blind is not None:
                why += f" or that are answered without it with more than {wanted.max_blind:g}"
            self.left_out[name].append(f"{len(problems) - len(kept)} {why}")
            problems = kept
        if source.avoid:
            from data_prep.overlap import without_overlap

            files = [self.file(f"sources.{name}.avoid.{i}", other) for i, other in enumerate(source.avoid)]
            kept, found = without_overlap(problems, files)
            self.left_out[name].append(f"{len(problems) - len(kept)} that occur in {', '.join(source.avoid)}")
            problems = kept
        if not problems:
            raise RecipeError(f"{self.path}: sources.{name}: no problem is left ({'; '.join(self.left_out[name])})")
        return problems

    def _add_parts(self, name: str, source: Source, needs: Needs) -> None:
        for view in source.views:
            if view not in View.__members__:
                raise RecipeError(f"{self.path}: sources.{name}.views: no such view: {view}; "
                                  f"views: {', '.join(View.__members__)}")
        first = len(self.parts)
        able = {view: self._able(name, {View(view), *needs(View(view))}) for view in source.views}
        if source.paired:
            shared = set.intersection(*map(set, able.values()))
            able = {view: [i for i in places if i in shared] for view, places in able.items()}
        for view, rate in source.views.items():
            shown = [View(view), *needs(View(view))]
            if source.turns > 1 and View.rendered in shown:
                raise RecipeError(f"{self.path}: sources.{name}: a rendered picture holds one question, so turns must be 1")
            if not able[view]:
                also = "".join(f" and as {other.value}" for other in shown[1:] if other is not shown[0])
                raise RecipeError(f"{self.path}: sources.{name}.views: no problem of {source.problems} can be shown as "
                                  f"{view}{also}")
            units = self._units(name, able[view], source.turns, shown)
            limit = float("inf") if source.max_epochs is None else round(source.max_epochs * len(units))
            order = first if source.paired else len(self.parts)
            self.parts.append(Part(name, View(view), rate, source.turns, limit, order, units))

    def _able(self, name: str, views: set[View]) -> list[int]:
        pairs = zip(self.problems[name], self.partners[name])
        return [i for i, (problem, other) in enumerate(pairs) if views <= set(possible_views(problem, other))]

    def _units(self, name: str, able: list[int], turns: int, shown: list[View]) -> list[tuple[int, ...]]:
        """Conversations: problems that show the same pictures and facts. One that its data set publishes in a form of its own in
        any of the `shown` views stands alone, because its first turn does not show what the others ask about."""
        if turns == 1:
            return [(i,) for i in able]
        shared: dict[tuple, list[int]] = {}
        for i in able:
            problem = self.problems[name][i]
            own = any(view.value in problem.meta.get("published", {}) for view in shown)
            shared.setdefault((i,) if own else (problem.image, problem.facts), []).append(i)
        return [tuple(group) for group in shared.values()]

    def conversation(self, draw: Draw) -> tuple[list[dict], tuple, list[Prompt]]:
        """Chat messages with the answers, the pictures, and the prompts they were made from.

        The picture and the facts are shown once, in the first turn; the later turns are questions alone.
        """
        problems, others = self.problems[draw.source], self.partners[draw.source]
        rationale = self.sources[draw.source].rationale
        prompts = [render(problems[i], draw.view if turn == 0 else View.blind, others[i], rationale=rationale, question=draw.question)
                   for turn, i in enumerate(draw.problems)]
        messages = [message for prompt in prompts
                    for message in (*prompt.messages, {"role": "assistant", "content": prompt.target})]
        return messages, prompts[0].images, prompts

    def ids(self, draw: Draw) -> tuple[str, ...]:
        """Of the problems that are drawn."""
        return tuple(self.problems[draw.source][i].id for i in draw.problems)

    def pictures(self) -> Iterator[tuple[Path, str, int]]:
        """(folder, path, largest size) of every problem's own pictures."""
        for problems in self.problems.values():
            yield from ((problem.root, picture, problem.max_pixels) for problem in problems for picture in problem.pictures)

    def table(self, encoder=None, sample: int = 100, title: str | None = None) -> Table:
        """Rows, epochs and tokens per source and view. Tokens are means over up to `sample` conversations."""
        drawn = self.drawn(len(self))
        notes = "".join(f"; {name}: left out {', '.join(told)}" for name, told in self.left_out.items() if told)
        table = Table("source", "view", "rate", "turns", "rows", "conversations", "drawn", "epochs", "tokens", "image tokens",
                      "answer tokens", "answer tokens drawn", title=escape((title or f"{self.path}: {len(self)} draws") + notes),
                      title_justify="left")
        for i, part in enumerate(self.parts):
            means = self.mean_tokens(part, encoder, sample) if encoder else None
            tokens = [f"{mean:.0f}" for mean in means] + [f"{means[2] * drawn[i]:,.0f}"] if means else ["-"] * 4
            table.add_row(escape(part.source), part.view.value, f"{part.rate:g}", str(part.turns), str(sum(map(len, part.units))),
                          str(len(part.units)), str(drawn[i]), f"{drawn[i] / len(part.units):.2f}", *tokens)
        return table

    def mean_tokens(self, part: Part, encoder, sample: int = 100, view: View | None = None) -> tuple[float, float, float]:
        """Tokens, image tokens among them and trained tokens of a conversation of this part, over up to `sample` of them.

        view: of another view of the same problems than the part's own.
        """
        picks = np.linspace(0, len(part.units) - 1, min(sample, len(part.units))).astype(int)
        rows = []
        for pick in picks:
            messages, images, _ = self.conversation(Draw(part.source, view or part.view, part.units[pick][:part.turns]))
            row = encoder.encode(messages, images)
            rows.append((len(row), (row.ids == encoder.image_id).sum(), row.trained.sum()))
        return tuple(np.mean(rows, axis=0).tolist())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.mixture", description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--items", type=int, default=5, help="how many of the first items of each stage to print")
    args = parser.parse_intermixed_args(argv)
    try:
        from training.collate import load_encoder
        from training.plan import Plan

        recipe = load_recipe(args.recipe, args.overrides)
        plan = Plan(recipe)
        encoder = load_encoder(recipe.model)
    except (RecipeError, ProblemError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    console = libraries.console()
    for stage in plan.stages:
        console.print(stage.table(encoder))
        for number in range(stage.first, stage.first + min(args.items, len(stage.mixture))):
            _show(console, plan, number)


def _show(console, plan, number: int) -> None:
    draw = plan.draw(number)
    mixture = plan.stages[draw.stage].mixture
    if draw.view is None:
        pair = mixture.pair(draw)
        console.rule(escape(f"{number}: {draw.source}: {pair.id}"))
        messages = pair.messages(pair.chosen)
        messages += [{"role": name, "content": text} for name in ("rejected", "rejected_prior", "rejected_images_answer")
                     if (text := getattr(pair, name)) is not None]
    else:
        problems = mixture.problems[draw.source]
        console.rule(escape(f"{number}: {draw.source} {draw.view.value}: {', '.join(problems[i].id for i in draw.problems)}"))
        messages, _, _ = plan.conversation(draw)
    for message in messages:
        content = message["content"]
        text = content if isinstance(content, str) else "".join(part.get("text", "<picture>\n") for part in content)
        console.print(f"[bold]{message['role']}[/bold]: ", end="")
        console.print(text, markup=False, highlight=False)


if __name__ == "__main__":
    main()
