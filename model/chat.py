"""A conversation to token ids, segment by segment. No torch, no HTTP.

The checkpoint's own Jinja template decides the form; without one it is Mistral's first instruct
format. Control tokens are never looked for in the rendered text: those that the template itself
writes are rendered as marks that no message can contain, and what stands between two marks is
encoded as text. So "</s>" typed by a user stays five characters, and so does "[INST]" where the
vocabulary has it as a control token.

Known limit of Mistral's first format: "[INST]" itself is plain text, so a user can write it.
"""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from model.config import read_json
from model.errors import ConfigError, PromptError
from model.tokenizer import Tokenizer

TEMPLATE_FILE = "chat_template.jinja"
TOOL_USE_FILE = "additional_chat_templates/tool_use.jinja"

DEFAULT, TOOL_USE = "default", "tool_use"
"""Names of templates, where a checkpoint has several: for conversations without tools and with."""

CALLS_MARKER = "[TOOL_CALLS]"
"""What a model of Mistral's writes before its tool calls; a control token where there is one."""

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


RESERVED = frozenset(
    {
        "messages",
        "tools",
        "add_generation_prompt",
        "bos_token",
        "eos_token",
        "raise_exception",
        "strftime_now",
    }
)
"""Variables of a template that only `ChatFormat.encode` sets."""


