"""Weights in files of the user's own."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

import surgery
from surgery import UsageError
from surgery.models import build, load_weights_file, open_model, open_pair

SOURCE = "squeezenet1_1?num_classes=5"
SHAPE = (2, 3, 32, 32)


@pytest.fixture(scope="module")
def trained():
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = torchvision.models.squeezenet1_1(num_classes=5).eval()
    nn.init.uniform_(model.classifier[1].bias, 0.2, 0.5)  # a ReLU follows: no output is zero
    return model


@pytest.fixture(scope="module")
def x():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


def same(a, b):
    """Whether outputs agree to float32's rounding."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=1e-6)


def write(model, path):
    state = model.state_dict()
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return str(path)


@pytest.mark.parametrize("name", ["best.safetensors", "best.pth", "best.pt"])
def test_weights_come_from_a_file(tmp_path, trained, x, name):
    opened = open_model(SOURCE, input_shape=SHAPE, weights=write(trained, tmp_path / name))
    assert same(opened(x), trained(x))
    assert surgery.recipe(opened).source == "torchvision:squeezenet1_1?num_classes=5"


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_a_checkpoint_of_a_trainer_may_hold_them_under_a_usual_name(tmp_path, trained, x, key, prefix):
    state = {f"{prefix}{name}": value for name, value in trained.state_dict().items()}
    torch.save({"epoch": 3, key: state, "optimizer": {"lr": 0.1}}, tmp_path / "best.pth")
    module = build(SOURCE, weights=str(tmp_path / "best.pth")).eval()
    assert same(module(x), trained(x))


def test_a_saved_model_takes_weights_too_and_they_are_never_ignored(tmp_path, trained, x):
    slim = surgery.slim(surgery.trace(trained, x, source=SOURCE), 0.5)
    surgery.save(slim, tmp_path / "slim")
    other = copy.deepcopy(slim)
    for parameter in other.parameters():
        parameter.data.mul_(1.5)
    path = write(other, tmp_path / "other.pth")
    assert same(open_model(str(tmp_path / "slim"), weights=path)(x), other(x))
    with pytest.raises(UsageError, match=r"there is no file of weights at .*gone\.pth"):
        open_model(str(tmp_path / "slim"), weights=str(tmp_path / "gone.pth"))
    with pytest.raises(UsageError, match=r"slim has weights of its own: published weights \(DEFAULT\) are for models"):
        open_model(str(tmp_path / "slim"), weights="DEFAULT")


def test_of_a_saved_and_a_named_model_the_named_one_takes_the_weights(tmp_path, trained, x):
    surgery.save(surgery.trace(trained, x, source=SOURCE), tmp_path / "dense")
    other = copy.deepcopy(trained)
    other.classifier[1].bias.data.add_(1)
    path = write(other, tmp_path / "other.pth")
    for names in ((str(tmp_path / "dense"), SOURCE), (SOURCE, str(tmp_path / "dense"))):
        opened = dict(zip(names, open_pair(*names, weights=path), strict=True))
        assert same(opened[str(tmp_path / "dense")](x), trained(x))
        assert same(opened[SOURCE](x), other(x))


def test_entries_that_do_not_fit_are_listed(tmp_path, trained):
    state = trained.state_dict()
    del state["features.0.weight"]
    state["head.weight"] = torch.ones(3)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(UsageError, match=r"missing are features\.0\.weight; unexpected are head\.weight"):
        build(SOURCE, weights=str(tmp_path / "x.pth"))


def test_another_number_of_classes_is_named_with_what_to_write(tmp_path, trained):
    path = write(trained, tmp_path / "x.pth")
    with pytest.raises(UsageError, match=r"classifier\.1\.weight \(\(5, 512, 1, 1\) in the file.*NAME\?num_classes=5"):
        build("squeezenet1_1", weights=path)


class _Trick:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')",))


@pytest.mark.parametrize("content", [b"", b"nothing", b"\x80\x02}q\x00.", "trick", [1, 2], {"epoch": 1}, {}])
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_files_that_hold_no_weights_are_refused_in_one_line(tmp_path, content, ending):
    path = tmp_path / f"x{ending}"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save({"state_dict": _Trick()} if content == "trick" else content, path)
    with pytest.raises(UsageError, match=r"x\.(pth|safetensors) (cannot be read|holds)") as found:
        build(SOURCE, weights=str(path))
    assert "\n" not in str(found.value)


def test_a_model_of_ones_own_may_have_a_name_that_wrappers_use(tmp_path):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = nn.Linear(2, 2)

    ours, theirs = Wrapped(), Wrapped()
    path = write(theirs, tmp_path / "x.pth")
    load_weights_file(ours, path)
    assert torch.equal(ours.model.weight, theirs.model.weight)


def test_a_saved_model_takes_another_input_shape(tmp_path, trained, x):
    traced = surgery.trace(trained, x, source=SOURCE)
    surgery.save(traced, tmp_path / "m")
    opened = open_model(str(tmp_path / "m"), input_shape=(3, 3, 48, 64))
    assert [tuple(t.shape) for t in surgery.example_inputs(opened)[0]] == [(3, 3, 48, 64)]
    assert surgery.cost(opened).macs > surgery.cost(traced).macs
    with pytest.raises(UsageError, match="does not take inputs of shape"):
        open_model(str(tmp_path / "m"), input_shape=(2, 4, 32, 32))


def test_a_number_of_classes_that_contradicts_the_data_is_refused(trained):
    data = surgery.load_data("digits", image_size=32, limit=20)
    with pytest.raises(
        UsageError, match="the model 'squeezenet1_1\\?num_classes=5' has 5 classes, and 'digits' has 10"
    ):
        surgery.classifier(SOURCE, data)


def test_every_verb_takes_a_file(tmp_path, trained, x, capsys):
    from surgery.cli import main

    path = write(trained, tmp_path / "best.pth")
    small = [SOURCE, "--input-shape", "2,3,32,32", "--weights", path]
    assert main(["slim", *small, "--rate", "0.5", "--out", str(tmp_path / "slim"), "--json"]) in (0, None)
    slim = surgery.slim(surgery.trace(trained, x), 0.5)
    assert same(surgery.load(tmp_path / "slim")(x), slim(x))
    assert json.loads(capsys.readouterr().out)
    assert main(["slim", *small[:-1], str(tmp_path / "gone.pth"), "--rate", "0.5", "--dry-run"]) == 2
    assert "there is no file of weights" in capsys.readouterr().err
