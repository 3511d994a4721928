"""Texts, ids and conversations of requests to the token ids of prompts, within what is allowed.

Knows schema and text; knows no sampling and no engine. Every refusal is a RequestError.
"""

from collections.abc import Sequence
from itertools import islice
from typing import Any

from pydantic import BaseModel

from cluster.errors import RequestError
from cluster.ingress.tools import conversation
from cluster.schema import ChatMessage, Rendering
from model.chat import RESERVED, ChatFormat
from model.errors import PromptError
from model.tokenizer import Tokenizer

LONG = 4_096
"""Characters of texts, and other items, of a body that is long: tokenising so many takes
milliseconds, in which no stream goes on where the event loop does it."""


class PromptReader:
    """Tokenises for one served model. Immutable."""

    def __init__(
        self, tokenizer: Tokenizer, chat: ChatFormat, *, vocab_size: int, max_model_len: int
    ) -> None:
        self._tokenizer = tokenizer
        self._chat = chat
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len

    def ids(
        self, prompt: str | list[int], field: str, *, has_begin: bool = True
    ) -> tuple[int, ...]:
        """Ids of one prompt in a field. has_begin: whether a text gets the begin token."""
        if not prompt:
            raise RequestError(400, f"{field}: must not be empty", param=field)
        if not isinstance(prompt, str):
            self.check_ids(prompt, field)
            return tuple(prompt)
        self._check_length(len(prompt), field)
        try:
            ids = self._tokenizer.encode(prompt)
        except PromptError as error:
            raise RequestError(400, f"{field}: {error}", param=field) from error
        return (self._tokenizer.bos_id, *ids) if has_begin else tuple(ids)

    def check_ids(self, ids: Sequence[int], field: str) -> None:
        """Refuse ids that the vocabulary does not have."""
        vocab_size = self._vocab_size
        if max(ids, default=0) >= vocab_size:
            raise RequestError(
                400,
                f"{field}: token id {max(ids)} is out of vocabulary ({vocab_size} ids)",
                param=field,
            )

    def text(self, prompt: str | list[int]) -> str:
        """Text of one prompt."""
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)

    def _check_length(self, num_characters: int, param: str) -> None:
        """Refuse what is too long whatever its tokens, before anybody counts them."""
        context = self._max_model_len
        if num_characters > context * self._tokenizer.longest_piece:
            raise RequestError(
                400,
                f"{num_characters:,} characters cannot fit into the context of {context} tokens",
                param=param,
                code="context_length_exceeded",
            )

    def chat_ids(
        self,
        given: Sequence[ChatMessage],
        body: Rendering,
        *,
        shown: Sequence[dict[str, Any]],
        calls_tools: bool = False,
    ) -> tuple[int, ...]:
        """Ids of a conversation, as the chat template renders it."""
        messages = conversation(given)
        self._check_length(sum(len(each.content or "") for each in messages), "messages")
        reserved = RESERVED.intersection(body.chat_template_kwargs)
        if reserved:
            raise RequestError(
                400,
                f"chat_template_kwargs: {min(reserved)} has a field of its own or is no caller's",
                param="chat_template_kwargs",
            )
        if body.continue_final_message and (
            messages[-1].role != "assistant" or messages[-1].tool_calls
        ):
            raise RequestError(
                400,
                "continue_final_message: the last message must be text of the assistant's",
                param="continue_final_message",
            )
        try:
            ids = self._chat.encode(
                messages,
                tools=shown,
                calls_tools=calls_tools,
                adds_prompt=body.opens_turn,
                continues_last=body.continue_final_message,
                variables=body.chat_template_kwargs,
            )
        except PromptError as error:
            raise RequestError(400, str(error), param="messages") from error
        return tuple(ids)


def is_long(body: BaseModel) -> bool:
    """Whether it could take long to make prompts of a body; looks at LONG items at most."""
    num_left = LONG
    waiting: list[Any] = [body]
    while waiting and num_left > 0:
        match waiting.pop():
            case str() as text:
                num_left -= len(text)
            case BaseModel() as part:
                waiting += part.__dict__.values()
            case dict() as fields:
                num_left -= len(fields)
                waiting += islice(fields, LONG)
                waiting += islice(fields.values(), LONG)
            case list() | tuple() as items:
                num_left -= len(items)
                waiting += islice(items, LONG)
            case _:
                num_left -= 1
    return num_left <= 0


def prompts_of(
    prompt: str | list[int] | list[str | list[int]], field: str
) -> list[str | list[int]]:
    """All prompts of a body's field, whichever of its forms it has."""
    if isinstance(prompt, str):
        return [prompt]
    ids = [item for item in prompt if isinstance(item, int)]
    if ids:
        return [ids]
    if not prompt:
        raise RequestError(400, f"{field}: must not be empty", param=field)
    return [item for item in prompt if not isinstance(item, int)]
