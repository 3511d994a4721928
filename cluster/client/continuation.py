"""A streamed answer that outlives its connection: what to ask for, what to show. Pure.

A server keeps nothing of a stream that broke off. So the client asks for the ids of the tokens
beside their text, and for a seed of its own if the caller named none; to go on it sends the same
request again with the ids that it has. What it asked for only for that, the caller does not see.

The text that a server has sent after a chunk depends on nothing but the ids sent until then, so a
stream can go on behind any chunk, whatever the server held back.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import httpx

from cluster.client.call import StreamCall
from cluster.schema import (
    RESUMED_TOKENS,
    ChatChunkChoice,
    ChatCompletionChunk,
    Completion,
    CompletionChoice,
)

Chunk = Completion | ChatCompletionChunk


def can_continue(body: Mapping[str, Any]) -> bool:
    """Whether an answer can go on: one choice, of which ids and text are all that is told."""
    prompt = body.get("prompt")
    is_one_prompt = (
        prompt is None
        or isinstance(prompt, str)
        or len(prompt) == 1
        or (len(prompt) > 0 and isinstance(prompt[0], int))
    )
    asked_once = all((body.get(name) or 1) == 1 for name in ("n", "best_of"))
    logprobs = body.get("logprobs")
    wants_logprobs = logprobs is not None and logprobs is not False  # completions count from 0
    return is_one_prompt and asked_once and not wants_logprobs


class Continuation:
    """Of one streamed answer with a single choice: what has come, and how to ask for the rest."""

    def __init__(self, call: StreamCall[Any, Any], *, seed: int) -> None:
        """seed: used if the caller named none."""
        asked = call.body or {}
        self._wants_ids = bool(asked.get("return_token_ids"))
        given = {name: value for name, value in asked.items() if value is not None}
        self._call = replace(call, body={"seed": seed, **given, "return_token_ids": True})
        self._ids = list(given.get("resume_token_ids") or ())
        self._first: Chunk | None = None
        self.is_possible = True
        """Whether the ids of all that has come are known."""
        self._has_finished = False

    @property
    def call(self) -> StreamCall[Any, Any]:
        """The request for what is still to come."""
        if not self._ids:
            return self._call
        body = {**(self._call.body or {}), "resume_token_ids": self._ids}
        return replace(self._call, body=body)

    def is_next(self, response: httpx.Response) -> bool:
        """Whether an answer to `call` goes on where the last one broke off."""
        return not self._ids or response.headers.get(RESUMED_TOKENS) == str(len(self._ids))

    def show(self, chunk: Chunk) -> Chunk | None:
        """Take note of a chunk; returns what the caller is to see of it, if anything."""
        first = self._first or chunk
        # An end that the caller has seen comes again if the stream broke off behind it, and
        # nothing else but a chat's opening does.
        if chunk.choices and (self._has_finished or (self._first and _is_opening(chunk))):
            return None
        self._first = first
        for choice in chunk.choices:
            self._take(choice)
        if chunk is not first:
            chunk.id, chunk.created = first.id, first.created
        if chunk is not first or not self._wants_ids:
            _hide_prompt_ids(chunk)
        return chunk

    def _take(self, choice: CompletionChoice | ChatChunkChoice) -> None:
        """The ids of the last chunk are never sent: if the stream breaks off behind it, the server
        repeats it, and tells what comes after, as the usage.
        """
        self._has_finished = choice.finish_reason is not None
        if choice.token_ids is None:
            self.is_possible = self.is_possible and _is_textless(choice)
        elif not self._has_finished:
            self._ids += choice.token_ids
        if not self._wants_ids:
            choice.token_ids = None


def _is_opening(chunk: Chunk) -> bool:
    """Whether it is the chunk that names the role, with which every streamed chat begins."""
    return isinstance(chunk, ChatCompletionChunk) and any(
        choice.delta.role for choice in chunk.choices
    )


def _is_textless(choice: CompletionChoice | ChatChunkChoice) -> bool:
    if isinstance(choice, CompletionChoice):
        return not choice.text
    return not (choice.delta.content or choice.delta.tool_calls)


def _hide_prompt_ids(chunk: Chunk) -> None:
    if isinstance(chunk, ChatCompletionChunk):
        chunk.prompt_token_ids = None
        return
    for choice in chunk.choices:
        choice.prompt_token_ids = None
