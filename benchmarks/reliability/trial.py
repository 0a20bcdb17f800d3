"""One trial: damage a file, read it, and say what came of it."""

from __future__ import annotations

import json
import random
import resource
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

import surgery
from benchmarks.reliability.artefacts import Artefact
from benchmarks.reliability.mutations import mutate_bytes, mutate_json
from surgery.storage.documents import sign


@dataclass(frozen=True)
class Outcome:
    """What reading a damaged file led to.

    ``kind`` is ``refused`` (an error of the package), ``same`` (the undamaged result), ``other`` (another result, of a
    file whose digests its writer made to fit), ``silent`` (another result in spite of the digests), ``raw`` (any other
    error) or ``fetched``.
    """

    kind: str
    seconds: float
    mebibytes: float
    said: str = ""


def attempt(artefact: Artefact, original: Path, scratch: Path, expected: list[torch.Tensor], seed: int) -> Outcome:
    """Copy the artefact, damage one of its files by a random way, and read it."""
    draw = random.Random(seed)
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(original, scratch)
    file = next(scratch.glob(draw.choice(artefact.files)))
    content = file.read_bytes()
    resigned = False
    if file.suffix == ".json" and draw.random() < 0.75:
        damaged = mutate_json(json.loads(content), draw)
        resigned = isinstance(damaged, dict) and draw.random() < 0.67
        changed = json.dumps(sign(damaged) if resigned else damaged, indent=1).encode()
    else:
        changed = mutate_bytes(content, draw)
    file.write_bytes(changed)
    before, started = _peak(), time.perf_counter()
    kind, said = _read(artefact, scratch, expected, resigned)
    return Outcome(kind, time.perf_counter() - started, _peak() - before, said)


def _read(artefact: Artefact, folder: Path, expected: list[torch.Tensor], resigned: bool) -> tuple[str, str]:
    try:
        with warnings.catch_warnings(), _nothing_fetched():
            warnings.simplefilter("ignore")
            found = artefact.read(folder)
    except surgery.SurgeryError as error:
        return "refused", " ".join(str(error).split())[:200]
    except Fetched as error:
        return "fetched", str(error)
    except Exception as error:  # what this benchmark looks for
        return "raw", f"{type(error).__name__}: {error}"[:200]
    same = len(found) == len(expected) and all(map(torch.equal, found, expected))
    return "same" if same else "other" if resigned else "silent", ""


class Fetched(BaseException):
    """Something was fetched."""


@contextmanager
def _nothing_fetched() -> Iterator[None]:
    def fetch(url: str, *_: object, **__: object) -> None:
        raise Fetched(url)

    places = [(torch.hub, "load_state_dict_from_url"), (torch.hub, "download_url_to_file")]
    before = [getattr(module, name) for module, name in places]
    for module, name in places:
        setattr(module, name, fetch)
    try:
        yield
    finally:
        for (module, name), own in zip(places, before, strict=True):
            setattr(module, name, own)


def _peak() -> float:
    """The most memory that this process has held, in MiB: it never falls, so that a rise is of the trial."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
