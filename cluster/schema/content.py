"""A field that is text or a list, told apart before either is checked: so what is wrong is told of
the form that was meant, not of both.
"""

from typing import Annotated, Any

from pydantic import Discriminator, Tag


def _form(given: Any) -> str:
    return "text" if isinstance(given, str) else "list"


Text = Annotated[str, Tag("text")]
"""The first alternative: text."""
AsList = Tag("list")
"""Marks the second one."""
TextOrList = Discriminator(_form)
"""Marks the whole: Annotated[Text | Annotated[list[...], AsList], TextOrList]."""
