"""What the command line prints on terminals of any width, and where there is none."""

from __future__ import annotations

import io
import json
import sys

import pytest
from rich.console import Console
from rich.text import Text

from surgery.cli.output import Bars, Whole, emit, table
from surgery.deploy.curve.run_progress import PartProgress, RunProgress
from surgery.units import counted

BENCH = ["model", "p50 ms", "p90 ms", "p99 ms", "samples/s", "relative", "memory", "file", "parameters", "MACs"]
FIGURES = ["12.345", "13.456", "15.678", "1,234.5", "0.553 (0.549-0.557)", "145.3 MiB", "44.6 MiB", "11.18 M", "37.1 M"]
NAMES = ["runs/demo/rate-1", "runs/demo/rate-0.25", "runs/demo/rate-0.5/model.onnx"]
REASON = "add combines it with an axis that holds no channels; encoder.layers.encoder_layer_0 normalises over it"


def printed(made, width):
    console = Console(file=io.StringIO(), width=width)
    made.print(console)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


@pytest.mark.parametrize("count", [1, 2, 3, 40])
@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 120, 160])
def test_no_figure_is_cut_or_wrapped_however_narrow_the_terminal(width, count):
    rows = [[f"{NAMES[k % 3]}-{k}", *(f"{figure}.{k}" for figure in FIGURES)] for k in range(count)]
    lines = printed(table("", BENCH, rows), width)
    shown = "\n".join(lines)
    assert all(shown.count(figure) >= 1 for row in rows for figure in row[1:])
    assert "…" not in shown
    if width >= 60:
        assert max(map(len, lines)) <= width
        assert all(name in shown for name, *_ in rows)


def test_a_table_that_fits_has_a_line_for_each_row():
    assert printed(table("", ["name", "p50 ms", "why"], [["a", 1.5, "it is small"]], text=["why"]), 40) == [
        "name  p50 ms  why",
        "─────────────────────────",
        "a        1.5  it is small",
        "",
    ]


def test_headers_and_then_prose_are_folded_before_figures_move():
    rows = [["one", "11.18 M", "it is no layer's output"], ["two", "9.40 M", ""]]
    assert printed(table("", ["name", "parameters saved", "why"], rows, text=["why"]), 28) == [
        "      parameters",
        "name       saved  why",
        "────────────────────────────",
        "one      11.18 M  it is no",
        "                  layer's",
        "                  output",
        "two       9.40 M",
        "",
    ]


def test_few_rows_that_do_not_fit_are_turned():
    header = ["model", "p50 ms", "relative", "why"]
    rows = [["a.onnx", "12.345", "1", ""], ["b.onnx", "6.789", "0.553 (0.549-0.557)", "too noisy"]]
    assert printed(table("", header, rows, text=["why"]), 40) == [
        "model     a.onnx               b.onnx",
        "─────────────────────────────────────",
        "p50 ms    12.345                6.789",
        "relative       1  0.553 (0.549-0.557)",
        "why               too noisy",
        "",
    ]


def test_names_of_more_rows_than_can_stand_side_by_side_are_folded():
    rows = [[f"encoder.layers.encoder_layer_{k}.mlp.0", 3072, "4.72 M"] for k in range(20)]
    assert printed(table("", ["group", "size", "parameters"], rows), 44)[:4] == [
        "group                       size  parameters",
        "────────────────────────────────────────────",
        "encoder.layers.encoder_lay  3072      4.72 M",
        "er_0.mlp.0",
    ]


def test_many_rows_whose_figures_alone_do_not_fit_are_turned_in_blocks():
    rows = [[f"{k}.onnx", "11.18 M", "37.1 M", "44.6 MiB"] for k in range(5)]
    lines = printed(table("", ["model", "parameters", "MACs", "file"], rows), 31)
    assert lines[:6] == [
        "model         0.onnx    1.onnx",
        "──────────────────────────────",
        "parameters   11.18 M   11.18 M",
        "MACs          37.1 M    37.1 M",
        "file        44.6 MiB  44.6 MiB",
        "",
    ]
    assert lines[12] == "model         4.onnx"


