"""Intercept a method of one object by swapping that object's class; nothing else in the process changes.

The object gets a cached subclass of the same name whose method runs a chain kept on the object. Removing the
last link gives the object its own class back. See docs/architecture.md for the experiments behind this seam.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable
from typing import Any, cast

from hasten.core.errors import PatchError

Interceptor = Callable[..., Any]
"""Called as `interceptor(call, *args, **kwargs)`; `call` runs the next link, in the end the object's own method."""

_CHAINS = "_hasten_chains"
_BASE = "_hasten_base"


_INNERMOST, _BETWEEN, _OUTERMOST = range(3)


class _Chain:
    """The links around one method of one object, outermost last, and the callable composed of them."""

    def __init__(self, innermost: Callable[..., Any]) -> None:
        self.innermost = innermost
        self.links: list[Interceptor] = []
        self.run = innermost

    def add(self, link: Interceptor) -> None:
        position = sum(_rank(other) <= _rank(link) for other in self.links)
        self.links.insert(position, link)
        self._compose()

    def remove(self, link: Interceptor) -> None:
        self.links.remove(link)
        self._compose()

    def _compose(self) -> None:
        self.run = functools.reduce(_wrap, self.links, self.innermost)


def _wrap(inner: Callable[..., Any], link: Interceptor) -> Callable[..., Any]:
    def linked(*args: Any, **kwargs: Any) -> Any:
        return link(inner, *args, **kwargs)

    return linked


def _rank(link: Interceptor) -> int:
    return cast(int, link.__dict__["_hasten_rank"])


def base_class(obj: object) -> type:
    """Return the class `obj` had before any interception."""
    return cast(type, type(obj).__dict__.get(_BASE, type(obj)))


def intercept(
    obj: object, method: str, link: Interceptor, *, outermost: bool = False, innermost: bool = False
) -> Callable[[], None]:
    """Put `link` around `obj.method` and return the function that takes it off again, in any order.

    A later link stands outside an earlier one; one added with `outermost=True` stays outside all others, one with
    `innermost=True` inside all others: it runs only when the object's own method really does. Raises PatchError when
    the object has no such method, or cannot change its class.
    """
    base = base_class(obj)
    _check(obj, base, method)
    chains: dict[str, _Chain] = obj.__dict__.get(_CHAINS, {})
    if method not in chains:
        _set_class(obj, base, frozenset({*chains, method}))
        chains[method] = _Chain(_own_method(base, method, obj))
        obj.__dict__[_CHAINS] = chains
    unique = _unique(link, _OUTERMOST if outermost else _INNERMOST if innermost else _BETWEEN)
    chains[method].add(unique)
    return functools.partial(_remove, obj, base, method, unique)


def _check(obj: object, base: type, method: str) -> None:
    if not callable(getattr(base, method, None)):
        raise PatchError(f"{base.__name__} has no method {method!r} to intercept.")
    if not hasattr(obj, "__dict__"):
        raise PatchError(f"{base.__name__} has no instance attributes, so its methods cannot be intercepted.")
    if _CHAINS in obj.__dict__ and _BASE not in type(obj).__dict__:
        raise _changed_since(obj, base)


def _changed_since(obj: object, base: type) -> PatchError:
    return PatchError(
        f"The class of this {base.__name__} was changed by other code after hasten was applied "
        f"(it is now {type(obj).__name__}); undo that change first, then leave the session."
    )


def _own_method(base: type, method: str, obj: object) -> Callable[..., Any]:
    own = getattr(base, method)

    # A plain closure: torch.compile traces it, unlike functools.partial.
    def innermost(*args: Any, **kwargs: Any) -> Any:
        return own(obj, *args, **kwargs)

    return innermost


def _unique(link: Interceptor, rank: int) -> Interceptor:
    def entry(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return link(call, *args, **kwargs)

    entry.__dict__["_hasten_rank"] = rank
    return entry


def _remove(obj: object, base: type, method: str, link: Interceptor) -> None:
    chains: dict[str, _Chain] = obj.__dict__.get(_CHAINS, {})
    if method not in chains or link not in chains[method].links:
        return
    if type(obj).__dict__.get(_BASE) is not base:
        raise _changed_since(obj, base)
    chains[method].remove(link)
    if not chains[method].links:
        del chains[method]
    if not chains:
        del obj.__dict__[_CHAINS]
    _set_class(obj, base, frozenset(chains))


def _set_class(obj: object, base: type, methods: frozenset[str]) -> None:
    try:
        obj.__class__ = _subclass(base, methods) if methods else base
    except TypeError as error:
        raise PatchError(f"{base.__name__} does not allow its methods to be intercepted: {error}.") from error


@functools.cache
def _subclass(base: type, methods: frozenset[str]) -> type:
    body: dict[str, Any] = {name: _overriding(base, name) for name in methods}
    body |= {_BASE: base, "__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    body["__reduce_ex__"] = _reduce
    if "__slots__" in base.__dict__:
        body["__slots__"] = ()
    return type(base)(base.__name__, (base,), body)


def _overriding(base: type, name: str) -> Callable[..., Any]:
    own = getattr(base, name)

    @functools.wraps(own)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        chain = self.__dict__[_CHAINS].get(name) if _CHAINS in self.__dict__ else None
        return own(self, *args, **kwargs) if chain is None else chain.run(*args, **kwargs)

    return method


def _reduce(self: Any, protocol: Any) -> Any:
    """Copy and pickle as an unpatched object of the original class."""
    base = base_class(self)
    make, arguments, *rest = cast("tuple[Any, ...]", base.__reduce_ex__(self, protocol))  # pyright: ignore
    if rest:
        rest[0] = _without_chains(rest[0])
    if getattr(make, "__module__", None) == "copyreg":  # the default way, which insists on the object's own class
        return (copyreg._reconstructor, (base, object, None), *rest)  # pyright: ignore
    original = {type(self): base}
    return (original.get(make, make), tuple(base if a is type(self) else a for a in arguments), *rest)


def _without_chains(state: Any) -> Any:
    """The state of an object without ours; an object with slots has a pair of attributes and slots."""
    if isinstance(state, tuple):
        return tuple(map(_without_chains, cast("tuple[Any, ...]", state)))
    return {key: value for key, value in state.items() if key != _CHAINS} if isinstance(state, dict) else state
