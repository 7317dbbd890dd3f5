"""YAML from a stranger: only what JSON could say as well. No tags, anchors or dates, no key twice; bounded before it is built."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any, cast

import yaml

from ..errors import Refused
from . import _json

MAX_YAML = 1 << 16  # bytes; a recipe has two thousand, and a megabyte takes the parser half a minute
MAX_NODES = 20_000
MAX_DEPTH = 40
MAX_NUMBER = 40  # characters
MAX_TEXT = 10_000  # characters
MAX_KEY = 100  # characters
_ODD = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_KNOWN = ("null", "bool", "int", "float", "str", "seq", "map")


class _Loader(yaml.SafeLoader):
    """The safe loader, less what a recipe never needs: anchors grow into gigabytes, dates and odd numbers raise whatever they like."""

    nodes = depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise Refused(f"line {event.start_mark.line + 1}: cannot be read: an alias (*name); write the value out.")
        if getattr(event, "tag", None) is not None:
            raise Refused(f"line {event.start_mark.line + 1}: cannot be read: the tag {_json.short(str(event.tag))}; plain values only.")
        self.nodes, self.depth = self.nodes + 1, self.depth + 1
        if self.nodes > MAX_NODES or self.depth > MAX_DEPTH:
            raise Refused(f"more than {MAX_NODES} values." if self.nodes > MAX_NODES else "nested too deeply.")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        where, number = f"line {node.start_mark.line + 1}", str(node.tag).endswith((":int", ":float"))
        if isinstance(node, yaml.ScalarNode) and len(node.value) > (MAX_NUMBER if number else MAX_TEXT):
            raise Refused(f"{where}: a {'number' if number else 'text'} of {len(node.value)} characters.")
        value = super().construct_object(node, deep)
        if value != value:
            raise Refused(f"{where}: NaN is no value.")
        if isinstance(value, str) and _ODD.search(value):
            raise Refused(f"{where}: {_json.short(value)} holds characters that cannot be shown.")
        return value

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        found = super().construct_mapping(node, deep)
        if len(found) != len(node.value):
            seen: set[object] = set()
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            twice = next(key for key in keys if key in seen or seen.add(key))
            raise Refused(f"line {node.start_mark.line + 1}: the key {_json.short(twice)} is given twice.")
        for key in found:
            if not isinstance(key, str) or len(key) > MAX_KEY or "\n" in key:
                raise Refused(
                    f"line {node.start_mark.line + 1}: expected a name of at most {MAX_KEY} characters, found {_json.short(key)}."
                )
        return found


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag.rpartition(":")[2] in _KNOWN]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse(text: str | bytes, what: str) -> _json.Json:
    """Parse YAML with bounded memory into plain values.

    Args:
        text: the text; bytes are UTF-8.
        what: named in the refusal.

    Raises:
        Refused: too large, not YAML, several documents, or more than plain values.
    """
    if len(text) > MAX_YAML:
        raise Refused(f"{what}: {len(text)} bytes, expected at most {MAX_YAML}.")
    try:
        loader = _Loader(text.decode("utf-8") if isinstance(text, bytes) else text)
        try:
            return cast("_json.Json", loader.get_single_data())
        finally:
            loader.dispose()
    except Refused as err:
        raise Refused(f"{what}: {err}") from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as err:  # TypeError: a list as a key
        where = getattr(err, "problem_mark", None)
        line = f"line {where.line + 1}: " if where is not None else ""
        reason = str(getattr(err, "problem", None) or getattr(err, "reason", None) or err)
        raise Refused(f"{what}: {line}cannot be read ({_json.short(reason, 200)}).") from err
