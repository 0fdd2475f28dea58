"""Ask a model every problem of some tasks in some views.

    python -m eval.run --model assets/tiny --adapter runs/demo/control-seed0/adapter --tasks twins \\
        --views both,vision,text,blind --out results/answers/control

Writes answers.jsonl (one object per item and view) and run.json (settings and parents) into --out. The views of an item are
asked side by side, so a run that is cut short is short in every view alike. The same command continues it; answers are kept by
a hash of prompt, pictures, model and settings, so nothing stale is served. Prompts that are equal to the last pixel are asked
once where they come close together, and the answer is written for each item.

With --corrupt words of facts and question and parts of the pictures are missing: which ones depends on --corrupt-seed and the
item, and a higher rate takes away what a lower one does and more. eval.robustness draws accuracy against the rate.

With --endpoint a server is asked instead of a model loaded here; see eval.endpoint. Its address is recorded, but no part of an
answer's hash: the same model may be served elsewhere when the run goes on.
"""

import argparse
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tqdm import tqdm

from data_prep.libraries import offline_if_local, one_sentence, quiet
from data_prep.problem import (
    Corruption,
    Problem,
    ProblemError,
    Prompt,
    View,
    partners,
    possible_views,
    read_problems,
    render,
    shown_pictures,
)
from data_prep.provenance import file_sha256, parents, write_json
from data_prep.read import one_or_several
from eval.endpoint import Endpoint, EndpointError, add_options, check_options
from eval.parse import PARSER_VERSION
from eval.tasks import TASKS, Task, TaskError, find_task

WINDOW = 8      # batches that are sorted by length together, so that short and long prompts do not pad each other
BATCH_SIZE = 32
MAX_NEW_TOKENS, WITH_RATIONALE = 32, 64     # by default


class Request(NamedTuple):
    task: Task
    problem: Problem
    view: View
    prompt: Prompt
    key: str            # of this item in this view
    shown: str          # hash of what the model is shown and may say: the same for equal prompts


RowOf = Callable[[Request], dict[str, Any]]     # a row of answers.jsonl, of one answer and a request that it answers


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m eval.run",
                                     description="Ask a model every problem of some tasks in some views.")
    parser.add_argument("--model", required=True, help="local folder or hub id; with --endpoint its name on the server")
    parser.add_argument("--adapter", help="a PEFT adapter folder, such as runs/demo/control-seed0/adapter")
    parser.add_argument("--revision", help="of a hub model")
    parser.add_argument("--tasks", default="twins", help=f"comma-separated: {', '.join(sorted(TASKS))}, or paths of .jsonl files")
    parser.add_argument("--views", default="both,vision,text,blind", help=f"comma-separated: {', '.join(View.__members__)}")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the tasks' files (default: %(default)s)")
    parser.add_argument("--mode", choices=("likelihood", "generate"),
                        help="score the options by likelihood (default), or parse a generated answer (open questions always are)")
    parser.add_argument("--rationale", action="store_true",
                        help="ask for the way to the answer, then the answer, as rationales are trained; implies --mode generate")
    parser.add_argument("--max-new-tokens", type=int, help=f"default: {MAX_NEW_TOKENS}, with --rationale {WITH_RATIONALE}")
    parser.add_argument("--batch-size", type=int, help=f"default: {BATCH_SIZE}")
    parser.add_argument("--limit", type=int, help="at most this many problems per task, whole groups first come first served")
    parser.add_argument("--min-pixels", type=int)
    parser.add_argument("--max-pixels", type=int)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"),
                        help="default: auto, which is bfloat16 on a GPU and float32 elsewhere")
    parser.add_argument("--label", help="name of this run in tables (default: the name of --out)")
    parser.add_argument("--seed", type=int, help="training seed of the model, recorded")
    parser.add_argument("--skip-bad", action="store_true", help="leave bad rows out instead of stopping")
    parser.add_argument("--corrupt", metavar="text=RATE,image=RATE",
                        help="share of words and of parts of the pictures that are missing; either may be left out")
    parser.add_argument("--corrupt-seed", type=int, default=0, help="of what is missing (default: %(default)s)")
    add_options(parser)
    args = parser.parse_args(argv)
    try:
        args.corrupt = parse_corruption(args.corrupt, args.corrupt_seed)
    except ValueError as error:
        parser.error(str(error))
    if args.rationale and args.mode == "likelihood":
        parser.error("--rationale: an option's likelihood straight after the prompt is not what such a model was trained on; "
                     "leave out --mode likelihood")
    check_options(parser, args)
    args.mode = args.mode or ("generate" if args.rationale or args.endpoint else "likelihood")
    args.batch_size, args.dtype = BATCH_SIZE if args.batch_size is None else args.batch_size, args.dtype or "auto"
    if args.max_new_tokens is None:
        args.max_new_tokens = WITH_RATIONALE if args.rationale else MAX_NEW_TOKENS
    return args


