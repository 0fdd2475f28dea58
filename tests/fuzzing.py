"""Damaged files against the readers that a user's commands call.

    python -m tests.fuzzing [--cases 50000] [--seed 0] [--target NAME ...] [--only CASE]

Every case damages one file of a small valid set and reads the set again. Either it can still be read, or the reader raises its own
error: one line that names what it is about. Anything else, and a reading that takes longer than LIMIT_S, is a finding. A case is a
pure function of (seed, target, number), so `--target NAME --only CASE` repeats one; its file then stays in the folder that is named.
"""

import argparse
import contextlib
import copy
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

LIMIT_S = 10
LONGEST = 600           # characters of a line of a message
HERE = "@@here@@"

DEEP = 30_000           # levels; the standard library's readers give up long before

# As they stand in a file, in place of a value. Both JSON and YAML, but for the readers' own limits.
ODD = ("null", "true", "false", "0", "-1", "1", "1.5", "-0.0", "1e400", "-1e400", "NaN", "Infinity", "1" + "0" * 5000, "1" * 30,
       '""', '" "', r'"\ud800"', r'"\u0000"', r'"a\nb"', '"../../etc/passwd"', '"/etc/passwd"', r'"C:\\x"', '"images/../../a.png"',
       '"images/out.png"', '"images/loop.png"', '"images"', '"images/none.png"', '"' + "x" * 5000 + '"', '"' + "y/" * 300 + '"',
       "[]", "{}", "[[]]", '{"a": 1}', "[null]", '["a"]', '[{"a": [1]}]', "[" * 40 + "]" * 40, "[" * DEEP + "]" * DEEP,
       '{"a":' * DEEP + "1" + "}" * DEEP, '"\u2028"', '"<script>alert(1)</script>"', '{"a": 1, "a": 2}', '"both"', '"\u202e"',
       '"\u00e9"', '"<image 1>"', '"<image 99>"', "nothing", "'a'", '"unfinished', "[1,", "1 2")
# In YAML alone.
ODD_YAML = ("!!python/object/apply:os.system ['true']", "!!python/name:os.system", "!!python/tuple [1]", "!!binary x", "!!int x",
            "!!float x", "!!bool x", "!!timestamp x", "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]", "!!null x", "!x y",
            "2001-13-45", "2001-01-01", "2001-01-01 25:00:00", "1:30:00", "0x", "0b2", "1_000", "0o17", ".inf", "-.inf", ".nan", "~",
            "*a", "&a [*a]", "&a {k: *a}", "yes", "1e5", "1e-4", r'"\x00"', r'"\U00110000"', "|", ">", "%", "@", "`", "? a", "- a",
            "{<<: 1}", "{<<: {a: 1}}", "{? [a] : 1}", "{1: 2}", "{null: 1}", "{true: 1}", "{1.5: 1}", "{.nan: 1}", "{2001-01-01: 1}")
LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi"))


# -- damage ----------------------------------------------------------------------------------------


def damaged_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flips, cuts, repeats, other encodings; nothing of it knows what the bytes mean."""
    place, end = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    lines = data.splitlines(keepends=True) or [b""]
    number = rng.randrange(len(lines))
    kind = rng.randrange(16)
    if kind == 0 and data:
        return data[: place - 1] + bytes([rng.randrange(256)]) + data[place:]
    if kind == 1:
        return data[:place]
    if kind == 2:
        return data[:place] + data[end:]
    if kind == 3:
        return data[:end] + data[place:]
    if kind == 4:
        return data[:place] + rng.randbytes(rng.randrange(1, 40)) + data[place:]
    if kind == 5:
        return b""
    if kind == 6:
        return data[:place] + b"\0" * rng.randrange(1, 9) + data[place:]
    if kind == 7:
        return data.decode("utf-8", "replace").encode(rng.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "cp1252")), "replace")
    if kind == 8:
        return data[:place] + rng.choice((b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x80\xa8", b"\x1b[2J")) + data[place:]
    if kind == 9:
        return b"".join(lines[:number] + [lines[number]] * rng.randrange(2, 4) + lines[number + 1:])
    if kind == 10:
        return b"".join(lines[:number] + lines[number + 1:])
    if kind == 11:
        rng.shuffle(lines)
        return b"".join(lines)
    if kind == 12:
        return data.replace(b"\n", rng.choice((b"\r", b"\r\n", b"\n\n", b"")))
    if kind == 13:
        return data + rng.choice((b"\n\n \n", b"{}", b"[]", b"\n{", b"null\n", b"\0", b"%PDF-1.4", b"PK\x03\x04"))
    if kind == 14 and data:
        bits = bytearray(data)
        for _ in range(rng.randrange(1, 6)):
            bits[rng.randrange(len(bits))] ^= 1 << rng.randrange(8)
        return bytes(bits)
    one = data[place:end]
    return data[:place] + one[::-1] + data[end:]


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The ways to every value inside a value, the whole first."""
    yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield from places(inner, (*path, key))


