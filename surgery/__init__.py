"""Model surgery on torch.fx graphs: widen, deepen, slim, export and measure, exactly.

``import surgery`` imports nothing else. The first use of a public name imports the module that defines it, so a script
that only slims never loads ONNX, and the command line prints its help without torch. ``__init__.pyi`` lists the names.
"""

from surgery.lazy import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
