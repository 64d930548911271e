"""`python -m meshnode.artifact.build`: exports one function of a person's module, for the CLI.

Started by `mesh artifact build`, so that the command itself loads no jax and the person's module is
imported in a process that ends. Reads one JSON request on stdin; what the module prints goes to
stderr; the answer goes to the file descriptor that the request names: a line of JSON, then the
artifact bytes.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ArtifactRefused, MeshError, UsageError
from ..protocol.types import ArraySpec


def load_function(target: str) -> Callable[..., Any]:
    """The function that `pkg.mod:fn` names; UsageError says what is wrong with it."""
    module_name, _, attribute = target.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # whatever a person's module raises, it is theirs to read
        raise UsageError(f"{module_name} cannot be imported: {_told(error)}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UsageError(f"{module_name} has no {attribute}")
        found = getattr(found, part)
    if not callable(found):
        raise UsageError(f"{target} is no function")
    return found  # type: ignore[no-any-return]


def _told(error: Exception) -> str:
    """An error of the person's code in one line, with the place in their code where it came up."""
    line = " ".join(str(error).split())[:300]
    ours = Path(__file__).parents[1]
    places = [
        f"{place.filename}:{place.lineno}"
        for place in traceback.extract_tb(error.__traceback__)
        if place.filename.endswith(".py")
        and "site-packages" not in place.filename
        and not Path(place.filename).is_relative_to(ours)
        and Path(place.filename).parent.name not in ("importlib", "jaxkernels")
    ]
    where = f" ({places[-1]})" if places else ""
    return f"{type(error).__name__}: {line}{where}"


def build(request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """The answer's JSON and the artifact bytes."""
    sys.path.insert(0, request["folder"])
    specs = [ArraySpec(dtype, tuple(shape)) for dtype, shape in request["specs"]]
    import jax

    from ..worker.header import read_header
    from .exporting import export

    function = load_function(request["target"])
    try:
        content = export(function, specs, x64=request["x64"])
    except MeshError:
        raise
    except Exception as error:  # the function's own, raised while jax traced it
        raise UsageError(f"{request['target']} cannot be traced: {_told(error)}") from error
    header = read_header(content)
    answer = {
        "ok": True,
        "args": [[spec.dtype, list(spec.shape)] for spec in header.args],
        "outs": [[spec.dtype, list(spec.shape)] for spec in header.outs],
        "x64": header.x64,
        "jax": jax.__version__,
        "calling_convention": header.calling_convention,
        "platforms": list(header.platforms),
    }
    return answer, content


def main() -> None:
    request = json.load(sys.stdin)
    out = os.fdopen(request["answer_fd"], "wb")
    os.dup2(2, 1)  # what the module prints is talk, not the result
    content = b""
    try:
        answer, content = build(request)
    except MeshError as error:
        reason = error.reason.name if isinstance(error, ArtifactRefused) else None
        answer = {"ok": False, "reason": reason, "text": str(error)}
    with out:
        out.write(json.dumps(answer).encode() + b"\n" + content)


if __name__ == "__main__":
    main()
