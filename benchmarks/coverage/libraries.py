"""Models of the libraries that people bring, edited with numbers: transformers, segmentation-models-pytorch, diffusers.

    python -m benchmarks.coverage.libraries                          # benchmarks/results/coverage-libraries.{json,md}
    python -m benchmarks.coverage.libraries --library transformers   # the rows of one library anew
    python -m benchmarks.coverage.libraries --only ViT --only BERT   # some rows anew
    python -m benchmarks.coverage.libraries --missing                # what has no row yet
    python -m benchmarks.coverage.libraries --page                   # the table of docs/guide/tested.md anew, only

Each model of `library_models.py` is built from a configuration, in float64, with weights that are nowhere constant, and
traced as it is ("unedited"). The traced model is compared with the original, permuted, widened, slimmed (against the
dense model with the rest switched off), saved and loaded: outputs at two batch sizes, in evaluation and in training,
and in training the gradients of inputs and parameters too. The slim one is exported to ONNX and compared in ONNX
Runtime. Inside a module that returns a plain tensor ("wrapped") the model is traced, permuted and slimmed again. Errors
are relative. The MACs are those of the slim model over those of the dense one. Other families of timm are in
`timm_families.py`.

Each row is measured in a process of its own, ended at a limit of CPU seconds, and written as it comes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import signal
import tempfile
import time
import warnings
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

import surgery
from benchmarks.coverage.library_models import CASES, Case, Wrapper
from benchmarks.coverage.timm_families import randomise
from benchmarks.results_io import RESULTS, command, read_document, write_document

EXACT = 1e-9
PAGE = Path(__file__).parents[2] / "docs" / "guide" / "tested.md"
FORMS = ("unedited", "wrapped")
_NO_GRADIENTS = "all gradients are zero"
_NAME = "coverage-libraries.json"
_LONG = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", action="append", help="the models of this library; of all by default")
    parser.add_argument("--only", action="append", metavar="NAME", help="the models of this name")
    parser.add_argument("--missing", action="store_true", help="only what has no row yet")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"folder for {_NAME} and the table")
    parser.add_argument("--seconds", type=int, default=200, help="limit of one model, in seconds of CPU time")
    parser.add_argument("--page", action="store_true", help="write the table of the page in docs, and measure nothing")
    options = parser.parse_args()
    file = options.out / _NAME
    if options.page:
        PAGE.write_text(with_table(PAGE.read_text(), read_document(file)))
        return
    rows = {(r["model"], r["form"]): r for r in read_document(file)["models"]} if file.is_file() else {}
    chosen = [case for case in CASES if not options.library or case.library in options.library]
    chosen = [case for case in chosen if not options.only or case.name in options.only]
    if not chosen:
        raise SystemExit(f"no such model: {', '.join(sorted({case.name for case in CASES}))}")
    for case in chosen:
        for form in FORMS[: 2 if case.take else 1]:
            if options.missing and "missing" not in rows.get((case.name, form), {"missing": True}):
                continue
            row = run(case, form, options.seconds)
            rows[case.name, form] = row
            print(line(row), flush=True)
            write(options.out, rows)


def run(case: Case, form: str, seconds: int) -> dict[str, Any]:
    """The row of a model, measured in a process of its own, which is ended at its limit."""
    empty = {"library": case.library, "model": case.name, "form": form, "failures": {}}
    if find_spec(case.library) is None:
        return {**empty, "missing": f"{case.library} is not installed"}
    import_module(case.library)  # once, before there are processes
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "row.json"
        process = context.Process(target=_measure_in_process, args=(case, form, seconds, path))
        process.start()
        process.join()
        row: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else empty
    if "step" in row or row is empty:
        late = process.exitcode in (-signal.SIGKILL, -signal.SIGXCPU)
        ended = f"ended at the limit of {seconds} CPU seconds" if late else f"ended with code {process.exitcode}"
        row["failures"][row.pop("step", "start")] = ended
    return row


def _measure_in_process(case: Case, form: str, seconds: int, path: Path) -> None:
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    resource.setrlimit(resource.RLIMIT_CPU, (int(used) + seconds, int(used) + seconds + 5))
    warnings.filterwarnings("ignore")
    for row in measure(case, form):
        path.write_text(json.dumps(row))


def measure(case: Case, form: str) -> Iterator[dict[str, Any]]:
    """One row, again after each step. What raises is a failure of the row."""
    row: dict[str, Any] = {"library": case.library, "model": case.name, "form": form, "failures": {}}
    begin, this = time.process_time(), _Run(case, form, row)
    rest = (this.widen, this.load, this.export) if form == FORMS[0] else ()
    for step in (this.build, this.trace, this.groups, this.permute, this.slim, *rest):
        row["step"] = label = step.__name__
        yield row
        try:
            step()
        except Exception as error:  # whatever stands in the way is the finding
            row["failures"][label] = " ".join(f"{type(error).__name__}: {error}".split())[:_LONG]
            if label in ("build", "trace"):
                break
    row.pop("step")
    row["seconds"] = round(time.process_time() - begin, 1)
    yield row


class _Run:
    """One model and what is made of it, step by step."""

    def __init__(self, case: Case, form: str, row: dict[str, Any]) -> None:
        self.case, self.form, self.row = case, form, row
        self.outputs = case.wrapped_outputs if form == "wrapped" else case.outputs
        self.inputs = case.inputs(2, torch.Generator().manual_seed(1))
        self.args, self.kwargs = tree_map_only(torch.Tensor, _double, self.inputs)

    def make(self) -> nn.Module:
        torch.manual_seed(0)
        model = randomise(self.case.make()).double().eval()
        return Wrapper(model, self.case.take) if self.case.take and self.form == "wrapped" else model

    def build(self) -> None:
        self.model = self.make()
        self.row["params"] = sum(p.numel() for p in self.model.parameters())
        with torch.no_grad():
            self.model(*self.args, **self.kwargs)

    def trace(self) -> None:
        begin = time.perf_counter()
        self.traced = surgery.trace(self.model, self.args, kwargs=self.kwargs)
        self.row["trace_seconds"] = round(time.perf_counter() - begin, 1)
        self.row["whole"] = isinstance(self.traced, torch.fx.GraphModule)
        self._check("trace", self.traced, self.model)
        with torch.no_grad():
            found, expected = (type(m(*self.args, **self.kwargs)) for m in (self.traced, self.model))
        if found is not expected:
            self.row["failures"]["class"] = f"returns {found.__name__} instead of {expected.__name__}"

    def groups(self) -> None:
        groups = surgery.dimension_groups(self.traced)
        self.row["groups"], self.row["editable"] = len(groups), sum(group.editable for group in groups)
        held = surgery.held_back(self.traced, outputs=self.outputs)
        self.row["held_back"] = [str(one)[:_LONG] for one in held][:6]

    def permute(self) -> None:
        editable = [group for group in surgery.dimension_groups(self.traced) if group.editable]
        permuted = surgery.reindex(self.traced, {g.name: g.permutation(1) for g in editable})
        self._check("permute", permuted, self.traced)

    def widen(self) -> None:
        self._check("widen", surgery.widen(self.traced, self.case.factor), self.traced)

    def slim(self) -> None:
        outputs = self.outputs
        self.slimmed = surgery.slim(self.traced, 0.5, outputs=outputs)
        costs = [surgery.cost(m, self.args, kwargs=self.kwargs).macs for m in (self.slimmed, self.traced)]
        self.row["slim_macs"] = round(costs[0] / costs[1], 4)
        masks = surgery.split_masks(self.traced, 0.5, outputs=outputs)
        self._check("slim", self.slimmed, surgery.masked(self.traced, masks))
        if self.row["slim_macs"] > self.case.target:
            self.row["failures"]["MACs"] = f"{self.row['slim_macs']:.2f} at 0.5, not {self.case.target:.2f}"

    def load(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            surgery.save(self.slimmed, Path(folder) / "saved")
            loaded = surgery.load(Path(folder) / "saved", model=self.make())
        self._check("load", loaded.eval(), self.slimmed)

    def export(self) -> None:
        args, kwargs = self.inputs
        traced = surgery.trace(self.make().float(), args, kwargs=kwargs)
        slim = surgery.slim(traced, 0.5, outputs=self.outputs)
        with tempfile.TemporaryDirectory() as folder:
            done = surgery.export_onnx(slim, Path(folder) / "slim.onnx")
        self.row["export error"] = done.max_rel

    def _check(self, label: str, module: nn.Module, reference: nn.Module) -> None:
        """Compare in evaluation, and with gradients in training."""
        errors, batches = [], []
        for train in (False, True):
            check = surgery.verify(module, reference, self.args, kwargs=self.kwargs, train=train)
            if train and check.problem.startswith(_NO_GRADIENTS):
                continue  # token numbers have none, and every parameter that matters was cut
            errors += [check.max_rel, check.max_grad]
            batches.append(check.batches)
            if check.problem:
                self.row["failures"][label] = check.problem[:_LONG]
        self.row[f"{label} error"] = max(errors)
        self.row["batches"] = min(self.row.get("batches", 2), *batches)
        if not max(errors) <= EXACT and label not in self.row["failures"]:
            self.row["failures"][label] = f"differs by {max(errors):.0e}"


def _double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def line(row: dict[str, Any]) -> str:
    """One row for the terminal."""
    failures = "; ".join(f"{step}: {said}" for step, said in row["failures"].items())
    said = row.get("missing") or f"{row.get('slim_macs', '?')} of the MACs at 0.5, {row.get('seconds', '?')} s"
    return f"{row['library']} {row['model']} ({row['form']}): {said}{f'; FAILED {failures}' if failures else ''}"


def write(out: Path, rows: dict[tuple[str, str], dict[str, Any]]) -> None:
    """The results as JSON and as a table."""
    ordered = [rows[case.name, form] for case in CASES for form in FORMS if (case.name, form) in rows]
    document = {
        "command": command("coverage.libraries"),
        "versions": {name: _version(name) for name in ("torch", *dict.fromkeys(case.library for case in CASES))},
        "models": ordered,
    }
    write_document(out / _NAME, document)
    (out / _NAME).with_suffix(".md").write_text(markdown(document))


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "not installed"


def markdown(document: dict[str, Any]) -> str:
    """The table of all rows, and what is left alone in those that cost more than is asked for."""
    rows = document["models"]
    good = sum(not row["failures"] and "missing" not in row for row in rows)
    versions = ", ".join(f"{name} {number}" for name, number in document["versions"].items())
    text = (
        f"# Models of libraries\n\n`python -m benchmarks.coverage.libraries`; {versions}. {good} of {len(rows)} rows "
        "without a failure. Errors are relative, in float64 at two batch sizes, the largest of outputs and of the "
        "gradients of inputs and parameters; that of ONNX is in float32. MACs are those at rate 0.5, of the dense "
        "model's.\n\n| library | model | form | traced | groups (editable) | trace | permute | widen 2 | slim 0.5 "
        "| save, load | ONNX | MACs at 0.5 | failures |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|\n"
    )
    for row in rows:
        steps = ("trace", "permute", "widen", "slim", "load", "export")
        errors = " | ".join(f"{row[f'{s} error']:.0e}" if f"{s} error" in row else "" for s in steps)
        traced = {True: "whole", False: "in parts"}.get(row.get("whole"), "")  # type: ignore[call-overload]
        said = row.get("missing") or "; ".join(f"{step}: {why}" for step, why in row["failures"].items())
        text += (
            f"| {row['library']} | {row['model']} | {row['form']} | {traced} "
            f"| {row.get('groups', '')} ({row.get('editable', '')}) | {errors} | {row.get('slim_macs', '')} "
            f"| {said.replace('|', chr(92) + '|')} |\n"
        )
    for row in rows:
        if "MACs" in row["failures"]:
            text += f"\n- **{row['model']}** ({row['form']}): {'; '.join(row['held_back'][:4])}"
    return text.rstrip() + "\n"


_MARK = "<!-- the table is written by benchmarks.coverage.libraries --page -->\n"


def with_table(page: str, document: dict[str, Any]) -> str:
    """The page with the table of the results behind its mark."""
    return page.partition(_MARK)[0] + _MARK + "\n" + page_table(document)


def page_table(document: dict[str, Any]) -> str:
    """A short table: a row for each model, of both forms."""
    models: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in document["models"]:
        models.setdefault((row["library"], row["model"]), []).append(row)
    text = "| Library | Model | Largest error | ONNX error | MACs at 0.5 | Left to say |\n|---|---|---|---|---|---|\n"
    for (library, name), rows in models.items():
        steps = ("trace", "permute", "widen", "slim", "load")
        errors = [row[f"{step} error"] for row in rows for step in steps if f"{step} error" in row]
        exported = [f"{row['export error']:.0e}" for row in rows if "export error" in row]
        macs = " / ".join(dict.fromkeys(f"{row['slim_macs']:.2f}" for row in rows if "slim_macs" in row))
        said = {row.get("missing", "") for row in rows}
        said |= {f"{row['form']}, {step}: {why}" for row in rows for step, why in row["failures"].items()}
        if any(row.get("whole") is False for row in rows):
            said.add("traced in parts")
        text += (
            f"| {library} {document['versions'][library]} | {name} | {f'{max(errors):.0e}' if errors else ''} "
            f"| {', '.join(exported)} | {macs} | {'; '.join(sorted(said - {''})).replace('|', chr(92) + '|')} |\n"
        )
    return text


if __name__ == "__main__":
    main()
