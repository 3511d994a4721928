"""What the tokenizer does, over HTTP, in the shapes of vLLM's API; and facts of the server."""

from importlib.metadata import version

from fastapi import APIRouter

from cluster.ingress.answerer import Answerer
from cluster.ingress.document import SERVICE, TOKENS
from cluster.schema import (
    DetokenizeRequest,
    Load,
    Text,
    TokenizeRequest,
    TokenizerInfo,
    Tokens,
    Version,
)


def router(answerer: Answerer) -> APIRouter:
    """POST /tokenize and /detokenize, also below /v1; /tokenizer_info, /version, /load."""
    endpoints = _Tokens(answerer)
    router = APIRouter()
    for prefix in ("", "/v1"):
        is_documented = not prefix
        for path, answer in (
            ("/tokenize", endpoints.tokenize),
            ("/detokenize", endpoints.detokenize),
        ):
            router.post(prefix + path, tags=[TOKENS], include_in_schema=is_documented)(answer)
    router.get("/tokenizer_info", tags=[TOKENS])(endpoints.tokenizer_info)
    router.post("/tokenizer_info", include_in_schema=False)(endpoints.tokenizer_info)
    router.get("/version", tags=[SERVICE])(endpoints.version)
    router.get("/load", tags=[SERVICE])(endpoints.load)
    return router


class _Tokens:
    """The endpoints. Owned by the event loop."""

    def __init__(self, answerer: Answerer) -> None:
        self._answerer = answerer
        self._tokenizer = answerer.tokenizer

    async def tokenize(self, body: TokenizeRequest) -> Tokens:
        """Token ids of a text or a conversation, as a prompt of them would have."""
        prepare = self._answerer.prepare
        ids = await self._answerer.prepared(body, lambda: prepare.tokens(body))
        self._answerer.note_ignored(body)
        return Tokens(
            count=len(ids),
            max_model_len=self._answerer.settings.max_model_len,
            tokens=list(ids),
            token_strs=[*map(self._tokenizer.piece, ids)] if body.return_token_strs else None,
        )

    async def detokenize(self, body: DetokenizeRequest) -> Text:
        """Text of token ids; control tokens have none."""
        prepare = self._answerer.prepare
        text = await self._answerer.prepared(body, lambda: prepare.text(body))
        self._answerer.note_ignored(body)
        return Text(prompt=text)

    async def tokenizer_info(self) -> TokenizerInfo:
        """What a client must know of the tokenizer to work with ids."""
        tokenizer = self._tokenizer
        return TokenizerInfo(
            vocab_size=tokenizer.vocab_size,
            model_max_length=self._answerer.settings.max_model_len,
            bos_token=tokenizer.piece(tokenizer.bos_id),
            bos_token_id=tokenizer.bos_id,
            eos_token=tokenizer.piece(tokenizer.eos_id),
            eos_token_id=tokenizer.eos_id,
            chat_template=self._answerer.chat_format.template,
        )

    async def version(self) -> Version:
        """Version of the server."""
        return Version(version=version("maestrale"))

    async def load(self) -> Load:
        """How busy the ingress that answers is."""
        return Load(server_load=self._answerer.num_in_progress)
