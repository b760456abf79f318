"""YAML in which no key stands twice, as its standard says (PyYAML takes the last one and says nothing), and every alias
is a value of its own, so that an edit of one changes no other.

Numbers are those of YAML 1.2. PyYAML has those of 1.1, in which 010 is 8, 1:30 is 90, and 1e3 is text.
"""

from __future__ import annotations

import re
import reprlib
from typing import Any

import yaml
from yaml.constructor import ConstructorError

_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_NUMBERS = {  # of the core schema of YAML 1.2, and the underscores of 1.1, which nobody misreads
    _INT: re.compile(r"(?:[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+)\Z"),
    _FLOAT: re.compile(
        r"(?:[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
    ),
}
_FIRST = list("-+.0123456789")  # characters of them


class _Loader(yaml.SafeLoader):
    """The safe loader; it looks before `<<` is put in, whose keys may stand again."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - of the class, as PyYAML has it
        first: [(tag, pattern) for tag, pattern in known if tag not in _NUMBERS]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_int(self, node: yaml.ScalarNode) -> int:
        """Construct a whole number; one that is another to readers of YAML 1.1 is none."""
        text = self.construct_scalar(node).replace("_", "")
        if re.match("[-+]?0[0-9]", text):
            problem = f"{node.value} begins with 0; write {int(text)} (numbers in base 8 begin with 0o)"
            raise ConstructorError(None, None, problem, node.start_mark)
        return int(text, 0)

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


class Dumper(yaml.SafeDumper):
    """The safe dumper, which quotes what is a number to readers of YAML 1.1 or 1.2 and was a text."""


for _tag, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, _pattern, _FIRST)
    Dumper.add_implicit_resolver(_tag, _pattern, _FIRST)
_Loader.add_constructor(_INT, _Loader.construct_int)


def dump_yaml(values: Any, **options: Any) -> str:
    """Values as YAML text, keys in their order; `options` as `yaml.dump` has them."""
    return str(yaml.dump(values, Dumper=Dumper, sort_keys=False, **options))


def load_yaml(text: str) -> Any:
    """The value of a YAML text. Raises yaml.YAMLError as `safe_load`, and for a key that stands twice, a date or number
    that there is not (2024-02-30), and what is nested too deeply or in itself.
    """
    try:
        return yaml.load(text, _Loader)  # a safe one
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