def parse_corruption(text: str | None, seed: int) -> dict[str, Any] | None:
    """`text=0.3,image=0.3` to {"text": 0.3, "image": 0.3, "seed": seed}; None where nothing is missing. ValueError: another form."""
    rates = {"text": 0.0, "image": 0.0}
    given = []
    for word in text.split(",") if text else []:
        name, _, value = word.partition("=")
        try:
            rate = float(value)
        except ValueError:
            rate = math.nan
        if name not in rates or name in given or not 0 <= rate <= 1:
            raise ValueError(f"--corrupt takes text=RATE,image=RATE, each once at most, with rates from 0 to 1, not {text!r}")
        given.append(name)
        rates[name] = rate
    return {**rates, "seed": seed} if any(rates.values()) else None


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.endpoint:
        with one_sentence(ProblemError, TaskError, EndpointError):
            run(args, lambda: Endpoint.of(args))
        return
    quiet()
    offline_if_local(args.model)
    from data_prep.answerer import Answerer, ModelError

    with one_sentence(ProblemError, TaskError, ModelError):
        run(args, lambda: Answerer.of(args))


def run(args: argparse.Namespace, load: Any) -> None:
    """Evaluate. `load` makes the Answerer, or the Endpoint, after everything cheap has been checked."""
    views = _views(args.views)
    tasks = [(task, *_problems(task, args)) for task in map(find_task, dict.fromkeys(args.tasks.split(",")))]
    asked = [(task, problem, view, other) for task, problems, _ in tasks
             for problem, other in zip(problems, partners(problems)) for view in views if view in possible_views(problem, other)]
    for task, problems, _ in tasks:
        for view in views:
            n = sum(1 for t, _, v, _ in asked if t is task and v is view)
            if n < len(problems):
                print(f"{task.name}: {len(problems) - n} of {len(problems)} problems cannot be shown as {view.value}",
                      file=sys.stderr)
    answerer = load()
    identity = answerer.identity()
    origin = identity.pop("endpoint", None)
    settings = {
        **identity, "mode": args.mode, "rationale": args.rationale, "parser": PARSER_VERSION,
        "max_new_tokens": args.max_new_tokens, "views": [view.value for view in views],
        "tasks": {task.name: {"data": str(file), "root": str(file.parent), "sha256": file_sha256(file), "n": len(problems)}
                  for task, problems, file in tasks},
        **({"corrupt": args.corrupt} if args.corrupt else {})}
    args.out.mkdir(parents=True, exist_ok=True)
    info = _open(args, settings, origin)
    answers = args.out / "answers.jsonl"
    done = _whole_lines(answers)
    fixed = json.dumps([settings[k] for k in ("model_sha256", "revision", "model", "adapter_sha256", "mode", "parser",
                                              "max_new_tokens", "dtype", "pixels")])
    started = time.perf_counter()
    left = (request for request in _requests(asked, fixed, args.rationale, args.corrupt) if request.key not in done)
    try:
        # Half of a surrogate pair, which a server may send, is written as JSON escapes it.
        with answers.open("a", encoding="utf-8", errors="backslashreplace", newline="\n") as file, \
                tqdm(total=len(asked), desc=args.label or args.out.name, unit="answer", mininterval=2) as bar:
            bar.update(len(done))
            for rows in (_served if args.endpoint else _loaded)(answerer, left, args):
                file.writelines(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows)
                file.flush()
                bar.update(len(rows))
    except OSError as error:
        if error.filename is None and error.errno is not None:     # of a write, which does not say where to
            raise OSError(error.errno, error.strerror, str(answers)) from error
        raise
    seconds = info.get("seconds", 0) + time.perf_counter() - started
    write_json(args.out / "run.json", {**info, "seconds": round(seconds, 1), "finished": True})
    print(f"{answers}: {len(asked)} answers, {seconds:.0f} s")


