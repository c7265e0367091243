"""JSON lines that carry their own checksum: `{"sum":"<xxh3-64>", …}`.

The sum covers every byte of the line after itself, so a line stays plain JSON for other tools
and is checked without parsing it.
"""

from __future__ import annotations

import json
from typing import Any

from xxhash import xxh3_64_hexdigest

MAX_LINE = 8 << 20
"""No line of ours comes near; a longer one is not parsed."""

_HEAD = b'{"sum":"'
_START, _END = len(_HEAD), len(_HEAD) + 16
_TAIL = b'",'

_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False, check_circular=False).encode


def encode_line(fields: dict[str, Any]) -> bytes:
    """One line with its newline; `fields` must not be empty and hold no NaN or infinity."""
    body = _encode(fields)[1:].encode()
    return b'{"sum":"%b",%b\n' % (xxh3_64_hexdigest(body).encode(), body)


def decode_line(line: bytes) -> dict[str, Any]:
    """Check and parse one line without its newline; raises `ValueError` saying what is wrong."""
    if len(line) > MAX_LINE:
        raise ValueError(f"{len(line)} bytes are no line of a run")
    if line[:_START] != _HEAD or line[_END : _END + 2] != _TAIL:
        raise ValueError("no checksum at its start")
    body = line[_END + 2 :]
    if line[_START:_END] != xxh3_64_hexdigest(body).encode():
        raise ValueError("checksum mismatch")
    return parse_object(b"{" + body)


def parse_object(text: bytes) -> dict[str, Any]:
    """Parse a JSON object from bytes nobody vouches for; raises `ValueError` only."""
    try:
        value = _decode(text.decode())
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _refuse(word: str) -> Any:
    raise ValueError(f"{word} is not JSON")


_decode = json.JSONDecoder(parse_constant=_refuse).decode
