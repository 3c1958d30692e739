"""PyTorch's zip archives: the archive is checked whole before its pickle is read.

Layout: local records one after the other, each with its data; then the central directory, the
64-bit end record with its locator, and the end record. torch's own reader believes the central
directory alone; here the local headers must say the same, and nothing may lie between. What the
pickle makes of the records is torch's affair; one that it does not use is no fault.
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass

from weightsurgery.errors import FormatError, PolicyError, counted, shown
from weightsurgery.formats.files import InputFile

MAX_RECORDS = 1_000_000
MAX_DIRECTORY = 100_000_000  # bytes of the central directory
MAX_PICKLE = 100_000_000  # bytes of data.pkl: names, shapes and strides
_CHUNK = 1 << 22
_END, _LOCATOR, _END64 = (struct.Struct(f) for f in ("<4s4H2IH", "<4sIQI", "<4sQ2H2I4Q"))
_CENTRAL, _LOCAL = struct.Struct("<4s6H3I5H2I"), struct.Struct("<4s5H3I2H")
_MOST16, _MOST32 = 0xFFFF, 0xFFFFFFFF
_DESCRIBED, _UTF8 = 0x0008, 0x0800  # the flags that torch sets: sizes follow the data; UTF-8 names
_RECORDS = re.compile(
    r"data\.pkl|data/\d+|version|byteorder|\.data/serialization_id"
    r"|\.format_version|\.storage_alignment"
)
_ONLY_SAVED = "save it again with torch.save, or convert it where you trust it"


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


def check_archive(file: InputFile) -> None:
    """Check a PyTorch zip archive from the first byte to the last, without unpickling anything.

    Args:
        file: The archive.

    Raises:
        PolicyError: It is a pickle of the time before PyTorch 1.6, which is no archive, or it
            holds a program (TorchScript).
        FormatError: A rule is broken: one root, plain and unique names that torch.save writes,
            uncompressed records, sizes and checksums that are right, local headers that equal the
            central directory, nothing before, between or behind.
        ChangedError: It became shorter meanwhile.
        StorageError: It cannot be read.
    """
    start = file.read_bytes(0, min(file.size, 4))
    if start[:1] == b"\x80" or start[:1] == b"(":
        raise PolicyError(
            "a pickle from before PyTorch 1.6, not a zip archive; it cannot be checked",
            file=file.path,
            hint=_ONLY_SAVED,
            code="E-PICKLE",
        )
    if start != b"PK\x03\x04":
        raise FormatError("not a PyTorch zip archive", file=file.path, code="E-PICKLE-ARCHIVE")
    begin, size, count = _read_end(file)
    records = _read_directory(file, begin, size, count)
    _check_names(file, records)
    _check_tiling(file, records, begin)
    for record in records:
        _check_crc(file, record)


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
        if rest == "data.pkl" and record.size > MAX_PICKLE:
            raise _bad(file, record.name, f"{record.size:,} bytes; the limit is {MAX_PICKLE:,}")
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


def _check_tiling(file: InputFile, records: list[_Record], begin: int) -> None:
    """Local records lie one behind the other, from the first byte to the central directory."""
    at = 0
    for record in sorted(records, key=lambda record: record.offset):
        if record.offset != at:
            raise _bad(file, record.name, f"at offset {record.offset:,}; expected {at:,}")
        at = _check_local(file, record, begin)
    if at != begin:
        raise FormatError(
            "zip archive: bytes before its central directory",
            file=file.path,
            code="E-PICKLE-ARCHIVE",
        )


def _check_local(file: InputFile, record: _Record, begin: int) -> int:
    """Compare a local header with the central directory; gives the end of what follows it."""
    at = record.offset
    if at + _LOCAL.size > begin:
        raise _bad(file, record.name, "its local header is cut")
    magic, _, flags, method, _, _, crc, stored, plain, length, extra = _LOCAL.unpack(
        file.read_bytes(at, _LOCAL.size)
    )
    end: int = at + _LOCAL.size + length + extra + record.size
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
        return end
    for form in ("<4s3I", "<4sI2Q"):
        width = struct.calcsize(form)
        if end + width <= begin:
            found = struct.unpack(form, file.read_bytes(end, width))
            if found == (b"PK\x07\x08", record.crc, record.size, record.size):
                return end + width
    raise _bad(file, record.name, "what follows its data says something else")


def _check_crc(file: InputFile, record: _Record) -> None:
    name, extra = struct.unpack("<2H", file.read_bytes(record.offset + 26, 4))
    at = record.offset + _LOCAL.size + name + extra
    end, crc, buffer = at + record.size, 0, bytearray(min(_CHUNK, record.size))
    while at < end:
        part = memoryview(buffer)[: min(_CHUNK, end - at)]
        file.read_into(part, at)
        crc, at = zlib.crc32(part, crc), at + len(part)
    if crc != record.crc:
        raise _bad(
            file, record.name, f"its checksum is {crc:08x}; the archive says {record.crc:08x}"
        )