def at(value: Any, path: Sequence) -> Any:
    for key in path:
        value = value[key]
    return value


def damaged_value(rng: random.Random, value: Any, odd: Sequence[str]) -> str:
    """JSON text of a value of which one part is something else: of another type, gone, given twice, under another name."""
    value = copy.deepcopy(value)
    ways = list(places(value))
    path = rng.choice(ways)
    raw = rng.choice(odd)
    if not path:
        return raw if rng.random() < 0.1 else damaged_value(rng, value, odd)
    holder, key = at(value, path[:-1]), path[-1]
    kind = rng.randrange(10)
    if kind == 0:
        del holder[key]
        return json.dumps(value, ensure_ascii=False)
    if kind == 1:
        holder[key] = copy.deepcopy(at(value, rng.choice(ways)))
        return json.dumps(value, ensure_ascii=False)
    if kind == 2 and isinstance(holder, list):
        holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(rng.choice(holder)))
        return json.dumps(value, ensure_ascii=False)
    if kind == 3 and isinstance(holder, dict):
        name = rng.choice((key + "s", key.upper(), "", " ", "a\nb", "x" * 3000, "\u2028", "__class__", "0", key[:-1], "<b>"))
        holder[name] = holder.pop(key) if rng.random() < 0.7 else copy.deepcopy(holder[key])
        return json.dumps(value, ensure_ascii=False)
    if kind == 4 and isinstance(holder, dict):
        raw = f"{json.dumps(holder[key])}, {json.dumps(key)}: {raw}"       # the key twice
    if kind == 5:
        raw = f"[{raw}]"
    if kind == 6:
        raw = json.dumps(str(holder[key]))
    holder[key] = HERE
    return json.dumps(value, ensure_ascii=False).replace(json.dumps(HERE), raw, 1)


def damaged_json(rng: random.Random, data: bytes) -> bytes:
    if rng.random() < 0.25:
        return damaged_bytes(rng, data)
    return damaged_value(rng, json.loads(data), ODD).encode("utf-8", "surrogatepass")


def damaged_lines(rng: random.Random, data: bytes) -> bytes:
    """One JSON object a line."""
    if rng.random() < 0.25:
        return damaged_bytes(rng, data)
    lines = data.decode("utf-8").splitlines()
    number = rng.randrange(len(lines))
    lines[number] = damaged_value(rng, json.loads(lines[number]), ODD)
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")


def damaged_yaml(rng: random.Random, data: bytes) -> bytes:
    if (chance := rng.random()) < 0.25:
        return damaged_bytes(rng, data)
    if chance < 0.27:
        return data + LAUGHS.encode()
    return damaged_value(rng, yaml.safe_load(data), (*ODD, *ODD_YAML)).encode("utf-8", "surrogatepass")


DAMAGE = {".json": damaged_json, ".jsonl": damaged_lines, ".yaml": damaged_yaml, ".png": damaged_bytes, "": damaged_bytes}


# -- what is read, and how -------------------------------------------------------------------------


