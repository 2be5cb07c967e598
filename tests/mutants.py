"""Changes one thing at a time in the library's functions, and shows the changes that no test notices.

    python tests/mutants.py [--files 'objectives/*'] [--tests objectives] [--sample 40] [--seed 0] [--workers 2]

mutmut makes the mutants. Here torch and the tests are imported once, each mutant runs in a fork, and only the tests
that reach the mutated function run, until one fails. `equivalent_mutants.toml` lists what no test can notice, and why.
"""

import argparse
import difflib
import gc
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "mutants"
FILES = ["objectives/*.py", "measures/*.py", "routing/*.py", "ensemble/head.py", "ensemble/storage.py"]
TESTS = ["objectives", "measures", "routing", "ensemble", "training/test_routed_steps.py"]


def forked(work, limit: float) -> tuple[int, Path]:
    """Run `work` in a child that is killed after `limit` seconds, and return its id and the folder of its result."""
    folder = Path(tempfile.mkdtemp(dir=BUILD / "tmp"))
    if child := os.fork():
        return child, folder
    os.setsid()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        os.environ["PYTEST_DEBUG_TEMPROOT"] = os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1), os.dup2(silent, 2)
        (folder / "result.json").write_text(json.dumps(work()))
    finally:
        os._exit(0)


def result_of(folder: Path):
    """What the child returned; "died" if it was killed."""
    file = folder / "result.json"
    result = json.loads(file.read_text()) if file.is_file() else "died"
    shutil.rmtree(folder, ignore_errors=True)
    return result


class Driver:
    """A pytest plugin that runs the collected tests for each mutant, in place of once."""

    def __init__(self, mutants: dict[str, str], workers: int):
        self.mutants, self.workers, self.outcomes = mutants, workers, {}
        self.reached, self.of_module = set(), defaultdict(set)

    def pytest_runtest_makereport(self, item, call) -> None:
        from mutmut.state import state

        (self.of_module[item.path] if call.when == "setup" else self.reached).update(state()._stats)
        state()._stats.clear()

    def run(self, items) -> dict:
        from _pytest.runner import runtestprotocol

        for item, following in zip(items, [*items[1:], None], strict=True):
            began = time.perf_counter()
            self.reached.clear()
            reports = runtestprotocol(item, nextitem=following, log=False)
            yield item, any(r.failed for r in reports), time.perf_counter() - began

    def watch(self, items) -> dict:
        os.environ["MUTANT_UNDER_TEST"] = "stats"
        return {
            item.nodeid: (failed, seconds, sorted(self.reached | self.of_module[item.path]))
            for item, failed, seconds in self.run(items)
        }

    def test(self, mutant: str, items) -> str | None:
        os.environ["MUTANT_UNDER_TEST"] = mutant
        return next((item.nodeid for item, failed, _ in self.run(items) if failed), None)

    def pytest_runtestloop(self, session) -> bool:
        gc.collect()
        gc.freeze()  # a collection in a child would copy the memory of all the libraries
        child, folder = forked(lambda: self.watch(session.items), limit=3600)
        os.waitpid(child, 0)
        seen = result_of(folder)
        usable = [item for item in session.items if not seen[item.nodeid][0]]
        print(
            "\nleft out, as they fail with mutmut's wrappers:",
            {i.name for i in session.items} - {i.name for i in usable},
        )
        by_function = defaultdict(list)
        for item in usable:
            for function in seen[item.nodeid][2]:
                by_function[function].append(item)
        waiting, running = list(self.mutants), {}
        while waiting or running:
            while waiting and len(running) < self.workers:
                name = waiting.pop(0)
                items = by_function[name.partition("__mutmut_")[0]]
                home = name.split(".")[1]
                items = sorted(items, key=lambda item: (home not in item.path.parts, seen[item.nodeid][1]))
                limit = 20 + 10 * sum(seen[item.nodeid][1] for item in items)
                child, folder = forked(lambda mutant=name, chosen=items: self.test(mutant, chosen), limit)
                running[child] = name, folder, len(items)
            child, _ = os.wait()
            name, folder, reaching = running.pop(child)
            killer = result_of(folder)
            self.outcomes[name] = killer or ("survived" if reaching else "untested")
            print("." if killer else "", end="" if len(self.outcomes) % 100 else f" {len(self.outcomes)}\n", flush=True)
            if killer is None:
                print(
                    f"\n{self.outcomes[name]} {reaching} tests, {name}\n{self.mutants[name]}",
                    flush=True,
                )
        return True


