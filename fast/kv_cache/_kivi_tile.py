"""A tile of KIVI's old keys on its way through the memory of a warp: for decodes, `_kivi_decode.py`.

The lanes of a warp copy it in pieces of 16 bytes, two tiles ahead, without a register in between; then each reads what
its registers hold of a product's operands. In a warp's memory lie, in words,

- 32 rows of keys' codes, and 32 of values';
- four words a token: the scales of its values, in the last two their zeros;
- for each group of keys its scales, then its zeros.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
import triton
import triton.language as tl

from fast._triton import paging
from fast._triton.lanes import copy_words, read_words

PAGE = tl.constexpr(16)  # keys of a product, all in one block and one group
PAGES = tl.constexpr(2)  # of a tile
TILE = tl.constexpr(32)  # keys of a tile
TOKEN = tl.constexpr(4)  # words of a token: scales and zeros of its values


@triton.constexpr_function
def tile_groups(GROUP_SIZE):
    """Groups of keys in a tile: one that both pages share, or one each."""
    return 1 if GROUP_SIZE % TILE.value == 0 else 2


@triton.constexpr_function
def tile_blocks(BLOCK_SIZE):
    """Likewise its blocks."""
    return 1 if BLOCK_SIZE % TILE.value == 0 else 2


@triton.constexpr_function
def tile_words(BITS, PIECES, GROUP_SIZE):
    """Words of a tile."""
    return 2 * TILE.value * PIECES * BITS + TILE.value * TOKEN.value + tile_groups(GROUP_SIZE) * 32 * PIECES


@triton.jit
def load_ids(row_ptr, stride_table_block, tile, lowest, last, BLOCK_SIZE: tl.constexpr):
    """The blocks of a tile's two pages, as the table has them."""
    page0, page1 = page_of(tile, 0, lowest, last), page_of(tile, 1, lowest, last)
    id0 = tl.load(row_ptr + page0 * PAGE // BLOCK_SIZE * stride_table_block)
    id1 = id0
    if tile_blocks(BLOCK_SIZE) > 1:
        id1 = tl.load(row_ptr + page1 * PAGE // BLOCK_SIZE * stride_table_block)
    return id0, id1


@triton.jit
def page_of(tile, i, lowest, last):
    """The page (of 16 tokens of the sequence) that a tile reads as one of its pages."""
    return tl.minimum(tl.maximum(tile * PAGES + i, lowest), last)


@triton.jit
def offset_of(tile, i, lowest, last, BLOCK_SIZE: tl.constexpr, GROUP_SIZE: tl.constexpr):
    """Where in its block such a page begins."""
    if tile_blocks(BLOCK_SIZE) == 1 and tile_groups(GROUP_SIZE) == 1:  # then both pages are there, or neither
        offset = (tile * 0 if BLOCK_SIZE == TILE else tile * TILE % BLOCK_SIZE) + i * PAGE
    else:
        offset = page_of(tile, i, lowest, last) * PAGE % BLOCK_SIZE
    return offset


@triton.jit
def places_of_lanes(
    lane, k_ptr, v_ptr, k_scale_ptr, k_zero_ptr, v_scale_ptr, v_zero_ptr, stride_token: tl.constexpr,
    stride_scale_token: tl.constexpr, ROW: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """What each lane copies, from where and to where: of keys, values, the tokens' scales and the groups'."""
    row, chunk = lane // (ROW // 4), lane % (ROW // 4)
    # Rows of values lie so that the lanes, which read every other one, find them side by side: 0 2 4 6 1 3 5 7.
    value_row = row // 2 % 4 + row % 2 * 4 + row // 8 * 8
    token, second = lane % 16, lane // 16
    in_group = lane % (8 * PIECES)
    cells = row * stride_token + 4 * chunk
    of_token = tl.where(second == 0, v_scale_ptr, v_zero_ptr) + token * stride_scale_token
    of_group = tl.where(in_group < 4 * PIECES, k_scale_ptr, k_zero_ptr) + in_group % (4 * PIECES) * 4
    sources = (k_ptr + cells, v_ptr + cells, of_token, of_group)
    return sources, (row * ROW + 4 * chunk, value_row * ROW + 4 * chunk, token * TOKEN + 2 * second, in_group * 4)


@triton.jit
def copy_tile(
    memory, into, ids, tile, lowest, last, num_blocks, sources, targets, block_strides,
    stride_token: tl.constexpr, stride_group: tl.constexpr, stride_scale_token: tl.constexpr,
    BITS: tl.constexpr, PIECES: tl.constexpr, NUM_GROUPS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):  # fmt: skip
    """Let a tile be copied to the words of the warp's memory from ``into`` on."""
    ROW: tl.constexpr = PIECES * BITS  # words of a row of codes
    ROWS: tl.constexpr = 128 // ROW  # that the lanes copy at a time
    TOKENS: tl.constexpr = 2 * TILE * ROW
    GROUPS: tl.constexpr = TOKENS + TILE * TOKEN
    to_keys, to_values, to_tokens, to_groups = (
        into + targets[0],
        into + targets[1],
        into + targets[2],
        into + targets[3],
    )
    for i in tl.static_range(PAGES):
        if i < tile_blocks(BLOCK_SIZE):
            block = tl.minimum(tl.maximum(ids[i], 0), num_blocks - 1)  # one that exists, whatever the table says
            in_cache = paging.times_stride(block, block_strides[0])
            keys, values = sources[0] + in_cache, sources[1] + in_cache
            groups = sources[3] + paging.times_stride(block, block_strides[1])
            tokens = sources[2] + paging.times_stride(block, block_strides[2])
        offset = offset_of(tile, i, lowest, last, BLOCK_SIZE, GROUP_SIZE)
        for step in tl.static_range(PAGE // ROWS):
            cells = (offset + step * ROWS) * stride_token
            memory = copy_words(memory, to_keys, (i * PAGE + step * ROWS) * ROW, keys + cells, 4)
            memory = copy_words(memory, to_values, (TILE + i * PAGE + step * ROWS) * ROW, values + cells, 4)
        of_page = tokens + offset * stride_scale_token
        memory = copy_words(memory, to_tokens, TOKENS + i * PAGE * TOKEN, of_page, NUM_GROUPS // 2)
        if i < tile_groups(GROUP_SIZE):
            group = groups + offset // GROUP_SIZE * stride_group
            memory = copy_words(memory, to_groups, GROUPS + i * 32 * PIECES, group, 4)
    return memory


@triton.jit
def read_channels(memory, at, OFFSET: tl.constexpr, PIECES: tl.constexpr):
    """The words of a lane's channels, from 32 * PIECES numbers."""
    words = ()
    for j in tl.static_range(PIECES):
        words = words + read_words(memory, at, OFFSET + 16 * j, 4)
    return words
