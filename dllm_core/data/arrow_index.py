"""How many rows each record batch of an Arrow IPC file has, of which pyarrow tells only the sum.

Read from the heads of the batches: flatbuffers, of which three fields are needed. Footer and message:
https://github.com/apache/arrow/blob/main/format/File.fbs and Message.fbs.
"""

import io
import struct

_AROUND = 1 << 16  # read at once: a head is some hundred bytes, and a request of a store costs as much as so many
_BLOCK = struct.Struct("<qi4xq")  # where a batch begins in the file, bytes of its head, of its body
_RECORD_BATCHES, _HEADER, _LENGTH = 3, 2, 0  # of a footer, of a message, of a record batch


def batch_rows(file: io.RawIOBase, size: int) -> list[int]:
    """Rows of each record batch of a file of `size` bytes that begins and ends as one; 0 where a head makes no sense.

    ValueError if its footer makes none.
    """
    buffered = io.BufferedReader(file, _AROUND)
    try:
        return [_rows(buffered, *block) for block in _blocks(buffered, size)]
    except struct.error as error:
        raise ValueError("its footer makes no sense") from error
    finally:
        buffered.detach()


def _blocks(file: io.BufferedIOBase, size: int) -> list[tuple[int, int]]:
    """(where it begins, bytes of its head) of each record batch."""
    end = size - len(b"ARROW1") - 4
    file.seek(end)
    [length] = struct.unpack("<i", file.read(4))
    file.seek(max(0, end - length))
    footer = file.read(length)
    at = _field(footer, _root(footer, 0), _RECORD_BATCHES)
    if at is None:
        return []
    at += _int(footer, at)
    first, count = at + 4, _int(footer, at)
    blocks = [_BLOCK.unpack_from(footer, first + number * _BLOCK.size) for number in range(count)]
    return [(begin, head) for begin, head, _ in blocks]


def _rows(file: io.BufferedIOBase, begin: int, length: int) -> int:
    try:
        file.seek(begin)
        head = file.read(length)
        message = _root(head, 8 if _int(head, 0) == -1 else 4)  # older files have no mark before the length
        batch = _field(head, message, _HEADER)
        if batch is None:
            return 0
        rows = _field(head, batch + _int(head, batch), _LENGTH)
        return 0 if rows is None else max(0, int(struct.unpack_from("<q", head, rows)[0]))
    except (struct.error, ValueError):
        return 0


def _int(data: bytes, at: int) -> int:
    return int(struct.unpack_from("<i", data, at)[0])


def _root(data: bytes, begin: int) -> int:
    return begin + _int(data, begin)


def _field(data: bytes, table: int, number: int) -> int | None:
    """Where a field of a table stands, None if it has its default."""
    entries = table - _int(data, table)
    offset = 0
    if 4 + 2 * number < struct.unpack_from("<H", data, entries)[0]:
        [offset] = struct.unpack_from("<H", data, entries + 4 + 2 * number)
    return table + offset if offset else None
