"""GET /v1/models: what the server serves."""

from urllib.parse import quote

from cluster.client.connection import Connection
from cluster.client.reply import read_reply
from cluster.schema import Model, ModelList

PATH = "/v1/models"


class Models:
    """`client.models`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def list(self) -> ModelList:
        return read_reply(self._connection.get(PATH), ModelList)

    def retrieve(self, model: str) -> Model:
        """One model by its id. Raises NotFoundError if the server does not serve it."""
        # An id may hold a slash. Dots alone would be taken for a folder, and lead elsewhere.
        if not model.strip("."):
            raise ValueError(
                f"{model!r} is no model id; client.models.list() names those there are"
            )
        return read_reply(self._connection.get(f"{PATH}/{quote(model, safe='')}"), Model)
