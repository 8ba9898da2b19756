"""What plain interpretation lets pass: an access outside every argument, and programs that race.

Triton's interpreter runs a kernel's programs one after another on real memory, so a load beyond an array returns
whatever lies there, and two programs that write one element just overwrite each other. This hooks the interpreter's
loads, stores and atomics, knows which program makes each, and says at once:

- *bounds*: an address that is in no tensor the kernel was given;
- *write after write*: two programs store to one element in one launch;
- *read and write*: a program reads what another one stores in the same launch, whichever came first;
- *garbage*: what a masked load without ``other`` leaves open is NaN or infinite here, or a strange integer or 1; memory
  that is allocated and not filled (``torch.empty``) holds NaN, or the largest integer;
- *overflow*: a sum, difference or product of integers does not fit in their 32 bits (or fewer).

Programs may share memory through atomics: what a program did before a releasing atomic is known to whoever acquires
from the same element afterwards. (What it did *after* that atomic is wrongly taken as known too.)

On request it also says which elements of a tensor no launch wrote, or wrote twice: `Sanitizer.assert_written_once`.

It does not look at torch's own kernels, at gaps inside a strided view, nor at lanes of one program among themselves.

    with sanitized():
        fast.rms_norm(x, weight)
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


class SanitizerError(AssertionError):
    """A kernel did what a GPU would not forgive."""


@dataclass
class Region:
    """The memory of one tensor argument, and what a launch has done to it, element by element."""

    name: str
    start: int
    end: int
    itemsize: int
    writer: np.ndarray = field(init=False)  # the program that stored, + 1; 0 for none
    reader: np.ndarray = field(init=False)  # likewise; -1 for several

    def __post_init__(self) -> None:
        num_elements = (self.end - self.start) // self.itemsize
        self.writer, self.reader = np.zeros(num_elements, np.int32), np.zeros(num_elements, np.int32)


@dataclass
class Launch:
    """One run of a kernel over its grid."""

    kernel: str
    regions: list[Region]
    synced: dict[int, int] = field(default_factory=dict)  # program: bits of the programs whose past it has acquired
    released: dict[int, int] = field(default_factory=dict)  # address: bits of the programs that have released there

    def __post_init__(self) -> None:
        self.starts = np.array([region.start for region in self.regions], np.uint64)

    def split(self, what: str, program: tuple[int, ...], addresses: np.ndarray) -> Iterator[tuple[Region, np.ndarray]]:
        """The accesses by region, as places in it. Raises if one is outside all of them."""
        if len(addresses) == 0:
            return
        which = np.searchsorted(self.starts, addresses, side="right") - 1
        for index in np.unique(which):
            region = self.regions[index] if index >= 0 else None
            inside = addresses[which == index]
            if region is None or inside.max() >= region.end:
                worst = int(inside.max())
                raise SanitizerError(f"{self.kernel}, program {program}: {what} of {self.place(worst)}, out of bounds")
            yield region, ((inside - np.uint64(region.start)) // np.uint64(region.itemsize)).astype(np.int64)

    def place(self, address: int) -> str:
        """An address in terms of the argument that is nearest."""
        if not self.regions:
            return hex(address)
        nearest = min(self.regions, key=lambda r: max(r.start - address, address - r.end + 1, 0))
        offset = (address - nearest.start) // nearest.itemsize
        return f"element {offset} of {nearest.name} (which has {len(nearest.writer)})"

    def conflict(self, others: np.ndarray, me: int) -> int | None:
        """A program among ``others`` (+ 1; 0 none, -1 several) that is not me, nor one whose past I have acquired."""
        known = self.synced.get(me, 0)
        for other in np.unique(others[(others != 0) & (others != me + 1)]).tolist():
            if other < 0 or not known >> (other - 1) & 1:
                return other - 1
        return None

    def read(self, region: Region, places: np.ndarray, me: int, program: tuple[int, ...]) -> None:
        other = self.conflict(region.writer[places], me)
        if other is not None:
            raise SanitizerError(f"{self.kernel}, program {program} reads what program {other} wrote in {region.name}")
        before = region.reader[places]
        region.reader[places] = np.where((before == 0) | (before == me + 1), me + 1, -1)

    def write(self, region: Region, places: np.ndarray, me: int, program: tuple[int, ...]) -> None:
        for done, others in (("wrote", region.writer[places]), ("read", region.reader[places])):
            other = self.conflict(others, me)
            if other is not None:
                who = "several programs" if other < 0 else f"program {other}"
                raise SanitizerError(f"{self.kernel}, program {program} writes what {who} {done} in {region.name}")
        region.writer[places] = me + 1

    def synchronize(self, addresses: np.ndarray, me: int, acquires: bool, releases: bool) -> None:
        for address in addresses.tolist():
            if acquires:
                self.synced[me] = self.synced.get(me, 0) | self.released.get(address, 0)
            if releases:
                self.released[address] = self.released.get(address, 0) | self.synced.get(me, 0) | 1 << me


class Sanitizer:
    """What is watched while `sanitized` is in force."""

    def __init__(self, keep_stores: bool = False) -> None:
        self.launch: Launch | None = None
        self.failure: SanitizerError | None = None
        self.num_launches = 0
        self.stores: list[tuple[np.ndarray, int]] | None = [] if keep_stores else None  # addresses, item size

    def access(self, builder: Any, what: str, pointers: Any, mask: Any, **synchronizes: bool) -> None:
        """Check one load, store or atomic of the program that runs now."""
        launch = self.launch
        if launch is None:
            return
        program, dims = builder.grid_idx, builder.grid_dim
        me = (program[0] * dims[1] + program[1]) * dims[2] + program[2]
        data = np.asarray(pointers.data)
        active = np.ones(data.shape, bool) if mask is None else np.broadcast_to(mask.data.astype(bool), data.shape)
        addresses = data[active].astype(np.uint64).ravel()
        try:
            for region, places in launch.split(what, program, addresses):
                if what == "load":
                    launch.read(region, places, me, program)
                elif what == "store":
                    launch.write(region, places, me, program)
            if what == "atomic":
                launch.synchronize(addresses, me, **synchronizes)
        except SanitizerError as error:
            self.failure = error
            raise
        if self.stores is not None and what != "load":
            self.stores.append((addresses, _itemsize(pointers)))

    def assert_written_once(self, tensor: torch.Tensor) -> None:
        """All launches together stored each element exactly once. (Ask for ``keep_stores``.)"""
        assert self.stores is not None, "sanitized(keep_stores=True) keeps what this looks at"
        counts = np.zeros(_extent(tensor) // tensor.element_size(), np.int64)
        for addresses, itemsize in self.stores:
            offset = addresses.astype(np.int64) - tensor.data_ptr()
            inside = offset[(offset >= 0) & (offset < len(counts) * tensor.element_size())]
            assert len(inside) == 0 or itemsize == tensor.element_size(), "stores of another size"
            np.add.at(counts, inside // tensor.element_size(), 1)
        per_element = torch.as_strided(torch.from_numpy(counts), tensor.shape, tensor.stride())
        for wrong, said in ((per_element == 0, "never written"), (per_element > 1, "written more than once")):
            if wrong.any():
                first = tuple(wrong.nonzero()[0].tolist())
                raise SanitizerError(f"{int(wrong.sum())} of {tensor.numel()} elements {said}, the first at {first}")


def find_regions(names: list[str], arguments: list[Any]) -> list[Region]:
    """The memory of all tensors among a kernel's arguments; where some overlap, the union under the names of all."""
    found: list[Region] = []
    for name, argument in zip(names, arguments):
        for tensor in _tensors(argument):
            if tensor.numel():
                start = tensor.data_ptr()
                found.append(Region(name, start, start + _extent(tensor), tensor.element_size()))
    merged: list[Region] = []
    for region in sorted(found, key=lambda region: (region.start, -region.end)):
        last = merged[-1] if merged else None
        if last is not None and region.start < last.end:
            names_of_both = last.name if region.name in last.name.split(", ") else f"{last.name}, {region.name}"
            itemsize = min(last.itemsize, region.itemsize)
            merged[-1] = Region(names_of_both, last.start, max(last.end, region.end), itemsize)
        else:
            merged.append(region)
    return merged


