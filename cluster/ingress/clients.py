"""Who asks: the name by which heads tell clients apart, to serve them evenly."""

from hashlib import blake2b


def client_key(authorization: str | None, user: str | None) -> str:
    """16 hex digits for the caller's key, else for the user that it names; "" for neither.

    authorization: the header of that name. A hash, because keys belong into no other process and
    no log; of two kinds, so that nobody takes another's place by naming him as its user.
    """
    scheme, _, token = (authorization or "").strip().partition(" ")
    token = token.strip()
    if scheme.lower() == "bearer" and token:
        return _digest(token, b"key")
    return _digest(user, b"user") if user else ""


def _digest(text: str, kind: bytes) -> str:
    data = text.encode("utf-8", errors="surrogatepass")
    return blake2b(data, digest_size=8, person=kind).hexdigest()