def changes(made, name: str) -> tuple[str, str]:
    """The lines that a mutant replaces, and its own."""
    source, function = made.code.splitlines(), name.partition("__mutmut_")[0]
    spans = [made.line_span_by_function_name[each] for each in (f"{function}__mutmut_orig", name)]
    old, new = (
        [line.replace("__mutmut_orig", "").replace(name, function) for line in source[s.start - 1 : s.end]]
        for s in spans
    )
    lines = [line for line in difflib.ndiff(old, new) if line[0] in "-+"]
    return tuple(" ".join(line[1:].strip() for line in lines if line[0] == sign) for sign in "-+")


def is_left_out(old: str, new: str) -> bool:
    """Whether a mutant only changes the letters of a text with spaces in it (a message), a zip's strictness, or utf-8.

    The tests run on systems that take utf-8 in any case.
    """
    without = [re.sub(r',? *(encoding=(None|"[^"]*"))?\)', ")", text) for text in (old, new)]
    if without[0] == without[1]:
        return True
    if marked := re.search("XX(.*)XX", new):
        return " " in marked[1]
    if new in [old.replace("strict=True", other) for other in ("strict=None", "strict=False", "")]:
        return True
    return old.lower() == new.lower() and any(" " in text for text in re.findall('"([^"]*)"', old))


def function_of(mutant: str) -> str:
    """The name of the function that a mutant changes, as it stands in the source."""
    return mutant.partition("__mutmut_")[0].replace(".x_", ".").replace(".xǁ", ".").replace("ǁ", ".")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", nargs="+", default=FILES, help="patterns in src/renyi")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="files or folders in tests")
    parser.add_argument("--sample", type=int, help="so many mutants of each file; all by default")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--workers", type=int, default=1, help="mutants that run at a time")
    parser.add_argument("--results", type=Path, help="a file for each mutant's outcome, in json")
    parser.add_argument("--only", type=Path, help="such a file: only its mutants that survived run")
    given = parser.parse_args()
    os.chdir(ROOT)
    import pytest
    from mutmut.configuration import config
    from mutmut.mutation.file_mutation import mutate_file_contents

    config()
    shutil.rmtree(BUILD, ignore_errors=True)
    shutil.copytree(ROOT / "src", BUILD / "src", ignore=shutil.ignore_patterns("__pycache__"))
    (BUILD / "tmp").mkdir()
    with open(ROOT / "tests" / "equivalent_mutants.toml", "rb") as file:
        known = {(each["function"], each["from"], each["to"]) for each in tomllib.load(file)["mutant"]}
    survived = json.loads(given.only.read_text()) if given.only else {}
    table, mutants = {}, {}
    for file in sorted(f for pattern in given.files for f in (ROOT / "src" / "renyi").glob(pattern)):
        module = ".".join(file.relative_to(ROOT / "src").with_suffix("").parts)
        made = mutate_file_contents(str(file), file.read_text(encoding="utf-8"))
        (BUILD / file.relative_to(ROOT)).write_text(made.code, encoding="utf-8")
        diffs = {f"{module}.{name}": changes(made, name) for name in made.mutant_names}
        diffs = {name: diff for name, diff in diffs.items() if not is_left_out(*diff)}
        chosen = random.Random(given.seed).sample(sorted(diffs), min(given.sample or len(diffs), len(diffs)))
        if given.only:
            chosen = [name for name in diffs if survived.get(name) in ("survived", "untested")]
        diffs, total = {name: diffs[name] for name in sorted(chosen)}, len(diffs)
        same = {n for n, (old, new) in diffs.items() if (function_of(n), old, new) in known}
        mutants |= {
            n: f"[[mutant]]\nfunction = \"{function_of(n)}\"\nfrom = '''{old}'''\nto = '''{new}'''\nbecause = \"\""
            for n, (old, new) in diffs.items()
            if n not in same
        }
        table[module] = {"mutants": total, "chosen": len(chosen), "equivalent": len(same)}
    sys.path.insert(0, str(BUILD / "src"))
    os.environ |= {"PYTHONPATH": str(BUILD / "src"), "OMP_NUM_THREADS": "1", "MUTANT_UNDER_TEST": ""}
    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(BUILD / "hypothesis")
    driver, began = Driver(mutants, given.workers), time.perf_counter()
    tests = [str(ROOT / "tests" / name) for name in given.tests]
    pytest.main(["-q", "-s", "-p", "no:cacheprovider", "-m", "not slow", *tests], plugins=[driver])
    if given.results:
        given.results.write_text(json.dumps(driver.outcomes, indent=1))
    print("\n| module | mutants | chosen | equivalent | killed | survived | untested |\n|---|---|---|---|---|---|---|")
    for module, row in table.items():
        ends = Counter(o for name, o in driver.outcomes.items() if name.rpartition(".")[0] == module)
        left = ends["survived"], ends["untested"]
        print("|", " | ".join(map(str, [module, *row.values(), ends.total() - sum(left), *left])), "|")
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
