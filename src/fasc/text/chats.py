"""Chats as text: through the tokenizer's chat template, or plain."""

from collections.abc import Iterable, Iterator

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from fasc.errors import CorpusError
from fasc.progress import say
from fasc.text.documents import Chat, Document, Piece


def rendered(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, corpus: str, *, chat_template: bool | None
) -> Iterator[Piece]:
    """Documents with every chat as text.

    Args:
        documents: plain ones pass through.
        tokenizer: whose template writes chats as the model was trained to read them.
        corpus: for messages.
        chat_template: ``None``: if the tokenizer has one; ``False``: turns become lines of plain text.

    Raises:
        CorpusError: the tokenizer has no template and one was asked for, or the template refuses a chat.
    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    plain = chat_template is False or not has_template
    told = chat_template is False
    for document in documents:
        if isinstance(document, Piece):
            yield document
            continue
        if plain and chat_template:
            raise CorpusError(f"{document.where}: a chat, and the tokenizer has no chat template", "pass --no-chat-template")
        if plain and not told:
            say(f"`{corpus}` holds chats and the tokenizer has no chat template: their turns are read as lines of plain text")
            told = True
        if plain:
            yield Piece(document.plain, document.where)
        else:
            text = _through_template(tokenizer, document)
            yield Piece(text, document.where, marked=text.rstrip().endswith(tokenizer.eos_token or "\0"))


def _through_template(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> str:
    try:
        return str(tokenizer.apply_chat_template(list(chat.turns), tokenize=False))
    except (TemplateError, ValueError, TypeError, LookupError, AttributeError) as problem:
        raise CorpusError(
            f"{chat.where}: the tokenizer's chat template refuses it ({problem})", "pass --no-chat-template, or mend the chat"
        ) from problem
