"""A backend put together from two: what a stranger's module has, and a complete one for the rest."""

from types import ModuleType, SimpleNamespace
from typing import Any

from reference._checks import require


class MissingOp(NotImplementedError, AttributeError):
    """A backend was asked for an op that it does not have."""


class Overlay(SimpleNamespace):
    """What `overlay` makes: ops as attributes, ``origin``, ``__all__``."""

    def __getattr__(self, name: str) -> Any:  # only what the two modules lack comes here
        raise MissingOp(f"neither of the overlaid backends has the op {name!r}")


def overlay(module: ModuleType | Any, base: ModuleType | Any) -> Overlay:
    """A backend made of ``module``'s ops where it has them and ``base``'s where not.

    Args:
        module: Any module or object. Its ops are those of its public names that ``base`` has too; with an ``__all__``
            only the names listed there count, so that a helper or an import is not taken for an op.
        base: A complete backend, such as `reference`.

    Returns:
        A namespace with every op, ``__all__``, and ``origin``: a dict that says which op came from where. An op that
        neither has raises ``NotImplementedError`` naming it when it is asked for.

    Raises:
        ValueError: If ``module`` has no op at all (a misspelt name would otherwise go unnoticed), or lists in
            ``__all__`` what it does not have.

    Example:
        >>> import reference
        >>> mine = SimpleNamespace(__name__="mine", swiglu=lambda gate_up, *, out=None: gate_up)
        >>> backend = overlay(mine, reference)
        >>> backend.origin["swiglu"], backend.origin["rms_norm"]
        ('mine', 'reference')
    """
    known, listed = _public(base), _public(module)
    own = [name for name in listed if name in known]
    absent = [name for name in listed if not hasattr(module, name)]
    require(not absent, "overlay", "module", "every name of its __all__", f"none called {', '.join(absent)}")
    require(own, "overlay", "module", f"one or more of the ops {', '.join(known)}", ", ".join(listed) or "nothing")
    origin = {name: _origin(module if name in own else base, name) for name in known}
    ops = {name: getattr(module if name in own else base, name) for name in known}
    return Overlay(**ops, origin=origin, __all__=known)


def _public(backend: Any) -> list[str]:
    listed = getattr(backend, "__all__", None)
    if listed is not None:
        return list(listed)
    return [name for name in dir(backend) if not name.startswith("_") and callable(getattr(backend, name))]


def _origin(backend: Any, name: str) -> str:
    """A backend that is an overlay itself says where it has the op from."""
    inner = getattr(backend, "origin", {}) if isinstance(backend, Overlay) else {}
    return inner.get(name) or getattr(backend, "__name__", type(backend).__name__)
