"""The models that this package knows by name, as data, and the one way from a name to a module.

A *source* is text that says which architecture a model has: ``"resnet50"``, ``"torchvision:resnet50?num_classes=10"``
or ``"package.module:factory"``. The command line takes it, and a saved model keeps it, so the architecture can be
rebuilt from text alone. The catalogue is text as well: listing models and reading a source need no torch.
"""

from surgery.lazy import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
