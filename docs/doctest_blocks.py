"""An extension of griffe: the doctests of a docstring become fenced blocks, so that Markdown reads no links in them."""

import inspect
import re

from griffe import Extension, Object

DOCTEST = re.compile(r"^>>> .*(?:\n(?!\n).+)*", re.MULTILINE)


def fenced(docstring: str) -> str:
    """The docstring with each paragraph that starts with a prompt in a block of its own."""
    return DOCTEST.sub(lambda found: f"```pycon\n{found[0]}\n```", inspect.cleandoc(docstring))


class DoctestBlocks(Extension):
    """Applies `fenced` to every docstring."""

    def on_instance(self, *, obj: Object, **kwargs: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