@contextlib.contextmanager
def sanitized(*, keep_stores: bool = False) -> Iterator[Sanitizer]:
    """Within, every kernel that is interpreted is watched; a fault raises `SanitizerError`."""
    from triton.runtime import interpreter

    from fast._triton.interpreter import overflow_checks

    sanitizer = Sanitizer(keep_stores)
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    semantics = {
        "acquires": ("ACQUIRE", "ACQUIRE_RELEASE"),
        "releases": ("RELEASE", "ACQUIRE_RELEASE"),
    }

    def ordering(sem: Any) -> dict[str, bool]:
        return {name: str(sem).rsplit(".", 1)[-1] in kinds for name, kinds in semantics.items()}

    def masked_load(self: Any, ptrs: Any, mask: Any, other: Any, *rest: Any, **options: Any) -> Any:
        sanitizer.access(self, "load", ptrs, mask)
        if other is None and mask.data.size > 1 and not mask.data.all():  # of one element, other=0 arrives as None
            other = _garbage(ptrs)
        return originals["create_masked_load"](self, ptrs, mask, other, *rest, **options)

    def masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        sanitizer.access(self, "store", ptrs, mask)
        return originals["create_masked_store"](self, ptrs, value, mask, *rest, **options)

    def atomic_rmw(self: Any, op: Any, ptr: Any, val: Any, mask: Any, sem: Any, scope: Any) -> Any:
        sanitizer.access(self, "atomic", ptr, mask, **ordering(sem))
        return originals["create_atomic_rmw"](self, op, ptr, val, mask, sem, scope)

    def atomic_cas(self: Any, ptr: Any, cmp: Any, val: Any, sem: Any, scope: Any) -> Any:
        sanitizer.access(self, "atomic", ptr, None, **ordering(sem))
        return originals["create_atomic_cas"](self, ptr, cmp, val, sem, scope)

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        names = [*self.arg_names[: len(args)], *kwargs]
        kernel = getattr(self.fn, "__name__", "kernel")
        sanitizer.launch = Launch(kernel, find_regions(names, [*args, *kwargs.values()]))
        sanitizer.num_launches += 1
        try:
            originals["__call__"](self, *args, **kwargs)
        except interpreter.InterpreterError:
            if sanitizer.failure is not None:  # the interpreter has only kept its text
                raise sanitizer.failure from None
            raise
        finally:
            sanitizer.launch = None

    hooks = {
        "create_masked_load": (builder, masked_load),
        "create_masked_store": (builder, masked_store),
        "create_atomic_rmw": (builder, atomic_rmw),
        "create_atomic_cas": (builder, atomic_cas),
        "__call__": (executor, launch),
    }
    originals = {name: getattr(owner, name) for name, (owner, _) in hooks.items()}
    try:
        for name, (owner, hook) in hooks.items():
            setattr(owner, name, hook)
        with overflow_checks(True), filled_memory():
            yield sanitizer
    finally:
        for name, (owner, _) in hooks.items():
            setattr(owner, name, originals[name])


