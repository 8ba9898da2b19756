"""Warps by their lanes: a tensor is one register of every lane, 32 to a warp, and what the GPU does with them.

Kernels that read codes spend their time on moving numbers between the layouts that products want, unless every load
brings a lane exactly what that lane's registers hold of an operand. Tensors of ``32 * num_warps`` are laid out so, and
the instructions that Triton has no name for are inline assembly: ``mma.m16n8k16``, ``movmatrix``, shuffles, loads of
several words.

In a product lane 4 g + c holds of the left operand, 16 x 16, rows g and g + 8, of the right one, 16 x 8, column g, each
at the steps 2 c, 2 c + 1 and those plus 8; of the result rows g and g + 8 at columns 2 c and 2 c + 1. Which step of a
product is which number is free: it only has to be the same on both sides.

The interpreter knows no such instructions; there each is computed from the numbers in every lane's registers instead.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
import triton
import triton.language as tl

from fast._triton.platform import INTERPRETED
from fast._triton.rounding import dot, to_dtype

# ---- one register of every lane ---------------------------------------------------------------------------------


@triton.jit
def halves_of(words, dtype: tl.constexpr):
    """The two 16-bit floats in each word, the lower first, in float32."""
    if dtype == tl.bfloat16:
        low, high = (words << 16).to(tl.float32, bitcast=True), (words & -65536).to(tl.float32, bitcast=True)
    else:
        low = (words & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        high = ((words >> 16) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def _word_of(low, high):
    """A word of two 16-bit numbers."""
    return (low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) | (high.to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def packed(low, high, dtype: tl.constexpr):
    """Two float32 numbers, rounded, in a word."""
    if INTERPRETED:
        word = _word_of(to_dtype(low, dtype), to_dtype(high, dtype))
    else:
        asm: tl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;" if dtype == tl.bfloat16 else "cvt.rn.f16x2.f32 $0, $2, $1;"
        word = tl.inline_asm_elementwise(asm, "=r,f,f", [low, high], tl.int32, is_pure=True, pack=1)
    return word


@triton.jit
def multiply(a, b):
    """Products of two float16s each."""
    if INTERPRETED:
        a0, a1 = halves_of(a, tl.float16)
        b0, b1 = halves_of(b, tl.float16)
        word = _word_of((a0 * b0).to(tl.float16), (a1 * b1).to(tl.float16))
    else:
        asm: tl.constexpr = "mul.rn.f16x2 $0, $1, $2;"
        word = tl.inline_asm_elementwise(asm, "=r,r,r", [a, b], tl.int32, is_pure=True, pack=1)
    return word


@triton.jit
def multiply_add(a, b, c):
    """a * b + c of two float16s each, rounded once."""
    if INTERPRETED:
        a0, a1 = halves_of(a, tl.float16)
        b0, b1 = halves_of(b, tl.float16)
        c0, c1 = halves_of(c, tl.float16)
        word = _word_of((a0 * b0 + c0).to(tl.float16), (a1 * b1 + c1).to(tl.float16))
    else:
        asm: tl.constexpr = "fma.rn.f16x2 $0, $1, $2, $3;"
        word = tl.inline_asm_elementwise(asm, "=r,r,r,r", [a, b, c], tl.int32, is_pure=True, pack=1)
    return word


@triton.jit
def bytes_0213(word):
    """The two middle bytes of a word swapped."""
    if INTERPRETED:
        word = (word & -16776961) | ((word & 0xFF00) << 8) | ((word >> 8) & 0xFF00)
    else:
        asm: tl.constexpr = "prmt.b32 $0, $1, $1, 0x3120;"
        word = tl.inline_asm_elementwise(asm, "=r,r", [word], tl.int32, is_pure=True, pack=1)
    return word


@triton.jit
def pair(a, b, HALF: tl.constexpr):
    """The lower (0) or upper (1) halves of two words, in one."""
    if INTERPRETED:
        if HALF == 0:
            word = (a & 0xFFFF) | (b << 16)
        else:
            word = ((a >> 16) & 0xFFFF) | (b & -65536)
    else:
        asm: tl.constexpr = "prmt.b32 $0, $1, $2, 0x5410;" if HALF == 0 else "prmt.b32 $0, $1, $2, 0x7632;"
        word = tl.inline_asm_elementwise(asm, "=r,r,r", [a, b], tl.int32, is_pure=True, pack=1)
    return word


@triton.jit
def interleaved(a, b, HALF: tl.constexpr):
    """The lower (0) or upper (1) two bytes of two words, by turns."""
    if INTERPRETED:
        a, b = (a >> (16 * HALF)) & 0xFFFF, (b >> (16 * HALF)) & 0xFFFF
        word = (a & 0xFF) | ((b & 0xFF) << 8) | ((a >> 8) << 16) | ((b >> 8) << 24)
    else:
        asm: tl.constexpr = "prmt.b32 $0, $1, $2, 0x5140;" if HALF == 0 else "prmt.b32 $0, $1, $2, 0x7362;"
        word = tl.inline_asm_elementwise(asm, "=r,r,r", [a, b], tl.int32, is_pure=True, pack=1)
    return word


@triton.jit
def _float8(byte):
    """A float8 (e4m3fn) as a float16 (for the interpreter)."""
    bits = ((byte & 0x80) << 8) | ((byte & 0x7F) << 7)  # with another bias
    x = bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((byte & 0x7F) == 0x7F, float("nan"), x).to(tl.float16)


@triton.jit
def float8s(word, HALF: tl.constexpr):
    """The lower (0) or upper (1) two float8s (e4m3fn) of a word, as float16s."""
    if INTERPRETED:
        word = word >> (16 * HALF)
        word = _word_of(_float8(word & 0xFF), _float8((word >> 8) & 0xFF))
    elif HALF == 0:
        asm: tl.constexpr = "{ .reg .b16 l, h; mov.b32 {l, h}, $1; cvt.rn.f16x2.e4m3x2 $0, l; }"
        word = tl.inline_asm_elementwise(asm, "=r,r", [word], tl.int32, is_pure=True, pack=1)
    else:
        asm: tl.constexpr = "{ .reg .b16 l, h; mov.b32 {l, h}, $1; cvt.rn.f16x2.e4m3x2 $0, h; }"
        word = tl.inline_asm_elementwise(asm, "=r,r", [word], tl.int32, is_pure=True, pack=1)
    return word


@triton.constexpr_function
def _load_asm(count):
    names = ", ".join(f"${i}" for i in range(count))
    return f"ld.global.nc.v{count}.b32 {{{names}}}, [${count}];"


@triton.jit
def load_words(ptr, COUNT: tl.constexpr):
    """COUNT (1, 2 or 4) words side by side, in one load."""
    if COUNT == 1:
        words = (tl.load(ptr),)
    elif INTERPRETED:
        words = ()
        for i in tl.static_range(COUNT):
            words = words + (tl.load(ptr + i),)
    elif COUNT == 2:
        asm: tl.constexpr = _load_asm(COUNT)
        address = ptr.to(tl.int64)
        words = tl.inline_asm_elementwise(asm, "=r,=r,l", [address], (tl.int32, tl.int32), is_pure=True, pack=1)
    else:
        asm: tl.constexpr = _load_asm(COUNT)
        address = ptr.to(tl.int64)
        kinds: tl.constexpr = (tl.int32, tl.int32, tl.int32, tl.int32)
        words = tl.inline_asm_elementwise(asm, "=r,=r,=r,=r,l", [address], kinds, is_pure=True, pack=1)
    return words


@triton.constexpr_function
def _number_at_asm(offset):
    return f"{{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, $3; @p ld.global.cg.b32 $0, [$1 + {4 * offset}]; }}"


@triton.jit
def load_number(ptr, OFFSET: tl.constexpr, there, other):
    """The float32 OFFSET numbers behind each lane's pointer, as another program left it; ``other`` where there is none.

    For dozens of numbers one by one. Of each `tl.load` and `tl.store` of a tensor, Triton asks which others its address
    has to do with: where there are a hundred, in a kernel of thousands of lines, that is most of the time to compile.
    """
    if INTERPRETED:
        number = tl.load(ptr + OFFSET, mask=there, other=other)
    else:
        asm: tl.constexpr = _number_at_asm(OFFSET)
        operands = [ptr.to(tl.int64), there.to(tl.int32), other + tl.zeros(ptr.shape, tl.float32)]
        number = tl.inline_asm_elementwise(asm, "=f,l,r,f", operands, tl.float32, is_pure=False, pack=1)
    return number


@triton.constexpr_function
def _store_asm(offset, bits):
    place = f"[$1 + {bits // 8 * offset}]"
    return f"{{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.global.b{bits} {place}, $2; mov.b32 $0, 0; }}"


@triton.jit
def store_number(ptr, OFFSET: tl.constexpr, number, there):
    """Store each lane's number OFFSET places behind its pointer, in the pointer's dtype; like `load_number`."""
    number = to_dtype(number, ptr.dtype.element_ty)
    if INTERPRETED:
        tl.store(ptr + OFFSET, number, mask=there)
    elif ptr.dtype.element_ty == tl.float32:
        asm: tl.constexpr = _store_asm(OFFSET, 32)
        operands = [ptr.to(tl.int64), number, there.to(tl.int32)]
        tl.inline_asm_elementwise(asm, "=r,l,f,r", operands, tl.int32, is_pure=False, pack=1)
    else:
        asm: tl.constexpr = _store_asm(OFFSET, 16)
        operands = [ptr.to(tl.int64), number.to(tl.int16, bitcast=True), there.to(tl.int32)]
        tl.inline_asm_elementwise(asm, "=r,l,h,r", operands, tl.int32, is_pure=False, pack=1)


# ---- lanes together ---------------------------------------------------------------------------------------------


@triton.jit
def from_lane(x, lane):
    """What another lane of the warp has."""
    if INTERPRETED:
        y = tl.gather(x, tl.arange(0, x.shape[0]) // 32 * 32 + lane, 0)
    else:
        asm: tl.constexpr = "shfl.sync.idx.b32 $0, $1, $2, 31, -1;"
        y = tl.inline_asm_elementwise(asm, "=f,f,r", [x, lane], tl.float32, is_pure=True, pack=1)
    return y


@triton.constexpr_function
def _other_asm(distance):
    return f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, -1;"


@triton.jit
def from_other(x, DISTANCE: tl.constexpr):
    """What the lane has whose number differs in one bit."""
    if INTERPRETED:
        y = from_lane(x, tl.arange(0, x.shape[0]) % 32 ^ DISTANCE)
    else:
        asm: tl.constexpr = _other_asm(DISTANCE)
        y = tl.inline_asm_elementwise(asm, "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def transposed(words):
    """8 x 8 numbers of 16 bits, lane 4 g + c having (g, 2 c) and (g, 2 c + 1): the transpose, held likewise."""
    if INTERPRETED:
        table = tl.join(words & 0xFFFF, (words >> 16) & 0xFFFF).reshape(words.shape[0] // 32, 8, 8)
        low, high = tl.split(tl.permute(table, (0, 2, 1)).reshape(words.shape[0], 2))
        words = low | (high << 16)
    else:
        asm: tl.constexpr = "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;"
        words = tl.inline_asm_elementwise(asm, "=r,r", [words], tl.int32, is_pure=True, pack=1)
    return words


@triton.jit
def _table_of(words, dtype: tl.constexpr):
    """8 x 8 floats of each warp from the registers of its lanes (for the interpreter)."""
    low, high = halves_of(words, dtype)
    return tl.join(low, high).reshape(words.shape[0] // 32, 8, 8)


@triton.constexpr_function
def _product_asm(kind):
    return (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )


@triton.jit
def product(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3, dtype: tl.constexpr = tl.float16):
    """a @ b + c, [16, 16] @ [16, 8]: a's rows g and g + 8 at the first steps, then at the last; c's rows likewise."""
    if INTERPRETED:
        SIZE: tl.constexpr = a0.shape[0]
        first, last = tl.permute(_table_of(b0, dtype), (0, 2, 1)), tl.permute(_table_of(b1, dtype), (0, 2, 1))
        upper, lower = tl.join(c0, c1).reshape(SIZE // 32, 8, 8), tl.join(c2, c3).reshape(SIZE // 32, 8, 8)
        upper = dot(_table_of(a0, dtype), first, dot(_table_of(a2, dtype), last, upper))
        lower = dot(_table_of(a1, dtype), first, dot(_table_of(a3, dtype), last, lower))
        c0, c1 = tl.split(upper.reshape(SIZE, 2))
        c2, c3 = tl.split(lower.reshape(SIZE, 2))
        c = (c0, c1, c2, c3)
    else:
        asm: tl.constexpr = _product_asm("bf16" if dtype == tl.bfloat16 else "f16")
        kinds: tl.constexpr = (tl.float32, tl.float32, tl.float32, tl.float32)
        operands = [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3]
        c = tl.inline_asm_elementwise(asm, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", operands, kinds, is_pure=True, pack=1)
    return c


@triton.jit
def some(words, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """COUNT of them from the FIRST on."""
    return words[FIRST : FIRST + COUNT]


@triton.jit
def rescaled(accs, rescale0, rescale1):
    """Results of products, their columns multiplied."""
    new = ()
    for i in tl.static_range(len(accs) // 2):
        new = new + (accs[2 * i] * rescale0, accs[2 * i + 1] * rescale1)
    return new


@triton.jit
def product_at(accs, AT: tl.constexpr, a0, a1, a2, a3, b0, b1, dtype: tl.constexpr = tl.float16):
    """``product``, added to four registers among many."""
    return product(a0, a1, a2, a3, b0, b1, accs[AT], accs[AT + 1], accs[AT + 2], accs[AT + 3], dtype)


@triton.jit
def largest_of(x):
    """The largest of the eight lanes that share their last two bits."""
    x = tl.maximum(x, from_other(x, 4))
    x = tl.maximum(x, from_other(x, 8))
    return tl.maximum(x, from_other(x, 16))


@triton.jit
def sum_of(x):
    """The sum of the eight lanes that share their last two bits."""
    x = x + from_other(x, 4)
    x = x + from_other(x, 8)
    return x + from_other(x, 16)


# ---- memory of a warp -------------------------------------------------------------------------------------------


@triton.constexpr_function
def _memory_asm(size):
    return f"{{ .shared .align 16 .b8 memory[{size}]; mov.b32 $0, memory; }}"


@triton.jit
def warp_memory(WORDS: tl.constexpr, WARPS: tl.constexpr):
    """WORDS words of shared memory for each warp, once in a kernel: their addresses; interpreted, the words themselves.

    A multiple of four words, 48 KB in all: it is static, beside what Triton takes for itself.
    """
    if INTERPRETED:
        memory = tl.zeros([WARPS * _power_of_2(WORDS)], tl.int32)
    else:
        asm: tl.constexpr = _memory_asm(4 * WORDS * WARPS)
        first = tl.inline_asm_elementwise(asm, "=r,r", [tl.program_id(0)], tl.int32, is_pure=False, pack=1)
        memory = first + tl.arange(0, 32 * WARPS) // 32 * (4 * WORDS)
    return memory


@triton.constexpr_function
def _power_of_2(number):
    return triton.next_power_of_2(number)


@triton.constexpr_function
def _copy_asm(count, offset):
    cached = "cg.shared.global.L2::128B" if count == 4 else "ca.shared.global"
    return f"cp.async.{cached} [$1 + {4 * offset}], [$2], {4 * count}; mov.b32 $0, 0;"


@triton.jit
def copy_words(memory, at, OFFSET: tl.constexpr, ptr, COUNT: tl.constexpr):
    """Let COUNT (1, 2 or 4) words be copied to a place of the warp's memory, as part of the next `commit_copies`.

    Returns the memory with them. Lanes may copy the same words to the same place.
    """
    if INTERPRETED:
        table = memory.reshape(at.shape[0] // 32, memory.shape[0] * 32 // at.shape[0])
        cell = tl.arange(0, table.shape[1])[None, :, None]
        for i in tl.static_range(COUNT):
            here = cell == (at + (OFFSET + i)).reshape(at.shape[0] // 32, 1, 32)
            word = tl.load(ptr + i).reshape(at.shape[0] // 32, 1, 32)
            written = tl.max(tl.where(here, word, -2147483648), 2)
            table = tl.where(tl.max(here.to(tl.int32), 2) > 0, written, table)
        memory = table.reshape(memory.shape[0])
    else:
        asm: tl.constexpr = _copy_asm(COUNT, OFFSET)
        operands = [memory + 4 * at, ptr.to(tl.int64)]
        tl.inline_asm_elementwise(asm, "=r,r,l", operands, tl.int32, is_pure=False, pack=1)
    return memory


@triton.jit
def commit_copies():
    """End a group of copies, an empty one perhaps."""
    if not INTERPRETED:
        asm: tl.constexpr = "cp.async.commit_group; mov.b32 $0, $1;"
        tl.inline_asm_elementwise(asm, "=r,r", [tl.program_id(0)], tl.int32, is_pure=False, pack=1)


@triton.constexpr_function
def _wait_asm(pending):
    return f"cp.async.wait_group {pending}; bar.warp.sync -1; mov.b32 $0, $1;"


@triton.jit
def wait_for_copies(PENDING: tl.constexpr):
    """Until all groups but the last PENDING have arrived, those of the other lanes too, which have read what they
    have asked for before: its place may be copied to."""
    if not INTERPRETED:
        asm: tl.constexpr = _wait_asm(PENDING)
        tl.inline_asm_elementwise(asm, "=r,r", [tl.program_id(0)], tl.int32, is_pure=False, pack=1)


@triton.constexpr_function
def _read_asm(count, offset):
    kind = f"v{count}.b32" if count > 1 else "b32"
    names = ", ".join(f"${i}" for i in range(count))
    return f"ld.shared.{kind} {{{names}}}, [${count} + {4 * offset}];"


@triton.jit
def read_words(memory, at, OFFSET: tl.constexpr, COUNT: tl.constexpr):
    """COUNT (1, 2 or 4) words side by side of the warp's memory."""
    if INTERPRETED:
        words = ()
        of_warp = tl.arange(0, at.shape[0]) // 32 * (memory.shape[0] * 32 // at.shape[0])
        for i in tl.static_range(COUNT):
            words = words + (tl.gather(memory, of_warp + at + (OFFSET + i), 0),)
    elif COUNT == 1:
        asm: tl.constexpr = _read_asm(COUNT, OFFSET)
        words = (tl.inline_asm_elementwise(asm, "=r,r", [memory + 4 * at], tl.int32, is_pure=False, pack=1),)
    elif COUNT == 2:
        asm: tl.constexpr = _read_asm(COUNT, OFFSET)
        kinds: tl.constexpr = (tl.int32, tl.int32)
        words = tl.inline_asm_elementwise(asm, "=r,=r,r", [memory + 4 * at], kinds, is_pure=False, pack=1)
    else:
        asm: tl.constexpr = _read_asm(COUNT, OFFSET)
        kinds: tl.constexpr = (tl.int32, tl.int32, tl.int32, tl.int32)
        words = tl.inline_asm_elementwise(asm, "=r,=r,=r,=r,r", [memory + 4 * at], kinds, is_pure=False, pack=1)
    return words


