"""NLVR v1 (Suhr et al., ACL 2017; github.com/lil-lab/nlvr): true or false sentences about boxes of coloured objects.

    python -m data_prep.sources.nlvr --from DIR --out data/nlvr [--split dev] [--orders 0] [--limit N]

DIR is a clone, or a folder that holds `<split>/<split>.json` and `<split>/images/`. The facts are the structured
representation in words: every object with its edges, because "touching the wall" turns on coordinates 0 and 100.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import permutations
from pathlib import Path

from PIL import Image

from data_prep.images import ProblemError, picture_path
from data_prep.read import BadRows, Problem
from data_prep.sources.common import Draft, Row, arguments, drafts_of, json_rows, run, take

SOURCE, LICENSE = "nlvr", "CC-BY-4.0"
COLORS = {"Yellow": ("yellow", (255, 255, 0)), "Black": ("black", (0, 0, 0)), "#0099ff": ("blue", (0, 153, 255))}
SIZES = {10: "small", 20: "medium", 30: "large"}
SHAPES = ("square", "circle", "triangle")
ORDERS = tuple(permutations(range(3)))  # picture k shows the boxes in the k-th order; slot s of it starts at x = 150 s
BOX_STEP = 150
# Objects may overlap, so the colour at a centre may be another object's; in the published pictures at most 5 % are.
AGREEMENT = 0.8
HEAD = (
    "Three boxes from left to right. "
    "In each, x goes from 0 (left edge) to 100 (right edge) and y from 0 (top) to 100 (bottom). "
    "Objects that are 1 apart touch."  # as drawn: the blocks of a tower leave a seam of one unit
)


def facts(boxes: Sequence[Sequence[dict]]) -> str:
    """Boxes in the order shown, their objects from left to right, each with size, colour, shape and edges."""
    said = []
    for number, box in enumerate(boxes, start=1):
        objects = [_object(item) for item in sorted(box, key=lambda item: (item["x_loc"], item["y_loc"]))]
        said.append(f"Box {number}: {'; '.join(objects) or 'empty'}.")
    return " ".join([HEAD, *said])


def _object(item: dict) -> str:
    x, y, size = item["x_loc"], item["y_loc"], item["size"]
    return f"{SIZES[size]} {COLORS[item['color']][0]} {item['type']} at x {x}-{x + size}, y {y}-{y + size}"


def kind(boxes: Sequence[Sequence[dict]]) -> str | None:
    """How the picture was drawn: "tower" (blocks piled up) or "scatter"; None when no box tells them apart."""
    if any(len({item["x_loc"] for item in box}) > 1 or any(item["type"] != "square" for item in box) for box in boxes):
        return "scatter"
    return "tower" if any(len(box) > 1 for box in boxes) else None


def agreement(picture: Image.Image, boxes: Sequence[Sequence[dict]]) -> float:
    """Share of the objects whose colour is found at their centre in the picture (400x100, RGB)."""
    hits = []
    for slot, box in enumerate(boxes):
        for item in box:
            half = item["size"] // 2
            place = (slot * BOX_STEP + item["x_loc"] + half, item["y_loc"] + half)
            inside = place[0] < picture.width and place[1] < picture.height
            wanted = COLORS[item["color"]][1]
            hits.append(inside and max(abs(a - b) for a, b in zip(picture.getpixel(place), wanted)) < 60)
    return sum(hits) / len(hits) if hits else 1.0


def _boxes(row: dict) -> list[list[dict]]:
    boxes = take(row, "structured_rep", list)
    if len(boxes) != 3 or not all(isinstance(box, list) for box in boxes):
        raise ProblemError("structured_rep: must be three boxes")
    for item in (item for box in boxes for item in box):
        if not isinstance(item, dict):
            raise ProblemError("structured_rep: an object of a box must be a JSON object")
        for name, known in (("type", SHAPES), ("color", COLORS), ("size", SIZES)):
            if take(item, name, str, int) not in known:
                raise ProblemError(
                    f"structured_rep: unknown {name} {item[name]!r}; known: {', '.join(map(str, known))}"
                )
        for name in ("x_loc", "y_loc"):
            if not 0 <= take(item, name, int) <= 100 - item["size"]:
                raise ProblemError(f"structured_rep: {name} {item[name]} with size {item['size']} leaves the box")
    return boxes


def drafts(args, bad: BadRows) -> Iterator[Draft]:
    for split in args.split or _splits(args.source_dir):
        folder = next((f for f in _folders(args.source_dir, split) if (f / f"{split}.json").is_file()), None)
        if folder is None:
            raise ProblemError(f"{args.source_dir}: holds no {split}/{split}.json")
        rows = json_rows(folder / f"{split}.json")
        yield from drafts_of(rows, partial(_build, split=split, folder=folder, orders=args.orders), bad)


def _folders(root: Path, split: str) -> tuple[Path, ...]:
    return (root / split, root / "nlvr" / split)


def _splits(root: Path) -> list[str]:
    found = [
        split for split in ("train", "dev", "test") for f in _folders(root, split) if (f / f"{split}.json").is_file()
    ]
    if not found:
        raise ProblemError(f"{root}: holds no train/train.json, dev/dev.json or test/test.json")
    return found


def _build(row: dict, _: Row, *, split: str, folder: Path, orders: Sequence[int]) -> list[Draft]:
    identifier, label = take(row, "identifier", str), take(row, "label", str).lower()
    if label not in ("true", "false"):
        raise ProblemError(f"label: must be true or false, not {label!r}")
    boxes, sentence = _boxes(row), take(row, "sentence", str).strip()
    votes = list(take(row, "evals", dict).values())
    meta = {"answer_with": "text", "split": split, "votes": len(votes), "votes_agree": votes.count(row["label"])}
    if (drawn := kind(boxes)) is not None:
        meta["kind"] = drawn
    return [_draft(identifier, label, sentence, boxes, meta, row, order, split, folder) for order in orders]


def _draft(identifier, label, sentence, boxes, meta, row, order, split, folder) -> Draft:
    shown = [boxes[box] for box in ORDERS[order]]
    name = f"{split}-{identifier}-{order}.png"
    # Later splits may come without `directory`; their pictures then lie in images/ itself.
    image = "/".join(filter(None, ("images", str(row.get("directory", "")), name)))

    def picture() -> Path:
        try:
            return picture_path(folder, image)
        except ProblemError as error:
            raise ProblemError(f"image: {error}") from error

    def check(pixels: Image.Image) -> None:
        if (share := agreement(pixels, shown)) < AGREEMENT:
            raise ProblemError(f"structured_rep: only {share:.0%} of its objects are found in {image}")

    problem = Problem(
        id=f"nlvr-{split}-{identifier}-{order}",
        group=f"{split}-{identifier.split('-')[0]}",  # one sentence over four pictures
        source=SOURCE,
        image=name,
        facts=facts(shown),
        question=f"Is this sentence true or false? {sentence}",
        options=("true", "false"),
        answer=label,
        license=LICENSE,
        meta={**meta, "order": order},
    )
    return Draft(problem, (picture,), check=check)


def _orders(text: str) -> list[int]:
    return list(range(6)) if text == "all" else [range(6)[int(part)] for part in text.split(",")]


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, "data_prep.sources.nlvr")
    parser.add_argument("--from", dest="source_dir", type=Path, required=True, help="a clone, or its nlvr/ folder")
    parser.add_argument("--split", action="append", help="train, dev or test; may be repeated (default: all)")
    parser.add_argument("--orders", type=_orders, default=[0], help="box orders, such as 0,3 or all (default: 0)")
    run(parser, argv, drafts)


if __name__ == "__main__":
    main()