@dataclass(frozen=True)
class ToolCall:
    """A call that the assistant has asked for."""

    id: str
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str | None
    """None only beside tool calls."""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    """Of a tool's turn: the call that it answers."""
    name: str | None = None

    def as_variable(self) -> dict[str, Any]:
        """What a template sees of it: the dictionary that transformers' templates expect."""
        turn: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            turn["tool_calls"] = [
                {
                    "type": "function",
                    "id": call.id,
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in self.tool_calls
            ]
        if self.tool_call_id is not None:
            turn["tool_call_id"] = self.tool_call_id
        if self.name is not None:
            turn["name"] = self.name
        return turn


class ChatFormat:
    """Renders conversations for one checkpoint. Immutable; safe to share between threads."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str = MISTRAL_V1_TEMPLATE,
        tool_template: str | None = None,
    ) -> None:
        """tool_template: for conversations with tools; None where the other serves for all.

        Raises ConfigError when a template does not parse.
        """
        self.template = template
        self._tokenizer = tokenizer
        # nobody can put into a message what he cannot foresee
        self._nonce = secrets.token_hex(16)
        self._mark = re.compile(f"{self._nonce}-([0-9]+)-")
        self._end = f"{self._nonce}-end-"
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise_prompt_error
        environment.globals["strftime_now"] = _strftime_now
        environment.filters["tojson"] = _to_json  # jinja's own is for HTML
        with_tools = template if tool_template is None else tool_template
        try:
            self._template = environment.from_string(self._marked(template))
            self._tool_template = environment.from_string(self._marked(with_tools))
            variables = meta.find_undeclared_variables(environment.parse(with_tools))
        except TemplateError as error:
            raise ConfigError(f"the chat template does not parse: {error}") from error
        self.takes_tools = "tools" in variables and CALLS_MARKER in with_tools
        """Whether the template tells the model of tools, and calls are written as Mistral's are."""
        self.calls_marker_id = tokenizer.control_ids.get(CALLS_MARKER)
        """Id of CALLS_MARKER; None where it is plain text."""

    @classmethod
    def from_folder(cls, folder: Path, tokenizer: Tokenizer) -> "ChatFormat":
        """The template of `chat_template.jinja`, else of `tokenizer_config.json`, else Mistral's;
        with one of its own for conversations with tools (`tool_use`) where the checkpoint has it.

        Raises ConfigError when one of them is there but cannot be used.
        """
        files = {DEFAULT: folder / TEMPLATE_FILE, TOOL_USE: folder / TOOL_USE_FILE}
        config_file = folder / "tokenizer_config.json"
        named: dict[str, str] = {}
        if config_file.is_file() and not files[DEFAULT].is_file():
            named = _named_templates(read_json(config_file).get("chat_template"), config_file)
        for name, file in files.items():
            if file.is_file():
                try:
                    named[name] = file.read_text(encoding="utf-8")
                except (OSError, ValueError) as error:
                    raise ConfigError(f"{file} cannot be read as text: {error}") from error
        return cls(tokenizer, named.get(DEFAULT, MISTRAL_V1_TEMPLATE), named.get(TOOL_USE))

    def encode(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        calls_tools: bool = False,
        adds_prompt: bool = True,
        continues_last: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Ids of the conversation, ready for the assistant's next words.

        tools:          descriptions for the template, where it `takes_tools`.
        calls_tools:    end with CALLS_MARKER, so that the next words are tool calls.
        adds_prompt:    end with what opens the assistant's turn.
        continues_last: end within the last message, which the assistant's next words continue.
        variables:      more for the template; none of RESERVED.

        Raises PromptError with the rule that the conversation breaks.
        """
        if not messages:
            raise PromptError("messages must hold at least one message")
        if messages[-1].role == "assistant" and adds_prompt:
            raise PromptError("the last message must not be the assistant's")
        turns = [message.as_variable() for message in messages]
        if continues_last:
            turns[-1]["content"] = (messages[-1].content or "") + self._end
        text = self._render(
            self._tool_template if tools else self._template,
            {
                **(variables or {}),
                "messages": turns,
                "tools": list(tools) or None,
                "add_generation_prompt": adds_prompt,
                "bos_token": self._mark_of(self._tokenizer.bos_id),
                "eos_token": self._mark_of(self._tokenizer.eos_id),
            },
        )
        if continues_last:
            text, found, _ = text.rpartition(self._end)
            if not found:
                raise PromptError("the chat template does not show the last message as it is")
            text = text.replace(self._end, "")
        if calls_tools:
            marker_id = self.calls_marker_id
            text += CALLS_MARKER if marker_id is None else self._mark_of(marker_id)
        return self._encode(text)

    def _marked(self, template: str) -> str:
        """With marks for the control tokens that it writes."""
        controls = sorted(self._tokenizer.control_ids, key=len, reverse=True)
        return re.sub(
            "|".join(map(re.escape, controls)),
            lambda found: self._mark_of(self._tokenizer.control_ids[found[0]]),
            template,
        )

    def _mark_of(self, token_id: int) -> str:
        return f"{self._nonce}-{token_id}-"

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for index, part in enumerate(self._mark.split(text)):
            if index % 2:
                ids.append(int(part))
                continue
            if self._nonce in part:
                raise PromptError("the chat template has changed a control token")
            # behind a control token SentencePiece puts the space that templates write there
            segment = part.removeprefix(" ") if index else part
            if segment:
                ids += self._tokenizer.encode(segment)
        return ids

    def _render(self, template: Template, variables: dict[str, Any]) -> str:
        try:
            return template.render(variables)
        except PromptError as error:  # the template's own words
            raise PromptError(self._without_marks(str(error))) from error
        except Exception as error:  # a template is a program of others: it may raise anything
            reason = self._without_marks(str(error))
            raise PromptError(f"the chat template refused the conversation: {reason}") from error

    def _without_marks(self, text: str) -> str:
        """A text for callers: who learned the nonce from it could write control tokens."""
        spelled = self._mark.sub(lambda found: self._tokenizer.piece(int(found[1])), text)
        return spelled.replace(self._end, "").replace(self._nonce, "")


def _named_templates(given: Any, file: Path) -> dict[str, str]:
    """The `chat_template` of a tokenizer_config.json: one, or several with names."""
    if given is None:
        return {}
    if isinstance(given, str):
        return {DEFAULT: given}
    try:
        named = {str(each["name"]): each["template"] for each in given}
    except (TypeError, KeyError) as error:
        raise ConfigError(
            f"{file}: chat_template is neither a template, as text, nor a list of them with names"
        ) from error
    if DEFAULT not in named or not all(isinstance(each, str) for each in named.values()):
        raise ConfigError(
            f"{file}: of the chat templates {sorted(named)} one must be {DEFAULT!r}, all be text"
        )
    return named


def _strftime_now(form: str) -> str:
    """Today's date, or what else a template tells the model of the time; as transformers has it."""
    return datetime.now().strftime(form)


def _raise_prompt_error(message: Any) -> None:
    raise PromptError(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As in transformers' templates: plain JSON, in which text stays as it is."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
