"""The zip archive that torch has written since version 1.6.

Only what torch writes is accepted: records stored uncompressed, one per name, inside the file.
An archive can then never unpack to more than its own size, which `zipfile` would not ensure.
"""

import struct
import zlib
from typing import BinaryIO, NamedTuple

from repopt_jax.torch_files.limits import (
    MAX_NAME,
    MAX_RECORDS,
    Budget,
    TorchFileError,
    quote,
)

_END = struct.Struct("<4s4H2LH")  # end of central directory
_LOCATOR64 = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")  # an entry of the central directory
_LOCAL = struct.Struct("<4s5H3L2H")  # the header in front of a record
_CHUNK = 1 << 24


class Record(NamedTuple):
    """One file of the archive, by its entry in the central directory."""

    name: bytes
    offset: int  # of the local header
    size: int
    checksum: int
    flags: int
    method: int


class Archive:
    """Names and places of an archive's records; the folder that holds `data.pkl` is stripped."""

    def __init__(self, stream: BinaryIO, file_size: int, budget: Budget):
        self.stream = stream
        self.file_size = file_size
        records = self._read_directory(budget)
        roots = [name[: -len("data.pkl")] for name in records if name.endswith("/data.pkl")]
        roots = [root for root in roots if root.count("/") == 1]
        if len(roots) != 1:
            raise TorchFileError(
                f"it is a zip archive with {len(roots)} files data.pkl, where torch writes one"
            )
        root = roots[0]
        self.records = {
            name[len(root) :]: record for name, record in records.items() if name.startswith(root)
        }
        if "constants.pkl" in self.records:
            raise TorchFileError("it is a TorchScript program, not a checkpoint")

    def _read_at(self, offset: int, size: int) -> bytes:
        if offset < 0 or size < 0 or offset + size > self.file_size:
            raise TorchFileError("its zip directory points outside the file")
        self.stream.seek(offset)
        data = self.stream.read(size)
        if len(data) != size:
            raise TorchFileError("it became shorter while it was read")
        return data

    def _read_directory(self, budget: Budget) -> dict[str, Record]:
        tail_start = max(0, self.file_size - _END.size - 0xFFFF)
        tail = self._read_at(tail_start, self.file_size - tail_start)
        at = tail.rfind(b"PK\x05\x06")
        if at < 0 or at + _END.size > len(tail):
            raise TorchFileError("its zip directory is missing, so the file is cut off")
        *_, count, size, offset, _ = _END.unpack_from(tail, at)
        end = tail_start + at
        if end >= _LOCATOR64.size:
            locator = self._read_at(end - _LOCATOR64.size, _LOCATOR64.size)
            magic, _, end64, _ = _LOCATOR64.unpack(locator)
            if magic == b"PK\x06\x07":
                magic, *_, count, size, offset = _END64.unpack(self._read_at(end64, _END64.size))
                if magic != b"PK\x06\x06":
                    raise TorchFileError("its zip64 directory is damaged")
                end = end64
        if count > MAX_RECORDS or offset + size > end:
            raise TorchFileError(
                f"its zip directory ({count} records, {size} bytes) cannot be right"
            )
        budget.spend(2 * size + 400 * count)
        directory = self._read_at(offset, size)
        self.data_end = offset
        records: dict[str, Record] = {}
        at = 0
        for _ in range(count):
            record, at = _parse_entry(directory, at)
            name = record.name.decode("utf-8" if record.flags & 0x800 else "cp437", "replace")
            if name in records:
                raise TorchFileError(f"its zip archive holds {quote(name)} twice")
            records[name] = record
        return records

    def locate(self, name: str) -> tuple[Record, int]:
        """The record of that name and the offset of its first byte in the file.

        Raises TorchFileError for a record that is missing, encrypted, compressed or misplaced.
        """
        self.size_of(name)
        record = self.records[name]
        if record.flags & 0x2041:
            raise TorchFileError(f"its record {quote(name)} is encrypted")
        if record.method != 0:
            raise TorchFileError(f"its record {quote(name)} is compressed, which torch never does")
        header = _LOCAL.unpack(self._read_at(record.offset, _LOCAL.size))
        magic, name_size, extra_size = header[0], header[-2], header[-1]
        start = record.offset + _LOCAL.size + name_size + extra_size
        if (
            magic != b"PK\x03\x04"
            or self._read_at(record.offset + _LOCAL.size, name_size) != record.name
            or start + record.size > self.data_end
        ):
            raise TorchFileError(f"its record {quote(name)} is not where the directory says")
        return record, start

    def size_of(self, name: str) -> int:
        """A record's bytes; raises TorchFileError where there is no such record."""
        if name not in self.records:
            raise TorchFileError(f"its zip archive lacks the record {quote(name)}")
        return self.records[name].size

    def seek(self, name: str) -> int:
        """Check a record, bring the stream to its first byte and return its size."""
        record, start = self.locate(name)
        self.stream.seek(start)
        checksum = 0
        for at in range(0, record.size, _CHUNK):
            checksum = zlib.crc32(self.stream.read(min(_CHUNK, record.size - at)), checksum)
        _compare_checksum(name, checksum, record)
        self.stream.seek(start)
        return record.size

    def read_into(self, name: str, buffer: memoryview) -> None:
        """Fill the buffer, which has the record's size, and check the record."""
        record, start = self.locate(name)
        self.stream.seek(start)
        checksum = 0
        for at in range(0, len(buffer), _CHUNK):
            chunk = buffer[at : at + _CHUNK]
            if self.stream.readinto(chunk) != len(chunk):
                raise TorchFileError("it became shorter while it was read")
            checksum = zlib.crc32(chunk, checksum)
        _compare_checksum(name, checksum, record)


def _compare_checksum(name: str, checksum: int, record: Record) -> None:
    # torch writes 0 when its users switch the checksums off.
    if record.checksum not in (0, checksum):
        raise TorchFileError(f"the checksum of its record {quote(name)} does not match its bytes")


def _parse_entry(directory: bytes, at: int) -> tuple[Record, int]:
    if at + _ENTRY.size > len(directory):
        raise TorchFileError("its zip directory ends before its last record")
    entry = _ENTRY.unpack_from(directory, at)
    magic, _, _, flags, method, _, _, checksum, packed, size = entry[:10]
    name_size, extra_size, comment_size, offset = entry[10], entry[11], entry[12], entry[-1]
    if magic != b"PK\x01\x02" or name_size > MAX_NAME:
        raise TorchFileError("its zip directory is damaged")
    at += _ENTRY.size
    name = directory[at : at + name_size]
    extra = directory[at + name_size : at + name_size + extra_size]
    size, packed, offset = _apply_zip64(extra, size, packed, offset)
    if method == 0 and size != packed:
        raise TorchFileError(
            f"its record {quote(name)} has {packed} bytes and claims to hold {size}"
        )
    at += name_size + extra_size + comment_size
    return Record(name, offset, size, checksum, flags, method), at


def _apply_zip64(extra: bytes, size: int, packed: int, offset: int) -> list[int]:
    """Replace the values that do not fit in four bytes by those of the zip64 field."""
    values = [size, packed, offset]
    for _ in range(8):  # fields; torch writes one or two, and a loop over thousands is slow
        if len(extra) < 4:
            break
        kind, length = struct.unpack_from("<2H", extra)
        field, extra = extra[4 : 4 + length], extra[4 + length :]
        if kind == 1:
            for index, value in enumerate(values):
                if value == 0xFFFFFFFF and len(field) >= 8:
                    values[index] = int.from_bytes(field[:8], "little")
                    field = field[8:]
    return values
