"""The command line: what it prints where, and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from urllib.error import URLError

import pytest
import torch

import surgery
from surgery.cli import main
from surgery.deploy.measure.ratios import fewest_sessions

VERBS = [
    "models", "inspect", "widen", "deepen", "shorten", "slim", "compress", "distill", "evolve", "export", "bench",
    "tradeoff", "sensitivity", "verify",
]  # fmt: skip
SMALL = "squeezenet1_1?num_classes=10"
PIXELS = ["--input-shape", "2,3,32,32"]


@pytest.fixture(autouse=True)
def empty_folder(module_in_folder):
    """Each command runs in a folder of its own, in which a factory of the user's can be imported."""
    code = """
        from torch import nn

        def tiny():
            return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
                                 nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10))

        def pooled():
            return nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    """
    return module_in_folder("cli_factory", code)


TINY = ["cli_factory:tiny", "--trust"]
TINY_PIXELS = ["--input-shape", "2,3,8,8"]


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_help_with_an_example(run, verb):
    code, out, err = run(verb, "--help")
    assert (code, err) == (0, "")
    assert f"Example: surgery {verb}" in " ".join(out.split())


def test_the_help_lists_every_verb_and_is_what_no_arguments_give(run):
    code, out, _ = run("--help")
    assert code == 0
    assert all(f" {verb} " in out for verb in VERBS)
    assert run()[1] == out


def test_models_are_listed_with_what_is_published_of_them(run):
    code, out, _ = run("models", "resnet*")
    assert code == 0
    assert "resnet152" in out
    assert "vgg11" not in out
    listed = {model["name"]: model for model in json.loads(run("models", "--json")[1])["models"]}
    assert listed.keys() == {**surgery.models.CATALOGUE, **surgery.models.FITNETS}.keys()
    resnet = listed["resnet18"]
    assert (resnet["params"], resnet["input_size"]) == (11_689_512, [3, 224, 224])
    assert (resnet["score"], listed["quantized_resnet18"]["score"]) == ("69.8% top-1", "69.8% top-1")
    assert listed["r3d_18"]["input"] == "video 3x16x112x112"
    assert listed["maskrcnn_resnet50_fpn"]["score"] == "37.9 box mAP"
    assert "targets: boxes, labels, masks" in listed["maskrcnn_resnet50_fpn"]["notes"]


def test_models_can_be_listed_by_family(run):
    listed = json.loads(run("models", "--family", "swin*", "--json")[1])["models"]
    assert {model["family"] for model in listed} == {"Swin Transformer", "Swin Transformer v2", "Swin Transformer 3D"}
    listed = json.loads(run("models", "*_s", "--family", "swin transformer", "--json")[1])["models"]
    assert [model["name"] for model in listed] == ["swin_s"]


def test_inspect_shows_groups_and_cost(run):
    code, out, err = run("inspect", SMALL, *PIXELS)
    assert (code, err) == (0, "")
    assert "features.3.squeeze" in out
    figures = json.loads(run("inspect", SMALL, *PIXELS, "--json")[1])
    assert figures["source"] == "torchvision:squeezenet1_1?num_classes=10"
    assert figures["params"] == sum(p.numel() for p in surgery.models.build(SMALL).parameters())
    assert figures["groups"][0]["editable"]


def test_inspect_shows_the_members_of_one_group(run):
    code, out, _ = run("inspect", *TINY, *TINY_PIXELS, "--group", "0")
    assert code == 0
    assert "5.weight" in out
    assert "consumer" in out
    members = json.loads(run("inspect", *TINY, *TINY_PIXELS, "--group", "0", "--json")[1])["members"]
    assert {"name": "5.weight", "axis": 1, "role": "consumer"} in members


