"""Where the settings of a service on this machine come from: flags, environment, file, defaults.

An earlier one wins over a later one. Only the command line uses this; it passes the environment in.
Also writes all settings down as a file, with what each means, so that no page has to repeat it.
"""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from cluster.config import ServeConfig, no_such_setting
from cluster.errors import ConfigurationError

PREFIX = "MAESTRALE_"

_NO_SETTINGS = {
    "MAESTRALE_BASE_URL",
    "MAESTRALE_API_KEY",
    "MAESTRALE_API_KEYS",
    "MAESTRALE_CLUSTER_TOKEN",
}
"""Variables of the SDK, and secrets, which no setting holds."""


_BOUNDS = {
    "minimum": "from",
    "exclusiveMinimum": "above",
    "maximum": "to",
    "exclusiveMaximum": "below",
}
"""What a JSON schema calls the bounds of a number, and we."""


@dataclass(frozen=True)
class Settings:
    """The settings in force, and where those that are no defaults were given."""

    config: ServeConfig
    given_by: Mapping[str, str]


def gather(*, file: Path | None, environ: Mapping[str, str], flags: Mapping[str, Any]) -> Settings:
    """Join what a YAML file, the environment and flags say.

    flags: by setting, only those that were given.
    Raises ConfigurationError that names the setting and who gave it.
    """
    values: dict[str, Any] = {}
    given_by: dict[str, str] = {}

    def take(name: str, value: Any, source: str) -> None:
        values[name] = value
        given_by[name] = source

    if file is not None:
        for name, value in _of_file(file).items():
            take(name, value, str(file))
    for name, variable in _variables().items():
        if variable in environ:
            take(name, parsed(environ[variable]), variable)
    for variable in environ:
        if variable.startswith(PREFIX) and variable not in {*_variables().values(), *_NO_SETTINGS}:
            raise ConfigurationError(no_such_setting(variable, _variables().values()))
    for name, value in flags.items():
        take(name, value, "command line")
    try:
        return Settings(ServeConfig.model_validate(values), given_by)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            where = ".".join(str(part) for part in item["loc"]) or "configuration"
            source = given_by.get(str(item["loc"][0])) if item["loc"] else None
            problems.append(f"{where}{f' ({source})' if source else ''}: {item['msg']}")
        raise ConfigurationError("; ".join(problems)) from error


def assignments(given: Sequence[str]) -> dict[str, Any]:
    """Settings out of NAME=VALUE. Raises ConfigurationError for anything else."""
    settings = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigurationError(f"--set {text}: expected NAME=VALUE, as in num_heads=2")
        if name not in ServeConfig.model_fields:
            raise ConfigurationError(no_such_setting(name, ServeConfig.model_fields))
        settings[name] = parsed(value)
    return settings


def parsed(text: str) -> Any:
    """A value out of text: null, lists and mappings as YAML has them, anything else as it is.

    Numbers stay text, so that a model may be called 7; the setting knows what it wants.
    """
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return value if isinstance(value, list | dict) or (value is None and text.strip()) else text


def as_file(settings: Settings) -> str:
    """All settings as a YAML file that gives them, with meaning, bounds and default as comments."""
    schema = ServeConfig.model_json_schema()
    variables = _variables()
    in_force = settings.config.model_dump(mode="json")
    parts = []
    for name, about in schema["properties"].items():
        default = _yaml(about.get("default"))
        facts = f"{_kind(about)}; default {default}; {variables[name]}"
        if name in settings.given_by:
            facts += f"; given by {settings.given_by[name]}"
        lines = [*textwrap.wrap(about["description"], 98), *textwrap.wrap(facts, 98)]
        comment = "\n".join(f"# {line}" for line in lines)
        parts.append(f"{comment}\n{name}: {_yaml(in_force[name])}\n")
    return "\n".join(parts)


def _of_file(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text())
    except OSError as error:
        raise ConfigurationError(f"cannot read {file}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{file} is no YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigurationError(f"{file}: expected settings as NAME: VALUE, one a line")
    for name in values:
        if name not in ServeConfig.model_fields:
            raise ConfigurationError(
                f"{file}: {no_such_setting(str(name), ServeConfig.model_fields)}"
            )
    return values


def _variables() -> dict[str, str]:
    """The environment variable of each setting."""
    return {name: f"{PREFIX}{name.upper()}" for name in ServeConfig.model_fields}


def _yaml(value: Any) -> str:
    """A value on one line of YAML."""
    dumped: str = yaml.safe_dump(value, default_flow_style=True, width=10**6)
    return dumped.removesuffix("...\n").strip()


def _kind(about: Mapping[str, Any]) -> str:
    """What a JSON schema lets a value be, in words."""
    if "anyOf" in about:
        return " or ".join(_kind(each) for each in about["anyOf"])
    if "const" in about:
        return str(about["const"])
    if "enum" in about:
        return ", ".join(about["enum"])
    if about["type"] == "array":
        return f"a list of ({_kind(about['items'])})"
    if about["type"] == "object":
        return f"a mapping of names to ({_kind(about['additionalProperties'])})"
    words = [about.get("format", about["type"])]
    for key, word in _BOUNDS.items():
        if key in about:
            words.append(f"{word} {about[key]:g}")
    return " ".join(words)