@dataclass
class Target:
    """A valid set of files in `folder`, what a case may damage of it, and how a command reads it."""
    name: str
    folder: Path
    files: Sequence[str]                        # below the folder; one of them is damaged in each case
    read: Callable[[], Any]
    errors: tuple[type[Exception], ...]         # the reader's own; SystemExit is a command's
    share: float = 1.0                          # of the cases, against the other targets
    lines: int = 1                              # a message may have: recipes name all wrong keys at once
    names: Sequence[str] = ()                   # a message names one of these, else the folder or a file
    whole: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.whole = {name: (self.folder / name).read_bytes() for name in self.files}

    def damaged(self, seed: int, case: int) -> tuple[str, bytes]:
        rng = random.Random(f"{seed} {self.name} {case}")
        name = rng.choice(self.files)
        data = DAMAGE[Path(name).suffix](rng, self.whole[name])
        return name, data

    def finding(self, name: str, data: bytes) -> str | None:
        """What is wrong with how the damaged file is read; None: nothing. The files are whole again afterwards."""
        (self.folder / name).write_bytes(data)
        try:
            return self._finding()
        finally:
            for one, content in self.whole.items():
                (self.folder / one).write_bytes(content)

    def _finding(self) -> str | None:
        try:
            with limited(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                self.read()
        except Slow:
            return f"was not read within {LIMIT_S} s"
        except self.errors as error:
            return self._of_message(str(error))
        except SystemExit as error:
            if not isinstance(error.code, str):
                return f"ends with {error.code!r} and not with a sentence"
            return self._of_message(error.code)
        except BaseException as error:      # a panic of a library in another language is no Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            return "".join(traceback.format_exception(error)[-6:])[-2500:]
        return None

    def _of_message(self, text: str) -> str | None:
        lines = text.split("\n")
        if len(lines) > self.lines or any(not line or len(line) > LONGEST for line in lines):
            return f"is no line of at most {LONGEST} characters ({len(lines)} lines, the longest {max(map(len, lines))}): {text[:700]!r}"
        if any(not (char.isprintable() or 0xD800 <= ord(char) < 0xE000) for line in lines for char in line.replace("\u202e", "")):
            return f"holds what is no character: {text[:700]!r}"
        if not any(name in text for name in self.names or (self.folder.name, *(Path(file).name for file in self.files))):
            return f"does not name the file: {text[:700]!r}"
        if "Traceback" in text or " object at 0x" in text:
            return f"is no sentence: {text[:700]!r}"
        return None


class Slow(BaseException):
    pass


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Slow is raised after LIMIT_S of computing, however busy the machine is."""
    def stop(*_: Any) -> None:
        raise Slow

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def search(targets: Sequence[Target], cases: int, seed: int, tell: Callable[[str], None] = lambda text: None) -> tuple[int, dict[str, str]]:
    """(how many were tried, {"target case file": finding})."""
    found, tried = {}, 0
    total = sum(target.share for target in targets)
    for target in targets:
        here = 0
        for case in range(max(1, round(cases * target.share / total))):
            name, data = target.damaged(seed, case)
            tried += 1
            if (finding := target.finding(name, data)) is not None:
                found[f"{target.name} {case} {name}"] = finding
                here += 1
        tell(f"{target.name}: {case + 1} cases, {here} findings")
    return tried, found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzzing", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", nargs="+", help="only these")
    parser.add_argument("--only", type=int, help="only the case with this number")
    args = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="fuzzing-"))
    from tests.fuzz_targets import targets

    chosen = [target for target in targets(folder) if not args.target or target.name in args.target]
    if args.only is not None:
        for target in chosen:
            name, data = target.damaged(args.seed, args.only)
            kept = folder / f"{target.name}-{args.only}-{Path(name).name}"
            kept.write_bytes(data)
            print(f"{target.name} {args.only} {name} (kept as {kept}): {target.finding(name, data) or 'nothing'}")
        return
    tried, found = search(chosen, args.cases, args.seed, lambda text: print(text, file=sys.stderr))
    shutil.rmtree(folder)
    for case, finding in found.items():
        print(f"{case}: {finding}\n")
    print(f"{tried} cases, {len(found)} findings")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
