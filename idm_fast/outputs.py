"""Writing files so that nothing half-written is ever left: a hidden temporary file beside the target, then a rename.

`InputError` lives here because it is what every edge of the program raises, and this module imports neither torch
nor Pillow.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


class InputError(ValueError):
    """Something the user gave cannot be used. `str(error)` is one line that says what, and what to do instead."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def reason(error: BaseException) -> str:
    """The first line of an error, without the path that `OSError` repeats; for use inside an `InputError`."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object]) -> Path:
    """Calls `write` with a binary file and puts the result at `path` in one step; an older file there is replaced.

    Raises InputError when the file cannot be written; the temporary file is removed then.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise InputError(f"cannot write {path}: {reason(error)}") from error
        raise
    return path


def output_folder(path: str | Path) -> Path:
    """Makes the folder and proves that files can be created in it. Raises InputError if not."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(f"cannot write to the output folder {path}: {reason(error)}; choose another one") from error
    return path