class Terminal(io.StringIO):
    """What stdout is in a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def emitted(monkeypatch):
    """What `emit` prints in a terminal of 60 columns, without its styles."""

    def call(*tables):
        with monkeypatch.context() as patch:
            for name, value in {"COLUMNS": "60", "TERM": "xterm"}.items():
                patch.setenv(name, value)
            patch.setattr(sys, "stdout", Terminal())
            emit({}, False, *tables)
            return Text.from_ansi(sys.stdout.getvalue()).plain.rstrip()

    return call


def test_titles_stand_above_a_table_that_is_narrower(emitted):
    title = "layer4.0.conv3: 2048 channels, 2048 units, 9.40 M parameters, 361.71 M MACs"
    assert emitted(table(title, ["path"], [["add"]])) == f"{title}\npath\n────\nadd"


def test_the_width_is_that_of_the_terminal(emitted):
    lines = emitted(table("", BENCH, [[NAMES[0], *FIGURES], [NAMES[1], *FIGURES]])).splitlines()
    assert lines[0] == "model          runs/demo/rate-1  runs/demo/rate-0.25"
    assert lines[-1] == "MACs                     37.1 M               37.1 M"


def test_without_a_terminal_a_row_has_up_to_160_columns(capsys):
    emit({}, False, table("", BENCH, [[NAMES[0], *FIGURES]] * 2))
    assert f"{NAMES[0]}  12.345  13.456" in capsys.readouterr().out


def test_what_looks_like_markup_is_printed_as_it_is(capsys):
    emit({}, False, table("[b]a[/b]", ["path"], [["weight[x]"]]), note="written to [red]:smile:")
    assert capsys.readouterr().out == "[b]a[/b]\npath     \n─────────\nweight[x]\n\nwritten to [red]:smile:\n"


def test_inspect_shortens_a_reason_that_is_the_same_for_each_layer(run, module_in_folder):
    module_in_folder(
        "vit_factory",
        """
        from torchvision.models import VisionTransformer

        def vit():
            return VisionTransformer(32, 8, 6, 3, 24, 48, num_classes=10)
    """,
    )
    model = ["vit_factory:vit", "--trust", "--input-shape", "2,3,32,32"]
    code, out, _ = run("inspect", *model)
    assert code == 0
    shown = " ".join(out.split())
    assert "encoder.layers.encoder_layer_0.self_attention normalises over it; " in shown
    assert "; and 10 more" in shown
    assert "encoder_layer_5.self_attention normalises" not in shown
    groups = json.loads(run("inspect", *model, "--json")[1])["groups"]
    assert any("encoder_layer_5.self_attention normalises over it" in group["reason"] for group in groups)


def test_where_nothing_is_drawn_a_long_stage_says_now_and_then_how_far_it_is(monkeypatch, capsys):
    now = 1000.0
    monkeypatch.setattr("surgery.cli.output.monotonic", lambda: now)
    with Bars() as bars:
        for task, done, seconds in [
            ("train dense", 0, 0),
            ("train dense", 100, 20),
            ("train dense", 101, 10),
            ("all", 101, 40),
            ("train dense", 253, 0),
            ("train dense", 300, 29),
            ("train dense", 400, 40),
            ("fine-tune [0.5]", 0, 0),
            ("fine-tune [0.5]", 199, 29),
        ]:
            now += seconds
            bars(task, done, 400)
    assert capsys.readouterr().err == "train dense …\ntrain dense 25 %\ntrain dense 63 %\nfine-tune [0.5] …\n"


def test_on_a_narrow_terminal_bars_shorten_names_and_no_figures(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Bars() as bars:
        bars("fine-tune slim:layer4=0.5+deepen:layer3=1", 1, 4)
    last = Text.from_ansi(sys.stderr.getvalue()).plain.splitlines()[-1]
    assert last.startswith("fine-tune slim:laye… ")
    assert " 25% 0:00:00 time left -:--:--" in last


@pytest.mark.parametrize(("count", "said"), [(0, "0 epochs"), (1, "1 epoch"), (2, "2 epochs")])
def test_one_is_no_plural(count, said):
    assert counted(count, "epoch") == said


def test_an_epoch_is_a_line_with_its_loss_its_accuracy_if_known_and_its_rate(capsys):
    with Bars() as bars:
        whole = Whole({"train": 1.0}, bars)
        whole.epoch("train", 1, {"loss": 0.123456, "lr": 0.002, "images": 5, "seconds": 1.0})
        run = RunProgress({"rate-1: fine-tune": 1.0}, whole)
        part = PartProgress(run, "rate-1: fine-tune", ["hints", "distill"])
        part.epoch("distill", 2, {"loss": 1.0, "lr": 1e-5, "accuracy": 0.91234})
    assert capsys.readouterr().err.splitlines() == [
        "train, epoch 1: loss 0.1235, rate 0.002",
        "rate-1: fine-tune, distill, epoch 2: loss 1, accuracy 91.23%, rate 1e-05",
    ]


def test_progress_that_is_a_function_is_not_told_of_epochs():
    RunProgress({"train": 1.0}, lambda task, done, total: None).epoch("train", 1, {"loss": 1.0})
