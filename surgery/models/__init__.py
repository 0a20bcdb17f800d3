"""The models this package knows by name, as data, and the one way from a name to a module.

A *source* is text that says which architecture a model has: ``"resnet50"``, ``"torchvision:resnet50?num_classes=10"``
or ``"package.module:factory"``. It is what the command line takes and what a saved model keeps, so that its
architecture can be rebuilt from text alone.
"""

from surgery.models.building import build
from surgery.models.entries import CATALOGUE, Entry, Value
from surgery.models.examples import example_inputs, example_targets, inputs_of_shape, small_inputs
from surgery.models.fitnets import FITNETS, build_fitnet, fitnet_cost
from surgery.models.pretrained import WeightsWarning
from surgery.models.sources import Source, canonical, parse, published, short

__all__ = [
    "CATALOGUE",
    "FITNETS",
    "Entry",
    "Source",
    "Value",
    "WeightsWarning",
    "build",
    "build_fitnet",
    "canonical",
    "example_inputs",
    "example_targets",
    "fitnet_cost",
    "inputs_of_shape",
    "parse",
    "published",
    "short",
    "small_inputs",
]
