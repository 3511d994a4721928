"""What travels over HTTP. Shared by ingress and SDK.

What only requests need is loaded when it is first asked for: the SDK, which must be quick to
import, needs none of it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cluster.schema.replies import (
    RESUMED_TOKENS,
    Alive,
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    Classification,
    ClassificationResult,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    ContentLogprob,
    ErrorBody,
    ErrorDetail,
    Load,
    LoadStatus,
    Model,
    ModelList,
    Move,
    PromptLogprob,
    PromptLogprobs,
    PromptTokensDetails,
    Readiness,
    Rebalancing,
    Reply,
    Text,
    TokenizerInfo,
    TokenLogprob,
    Tokens,
    Usage,
    Version,
    WorkerStatus,
)
from cluster.schema.tools import (
    MAX_TOOLS,
    FunctionCall,
    FunctionCallDelta,
    FunctionDefinition,
    Tool,
    ToolCall,
    ToolCallDelta,
    ToolChoice,
)

if TYPE_CHECKING:
    from cluster.schema.answer_form import (
        JsonSchemaFormat,
        ResponseFormat,
        StructuredOutputs,
    )
    from cluster.schema.chat import (
        ChatCompletionRequest,
        ChatMessage,
        ContentPart,
        DetokenizeRequest,
        Rendering,
        TokenizeRequest,
    )
    from cluster.schema.requests import (
        IGNORED,
        MAX_ALLOWED_TOKENS,
        MAX_BAD_WORDS,
        MAX_CHOICES,
        MAX_DRAFTS,
        MAX_LOGIT_BIASES,
        MAX_LOGPROBS,
        MAX_PRIORITY,
        MAX_SEED,
        ClassifyRequest,
        CompletionRequest,
        GenerationRequest,
        ModelRequest,
        RebalanceRequest,
        StreamOptions,
    )

__all__ = [
    "IGNORED",
    "MAX_ALLOWED_TOKENS",
    "MAX_BAD_WORDS",
    "MAX_CHOICES",
    "MAX_DRAFTS",
    "MAX_LOGIT_BIASES",
    "MAX_LOGPROBS",
    "MAX_PRIORITY",
    "MAX_SEED",
    "MAX_TOOLS",
    "RESUMED_TOKENS",
    "Alive",
    "AssistantMessage",
    "ChatChoice",
    "ChatChunkChoice",
    "ChatCompletion",
    "ChatCompletionChunk",
    "ChatCompletionRequest",
    "ChatDelta",
    "ChatLogprobs",
    "ChatMessage",
    "Classification",
    "ClassificationResult",
    "ClassifyRequest",
    "Completion",
    "CompletionChoice",
    "CompletionLogprobs",
    "CompletionRequest",
    "ContentLogprob",
    "ContentPart",
    "DetokenizeRequest",
    "ErrorBody",
    "ErrorDetail",
    "FunctionCall",
    "FunctionCallDelta",
    "FunctionDefinition",
    "GenerationRequest",
    "JsonSchemaFormat",
    "Load",
    "LoadStatus",
    "Model",
    "ModelList",
    "ModelRequest",
    "Move",
    "PromptLogprob",
    "PromptLogprobs",
    "PromptTokensDetails",
    "Readiness",
    "RebalanceRequest",
    "Rebalancing",
    "Rendering",
    "Reply",
    "ResponseFormat",
    "StreamOptions",
    "StructuredOutputs",
    "Text",
    "TokenLogprob",
    "TokenizeRequest",
    "TokenizerInfo",
    "Tokens",
    "Tool",
    "ToolCall",
    "ToolCallDelta",
    "ToolChoice",
    "Usage",
    "Version",
    "WorkerStatus",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        for part in ("answer_form", "requests", "chat"):
            module = import_module(f"cluster.schema.{part}")
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module 'cluster.schema' has no attribute {name!r}")
