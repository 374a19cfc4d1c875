"""Zip archives, measured before they are opened: by their central directory, which says what is inside and what it unpacks to.

Refused whole: more than 2,000 members, more than 200 MB or a hundred times the archive's size unpacked, names that lead elsewhere, links,
and members that share bytes. A member is unpacked to a name of ours; what it gives is bounded by the size that was measured and checked by
its checksum, so a directory that lies gives an error. Office files are zip archives too and are measured alike.
"""

import mmap
import re
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path, PurePosixPath

from garage.core.errors import UserError

MAX_MEMBERS, MAX_UNPACKED, MAX_RATIO, MAX_RECORDS = 2000, 200 << 20, 100, 100_000
_DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, ValueError, EOFError, NotImplementedError, RuntimeError, OSError)
_LOCAL_HEADER, _RECORD = 30, re.compile(b"PK\x01\x02")


def members(path: Path) -> Sequence[zipfile.ZipInfo]:
    """The files of an archive in the order of their names, hidden ones left out.

    Raises:
        UserError: it is no whole archive, or one that must not be unpacked.
    """
    found = measured(path)
    for member in found:
        place = PurePosixPath(name := member.filename.replace("\\", "/"))
        if place.is_absolute() or ".." in place.parts or name[1:2] == ":":
            raise UserError(f"the name {member.filename[:100]!r} inside it leads elsewhere", remedy="pack it again from inside its folder")
        if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise UserError(f"{member.filename[:100]!r} inside it is a link or a device", remedy="pack it again with files alone")
    if not (files := [m for m in found if not m.is_dir() and not re.search(r"(^|/)(\.|__MACOSX/)", m.filename)]):
        raise UserError("there is no file in it", remedy="pack it again, or leave it out")
    return sorted(files, key=lambda member: member.filename)


def measured(path: Path, kind: str = "archive") -> list[zipfile.ZipInfo]:
    """What the central directory of an archive, or of a file that is one inside, lists, if all of it may be unpacked."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if sum(1 for _ in _RECORD.finditer(data)) > MAX_RECORDS:  # even to list them would cost too much
                raise UserError(f"it lists more than {MAX_RECORDS} files", remedy="unpack it and give the folder")
            with zipfile.ZipFile(file) as archive:
                found, end, size = archive.infolist(), archive.start_dir, len(data)
    except _DAMAGE as error:
        raise UserError(f"it is not a whole {kind}: {error}", remedy="it may be cut or of another type: make it again") from error
    unpacked = sum(member.file_size for member in found)
    if len(found) > MAX_MEMBERS or unpacked > min(MAX_UNPACKED, MAX_RATIO * size):
        message = f"it unpacks {size} bytes to {unpacked} bytes in {len(found)} files, more than is allowed"
        raise UserError(message, remedy="if you trust it, unpack it and give the folder")
    places = sorted((member.header_offset, member.header_offset + _LOCAL_HEADER + member.compress_size) for member in found)
    if any(stop > start for (_, stop), (start, _) in pairwise([*places, (end, end)])):
        raise UserError("files inside it share the same bytes", remedy="if you trust it, unpack it and give the folder")
    return found


def unpack(path: Path, member: zipfile.ZipInfo, place: Path) -> None:
    """Write one member to `place`; a `UserError` if it is locked or damaged."""
    if member.flag_bits & 1:
        raise UserError("it is locked with a password", remedy="unpack it with its password and give the folder")
    try:
        with zipfile.ZipFile(path) as archive, archive.open(member) as source, open(place, "wb") as target:
            shutil.copyfileobj(source, target)
    except _DAMAGE as error:
        raise UserError(f"it cannot be unpacked: {error}", remedy="pack the archive again") from error