@contextlib.contextmanager
def filled_memory() -> Iterator[None]:
    """Within, torch fills what it allocates: with NaN, or the largest integer (which is far off, as an index)."""
    kept = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # this, too, is `fill_uninitialized_memory`, on by default
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(kept[0], warn_only=kept[1])


def _garbage(pointers: Any) -> Any:
    """What a masked load without ``other`` may return where it is masked: no number, or one that nobody expects."""
    from triton.runtime import interpreter

    dtype = pointers.get_element_ty()
    stored_as = interpreter._get_np_dtype(dtype)
    if stored_as.kind == "f":
        by_turns = [np.nan, np.inf]  # no comparison with NaN holds
    elif dtype.is_floating():  # kept as integers: bfloat16 and the kinds of float8, whose NaN are such words
        by_turns = [0x7FC1, 0x7F80] if stored_as.itemsize == 2 else [0x7F, 0x7C]
    else:
        by_turns = [np.iinfo(stored_as).max // 3 if stored_as.kind in "iu" else 1, 1]  # as an index: far off, in range
    return interpreter.TensorHandle(np.resize(np.array(by_turns, stored_as), pointers.data.shape), dtype)


def _tensors(argument: Any) -> Iterator[torch.Tensor]:
    if isinstance(argument, torch.Tensor):
        yield argument
    elif isinstance(argument, tuple):
        for part in argument:
            yield from _tensors(part)
    elif isinstance(getattr(argument, "base", None), torch.Tensor):  # a tensor descriptor
        yield argument.base


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return (last + 1) * tensor.element_size() if tensor.numel() else 0


def _itemsize(pointers: Any) -> int:
    return max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
