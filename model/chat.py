"""A conversation to token ids, segment by segment. No torch, no HTTP.

The checkpoint's own Jinja template decides the form; without one it is Mistral's first instruct
format. Control tokens are never looked for in the rendered text: the template's begin and end
tokens are rendered as marks that no message can contain, and what stands between two marks is
encoded as text. So "</s>" typed by a user stays five characters.

Known limit of Mistral's first format: "[INST]" itself is plain text, so a user can write it.
"""

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from model.errors import ConfigError, PromptError
from model.tokenizer import Tokenizer

MISTRAL_V1_TEMPLATE = """\
{%- if messages and messages[0]['role'] == 'system' -%}
  {%- set system = messages[0]['content'] + '\\n\\n' if messages[0]['content'] else '' -%}
  {%- set turns = messages[1:] -%}
{%- else -%}
  {%- set system = '' -%}{%- set turns = messages -%}
{%- endif -%}
{{- bos_token -}}
{%- for turn in turns -%}
  {%- if turn['role'] not in ('user', 'assistant') -%}
    {{- raise_exception('role ' + turn['role'] + ' is not system, user or assistant') -}}
  {%- elif (turn['role'] == 'user') != (loop.index0 % 2 == 0) -%}
    {{- raise_exception(
      'roles must alternate: user, assistant, user, ... after an optional system message') -}}
  {%- elif turn['role'] == 'user' -%}
    {{- '[INST] ' + (system if loop.first else '') + turn['content'] + ' [/INST]' -}}
  {%- else -%}
    {{- ' ' + turn['content'] + eos_token -}}
  {%- endif -%}
{%- endfor -%}
"""
"""Mistral's v1 instruct format; a system message is folded into the first user turn."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


class ChatFormat:
    """Renders conversations for one checkpoint. Immutable; safe to share between threads."""

    def __init__(self, tokenizer: Tokenizer, template: str = MISTRAL_V1_TEMPLATE) -> None:
        """Raises ConfigError when the template does not parse."""
        self._tokenizer = tokenizer
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise_prompt_error
        try:
            self._template = environment.from_string(template)
        except TemplateError as error:
            raise ConfigError(f"the chat template does not parse: {error}") from error

    @classmethod
    def from_folder(cls, folder: Path, tokenizer: Tokenizer) -> "ChatFormat":
        """The template of `chat_template.jinja`, else of `tokenizer_config.json`, else Mistral's.

        Raises ConfigError when one of them is there but cannot be used.
        """
        template_file = folder / "chat_template.jinja"
        if template_file.is_file():
            try:
                template = template_file.read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise ConfigError(f"{template_file} cannot be read as text: {error}") from error
            return cls(tokenizer, template)
        config_file = folder / "tokenizer_config.json"
        if not config_file.is_file():
            return cls(tokenizer)
        try:
            template = json.loads(config_file.read_text(encoding="utf-8")).get("chat_template")
        except (ValueError, AttributeError) as error:
            raise ConfigError(f"{config_file} is not a JSON object: {error}") from error
        if template is None:
            return cls(tokenizer)
        if not isinstance(template, str):
            raise ConfigError(f"{config_file}: chat_template must be one template, as text")
        return cls(tokenizer, template)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the conversation, ready for the assistant's next words.

        Raises PromptError with the rule that the conversation breaks.
        """
        if not messages:
            raise PromptError("messages must hold at least one message")
        if messages[-1].role == "assistant":
            raise PromptError("the last message must not be the assistant's")
        # A fresh mark for every call: nobody can put into a message what he cannot foresee.
        nonce = secrets.token_hex(16)
        marks = {f"\x00{nonce}bos\x00": self._tokenizer.bos_id}
        marks[f"\x00{nonce}eos\x00"] = self._tokenizer.eos_id
        bos, eos = marks
        text = self._render(messages, bos_token=bos, eos_token=eos)
        ids: list[int] = []
        for segment in re.split(f"({re.escape(bos)}|{re.escape(eos)})", text):
            if segment in marks:
                ids.append(marks[segment])
            elif segment:
                ids += self._tokenizer.encode(segment)
        return ids

    def _render(self, messages: Sequence[Message], **tokens: str) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self._template.render(messages=turns, add_generation_prompt=True, **tokens)
        except PromptError:
            raise  # the template's own words
        except Exception as error:  # a template is a program of others: it may raise anything
            raise PromptError(f"the chat template refused the conversation: {error}") from error


def _raise_prompt_error(message: Any) -> None:
    raise PromptError(str(message))
