"""Seeded damage to what a user can hand in: bytes, text, JSON, safetensors and options."""

import json
import random
import struct
from pathlib import Path
from typing import Any

NUMBERS: tuple[Any, ...] = (0, -1, 1, 2**31, 2**65, -0.5, 1e400, float("nan"), 3.7)
ODD: tuple[Any, ...] = (
    *NUMBERS,
    None,
    True,
    "",
    "x" * 5000,
    "../x",
    "nan",
    [],
    {},
    [[]],
    {"a": None},
    "\ud800",
    "é",
    [1, [2, [3]]],
)
TEXTS = (
    "",
    " ",
    "nan",
    "1e400",
    "-1",
    "0",
    "2**65",
    "9" * 30,
    "../x",
    "/dev/null",
    "~",
    "a,b",
    ",",
    "é",
    "'",
    "--",
    "none",
    "1;2",
    "{}",
    "\x00",
    "inf",
)


def bytes_of(data: bytes, dice: random.Random) -> bytes:
    """Cut, flipped, doubled, or with something put in."""
    place = dice.randrange(len(data) + 1)
    kind = dice.choice(("cut", "flip", "double", "insert", "remove", "empty", "zeros"))
    if kind == "cut":
        return data[:place]
    if kind == "flip" and place < len(data):
        return data[:place] + bytes([data[place] ^ (1 << dice.randrange(8))]) + data[place + 1 :]
    if kind == "double":
        return data + data[place:]
    if kind == "insert":
        return (
            data[:place]
            + dice.choice((b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b'"', b"}" * 50, b"[" * 3000, b"\xed\xa0\x80"))
            + data[place:]
        )
    if kind == "remove":
        return data[:place] + data[place + dice.randrange(1, 40) :]
    return b"" if kind == "empty" else bytes(len(data))


def json_of(value: Any, dice: random.Random) -> str:
    """One node replaced, removed, repeated or renamed; written as Python does, NaN included."""
    places = list(_places(value))
    if not places:
        return json.dumps(dice.choice(ODD))
    holder, key = dice.choice(places)
    kind = dice.choice(("replace", "replace", "replace", "remove", "rename", "repeat", "nudge"))
    if kind == "remove":
        del holder[key]
    elif kind == "rename" and isinstance(holder, dict):
        holder[f"{key}x"] = holder.pop(key)
    elif kind == "repeat" and isinstance(holder, list):
        holder.append(holder[key])
    elif kind == "nudge" and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
        holder[key] += dice.choice((-1, 1, 7))
    else:
        holder[key] = dice.choice(ODD)
    return json.dumps(value)


def _places(value: Any) -> Any:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def json_file(file: Path, dice: random.Random) -> None:
    """A JSON file, by its structure or by its bytes."""
    data = file.read_bytes()
    if dice.random() < 0.25:
        file.write_bytes(bytes_of(data, dice))
    else:
        file.write_text(json_of(json.loads(data), dice), encoding="utf-8", errors="surrogatepass")


def safetensors_file(file: Path, dice: random.Random) -> None:
    """A tensor's entry in the header, its numbers, or the file's bytes."""
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    kind = dice.choice(("header", "header", "numbers", "bytes"))
    if kind == "bytes":
        file.write_bytes(bytes_of(data, dice))
        return
    header, body = json.loads(data[8 : 8 + size]), bytearray(data[8 + size :])
    if kind == "numbers":
        names = [name for name in header if name != "__metadata__" and header[name]["dtype"] == "F32"]
        start, stop = header[dice.choice(names)]["data_offsets"]
        for _ in range(dice.choice((1, 1, 50))):
            place = start + 4 * dice.randrange(max(1, (stop - start) // 4))
            body[place : place + 4] = struct.pack("<f", dice.choice((float("nan"), float("inf"), -float("inf"), 1e30, 0.0, -5.0)))
        written = data[8 : 8 + size]
    else:
        written = json_of(header, dice).encode("utf-8", "surrogatepass")
    file.write_bytes(struct.pack("<Q", len(written)) + written + bytes(body))


def text_file(file: Path, dice: random.Random) -> None:
    """Any other file, by its bytes, several times."""
    data = file.read_bytes()
    for _ in range(dice.choice((1, 1, 3))):
        data = bytes_of(data, dice)
    file.write_bytes(data)


def toml_file(file: Path, dice: random.Random) -> None:
    """A value of a line, a line, or the bytes."""
    lines = file.read_text(encoding="utf-8").splitlines()
    place = dice.randrange(len(lines))
    kind = dice.choice(("value", "value", "value", "remove", "repeat", "bytes"))
    if kind == "bytes":
        text_file(file, dice)
        return
    if kind == "value" and "=" in lines[place]:
        odd = (
            "nan",
            "inf",
            "-1",
            "0",
            '""',
            '".."',
            "[]",
            "{}",
            "true",
            "1e400",
            str(2**70),
            '"../../x"',
            "1979-05-27",
            '"\\u0000"',
            "[1, 'a']",
            "'a/b'",
            "'.'",
            "'figures'",
        )
        lines[place] = f"{lines[place].split('=')[0]}= {dice.choice(odd)}"
    elif kind == "remove":
        del lines[place]
    else:
        lines.insert(place, lines[place])
    file.write_text("\n".join(lines), encoding="utf-8")
