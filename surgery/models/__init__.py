"""The models this package knows by name, as data, and the one way from a name to a module.

A *source* is text that says which architecture a model has: ``"resnet50"``, ``"torchvision:resnet50?num_classes=10"``
or ``"package.module:factory"``. The command line takes it, and a saved model keeps it, so that the architecture can be
rebuilt from text alone. The catalogue is text as well: to list models and to read a source, torch is not needed.
"""

from typing import TYPE_CHECKING

from surgery.lazy import lazy_names

_HOMES = {
    "fitnet_modules": "build_fitnet",
    "building": "build",
    "checkpoint": "RECIPE",
    "entries": "CATALOGUE Entry Value",
    "examples": "example_inputs example_targets inputs_of_shape small_inputs",
    "fitnets": "FITNETS fitnet_cost",
    "listing": "KnownModel list_models",
    "opening": "is_saved open_model open_pair",
    "sources": "Source canonical parse published short",
}

if TYPE_CHECKING:
    from surgery.models.building import build as build
    from surgery.models.checkpoint import RECIPE as RECIPE
    from surgery.models.entries import CATALOGUE as CATALOGUE
    from surgery.models.entries import Entry as Entry
    from surgery.models.entries import Value as Value
    from surgery.models.examples import example_inputs as example_inputs
    from surgery.models.examples import example_targets as example_targets
    from surgery.models.examples import inputs_of_shape as inputs_of_shape
    from surgery.models.examples import small_inputs as small_inputs
    from surgery.models.fitnet_modules import build_fitnet as build_fitnet
    from surgery.models.fitnets import FITNETS as FITNETS
    from surgery.models.fitnets import fitnet_cost as fitnet_cost
    from surgery.models.listing import KnownModel as KnownModel
    from surgery.models.listing import list_models as list_models
    from surgery.models.opening import is_saved as is_saved
    from surgery.models.opening import open_model as open_model
    from surgery.models.opening import open_pair as open_pair
    from surgery.models.sources import Source as Source
    from surgery.models.sources import canonical as canonical
    from surgery.models.sources import parse as parse
    from surgery.models.sources import published as published
    from surgery.models.sources import short as short
else:
    __getattr__, _HOME = lazy_names(__name__, _HOMES)
    __all__ = sorted(_HOME)
