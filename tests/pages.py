"""The pages of documentation: their code, what it is said to print, their headings and their links."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import surgery

ROOT = Path(__file__).parents[1]
_APART = ("README.md", "CONTRIBUTING.md", "examples/README.md")
PAGES = sorted([*(ROOT / name for name in _APART), *(ROOT / "docs").rglob("*.md")])
_SAYS = "# → "


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def run_python(text: str, name: str) -> list[str]:
    """Run the Python of a page from top to bottom, and return what each ``print`` prints.

    A ``print`` with ``# → text`` behind it, or on the next line, must be reached, and print that text; ``…`` stands for
    any. Rules, criteria and steps that the page defines are forgotten afterwards.
    """
    printed: list[str] = []
    names: dict[str, Any] = {"__name__": "__main__"}
    try:
        with surgery.restore_rules(), surgery.restore_importance():
            for number, block in enumerate(blocks("python", text), 1):
                said = dict(_promises(block))
                reached: set[int] = set()
                names["print"] = _checked_print(said, reached, printed, name)
                exec(compile(block, f"{name}, block {number}", "exec"), names)
                assert {text for at, text in said.items() if at not in reached} == set(), f"{name}: is never printed"
    finally:
        for step in [step for step in surgery.Step.known.values() if step.__module__ == "__main__"]:
            del surgery.Step.known[step.__name__]
    return printed


def _promises(block: str) -> Iterator[tuple[int, str]]:
    """The line of each ``print`` that is said to print a text, and the text."""
    for at, line in enumerate(block.splitlines(), 1):
        code, arrow, text = line.partition(_SAYS)
        if arrow:
            yield at if code.strip() else at - 1, text


def _checked_print(said: dict[int, str], reached: set[int], printed: list[str], name: str) -> Callable[..., None]:
    def show(*values: object) -> None:
        frame = inspect.currentframe()
        assert frame is not None
        assert frame.f_back is not None
        at, text = frame.f_back.f_lineno, " ".join(map(str, values))
        printed.append(text)
        reached.add(at)
        if at in said:
            pattern = ".*".join(map(re.escape, said[at].split("…")))
            assert re.fullmatch(pattern, text, flags=re.DOTALL), f"{name} says {said[at]!r}, and prints {text!r}"

    return show


def headings(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and the built pages have them."""
    found = re.findall("^#+ (.*)$", re.sub("^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", one.lower()).strip().replace(" ", "-") for one in found}


def links(text: str) -> list[str]:
    """The targets of a page's links and pictures that are not addresses."""
    prose = re.sub("^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return [one for one in re.findall(r"\]\(([^)\s]+)\)", prose) if not re.match(r"\w+:", one)]