@pytest.mark.parametrize(
    ("arguments", "grows"),
    [
        (["widen", "--width", "1.5"], True),
        (["widen", "--width", "0=12", "--round-to", "4"], True),
        (["deepen", "--at", "0", "--at", "2=1"], True),
        (["deepen", "--at", "0", "--form", "layer", "--kernel", "1,5"], True),
        (["slim", "--rate", "0.5"], False),
        (["slim", "--rate", "0=0.25"], False),
        (["slim", "--rate", "nn.Conv2d=0.25"], False),
        (["deepen", "--at", "[01]*=1"], True),
    ],
)
def test_an_operation_writes_a_verified_model_that_loads(run, arguments, grows):
    verb, *options = arguments
    code, out, err = run(verb, *TINY, *TINY_PIXELS, *options, "--out", "made", "--json")
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert result["verification"]["ok"]
    assert (result["after"]["params"] > result["before"]["params"]) is grows
    loaded = surgery.load("made", trust=True)
    assert sum(p.numel() for p in loaded.parameters()) == result["after"]["params"]
    assert surgery.recipe(loaded).steps


def test_shorten_removes_blocks_by_name_and_by_number(run):
    options = ("resnet18?num_classes=3", "--input-shape", "1,3,32,32")
    code, out, err = run("shorten", *options, "--at", "layer1=1", "--at", "layer3.0", "--out", "made", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["verification"]["ok"]
    removed = [step.name for step in surgery.recipe(surgery.load("made")).steps]
    assert removed == ["layer3.0", "layer1.1"]


def test_an_operation_says_what_it_did(run):
    code, out, err = run("slim", *TINY, *TINY_PIXELS, "--rate", "0.5", "--out", "made")
    assert (code, err) == (0, "")
    assert "before" in out
    assert "verified in float64" in out
    assert "saved to made" in out
    assert "not verified" in run("slim", *TINY, *TINY_PIXELS, "--rate", "0.5", "--out", "raw", "--no-verify")[1]


def test_outputs_are_let_go_by_name_and_the_command_says_what_is_left_of_them(run):
    narrow = ["--rate", "0.5", "--outputs", "free"]
    code, out, err = run("slim", *TINY, *TINY_PIXELS, *narrow, "--out", "made")
    assert (code, err) == (0, "")
    assert "verified in float64" in out
    assert "output output: 5 along axis 1 (changed)" in out
    assert surgery.outputs(surgery.load("made", trust=True))[0].kept == {1: (0, 1, 2, 3, 4)}
    code, out, _ = run("verify", "made", *TINY, *TINY_PIXELS)
    assert code == 1  # the others are not switched off there
    shown = json.loads(run("slim", *TINY, *TINY_PIXELS, *narrow, "--dry-run", "--json")[1])
    assert shown["outputs"] == [{"name": "output", "channels": {"1": 5}, "kept": {"1": [*range(5)]},
                                 "modes": [False, True]}]  # fmt: skip
    wide = ["widen", *TINY, *TINY_PIXELS, "--width", "5=12", "--outputs", "output", "--out", "wide"]
    assert run(*wide)[0] == 0
    assert run("verify", "wide", *TINY, *TINY_PIXELS)[0] == 0
    code, _, err = run("slim", *TINY, *TINY_PIXELS, "--rate", "0.5", "--outputs", "logits", "--out", "other")
    assert code == 2
    assert err.startswith("error: unknown output 'logits'")


def test_a_saved_model_can_be_operated_on_again(run):
    run("widen", *TINY, *TINY_PIXELS, "--width", "2.0", "--out", "wide")
    code, _, _ = run("slim", "wide", "--trust", "--rate", "0.5", "--out", "slim")
    assert code == 0
    assert len(surgery.recipe(surgery.load("slim", trust=True)).steps) == 2


def test_force_replaces_a_saved_model_but_no_other_folder(run, empty_folder):
    slim = ["slim", *TINY, *TINY_PIXELS, "--out", "made"]
    assert run(*slim, "--rate", "0.5")[0] == 0
    assert run(*slim, "--rate", "0.25", "--force")[0] == 0
    (empty_folder / "other").mkdir()
    (empty_folder / "other" / "thesis.txt").write_text("years of work")
    code, _, err = run("slim", *TINY, *TINY_PIXELS, "--rate", "0.5", "--out", "other", "--force")
    assert (code, err) == (
        2,
        "error: other is not replaced: it holds no recipe.json, so it was not made by this command\n",
    )


def test_verify_ends_with_0_for_equal_models_and_1_for_different_ones(run):
    run("widen", *TINY, *TINY_PIXELS, "--width", "2.0", "--out", "wide")
    run("slim", *TINY, *TINY_PIXELS, "--rate", "0.5", "--out", "slim")
    code, out, err = run("verify", "wide", "cli_factory:tiny", "--trust", "--json")
    assert (code, err, json.loads(out)["ok"]) == (0, "", True)
    assert run("verify", "cli_factory:tiny", "wide", "--trust")[0] == 0
    code, out, err = run("verify", "slim", "wide", "--trust")
    assert code == 1
    assert "slim and wide are different" in out
    assert err.startswith("error: outputs differ by ")
    assert err.count("\n") == 1


def test_export_writes_a_file_that_bench_can_measure(run):
    code, out, err = run("export", *TINY, *TINY_PIXELS, "--out", "tiny.onnx", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["batches"] == [1, 2, 3]
    code, out, err = run("bench", "tiny.onnx", "--min-runs", 5, "--min-seconds", 0, "--threads", 1, "--json")
    assert (code, err) == (0, "")
    result = json.loads(out)["results"]["tiny.onnx"]
    assert len(result["samples_ms"]) >= 5
    assert result["params"] == 8 * 27 + 8 + 16 + 1280 + 10
    code, out, _ = run(
        "bench", TINY[0], "--trust", *TINY_PIXELS, "--runtime", "torch", "--min-runs", 5, "--min-seconds", 0
    )
    assert code == 0
    assert "torch on cpu, batch 1" in out


def test_a_detection_model_is_exported_for_one_image_or_for_as_many_as_are_given(run):
    few = "min_size=64&max_size=96&rpn_post_nms_top_n_test=8&box_detections_per_img=4&box_score_thresh=0"
    model = f"fasterrcnn_mobilenet_v3_large_320_fpn?{few}"
    code, out, _ = run("export", model, "--out", "one.onnx")
    assert code == 0
    assert out.startswith("one.onnx: ")
    assert "by torchscript; open axes: none; relative difference to torch of " in out
    assert out.endswith(" at batch 1\n")
    code, out, _ = run("export", model, "--input-shape", "2,3,64,96", "--dynamic-size", "--out", "two.onnx", "--json")
    assert json.loads(out)["batches"] == [2]
    assert json.loads(out)["image_sizes"] == [[96, 160]]
    assert run("export", model, "--input-shape", "2,3,64,96", "--exporter", "onnx", "--out", "three.onnx")[0] == 2


def test_bench_compares_at_several_batch_sizes_and_checks_the_machine_against_itself(run):
    quick = ["--min-runs", 1, "--min-seconds", 0, "--threads", 1, "--sessions", 6]
    assert run("export", *TINY, *TINY_PIXELS, "--out", "tiny.onnx")[0] == 0
    code, out, _ = run("bench", "tiny.onnx", "--batch-size", "1,3", *quick, "--json")
    assert code == 0
    measured = json.loads(out)["batch_sizes"]
    assert [measured[size]["results"]["tiny.onnx"]["batch_size"] for size in ("1", "3")] == [1, 3]
    assert measured["1"]["check"]["sessions"] == 6
    code, out, _ = run("bench", "tiny.onnx", *quick)
    assert code == 0
    assert ("1 thread; A/A " in out) != ("cannot be told apart in this run" in out)  # one fact, once


def test_bench_says_that_models_were_given_images_of_different_sizes(run):
    quick = ["--min-runs", 1, "--min-seconds", 0, "--threads", 1, "--sessions", 6]
    for size in (8, 12):
        shape = f"2,3,{size},{size}"
        assert run("export", "cli_factory:pooled", "--trust", "--input-shape", shape, "--out", f"{size}.onnx")[0] == 0
    note = "note: the models were measured on inputs of different shapes"
    assert f"{note}: 8.onnx 1 x 3 x 8 x 8, 12.onnx 1 x 3 x 12 x 12\n" in run("bench", "8.onnx", "12.onnx", *quick)[1]
    assert note not in run("bench", "8.onnx", *quick)[1]


def test_tradeoff_prints_a_table_and_keeps_the_exact_command(run, empty_folder):
    options = ["--dataset", "digits", "--split-rates", "1.0,0.5", "--limit", "64", "--threads", "1"]
    short = ["--epochs", "1", "--finetune-epochs", "1", "--out", "runs/demo"]
    code, out, err = run("tradeoff", *TINY, *options, *short)
    assert code == 0
    assert "split rate" in out
    files = ("tradeoff.png", "tradeoff.html", "tradeoff.csv", "tradeoff.json", "report.md", "history.csv")
    assert f"written to runs/demo: {', '.join(files)}, rate-1" in out
    assert "train dense …" in err
    command = "surgery tradeoff cli_factory:tiny --trust --dataset digits --split-rates 1.0,0.5 --limit 64"
    assert command in (empty_folder / "runs" / "demo" / "report.md").read_text()
    # What it saved is a model like any other; it goes through the same command, as it is, and into the same folder.
    code, out, _ = run(
        "tradeoff", "runs/demo/rate-0.5", "--trust", *options, *short, "--epochs", "0", "--force", "--json"
    )
    assert code == 0
    assert json.loads(out)["settings"]["epochs"] == 0


def no_network(*_, **__):
    raise URLError("Name or service not known")


OUT = ["--out", "made"]
TRADEOFF = ["tradeoff", SMALL, "--dataset", "digits", "--out", "made"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["models", "--family", "resnets"], "unknown family 'resnets'; did you mean 'ResNet'"),
        (["models", "swin*", "--family", "VGG"], "unknown model 'swin*'"),
        (
            ["inspect", "swin_t", "--input-shape", "3,224"],
            "model 'swin_t' takes inputs of the form N,C,H,W, not 3,224\n",
        ),
        (
            ["inspect", "vit_b_32", *PIXELS],
            "model 'vit_b_32' is built for inputs of 224 x 224, not 32 x 32; image_size=",
        ),
        (
            ["inspect", "quantized_resnet18?quantize=true"],
            "'quantized_resnet18' cannot be built with quantize=true: int8",
        ),
        (["slim", "resnet19", "--rate", "0.5", *OUT], "unknown model 'resnet19'; did you mean 'resnet18',"),
        (["inspect", "runs/nothing"], "there is no saved model at runs/nothing\n"),
        (["inspect", "cli_factory:tiny"], "'cli_factory:tiny' would import and run code: pass --trust"),
        (["inspect", "resnet18?colour=red"], "model 'resnet18' cannot be built with colour=red: "),
        (
            ["inspect", SMALL, *PIXELS, "--group", "features.3.squeez"],
            "unknown group 'features.3.squeez'; did you mean ",
        ),
        (["slim", SMALL, *PIXELS, "--rate", "featurs=0.5", *OUT], "unknown layer 'featurs'; did you mean 'features'"),
        (["widen", SMALL, *PIXELS, "--width", "clasifier.1=2.0", *OUT], "unknown layer 'clasifier.1'; did you mean "),
        (["deepen", SMALL, *PIXELS, "--at", "fc=1", *OUT], "unknown layer 'fc'"),
        (
            ["deepen", SMALL, *PIXELS, "--at", "fc=1.5", *OUT],
            "--at 'fc=1.5' is not of the form LAYER=COUNT, a whole number",
        ),
        (["deepen", SMALL, *PIXELS, "--at", "features.0", "--form", "blok", *OUT], "unknown form 'blok'"),
        (["deepen", SMALL, *PIXELS, "--at", "features.0", "--kernel", "three", *OUT], "--kernel 'three' is neither"),
        (["deepen", SMALL, *PIXELS, "--at", "features.0", "--kernel", "1,3,3", *OUT], "a kernel of 3 sizes"),
        (["slim", SMALL, *PIXELS, "--rate", "1.5", *OUT], "split rate must be in (0, 1], not 1.5\n"),
        (["slim", SMALL, *PIXELS, "--rate", "0", *OUT], "split rate must be in (0, 1], not 0.0\n"),
        (["slim", SMALL, *PIXELS, "--rate", "half", *OUT], "--rate 'half' is neither a number nor of the form LAYER="),
        (
            ["slim", SMALL, *PIXELS, "--rate", "fc=0.5", "--rate", "fc=1", *OUT],
            "--rate: 'fc' is given more than once\n",
        ),
        (["slim", SMALL, *PIXELS, "--rate", "0.5", "--seed", "-1", *OUT], "Invalid value for '--seed': "),
        (["slim", SMALL, *PIXELS, "--rate", "a=0.5", "--rate", "0.5", *OUT], "--rate '0.5' is not of the form LAYER="),
        (
            ["inspect", SMALL, "--input-shape", "2,1,32,32"],
            "the example inputs do not fit: SqueezeNet cannot take them (Given groups=1, weight of size [64, 3, 3, 3]",
        ),
        (
            ["slim", SMALL, "--input-shape", "2,1,32,32", "--rate", "0.5", *OUT],
            "the example inputs do not fit: ",
        ),
        (
            ["inspect", SMALL, "--input-shape", "wide"],
            "input shape 'wide' is not of the form N,C,H,W, as in 2,3,64,64\n",
        ),
        (
            ["export", SMALL, *PIXELS, "--out", "no/such/file.onnx"],
            "cannot write no/such/file.onnx: there is no folder ",
        ),
        (
            ["export", SMALL, "--weights", "DEFAULT", "--out", "a.onnx"],
            "cannot fetch the weights of 'squeezenet1_1' from ",
        ),
        (["export", SMALL, "--weights", "BEST", "--out", "a.onnx"], "unknown weights of 'squeezenet1_1' 'BEST'"),
        (["export", *TINY, *TINY_PIXELS, "--out", "x.txt"], "--out x.txt: the name of an ONNX file ends in .onnx\n"),
        (["widen", SMALL, *PIXELS, "--width", "1.5", "--round-to", "0", *OUT], "--round-to must be a whole number of "),
        (["bench", "nothing.onnx"], "there is no file nothing.onnx\n"),
        (["bench", SMALL, "--runtime", "onxruntime"], "unknown runtime 'onxruntime'; did you mean 'onnxruntime', "),
        (
            ["sensitivity", SMALL, "--dataset", "digits", "--image-size", "0", *OUT],
            "--image-size must be a whole number of at least 1, not 0\n",
        ),
        (
            ["export", "mymodel.py", "--out", "a.onnx"],
            "mymodel.py names a Python file: pass a model of your own as package.module:factory, with --trust, "
            "here as mymodel:NAME for the function or class that makes it\n",
        ),
        (["slim", "./cli_factory.py:tiny", "--rate", "0.5", *OUT], "./cli_factory.py:tiny names a Python file: "),
        (["bench", SMALL, SMALL], "a model is given more than once\n"),
        ([*TRADEOFF, "--dataset", "digit"], "unknown data set 'digit'; did you mean 'digits'?\n"),
        ([*TRADEOFF, "--dataset", "torchvision:CIFAR10"], "data set 'torchvision:CIFAR10' needs a folder to keep its "),
        (
            [*TRADEOFF, "--dataset", "torchvision:CIFAR10", "--data-root", "data"],
            "data set 'torchvision:CIFAR10' is not in data and cannot be fetched (Name or service not known): ",
        ),
        ([*TRADEOFF, "--split-rates", "1.0,1.5"], "split rate 1.5 is outside (0, 1]\n"),
        ([*TRADEOFF, "--split-rates", ""], "--split-rates '' is not a list of numbers, as in 1.0,0.5,0.25\n"),
        ([*TRADEOFF, "--split-rates", "all"], "--split-rates 'all' is not a list of numbers, as in 1.0,0.5,0.25\n"),
        (
            [*TRADEOFF, "--image-size", "4"],
            "the model cannot be run on 4 x 4 images, try another size (--image-size): ",
        ),
        (
            ["tradeoff", "raft_small", "--dataset", "digits", *OUT],
            "model 'raft_small' takes two images of 3 x 440 x 1024, and the data are single images\n",
        ),
        ([*TRADEOFF, "--epochs", "-1"], "--epochs must be a whole number of at least 0, not -1\n"),
        ([*TRADEOFF, "--weights", "DEFAULT"], "cannot fetch the weights of 'squeezenet1_1' from "),
        (["slim", SMALL, "--rate", "0.5"], "Missing option '--out'"),
        (["slim", SMALL, "--rte", "0.5", *OUT], "No such option: --rte"),
        (["slm"], "No such command 'slm'"),
        (["bench", SMALL, "--batch-size", "many"], "Invalid value for '--batch-size': "),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2_and_writes_nothing(
    run, empty_folder, monkeypatch, arguments, message
):
    monkeypatch.setenv("TORCH_HOME", str(empty_folder.parent / f"{empty_folder.name}-hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setattr("torchvision.datasets.utils.urllib.request.urlopen", no_network)
    code, out, err = run(*arguments)
    assert err.startswith(f"error: {message}")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert [path.name for path in empty_folder.iterdir()] == ["cli_factory.py"]


@pytest.mark.parametrize("verb", [["bench"], ["inspect"]], ids=["bench", "inspect"])
def test_a_file_that_is_no_model_is_refused_as_one_and_one_with_a_models_name_is_not(run, empty_folder, verb):
    for name in ("first.log", "squeezenet1_1"):
        (empty_folder / name).write_text("text")
    code, out, err = run(*verb, "first.log")
    assert (code, out) == (2, "")
    assert err == (
        "error: first.log is a file, and a saved model is a folder; only bench takes files, and these end in .onnx\n"
    )
    assert not surgery.models.is_saved("squeezenet1_1")


def test_bench_says_how_many_sessions_it_takes(run):
    fewest = fewest_sessions(0.95)
    assert f"1, or at least {fewest} to compare over them" in " ".join(
        run("bench", "--help")[1].replace("│", "").split()
    )
    err = run("bench", *TINY, *TINY_PIXELS, "--sessions", fewest - 1)[2]
    assert err.startswith(
        f"error: {fewest - 1} sessions cannot bound a ratio with 95% confidence: take {fewest} or more"
    )


def test_the_version_is_that_of_the_package(run):
    assert run("--version") == (0, f"surgery {surgery.__version__}\n", "")


def test_a_width_beyond_all_memory_is_one_clear_line(run, empty_folder):
    code, out, err = run("widen", *TINY, *TINY_PIXELS, "--width", "1e15", *OUT)
    assert err.startswith("error: there is not enough memory for this: ")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert [path.name for path in empty_folder.iterdir()] == ["cli_factory.py"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["slim", SMALL, "--rate", "0.5", "--out", "taken"],
        ["widen", SMALL, "--width", "1.5", "--out", "taken"],
        ["deepen", SMALL, "--at", "features", "--out", "taken"],
        ["tradeoff", SMALL, "--dataset", "digits", "--out", "taken"],
        ["export", SMALL, "--out", "taken"],
    ],
)
def test_a_place_that_is_taken_is_refused_without_force(run, empty_folder, arguments):
    (empty_folder / "taken").mkdir()
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: taken exists: ")
    assert err.count("\n") == 1
    assert "--force" in err


def test_weights_taken_over_in_part_are_a_warning_on_stderr(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    state = surgery.models.build("squeezenet1_1").state_dict()
    torch.save(state, tmp_path / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth")
    code, out, err = run("inspect", SMALL, *PIXELS, "--weights", "DEFAULT", "--json")
    assert code == 0
    assert json.loads(out)["groups"]
    assert err.startswith("warning: squeezenet1_1: the published weights do not fit, and initial values stay, in: ")
    assert err.count("\n") == 1


def test_the_installed_command_exits_with_the_code():
    script = "import sys; from surgery.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", script, "inspect", "resnet19"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: unknown model 'resnet19'")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["sl"], {"slim"}),
        (["slim", "resnet1"], {"resnet18", "resnet101", "resnet152"}),
        (["slim", "resnet18", "--mac"], {"--macs"}),
        (["slim", "resnet18", "--importance", "la"], {"lamp"}),
        (["slim", "resnet18", "--ranking", ""], {"local", "global", "isomorphic"}),
        (["tradeoff", "resnet18", "--optimizer", "ad"], {"adamw"}),
    ],
)
def test_a_shell_completes_verbs_models_options_and_their_choices(words, expected, monkeypatch, capfd):
    monkeypatch.setenv("_SURGERY_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", " ".join(["surgery", *words]))
    monkeypatch.setenv("COMP_CWORD", str(len(words)))
    with pytest.raises(SystemExit):
        main([])
    assert set(capfd.readouterr().out.split()) == expected


def test_no_flag_has_a_type_in_the_help(run):
    assert not [verb for verb in VERBS if "<bool>" in run(verb, "--help")[1]]
