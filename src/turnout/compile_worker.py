"""A process that compiles kernels into Triton's cache on disk; `compile_ahead.py` starts it.

From its standard input it reads, pickled, `Shared` and then `Source`s, and it answers each of these
with one byte: `DONE` if kernel and launcher are in the cache, else `FAILED` (whoever launches the
kernel meets the reason). It needs no GPU and takes no memory on one.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from hashlib import sha256
from importlib import import_module
from typing import Any, BinaryIO, NamedTuple

DONE, FAILED = b"\x01", b"\x00"
# What Triton's compiler raises besides its own errors, the C compiler, and the import of what that
# made. The next kernel is tried all the same.
REFUSED = (
    RuntimeError,
    OSError,
    ImportError,
    AssertionError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    subprocess.SubprocessError,
)


class Shared(NamedTuple):
    """What is the same in the process that asks, as it is part of every key in Triton's cache.

    Attributes:
        folder: of Triton's cache.
        triton_key: what Triton has found its own files to be, for which it reads 400 MB; None if it
            does not ask (3.6 does).
        ptxas_version: what Triton has found its assembler to be. It asks once, and the first
            torch.compile of a process names another assembler for it afterwards.
    """

    folder: str
    triton_key: str | None
    ptxas_version: str | None


class Source(NamedTuple):
    """One kernel with what Triton specialises it on.

    Attributes:
        module, name: where the jit function is.
        signature, constants, attributes, options: as `triton.compile` and its sources take them.
        target: back end, architecture and warp size.
    """

    module: str
    name: str
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    target: tuple[str, int, int]


def compile_source(source: Source) -> tuple[Any, Any]:
    """Triton's source and compiled kernel, now in its cache."""
    import triton

    made, target = _made(source)
    return made, triton.compile(made, target=target, options=source.options)


def in_cache(source: Source) -> bool:
    """Triton's cache on disk has the kernel, or where it would be is not known.

    Asks as `triton.compile` of 3.6 does before it compiles.
    """
    try:
        from triton import knobs
        from triton._C.libtriton import get_cache_invalidating_env_vars
        from triton.compiler import make_backend
        from triton.runtime.cache import get_cache_key, get_cache_manager

        if knobs.compilation.always_compile:
            return True  # who else compiles it is of no use
        made, target = _made(source)
        backend = make_backend(target)
        options = backend.parse_options({**source.options, **made.parse_options()})
        key = get_cache_key(made, backend, options, env_vars=get_cache_invalidating_env_vars())
        folder = get_cache_manager(sha256(key.encode()).hexdigest())
        return folder.get_group(f"{made.name[:150]}.json") is not None
    except (ImportError, AttributeError, TypeError):  # another Triton
        return True


def _made(source: Source) -> tuple[Any, Any]:
    """Triton's own source, and its target."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(import_module(source.module), source.name)
    kind: type[ASTSource] = ASTSource
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        kind = GluonASTSource
    made = kind(kernel, source.signature, source.constants, source.attributes)
    return made, GPUTarget(*source.target)


def _build_launcher(made: Any, kernel: Any) -> None:
    from triton.backends.nvidia.driver import CudaLauncher

    CudaLauncher(made, kernel.metadata)


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Until the requests end."""
    from triton import knobs
    from triton.backends.nvidia import compiler
    from triton.errors import TritonError
    from triton.runtime import cache

    shared: Shared = pickle.load(requests)
    knobs.cache.dir = shared.folder
    if shared.triton_key is not None:
        cache.triton_key = lambda: shared.triton_key
    if shared.ptxas_version is not None:
        compiler.get_ptxas_version = lambda arch=0: shared.ptxas_version
    while True:
        try:
            source: Source = pickle.load(requests)
        except EOFError:
            return
        try:
            _build_launcher(*compile_source(source))
        except (TritonError, *REFUSED):
            answers.write(FAILED)
        else:
            answers.write(DONE)
        answers.flush()


def main() -> None:
    """On the standard input and output."""
    with os.fdopen(os.dup(sys.stdout.fileno()), "wb") as own:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # Triton prints what ptxas refuses
        serve(sys.stdin.buffer, own)
