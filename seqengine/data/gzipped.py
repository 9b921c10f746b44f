"""gzip files that are cut or damaged, told by name."""

import gzip
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from seqengine.errors import InputError

MAGIC = b"\x1f\x8b"


@contextmanager
def refusing_damage(path: Path, done: Callable[[], int]) -> Iterator[None]:
    """Reading inside raises InputError about `path`; `done` tells the bytes of text that were read before."""
    try:
        yield
    except EOFError:
        raise InputError(
            f"{path}: truncated gzip file: it ends before its end mark, after some {done()} bytes of text. "
            "Copy or compress it again."
        ) from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise InputError(
            f"{path}: corrupt gzip file, after some {done()} bytes of text ({error}). Copy or compress it again."
        ) from None
