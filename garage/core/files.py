"""Files that others wrote: read within a limit, JSON objects only, and every fault in words.

Limits: a file larger than the limit is refused unread; JSON nested too deeply or with absurd numbers counts as damaged.
"""

import json
from pathlib import Path
from typing import Any

from garage.core.errors import UserError

MAX_BYTES = 256 * 1024 * 1024


def read_file(path: Path) -> bytes | None:
    """The bytes of a file, None where there is none."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path} has more than {MAX_BYTES:,} bytes", remedy="give a file of the usual size")
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", remedy="check its permissions") from error


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, empty where there is no file."""
    data = read_file(path)
    return {} if data is None else parse_object(data, str(path))


def parse_object(data: bytes, name: str) -> dict[str, Any]:
    """A JSON object from bytes; `name` is for the error."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise damaged(name, error) from error
    if not isinstance(value, dict):
        raise damaged(name, "it is not a JSON object")
    return value


def damaged(name: str, why: object) -> UserError:
    return UserError(f"{name} is damaged: {str(why)[:200]}", remedy="download or export it again")