def _views(text: str) -> list[View]:
    names = list(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in View.__members__]:
        raise TaskError(f"no such view: {', '.join(unknown)}; views: {', '.join(View.__members__)}")
    return [View(name) for name in names]


def _problems(task: Task, args: argparse.Namespace) -> tuple[list[Problem], Path]:
    file = args.data / task.file
    if not file.is_file():
        raise TaskError(f"task {task.name}: no such file: {file}; {task.about}")
    problems = read_problems(file, verify="header", skip_bad=args.skip_bad)
    if args.limit is not None and args.limit < len(problems):
        groups = dict.fromkeys(problem.group for problem in problems)
        kept: list[Problem] = []
        for group in groups:
            members = [problem for problem in problems if problem.group == group]
            if kept and len(kept) + len(members) > args.limit:
                break
            kept += members
        problems = kept
    if args.rationale and (without := next((problem for problem in problems if "rationale" not in problem.meta), None)):
        raise TaskError(f"{file}: {without.id}: meta.rationale: missing, so --rationale cannot ask for it")
    return problems, file


def _open(args: argparse.Namespace, settings: dict[str, Any], origin: dict[str, Any] | None) -> dict[str, Any]:
    """run.json of this run. Raises TaskError when --out holds answers given under other settings.

    origin: of a served model: its server, recorded beside those that were asked before.
    """
    path = args.out / "run.json"
    if path.exists():
        old = {"rationale": False, **_recorded(path)}       # older runs knew no rationale
        if differing := [key for key in dict.fromkeys((*settings, "corrupt")) if old.get(key) != settings.get(key)]:
            raise TaskError(f"{args.out} holds answers of another run; it differs in {', '.join(differing)}: give another --out")
        if not isinstance(old.get("seconds", 0), (int, float)) or origin and not isinstance(old.get("endpoints"), list):
            raise TaskError(f"{path}: is damaged: its seconds are no number, or it has no list of endpoints; give another --out")
        if origin and origin not in old["endpoints"]:
            old["endpoints"].append(origin)
            write_json(path, old)
        return old
    # Beside the adapter of a finished run, or above a checkpoint of one.
    beside = [folder / "run.json" for folder in list(Path(args.adapter).parents)[:2]] if args.adapter else []
    recipe = next((path for path in beside if path.exists()), None)
    trained = _recorded(recipe) if recipe else None
    info = {**settings, **parents(), "label": args.label or args.out.name, "seed": args.seed,
            "device": None if origin else _device(), "training": trained, "seconds": 0, "finished": False,
            **({"endpoints": [origin]} if origin else {})}
    write_json(path, info)
    return info


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _recorded(path: Path) -> dict[str, Any]:
    """A run.json. Raises TaskError where it cannot be read."""
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{path}: cannot be read: {error}") from error
    if not isinstance(info, dict):
        raise TaskError(f"{path}: cannot be read: is no JSON object")
    return info


def _whole_lines(path: Path) -> set[str]:
    """Keys of the answers already there; a last line that a killed process left half written is cut off.

    Raises TaskError where another line is no answer: what damaged it may have damaged others too.
    """
    if not path.exists():
        return set()
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)        # in place: there may be no room to write the rest again
    keys = set()
    for number, line in enumerate(data[:whole].split(b"\n")[:-1], start=1):
        try:
            key = json.loads(line.decode("utf-8"))["key"]
        except (ValueError, LookupError, TypeError, RecursionError):
            key = None
        if not isinstance(key, str) or key in keys:
            raise TaskError(f"{path}:{number}: is no answer of its own, so the file is damaged: give another --out, or remove the line")
        keys.add(key)
    return keys


