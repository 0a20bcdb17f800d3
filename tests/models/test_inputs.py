import pytest
import torch
from torch import nn

from surgery.deploy.onnx.parity import run_reference
from surgery.errors import UsageError
from surgery.graph.batches import batch_of, with_batch
from surgery.models.inputs import other_values, resolve


def test_samples_beyond_those_given_hold_the_same_values_and_yet_differ():
    tokens = torch.tensor([[3, 1, 4], [1, 5, 9]])
    (grown,), _ = with_batch((tokens,), {}, 5)
    assert torch.equal(grown[:2], tokens)
    assert grown[2:].tolist() == [[4, 3, 1], [9, 1, 5], [1, 4, 3]]


def test_fewer_samples_are_the_first_ones():
    x = torch.randn(4, 2)
    assert torch.equal(with_batch((x,), {}, 1)[0][0], x[:1])


def test_only_tensors_that_run_along_the_batch_are_resized():
    x, table, scale = torch.randn(2, 3), torch.randn(5, 3), torch.tensor(2.0)
    (_, same_table, same_scale, flag), named = with_batch((x, table, scale, True), {"mask": torch.ones(2, 7)}, 3)
    assert same_table is table
    assert same_scale is scale
    assert flag is True
    assert named["mask"].shape == (3, 7)


def test_a_tensor_that_is_given_twice_stays_one():
    x = torch.randn(2, 3)
    (query, key), named = with_batch((x, x), {"value": x}, 4)
    assert query is key is named["value"]


def test_the_batch_size_is_the_length_of_axis_0_of_the_first_tensor():
    assert batch_of((True, torch.randn(6, 2)), {"y": torch.randn(3)}) == 6
    assert batch_of((), {"y": torch.randn(3)}) == 3
    assert batch_of((torch.tensor(1.0),), {}) is None
    assert batch_of((), {}) is None


def test_a_list_of_images_and_their_targets_run_along_the_batch():
    images = [torch.randn(3, 4, 5), torch.randn(3, 6, 7)]
    targets = [{"boxes": torch.rand(1, 4)}, {"boxes": torch.rand(2, 4)}]
    assert batch_of((images, targets), {}) == 2
    (one, one_target), _ = with_batch((images, targets), {}, 1)
    assert [image.shape for image in one] == [(3, 4, 5)]
    assert len(one_target) == 1
    (many,), named = with_batch((images,), {"targets": targets}, 5)
    assert [tuple(image.shape) for image in many] == [(3, 4, 5), (3, 6, 7), (3, 4, 5), (3, 6, 7), (3, 4, 5)]
    assert torch.equal(many[0], images[0])
    assert torch.equal(many[2], images[0].roll(1, -1))
    assert named["targets"][4] is targets[0]


def test_a_list_of_batches_is_no_list_of_images():
    levels = [torch.randn(2, 3, 8, 8), torch.randn(2, 3, 4, 4)]
    assert batch_of((levels,), {}) == 2
    (resized,), _ = with_batch((levels,), {}, 3)
    assert [level.shape[0] for level in resized] == [3, 3]


class Detects(nn.Module):
    def forward(self, images):
        return [image.mean((1, 2)) for image in images]


def test_a_traced_module_that_takes_a_list_of_images_is_given_as_many_as_asked_for(monkeypatch):
    traced_with = ([torch.randn(3, 4, 5), torch.randn(3, 6, 7)],)
    monkeypatch.setattr("surgery.graph.tracing.example_inputs", lambda module, batch_size=None: (traced_with, {}))
    (images,), _ = resolve(Detects(), batch_size=3)
    assert [image.shape for image in images] == [(3, 4, 5), (3, 6, 7), (3, 4, 5)]


@pytest.mark.parametrize("error", [AssertionError("too small"), KeyError("too small"), AttributeError("too small")])
def test_whatever_a_module_raises_on_its_inputs_is_one_line_that_gives_their_shapes(error):
    class Raises(nn.Module):
        def forward(self, x):
            raise error

    with pytest.raises(UsageError, match=r"cannot be run on these inputs \(\(2, 4\)\): '?too small"):
        run_reference(Raises(), (torch.zeros(2, 4),), {})


def test_other_values_are_of_the_same_kind():
    whole, mixed = torch.arange(6), torch.randn(4, 5)
    args, kwargs = other_values((whole, mixed, torch.zeros(2), torch.full((4,), -3.0)), {"again": mixed})
    assert args[0] is whole
    assert not torch.equal(args[1], mixed)
    assert set(args[1].flatten().tolist()) < set(mixed.flatten().tolist())
    assert ((args[2] >= 0.5) & (args[2] <= 1.5)).all()
    assert ((args[3] <= -1.5) & (args[3] >= -4.5)).all()
    assert kwargs["again"] is args[1]
