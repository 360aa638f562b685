"""Mutation testing: cosmic-ray's mutants of what must never be wrong, each against the few tests that are about it.

    python tests/mutation.py selection rewriting/check    # of the modules whose name contains one of the words; or all

One mutant per place in the source is drawn (``--seed`` draws others): of a ``<`` that becomes ``<=``, ``>`` and so on,
one of them. A copy of the repository is mutated, never this one. Results are kept in ``.mutation/``, as sessions that
``cr-report`` reads: a second call runs what is left, and the survivors again, until the module is changed.

Tests run in a fork of this process, which has imported torch already: that is most of the time that they would take.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.metadata
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def nets(*topics: str) -> list[str]:
    """The groups of the nets of these topics, and what they are pruned."""
    texts = [(ROOT / "tests" / "labels" / "nets" / f"{topic}.py").read_text() for topic in topics]
    found = [
        pair
        for text in texts
        for pair in re.findall(r"^@net\((.*?)^class ([A-Z]\w*)\(", text, re.MULTILINE | re.DOTALL)
    ]
    chosen = [("test_groups", name) for _, name in found]
    chosen += [("test_pruned", name) for said, name in found if "frozen=True" not in said]
    return [f"labels/test_groups.py::{test}[{name}]" for test, name in chosen]


TARGETS: dict[str, list[str]] = {
    "selection/budget": ["selection/test_budget.py"],
    "selection/plan": ["selection/test_plan.py", "test_bad_input.py", "-k", "plan"],
    "rewriting/check": ["rewriting/test_check.py"],
    "rewriting/gates": ["rewriting/test_gates.py"],
    "verification/compare": ["verification/test_oracle.py"],
    "verification/oracle": ["verification/test_oracle.py", "verification/test_oracle_kinds.py"],
    "verification/sizes": ["verification/test_sizes.py", "recording/test_guards.py", "verification/test_probes.py"],
    "ops/movement": nets("movement", "limits"),
    "ops/parts": ["rewriting/test_literals.py", *nets("structure", "usage", "movement", "indexed", "limits")],
    "ops/spatial": nets("movement", "convolution", "indexed", "limits"),
    "methods/state": ["methods/test_criteria.py", "methods/test_gsm.py"],
}
"""Module in ``fxprune/`` -> its tests in ``tests/``, and further arguments of pytest."""

ALIVE, KILLED, SLOW = 0, 1, -1
OUTPUT = "pytest.txt"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("word", nargs="*", help="part of a module's name; all modules without")
    parser.add_argument("--seed", type=int, default=0, help="which mutant of every place is drawn (default 0)")
    parser.add_argument("--most", type=int, default=60, metavar="N", help="mutants of one module (default 60)")
    given = parser.parse_args()
    chosen = [name for name in TARGETS if not given.word or any(word in name for word in given.word)]
    if not chosen:
        parser.error(f"no module fits; known: {', '.join(TARGETS)}")
    import numpy  # noqa: F401
    import pytest  # noqa: F401
    import timm  # noqa: F401
    import torch  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        for part in ("fxprune", "tests", "model_zoo", "docs"):
            shutil.copytree(ROOT / part, Path(folder, part), ignore=shutil.ignore_patterns("__pycache__"))
        for file in ("pyproject.toml", "README.md", "CONTRIBUTING.md"):
            shutil.copy(ROOT / file, folder)
        os.chdir(folder)
        for name in chosen:
            examine(name, given.seed, given.most)


def examine(name: str, seed: int, most: int) -> None:
    """Run the mutants of a module, and print those that no test finds."""
    from cosmic_ray.mutating import use_mutation
    from cosmic_ray.plugins import get_operator
    from cosmic_ray.work_db import use_db
    from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkItem, WorkResult

    path, began = Path("fxprune", f"{name}.py"), time.monotonic()
    if verdict([*TARGETS[name]], 600) != ALIVE:
        raise SystemExit(f"The tests of {name} fail without any mutation:\n{Path(OUTPUT).read_text()}")
    limit = 10 + 3 * (time.monotonic() - began)
    version = hashlib.sha256(path.read_bytes() + str(seed).encode()).hexdigest()[:8]
    session = ROOT / ".mutation" / f"{name.replace('/', '-')}-{version}.sqlite"
    session.parent.mkdir(exist_ok=True)
    outcomes = []
    with use_db(str(session)) as db:
        if not db.num_work_items:
            db.add_work_items(WorkItem.single(f"{i:04}", m) for i, m in enumerate(drawn(path, seed)))
        killed = {job for job, result in db.results if result.test_outcome == TestOutcome.KILLED}
        chosen = sorted(db.work_items, key=lambda item: item.job_id)[:most]
        for item in chosen:
            if item.job_id in killed:
                continue
            (mutation,) = item.mutations
            operator = get_operator(mutation.operator_name)(**mutation.operator_args)
            with use_mutation(path, operator, mutation.occurrence) as (before, after):
                code = verdict([*TARGETS[name]], limit)
            outcome = TestOutcome.SURVIVED if code == ALIVE else TestOutcome.KILLED
            place = f"{path}:{mutation.start_pos[0]}"
            shown = changed(before, after)
            if code == ALIVE:
                print(f"{place} {mutation.definition_name}\n{shown}", flush=True)
            outcomes.append(outcome)
            db.set_result(item.job_id, WorkResult(WorkerOutcome.NORMAL, str(code), outcome, shown))
        places = db.num_work_items
    alive, took = outcomes.count(TestOutcome.SURVIVED), time.monotonic() - began
    tool = f"cosmic-ray {importlib.metadata.version('cosmic-ray')}"
    print(f"{name}: {places} places, {len(chosen)} tried, {alive} not found; {tool}, {took:.0f} s", flush=True)


def drawn(path: Path, seed: int) -> list[object]:
    """One mutation for every place of a module, in random order; none of annotations and decorators."""
    from cosmic_ray.commands.init import _all_work_items

    passed_over = [*spans(ast.parse(path.read_text()))]
    by_place: dict[tuple[int, int], list[object]] = {}
    for item in _all_work_items([path], {}):
        (mutation,) = item.mutations
        if not any(start <= mutation.start_pos < end for start, end in passed_over):
            by_place.setdefault(mutation.start_pos, []).append(mutation)
    generator = random.Random(seed)
    found = [generator.choice(by_place[place]) for place in sorted(by_place)]
    generator.shuffle(found)
    return found


def spans(tree: ast.AST) -> Iterable[tuple[tuple[int, int], tuple[int, int]]]:
    """Where annotations, which nobody evaluates, and decorators begin and end."""
    for node in ast.walk(tree):
        notes = (getattr(node, "annotation", None), getattr(node, "returns", None))
        for part in (*notes, *getattr(node, "decorator_list", ())):
            if part is not None:
                yield (part.lineno, part.col_offset), (part.end_lineno, part.end_col_offset)


def changed(before: str, after: str) -> str:
    """The lines that differ."""
    a, b = before.split("\n"), after.split("\n")
    first = next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    last = next(i for i, (x, y) in enumerate(zip(a[::-1], b[::-1], strict=False)) if x != y)
    return "\n".join([*(f"  - {x}" for x in a[first : len(a) - last]), *(f"  + {y}" for y in b[first : len(b) - last])])


def verdict(tests: Sequence[str], limit: float) -> int:
    """ALIVE if the tests pass here, KILLED if they do not, SLOW if they take more than ``limit`` seconds."""
    child = os.fork()
    if not child:
        try:
            os._exit(min(tested(tests), KILLED))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(KILLED)
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return ALIVE if status == 0 else KILLED
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return SLOW


def tested(tests: Sequence[str]) -> int:
    """Run tests in this process, and in nobody's sight."""
    import pytest

    os.setsid()
    with open(OUTPUT, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.dont_write_bytecode = True  # or a second mutant of the same size and second would be taken for the first
    sys.path[:0] = [os.getcwd()]
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    places = [f"tests/{t}" if Path("tests", t.partition("::")[0]).exists() else t for t in tests]
    options = ["-x", "-q", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib"]
    return int(pytest.main([*options, *places]))


if __name__ == "__main__":
    main()
