"""PyTorch's zip archives: the archive is checked whole before its pickle is read.

Layout: local records one after the other, each with its data; then the central directory, the
64-bit end record with its locator, and the end record. torch's own reader believes the central
directory alone; here the local headers must say the same, and nothing may lie between.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from weightsurgery.errors import FormatError, PolicyError, counted, shown
from weightsurgery.formats.files import InputFile

MAX_RECORDS = 50_000  # a model of 10,000 tensors with its optimizer has 40,000
MAX_DIRECTORY = 10_000_000  # bytes of the central directory
MAX_PICKLE = 50_000_000  # bytes of data.pkl: names, shapes and strides
MAX_OTHER = 1_000_000  # bytes of another record that holds no tensor
_END, _LOCATOR, _END64 = (struct.Struct(f) for f in ("<4s4H2IH", "<4sIQI", "<4sQ2H2I4Q"))
_CENTRAL, _LOCAL = struct.Struct("<4s6H3I5H2I"), struct.Struct("<4s5H3I2H")
_MOST16, _MOST32 = 0xFFFF, 0xFFFFFFFF
_DESCRIBED, _UTF8 = 0x0008, 0x0800  # the flags that torch sets: sizes follow the data; UTF-8 names
_FOLDER = 0x10  # the attribute of MS-DOS
_RECORDS = re.compile(
    r"data\.pkl|data/[0-9]+|version|byteorder|\.data/serialization_id"
    r"|\.format_version|\.storage_alignment"
)


@dataclass(frozen=True)
class _Record:
    """A record, as the central directory tells it.

    Attributes:
        name: With the root.
        flags: The two that torch sets.
        crc: Checksum of its bytes.
        size: Bytes.
        offset: Of its local header.
    """

    name: str
    flags: int
    crc: int
    size: int
    offset: int


@dataclass(frozen=True)
class Archive:
    """A checked archive.

    Attributes:
        pickle: The bytes of data.pkl.
        storages: Key of a storage to the place of its bytes: offset in the file, and length.
        swapped: Whether the numbers are stored with their first byte first.
    """

    pickle: bytes
    storages: Mapping[str, tuple[int, int]]
    swapped: bool


def read_archive(file: InputFile) -> Archive:
    """Check a PyTorch zip archive from the first byte to the last, but for the tensors' bytes.

    Args:
        file: The archive.

    Raises:
        PolicyError: It holds a program (TorchScript).
        FormatError: A rule is broken: one root, plain and unique names that torch.save writes,
            uncompressed records, sizes that are right, local headers that equal the central
            directory, nothing before, between or behind; the checksums of all but the tensors.
        ChangedError: It became shorter meanwhile.
        StorageError: It cannot be read.
    """
    begin, size, count = _read_end(file)
    records = _read_directory(file, begin, size, count)
    _check_names(file, records)
    places = _check_tiling(file, records, begin)
    storages: dict[str, tuple[int, int]] = {}
    others: dict[str, bytes] = {}
    for record, place in zip(records, places, strict=True):
        name = record.name.partition("/")[2]
        if name.startswith("data/"):
            storages[name.removeprefix("data/")] = (place, record.size)
        else:
            others[name] = _read_checked(file, record, place)
    order = others.get("byteorder", b"little")
    if order not in (b"little", b"big"):
        reason = f"zip archive: byteorder is '{shown(order.decode('latin-1'))}'"
        raise FormatError(reason, file=file.path, code="E-PICKLE-ARCHIVE")
    return Archive(others["data.pkl"], storages, order == b"big")


def _read_end(file: InputFile) -> tuple[int, int, int]:
    """Offset and bytes of the central directory, and the number of its entries."""

    def bad(reason: str) -> FormatError:
        return FormatError(
            f"zip archive: {reason}",
            file=file.path,
            hint="the download may be incomplete",
            code="E-PICKLE-ARCHIVE",
        )

    last = file.size - _END.size
    if last < 0:
        raise bad(f"{counted(file.size, 'byte')}: too few")
    magic, disk, first, here, count, size, begin, comment = _END.unpack(
        file.read_bytes(last, _END.size)
    )
    if magic != b"PK\x05\x06" or comment:
        raise bad("it does not end with an end record")
    if disk or first or here != count:
        raise bad("it has several parts")
    place = last - _LOCATOR.size
    if place >= _END64.size and file.read_bytes(place, 4) == b"PK\x06\x07":
        _, disk, where, disks = _LOCATOR.unpack(file.read_bytes(place, _LOCATOR.size))
        last = place - _END64.size
        found = _END64.unpack(file.read_bytes(last, _END64.size))
        said = (count, size, begin)
        count, size, begin = found[7:]
        short = zip(said, (count, size, begin), (_MOST16, _MOST32, _MOST32), strict=True)
        parts = disk or disks != 1 or found[4] or found[5] or found[6] != count
        if found[0] != b"PK\x06\x06" or found[1] != _END64.size - 12 or where != last or parts:
            raise bad("its 64-bit end record is wrong")
        if any(one not in (other, most) for one, other, most in short):
            raise bad("its two end records differ")
    if begin + size != last:
        raise bad("its central directory is not where the end record says")
    if count > MAX_RECORDS or size > MAX_DIRECTORY:
        raise bad(f"{count:,} records in a directory of {size:,} bytes are too many")
    return begin, size, count


def _read_directory(file: InputFile, begin: int, size: int, count: int) -> list[_Record]:
    data, at, records = file.read_bytes(begin, size), 0, []
    for _ in range(count):
        if at + _CENTRAL.size > size or data[at : at + 4] != b"PK\x01\x02":
            raise FormatError(
                "zip archive: its central directory is cut", file=file.path, code="E-PICKLE-ARCHIVE"
            )
        entry = _CENTRAL.unpack_from(data, at)
        flags, method, crc, stored, plain, *lengths = (*entry[3:5], *entry[7:13])
        at += _CENTRAL.size
        if at + sum(lengths) > size:
            raise FormatError(
                "zip archive: its central directory is cut", file=file.path, code="E-PICKLE-ARCHIVE"
            )
        name = _name(file, data[at : at + lengths[0]])
        extra = data[at + lengths[0] : at + lengths[0] + lengths[1]]
        at += sum(lengths)
        plain, stored, offset = _wide(file, name, extra, [plain, stored, entry[16]])
        if method:
            raise _bad(file, name, "compressed; torch.save stores, and expanding could be a bomb")
        if flags & ~(_DESCRIBED | _UTF8) or entry[13] or lengths[2]:
            raise _bad(file, name, f"flags {flags:#x}, a comment or another part; expected none")
        if entry[15] & _FOLDER:  # torch reads nothing, and gives whatever the memory held
            raise _bad(file, name, "marked as a folder; expected a file")
        if plain != stored:
            raise _bad(file, name, f"{stored:,} bytes stored for {plain:,}; expected equal numbers")
        records.append(_Record(name, flags, crc, plain, offset))
    if at != size:
        raise FormatError(
            "zip archive: its central directory holds more", file=file.path, code="E-PICKLE-ARCHIVE"
        )
    return records


def _name(file: InputFile, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _bad(file, data.decode("latin-1"), "its name is not UTF-8") from error


def _bad(file: InputFile, name: str, reason: str) -> FormatError:
    told = f"zip archive: record '{shown(name)}': {reason}"
    return FormatError(told, file=file.path, code="E-PICKLE-ARCHIVE")


def _wide(file: InputFile, name: str, extra: bytes, given: list[int]) -> list[int]:
    """Numbers that do not fit in 32 bits, from the extra field that holds them."""
    found, at = b"", 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1 and found:
            raise _bad(file, name, "two 64-bit fields")
        found = extra[at + 4 : at + 4 + length] if kind == 1 else found
        at += 4 + length
    wanted = [i for i, number in enumerate(given) if number == _MOST32]
    if at != len(extra) or len(found) != 8 * len(wanted):
        raise _bad(file, name, "its extra fields are wrong")
    for i, number in zip(wanted, struct.unpack(f"<{len(wanted)}Q", found), strict=True):
        given[i] = number
    return given


def _check_names(file: InputFile, records: list[_Record]) -> None:
    roots: set[str] = set()
    seen: set[str] = set()
    for record in records:
        root, _, rest = record.name.partition("/")
        if rest == "constants.pkl" or rest.startswith("code/"):
            told = "a program (TorchScript), not weights"
            raise PolicyError(told, file=file.path, code="E-PICKLE")
        # An allow-list, so that absolute, dotted, doubled and empty parts are out too.
        plain = root.isprintable() and root not in ("", ".", "..") and not set(root) & set("\\:")
        if not plain or not _RECORDS.fullmatch(rest):
            raise _bad(file, record.name, "not a name that torch.save writes")
        if record.name.lower() in seen:  # torch looks names up without regard to case
            raise _bad(file, record.name, "there are two of this name")
        limit = MAX_PICKLE if rest == "data.pkl" else MAX_OTHER
        if not rest.startswith("data/") and record.size > limit:
            raise _bad(file, record.name, f"{record.size:,} bytes; the limit is {limit:,}")
        roots.add(root)
        seen.add(record.name.lower())
    if len(roots) > 1:
        raise FormatError(
            f"zip archive: several roots: {', '.join(map(shown, sorted(roots)[:2]))}",
            file=file.path,
            code="E-PICKLE-ARCHIVE",
        )
    if not any(record.name.endswith("/data.pkl") for record in records):
        raise FormatError("zip archive: no data.pkl in it", file=file.path, code="E-PICKLE-ARCHIVE")


def _check_tiling(file: InputFile, records: list[_Record], begin: int) -> list[int]:
    """Local records lie one behind the other, from the first byte to the central directory.

    Returns:
        Where each record's data begin.
    """
    at, places = 0, {}
    for record in sorted(records, key=lambda record: record.offset):
        if record.offset != at:
            raise _bad(file, record.name, f"at offset {record.offset:,}; expected {at:,}")
        places[record.name], at = _check_local(file, record, begin)
    if at != begin:
        raise FormatError(
            "zip archive: bytes before its central directory",
            file=file.path,
            code="E-PICKLE-ARCHIVE",
        )
    return [places[record.name] for record in records]


def _check_local(file: InputFile, record: _Record, begin: int) -> tuple[int, int]:
    """Compare a local header with the central directory.

    Returns:
        Where the data begin, and the end of what follows them.
    """
    at = record.offset
    if at + _LOCAL.size > begin:
        raise _bad(file, record.name, "its local header is cut")
    magic, _, flags, method, _, _, crc, stored, plain, length, extra = _LOCAL.unpack(
        file.read_bytes(at, _LOCAL.size)
    )
    place: int = at + _LOCAL.size + length + extra
    end = place + record.size
    if end > begin:
        raise _bad(file, record.name, "it is longer than the archive")
    name = file.read_bytes(at + _LOCAL.size, length)
    same = (b"PK\x03\x04", record.flags, 0, record.name.encode()) == (magic, flags, method, name)
    # With a descriptor behind the data, the header may leave these open.
    open_ = (0, _MOST32) if flags & _DESCRIBED else ()
    sizes = (record.size, *open_, *((_MOST32,) if extra else ()))
    if not same or crc not in (record.crc, *open_) or stored not in sizes or plain not in sizes:
        raise _bad(file, record.name, "its local header says something else")
    if not flags & _DESCRIBED:
        return place, end
    for form in ("<4s3I", "<4sI2Q"):
        width = struct.calcsize(form)
        if end + width <= begin:
            found = struct.unpack(form, file.read_bytes(end, width))
            if found == (b"PK\x07\x08", record.crc, record.size, record.size):
                return place, end + width
    raise _bad(file, record.name, "what follows its data says something else")


def _read_checked(file: InputFile, record: _Record, place: int) -> bytes:
    data = file.read_bytes(place, record.size)
    crc = zlib.crc32(data)
    if crc != record.crc:
        raise _bad(
            file, record.name, f"its checksum is {crc:08x}; the archive says {record.crc:08x}"
        )
    return data
