"""YAML in which no key stands twice, as its standard says (PyYAML takes the last one and says nothing), and every alias
is a value of its own, so that an edit of one changes no other.
"""

from __future__ import annotations

import reprlib
from typing import Any

import yaml
from yaml.constructor import ConstructorError


class _Loader(yaml.SafeLoader):
    """The safe loader; it looks before `<<` is put in, whose keys may stand again."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: dict[tuple[str, str], yaml.Node] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                first = seen.setdefault((key.tag, key.value), key)
                if first is not key:
                    lines = f"lines {first.start_mark.line + 1} and {key.start_mark.line + 1}"
                    problem = f"the key {key.value!r} stands twice in one place, in {lines}; remove one"
                    raise ConstructorError(None, None, problem, key.start_mark)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Construct a node, anew wherever it stands."""
        if node in self.recursive_objects:
            raise ConstructorError(None, None, "a value stands in itself", node.start_mark)
        try:
            value = super().construct_object(node, deep=True)  # at once: what stands in itself would never end
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception:  # PyYAML lets through whatever Python says of a date or number that there is not
            kind = node.tag.rpartition(":")[2]
            problem = f"{reprlib.repr(node.value)} cannot be read as {kind}; quote it if it is text"
            raise ConstructorError(None, None, problem, node.start_mark) from None
        self.constructed_objects.pop(node, None)
        return value


def load_yaml(text: str) -> Any:
    """The value of a YAML text. Raises yaml.YAMLError as `safe_load`, and for a key that stands twice, a date or number
    that there is not (2024-02-30), and what is nested too deeply or in itself.
    """
    try:
        return yaml.load(text, _Loader)  # a safe one
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
