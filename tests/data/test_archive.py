"""Zip archives: what may not be unpacked is refused by its directory, and what is unpacked is what was measured."""

import io
import stat
import struct
import zipfile

import pytest

from garage.core.errors import UserError
from garage.data.archive import members, unpack

MIB = 1 << 20


def zipped(path, *files, mode=0, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files:
            info = zipfile.ZipInfo(name)
            info.external_attr, info.compress_type = mode << 16, method
            archive.writestr(info, content)
    return path


def test_members_are_files_in_order_and_hidden_ones_are_left_out(tmp_path):
    names = ["b.txt", "a/c.txt", ".hidden", "a/.git/x", "__MACOSX/b.txt", "folder/", "a.txt"]
    path = zipped(tmp_path / "a.zip", *((name, f"in {name}") for name in names))
    found = members(path)
    assert [member.filename for member in found] == ["a.txt", "a/c.txt", "b.txt"]
    for member in found:
        unpack(path, member, tmp_path / "out.txt")
        assert (tmp_path / "out.txt").read_text() == f"in {member.filename}"


REFUSED = {
    "ratio": (lambda p: zipped(p, ("a.txt", b"0" * (20 * MIB))), "unpacks"),
    "count": (lambda p: zipped(p, *((f"{n}", "") for n in range(2001))), "in 2001 files"),
    "up": (lambda p: zipped(p, ("../a.txt", "x")), "leads elsewhere"),
    "deep up": (lambda p: zipped(p, ("a/../../a.txt", "x")), "leads elsewhere"),
    "absolute": (lambda p: zipped(p, ("/a.txt", "x")), "leads elsewhere"),
    "drive": (lambda p: zipped(p, ("C:/a.txt", "x")), "leads elsewhere"),
    "backslash": (lambda p: zipped(p, ("..\\a.txt", "x")), "leads elsewhere"),
    "link": (lambda p: zipped(p, ("a.txt", "/etc/passwd"), mode=stat.S_IFLNK | 0o777), "link or a device"),
    "pipe": (lambda p: zipped(p, ("a.txt", ""), mode=stat.S_IFIFO | 0o666), "link or a device"),
    "empty": (lambda p: zipped(p), "no file in it"),
    "garbage": (lambda p: p.write_bytes(b"PK\x03\x04garbage") and p, "not a whole archive"),
    "nothing": (lambda p: p.write_bytes(b"") or p, "not a whole archive"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_may_not_be_unpacked_is_refused_with_a_remedy(tmp_path, name):
    make, says = REFUSED[name]
    with pytest.raises(UserError, match=says) as caught:
        members(make(tmp_path / "a.zip"))
    assert caught.value.remedy


def overlapping(path):
    """Two records of the directory that point at the same bytes."""
    data = zipped(path, ("a.txt", b"\x01\x02\x03" * 100), method=zipfile.ZIP_STORED).read_bytes()
    start = data.index(b"PK\x01\x02")
    records = data[start:-22] + data[start:-22].replace(b"a.txt", b"b.txt")
    path.write_bytes(data[:start] + records + data[-22:-14] + struct.pack("<HHLL", 2, 2, len(records), start) + data[-2:])
    return path


def test_members_that_share_bytes_are_refused_and_the_twin_without_the_check_unpacks_them(tmp_path, monkeypatch):
    path = overlapping(tmp_path / "a.zip")
    with pytest.raises(UserError, match="share the same bytes"):
        members(path)
    monkeypatch.setattr("garage.data.archive.pairwise", lambda places: ())
    assert len(members(path)) == 2, "the twin counts one file twice"


def test_a_directory_that_lies_about_a_size_gives_an_error(tmp_path):
    data = zipped(tmp_path / "a.zip", ("a.txt", b"01" * MIB)).read_bytes()
    at = data.index(b"PK\x01\x02") + 24
    (tmp_path / "a.zip").write_bytes(data[:at] + struct.pack("<L", 10) + data[at + 4 :])
    (member,) = members(tmp_path / "a.zip")
    with pytest.raises(UserError, match="cannot be unpacked"):
        unpack(tmp_path / "a.zip", member, tmp_path / "out.txt")
    assert (tmp_path / "out.txt").stat().st_size <= 10, "no more than was measured is written"


def test_a_locked_member_is_said(tmp_path):
    data = zipped(tmp_path / "a.zip", ("a.txt", "x")).read_bytes()
    at = data.index(b"PK\x01\x02") + 8
    (tmp_path / "a.zip").write_bytes(data[:at] + b"\x01\x00" + data[at + 2 :])
    (member,) = members(tmp_path / "a.zip")
    with pytest.raises(UserError, match="password") as caught:
        unpack(tmp_path / "a.zip", member, tmp_path / "out.txt")
    assert "unpack it" in caught.value.remedy


def test_a_flood_of_records_is_refused_before_it_is_listed(tmp_path, monkeypatch):
    monkeypatch.setattr("garage.data.archive.MAX_RECORDS", 100)
    monkeypatch.setattr("garage.data.archive.zipfile.ZipFile", lambda *_: pytest.fail("it was listed"))
    (tmp_path / "a.zip").write_bytes(b"PK\x01\x02" * 101)
    with pytest.raises(UserError, match="more than 100 files"):
        members(tmp_path / "a.zip")


def test_the_bytes_of_a_member_do_not_depend_on_its_name(tmp_path):
    stream = io.BytesIO()
    stream.write(zipped(tmp_path / "a.zip", ("a\nb\u202e.txt", "x")).read_bytes())
    (member,) = members(tmp_path / "a.zip")
    unpack(tmp_path / "a.zip", member, tmp_path / "ours.txt")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.zip", "ours.txt"]
