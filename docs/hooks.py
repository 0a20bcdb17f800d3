"""What `mkdocs build` needs to know about links that leave this folder.

The pages are read in the repository too, where ``../benchmarks/results/x.md`` is a link like any other. The site gets a
copy of the results and of the guide for contributors; a link to any other file or folder becomes its path.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[1]
COPIED = [ROOT / "CONTRIBUTING.md", *sorted((ROOT / "benchmarks" / "results").glob("*.md"))]
COPIED += sorted((ROOT / "benchmarks" / "results").glob("*.png"))
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the copied files, at their paths in the repository."""
    for path in COPIED:
        place = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, place, abs_src_path=str(path), inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Point links to copied files at the copies, and write out the paths of what the site lacks."""
    copied = page.file.src_uri in {path.relative_to(ROOT).as_posix() for path in COPIED}
    folder = posixpath.dirname(page.file.src_uri if copied else f"docs/{page.file.src_uri}")

    def mend(found: re.Match[str]) -> str:
        image, text, target, anchor = found[1], found[2], found[3], found[4] or ""
        if "://" in target:
            return found[0]
        place = posixpath.normpath(posixpath.join(folder, target))
        here = place.removeprefix("docs/")
        if files.get_file_from_path(here) is None:
            return text if text.strip("`") == place else f"{text} (`{place}`)"
        return f"{image}[{text}]({posixpath.relpath(here, posixpath.dirname(page.file.src_uri) or '.')}{anchor})"

    parts = re.split(r"(^```.*?^```)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else LINK.sub(mend, part) for part in parts)