@triton.constexpr_function
def _read_transposed_asm(offset):
    return f"ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {{$0, $1}}, [$2 + {4 * offset}];"


@triton.jit
def read_transposed(memory, at, OFFSET: tl.constexpr):
    """Two tables of 8 x 8 numbers of 16 bits, transposed: lane 4 g + c has of each (2 c, g) and (2 c + 1, g).

    Row r of the first is the four words from ``at`` of lane r, row r of the second from that of lane r + 8.
    """
    if INTERPRETED:
        lane = tl.arange(0, at.shape[0])
        of_warp = lane // 32 * (memory.shape[0] * 32 // at.shape[0])
        g, c = lane % 32 // 4, lane % 4
        words = ()
        for table in tl.static_range(2):
            halves = ()
            for i in tl.static_range(2):
                row = tl.gather(at, lane // 32 * 32 + 8 * table + 2 * c + i, 0)
                halves = halves + ((tl.gather(memory, of_warp + row + OFFSET + g // 2, 0) >> (g % 2 * 16)) & 0xFFFF,)
            words = words + (halves[0] | (halves[1] << 16),)
    else:
        asm: tl.constexpr = _read_transposed_asm(OFFSET)
        words = tl.inline_asm_elementwise(
            asm, "=r,=r,r", [memory + 4 * at], (tl.int32, tl.int32), is_pure=False, pack=1
        )
    return words
