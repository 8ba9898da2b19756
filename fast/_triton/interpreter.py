"""Triton's interpreter, computing the same in less than half the time.

What takes its time is not NumPy, it is types: every operation of a kernel makes the type, the shape and the NumPy
dtype of its result anew, every call of a helper patches the whole language anew, and every sum of integers is done
once more in 64 bits to see whether it overflows (of which nobody hears, unless debugging is on). `quicken` has the
former remembered, and the latter left to those who ask for `overflow_checks`. Nothing that a kernel computes changes.

It replaces functions inside Triton, by name: `REPLACED`. A version that lacks one of them keeps its own.
"""

import dataclasses
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter

OWN: dict[str, Any] = {}  # what was replaced


def quicken() -> None:
    """Replace what is slow, for good."""
    for name, wrap in REPLACED.items():
        owner, attribute = find(name)
        if name not in OWN and hasattr(owner, attribute):
            OWN[name] = getattr(owner, attribute)
            setattr(owner, attribute, wrap(OWN[name]))
    overflow_checks(False).start()


def find(name: str) -> tuple[Any, str]:
    """What holds an attribute (None if this Triton has it not), and the attribute's own name."""
    owner: Any = triton
    *path, attribute = name.split(".")
    for part in path:
        owner = getattr(owner, part, None)
    return owner, attribute


def overflow_checks(on: bool) -> Any:
    """A context in which an integer of 32 bits or fewer that overflows in ``+``, ``-`` or ``*`` raises, or does not."""
    builder = interpreter.interpreter_builder
    return patch.object(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=on))


# ---- what stands in, each made from the function it replaces -------------------------------------------------------


def np_dtype(original: Any) -> Any:
    """A dtype's NumPy dtype, looked up by the dtype's name."""
    known: dict[str, Any] = {}

    def replacement(type: Any) -> Any:
        if type.name not in known:
            known[type.name] = original(type)
        return known[type.name]

    return replacement


def unwrap(original: Any) -> Any:
    """What a constexpr holds; the commonest kinds of argument first."""
    plain = (int, str, tl.tensor)

    def replacement(value: Any) -> Any:
        if type(value) is tl.constexpr:
            return value.value
        return value if type(value) in plain else original(value)

    return replacement


def init_block_type(original: Any) -> Any:
    """A block's type, made once for each dtype and shape."""
    known: dict[Any, dict[str, Any]] = {}

    def replacement(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, tuple(size.value if type(size) is tl.constexpr else size for size in shape)
        if key in known:
            self.__dict__.update(known[key])
        else:
            original(self, element_ty, shape)
            known[key] = dict(self.__dict__)

    return replacement


def init_tensor(original: Any) -> Any:
    """A tensor, whose shape is made once for each type."""
    known: dict[str, dict[str, Any]] = {}

    def replacement(self: Any, handle: Any, type: Any) -> None:
        if type.name in known:
            self.__dict__.update(known[type.name], handle=handle, type=type)
        else:
            original(self, handle, type)
            known[type.name] = dict(self.__dict__)

    return replacement


def broadcast(original: Any) -> Any:
    """Two operands, broadcast; at once if they have one shape already."""

    def replacement(self: Any, lhs: Any, rhs: Any) -> tuple[Any, Any]:
        left, right = lhs.type, rhs.type
        if left.is_block() == right.is_block() and (not left.is_block() or left.shape.values == right.shape.values):
            return lhs, rhs
        return original(self, lhs, rhs)

    return replacement


def is_int(original: Any) -> Any:
    """Whether a dtype is an integer, by a set instead of two lists joined."""
    names = frozenset(tl.dtype.SINT_TYPES + tl.dtype.UINT_TYPES)
    return lambda self: self.name in names


def equal(original: Any) -> Any:
    """Whether two dtypes are equal; at once if they are one."""
    return lambda self, other: self is other or original(self, other)


def check_overflow(original: Any) -> Any:
    """Whether a result fits in its bits, by NumPy's integers instead of ten more operations of the interpreter."""
    functions = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def replacement(self: Any, lhs: Any, rhs: Any, operation: Any) -> None:
        dtype, function = lhs.type.scalar, functions.get(operation.__name__)
        if not self.builder.options.sanitize_overflow or dtype.int_bitwidth >= 64:
            return
        if function is None:
            return original(self, lhs, rhs, operation)
        exact = function(lhs.handle.data, rhs.handle.data, dtype=np.int64)
        fits = (exact >= dtype.get_int_min_value()) & (exact <= dtype.get_int_max_value())
        if not fits.all():
            raise OverflowError(f"{operation.__name__} overflows {dtype}: {exact[~fits].ravel()[0]}")

    return replacement


def patch_language(original: Any) -> Any:
    """Patch `triton.language` for a kernel's run, not again for each helper that it calls."""
    nothing = getattr(interpreter, "_LangPatchScope", None)

    def replacement(fn: Any) -> Any:
        languages = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        patched = languages and not any(tl.core.is_builtin(language.load) for language in languages)
        return nothing() if nothing and patched else original(fn)

    return replacement


REPLACED: dict[str, Callable[[Any], Any]] = {
    "runtime.interpreter._get_np_dtype": np_dtype,
    "runtime.interpreter._patch_lang": patch_language,
    "language.core._unwrap_if_constexpr": unwrap,
    "language.core.block_type.__init__": init_block_type,
    "language.core.tensor.__init__": init_tensor,
    "language.core.dtype.__eq__": equal,
    "language.core.dtype.is_int": is_int,
    "language.semantic.TritonSemantic.broadcast_impl_value": broadcast,
    "language.semantic.TritonSemantic.binary_op_sanitize_overflow_impl": check_overflow,
}
