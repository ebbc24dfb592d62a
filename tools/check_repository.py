"""Static checks of the repository that no linter knows.

* Imports go down the floors of the house only (docs/index.md).
* Relative links in Markdown lead to existing files, and docs/index.md leads to every page of docs/.
* Every COACHHOOK_ variable in the sources is described in docs/environment.md, and the other way.

Prints one line per problem and ends with status 1 if there is one.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# A module may import from its own floor and from those below.
FLOORS = {
    "errors": 0,
    "_version": 0,
    "bundled": 0,
    "ops": 1,
    "hooks": 2,
    "models": 2,
    "store": 3,
    "statistics": 3,
    "editing": 3,
    "selftest": 4,
    "inspecting": 4,
    "evaluation": 4,
    "integrations": 4,
    "bench": 4,
    "doctor": 5,
    "cli": 5,
}
# Within a floor, the first may not know the second.
FORBIDDEN = {("models", "hooks"), ("store", "editing"), ("statistics", "editing")}

VARIABLE = re.compile(r"\bCOACHHOOK_[A-Z][A-Z_]+\b")
# Macros of the C++ sources and their build, not switches of the environment.
MACROS = re.compile(
    r"COACHHOOK_(REQUIRE|LAUNCH(_OVERLAPPED|_SHARED)?|HOST_SHIM|VERSION|ARCHITECTURES)$"
)
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")


def tracked(*suffixes: str) -> list[Path]:
    """Files of the repository that git would keep, by ending."""
    listing = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listing.returncode == 0:
        paths = [ROOT / line for line in listing.stdout.splitlines()]
    else:  # an unpacked source archive
        everything = (p for p in ROOT.rglob("*") if p.is_file())
        hidden = re.compile(r"(^|/)(\.|build/|dist/)")
        paths = [p for p in everything if not hidden.search(p.relative_to(ROOT).as_posix())]
    return sorted(p for p in paths if p.is_file() and p.name.endswith(suffixes))


def room(module: str) -> str | None:
    """``ops`` for ``coachhook.ops.cholesky``; None for the package itself and for strangers."""
    parts = module.split(".")
    return parts[1] if parts[0] == "coachhook" and len(parts) > 1 else None


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything a module of the package imports from the package."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            if module == "coachhook":
                yield from ((node.lineno, f"coachhook.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, module


def check_imports() -> Iterator[str]:
    """Floors of the house."""
    for path in tracked(".py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        importer = room(name)
        if importer is None or importer in ("__init__", "__main__"):
            continue
        if importer not in FLOORS:
            yield f"{path.relative_to(ROOT)}: {importer} has no floor in {Path(__file__).name}"
            continue
        for line, module in imports(path):
            imported = room(module)
            if imported not in FLOORS:
                continue
            up = FLOORS[imported] > FLOORS[importer]
            if up or (importer, imported) in FORBIDDEN:
                yield f"{path.relative_to(ROOT)}:{line}: {importer} must not import {imported}"


def check_links() -> Iterator[str]:
    """Relative links of the documentation."""
    for path in tracked(".md"):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            for target in LINK.findall(line):
                if "://" in target or target.startswith("mailto:"):
                    continue
                if not (path.parent / target).exists():
                    yield f"{path.relative_to(ROOT)}:{number}: link to missing {target}"


def check_pages() -> Iterator[str]:
    """Pages of docs/ that nobody finds."""
    pages = {p for p in tracked(".md") if p.is_relative_to(ROOT / "docs")}
    reached: set[Path] = set()
    todo = {ROOT / "docs" / "index.md"}
    while todo:
        page = todo.pop()
        reached.add(page)
        targets = LINK.findall(page.read_text(encoding="utf-8"))
        todo |= {(page.parent / t).resolve() for t in targets} & pages - reached
    for page in sorted(pages - reached):
        yield f"{page.relative_to(ROOT)}: no link leads here from docs/index.md"


def check_environment() -> Iterator[str]:
    """Switches of the environment against their page."""
    page = ROOT / "docs" / "environment.md"
    if not page.is_file():
        yield "docs/environment.md is missing"
        return
    documented = set(VARIABLE.findall(page.read_text(encoding="utf-8")))
    used: dict[str, str] = {}
    for path in tracked(".py", ".cu", ".cuh", ".h", ".cpp", ".sh", "Makefile", "run"):
        if path == Path(__file__).resolve() or "tests" in path.relative_to(ROOT).parts:
            continue
        for name in VARIABLE.findall(path.read_text(encoding="utf-8")):
            if not MACROS.match(name):
                used.setdefault(name, str(path.relative_to(ROOT)))
    for name in sorted(used.keys() - documented):
        yield f"{used[name]}: {name} is not described in docs/environment.md"
    for name in sorted(documented - used.keys()):
        yield f"docs/environment.md: {name} is used nowhere"


def main() -> int:
    """Run all checks."""
    problems = [*check_imports(), *check_links(), *check_pages(), *check_environment()]
    for problem in problems:
        print(problem)
    if not problems:
        print("repository: imports, links and environment switches are in order")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
