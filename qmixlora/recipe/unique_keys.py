"""YAML in which no key stands twice, as its standard says; PyYAML takes the last one and says nothing."""

from __future__ import annotations

from typing import Any

import yaml


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
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        return node


def load_yaml(text: str) -> Any:
    """The value of a YAML text. Raises yaml.YAMLError as `safe_load`, and for a key that stands twice."""
    return yaml.load(text, _Loader)  # a safe one
