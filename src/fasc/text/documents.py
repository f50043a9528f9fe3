"""What a corpus is made of: documents of plain text, and chats; and which of the two a record holds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fasc.errors import CorpusError

FIELDS = ("text", "content", "messages", "conversations", "prompt", "completion", "instruction", "input", "output")
"""Fields of a record that are read."""

_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "observation": "tool", "function": "tool"}
"""Other names for the roles of a chat."""

Turn = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Piece:
    """A document, or a part of a long one."""

    text: str
    where: str
    """File and line, for messages."""

    last: bool = True
    """Whether the document ends here."""

    marked: bool = False
    """Whether the text itself says that it ends here, so that no end-of-text token need follow."""


@dataclass(frozen=True, slots=True)
class Chat:
    """Turns of a conversation, each with ``role`` and ``content``."""

    turns: tuple[Turn, ...]
    where: str

    @property
    def plain(self) -> str:
        """The turns' contents, one a line."""
        return "\n".join(str(turn["content"]) for turn in self.turns if turn["content"])


Document = Piece | Chat


def document_of(row: object, where: str) -> Document:
    """The text or the chat of a record.

    Args:
        row: a string, or an object with ``text`` or ``content``; with ``messages`` (role, content) or ``conversations`` (from,
            value); with ``prompt`` and ``completion``; or with ``instruction``, perhaps ``input``, and ``output``.
        where: the record, for messages.

    Raises:
        CorpusError: it has none of these.
    """
    if isinstance(row, str):
        return Piece(row, where)
    if isinstance(row, Mapping):
        for field in ("text", "content"):
            if isinstance(row.get(field), str):
                return Piece(row[field], where)
        turns = _turns_of(row, where)
        if turns:
            return Chat(tuple(turns), where)
        if isinstance(row.get("output"), str):
            return Piece("\n".join(str(row[field]) for field in ("input", "output") if row.get(field)), where)
    fields = f" (fields: {', '.join(map(str, row))[:200]})" if isinstance(row, Mapping) else ""
    raise CorpusError(
        f"{where}: no text in it{fields}",
        "a record needs `text`, `content`, `messages`, `conversations`, `prompt` and `completion`, or `instruction` and `output`",
    )


def _turns_of(row: Mapping[str, Any], where: str) -> list[Turn]:
    for field in ("messages", "conversations"):
        if isinstance(row.get(field), Sequence) and not isinstance(row[field], str):
            return [_turn(raw, where) for raw in row[field]]
    prompt, completion = row.get("prompt"), row.get("completion")
    if prompt is not None and completion is not None:
        return [*_side(prompt, "user", where), *_side(completion, "assistant", where)]
    instruction, output = row.get("instruction"), row.get("output")
    if isinstance(instruction, str) and isinstance(output, str):
        asked = "\n".join(str(part) for part in (instruction, row.get("input")) if part)
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": output}]
    return []


def _side(value: object, role: str, where: str) -> list[Turn]:
    """One side of a prompt and its completion: a string, or turns."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, Sequence):
        return [_turn(raw, where) for raw in value]
    raise CorpusError(
        f"{where}: its prompt or completion is neither text nor turns", "give strings, or lists of role and content"
    )


def _turn(raw: object, where: str) -> Turn:
    """One turn with ``role`` and ``content``, whichever of the two ways it is written."""
    if isinstance(raw, Mapping):
        role, content = raw.get("role", raw.get("from")), raw.get("content", raw.get("value"))
        if isinstance(content, Sequence) and not isinstance(content, str):
            content = "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
        if isinstance(role, str) and (isinstance(content, str) or content is None):
            rest = {str(key): value for key, value in raw.items() if key not in ("role", "from", "content", "value")}
            return {**rest, "role": _ROLES.get(role, role), "content": content or ""}
    raise CorpusError(f"{where}: a turn has no role or no content", "each turn needs `role` and `content`, or `from` and `value`")
