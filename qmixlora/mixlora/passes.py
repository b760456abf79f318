"""The forward passes of a model: what begins and ends each of them, whichever part of the model is called; how far the
prompt reaches in those of a generation; and the routing that a key-value cache goes on with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from .routing import Routing

KEPT = "mixlora_routing"  # a cache's attribute: the Routing of the pass that was last in it
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Passes:
    """Calls `begin` before each forward pass of a model, and `end` with what it has made: of a part that holds the
    decoder (`model.model`, `get_decoder()`), too, where that is called by itself.

    `generate` of the model runs within `prompt_of(width)`, with the columns of its prompt: passes that read more
    (what was generated, without a cache; candidates, in speculative decoding) begin with the same.
    """

    def __init__(
        self,
        model: nn.Module,
        begin: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Arguments],
        end: Callable[[Any], None],
        prompt_of: Callable[[int | None], AbstractContextManager[None]],
    ) -> None:
        self._model, self._begin, self._end, self._prompt_of = model, begin, end, prompt_of
        self._parts = _around_the_decoder(model)
        self._running: nn.Module | None = None
        self._handles = []
        for part in self._parts:
            self._handles.append(part.register_forward_pre_hook(self._before, with_kwargs=True))
            self._handles.append(part.register_forward_hook(self._after, always_call=True))
        self._generate: Callable[..., Any] | None = getattr(model, "generate", None)
        if self._generate is not None:
            model.generate = self.generate  # type: ignore[assignment]

    def remove(self) -> None:
        """Leave the model alone from now on."""
        for handle in self._handles:
            handle.remove()
        if self._generate is not None:
            self._model.generate = self._generate  # type: ignore[assignment]

    @staticmethod
    def of(model: nn.Module) -> Passes | None:
        """Those of a model, where an adapter has been put on it."""
        owners = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
        return next((owner for owner in owners if isinstance(owner, Passes)), None)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate` of the model."""
        assert self._generate is not None, "it stands in for the model's own"
        named = (kwargs.get("inputs_embeds"), *args[:1], kwargs.get("inputs"), kwargs.get("input_ids"))
        prompt = next((value for value in named if isinstance(value, Tensor) and value.dim() > 1), None)
        with self._prompt_of(None if prompt is None else prompt.shape[1]):
            return self._generate(*args, **kwargs)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        if self._running is not None and module is not self._model:
            return None  # a part of the pass that runs
        if not any(module is part for part in self._parts):
            raise RuntimeError(
                "A mixture cannot work in a copy of its model that shares its routing (nn.DataParallel makes such"
                " copies). Use one GPU, or DistributedDataParallel."
            )
        arguments = self._begin(module, args, kwargs)
        self._running = module
        return arguments

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._running is module:
            self._running = None
            self._end(output)


def _around_the_decoder(model: nn.Module) -> list[nn.Module]:
    """The model, its decoder, and what holds that."""
    path = [part for part in (name_of_decoder(model) or "").split(".") if part]
    return [model, *(model.get_submodule(".".join(path[: depth + 1])) for depth in range(len(path)))]


def name_of_decoder(model: nn.Module) -> str | None:
    """The path of what reads the embeddings of tokens: empty where the model does, None where it does not tell."""
    find = getattr(model, "get_decoder", None)
    decoder = None if find is None else find()
    return next((name for name, module in model.named_modules() if module is decoder), None)


def keep_with(values: Iterable[Any], routing: Routing) -> None:
    """Have the key-value caches among these go on with a routing: their own, whatever the model does in between."""
    for value in values:
        if hasattr(value, "get_seq_length"):
            setattr(value, KEPT, routing)


def kept_with(cache: Any) -> Routing:
    """The routing that a key-value cache goes on with. Raises ValueError for one that no pass of a mixture filled."""
    routing: Routing | None = getattr(cache, KEPT, None)
    if routing is None:
        raise ValueError(
            f"A cache of {cache.get_seq_length()} tokens without a prefill through this adapter: its factors are"
            " selected there and frozen. Run the whole prompt without past_key_values."
        )
    return routing
