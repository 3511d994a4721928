"""What can go wrong in the model library. The service maps these at its border.

ModelError
├── ConfigError       config.json is missing, is not Mixtral's, or asks for the unsupported
├── CheckpointError   a weight file or tensor is missing, cut, mis-shaped or not finite
├── QuantizationError an unknown mode, or one whose library is missing
├── TokenizerError    the tokenizer file is missing or unreadable
├── PromptError       a prompt or conversation that cannot be turned into token ids
├── SamplingError     a sampling parameter out of its range
└── GrammarError      a grammar that is wrong or too big, or a token that it does not allow
"""


class ModelError(Exception):
    """Base of every error that `model` raises on purpose."""


class ConfigError(ModelError):
    """The configuration is missing, not a Mixtral's, or asks for something unsupported."""


class CheckpointError(ModelError):
    """A weight file or a tensor in it is missing, cut short, mis-shaped or not finite."""


class QuantizationError(ModelError):
    """The mode of quantisation is unknown, its library is missing, or weights have one already."""


class TokenizerError(ModelError):
    """The tokenizer file is missing or unreadable."""


class PromptError(ModelError, ValueError):
    """A prompt or a conversation that cannot be turned into token ids."""


class SamplingError(ModelError, ValueError):
    """A sampling parameter is out of its range. `field` names it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class GrammarError(ModelError, ValueError):
    """A grammar is wrong or too big, or a token does not fit it. One line, fit for a caller."""
