"""Where the time of an ONNX file goes."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from surgery.errors import UsageError
from surgery.models.inputs import squash

Array = np.ndarray[Any, Any]

_WARM_UP = 3


def time_by_operator(path: str | Path, inputs: Sequence[Array], *, threads: int, runs: int = 20) -> dict[str, float]:
    """Milliseconds of a query that ONNX Runtime's profiler attributes to each type of operator, on the CPU.

    ``inputs`` are the file's, in order. Means over ``runs``, without the first ones; the slowest type first. Operators
    that the runtime has fused or laid out anew go by the names it gives them (``FusedConv``, ``ReorderInput``). The
    profiler costs time itself: take the figures as shares.

    Raises:
        UsageError: the file cannot be run on these inputs.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.enable_profiling = True
    with tempfile.TemporaryDirectory(prefix="surgery-") as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        try:
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            feed = {node.name: array for node, array in zip(session.get_inputs(), inputs, strict=True)}
            for _ in range(_WARM_UP + runs):
                session.run(None, feed)
        except Exception as error:  # ONNX Runtime's errors share no base of their own
            raise UsageError(f"{path} cannot be profiled: {squash(error)}") from error
        events = json.loads(Path(session.end_profiling()).read_text())
    begins = sorted(event["ts"] for event in events if event["name"] == "model_run")
    found: defaultdict[str, float] = defaultdict(float)
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time") and event["ts"] >= begins[_WARM_UP]:
            found[event["args"]["op_name"]] += event["dur"] / 1e3 / runs
    return dict(sorted(found.items(), key=lambda item: -item[1]))