def _requests(asked: Sequence[tuple[Task, Problem, View, Problem | None]], fixed: str, rationale: bool = False,
              corrupt: dict[str, Any] | None = None) -> Iterator[Request]:
    for task, problem, view, other in asked:
        prompt = render(problem, view, other, rationale=rationale)
        key = hashlib.sha256(json.dumps([fixed, task.name, problem.id, view.value, prompt.messages, prompt.choices]).encode())
        shown = hashlib.sha256(json.dumps([prompt.messages, prompt.choices]).encode())
        for image in prompt.images:
            for digest in (key, shown):
                digest.update(f"{image.size}".encode())
                digest.update(image.tobytes())
        if corrupt is not None:     # by item and not by view, so that every view of it misses the same
            prompt = replace(prompt, corruption=Corruption(corrupt["text"], corrupt["image"], (corrupt["seed"], problem.id)))
            for digest in (key, shown):
                digest.update(json.dumps(prompt.corruption).encode())
        yield Request(task, problem, view, prompt, key.hexdigest()[:32], shown.hexdigest())


def _alike(window: Sequence[Request]) -> list[list[Request]]:
    """Requests that show alike together: what is asked once."""
    alike: dict[str, list[Request]] = {}
    for request in window:
        alike.setdefault(request.shown, []).append(request)
    return list(alike.values())


def _loaded(answerer: Any, left: Iterator[Request], args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Rows of the answers of an Answerer, batch by batch."""
    while window := list(islice(left, WINDOW * args.batch_size)):
        alike = _alike(window)
        scored = [same for same in alike if same[0].prompt.choices is not None and args.mode == "likelihood"]
        generated = [same for same in alike if same[0].prompt.choices is None or args.mode == "generate"]
        for groups, ask in ((scored, _by_likelihood), (generated, _by_generation)):
            groups.sort(key=lambda same: _size(same[0]))
            for start in range(0, len(groups), args.batch_size):
                batch = groups[start:start + args.batch_size]
                row_of = ask(answerer, [same[0].prompt for same in batch], args)
                yield [row(request) for row, same in zip(row_of, batch, strict=True) for request in same]


def _served(endpoint: Endpoint, left: Iterator[Request], args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Rows of the answers of an Endpoint, prompt by prompt. Windows are for what is alike; no request waits for one to end."""
    asked: dict[str, list[Request]] = {}

    def named() -> Iterator[tuple[str, Prompt]]:
        while window := list(islice(left, WINDOW * args.parallel)):
            for same in _alike(window):
                name = f"{same[0].task.name}, {same[0].problem.id}, view {same[0].view.value}"
                asked[name] = same
                yield name, same[0].prompt

    for name, said in endpoint.answers(named(), args.max_new_tokens):
        yield [_said(said, request) for request in asked.pop(name)]


def _size(request: Request) -> int:
    """A rough length: characters of text and, at four to a token, image tokens."""
    pixels = sum(image.width * image.height for image in request.prompt.images)
    return sum(len(part.get("text", "")) for part in request.prompt.messages[0]["content"]) + 4 * pixels // 784


def _by_likelihood(answerer: Any, prompts: list[Prompt], args: argparse.Namespace) -> list[RowOf]:
    return [partial(_scored, scores) for scores in answerer.likelihoods(prompts)]


def _scored(scores: list[float], request: Request) -> dict[str, Any]:
    choices = request.prompt.choices
    pred = choices[max(range(len(choices)), key=scores.__getitem__)]
    return _row(request, pred, pred == request.prompt.answer, scores=[round(score, 6) for score in scores])


def _by_generation(answerer: Any, prompts: list[Prompt], args: argparse.Namespace) -> list[RowOf]:
    return [partial(_said, said) for said in answerer.generate(prompts, args.max_new_tokens)]


def _said(said: Any, request: Request) -> dict[str, Any]:
    score = request.task.score(request.prompt, said.text)
    return _row(request, score.pred, score.correct, text=said.text, finish=said.finish, answer_tokens=said.tokens)


def _row(request: Request, pred: str | None, correct: bool, *, scores: list[float] | None = None, text: str | None = None,
         finish: str | None = None, answer_tokens: int | None = None) -> dict[str, Any]:
    problem, prompt = request.problem, request.prompt
    pictures = shown_pictures(problem, request.view)        # of a view without any: the problem's own, for the report
    return {"task": request.task.name, "view": request.view.value, "id": problem.id, "group": problem.group,
            "source": problem.source, "question": problem.question, "choices": prompt.choices, "options": prompt.options,
            "gold": prompt.answer, "pred": pred, "correct": correct, "scores": scores, "text": text, "finish": finish,
            "answer_tokens": answer_tokens, "image": one_or_several(pictures), "key": request.key, "meta": problem.meta}


if __name__ == "__main__":
    main()
