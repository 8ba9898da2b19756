"""What a GPU has room for."""

import gc

import torch


def room(device: str | None, share: float) -> int:
    """Bytes of a GPU (None: the current one) that are free now, if this program is to leave all but ``share`` of it."""
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()  # what torch holds and nobody uses is free
    free, total = torch.cuda.mem_get_info(device)
    return round(free - (1 - share) * total)
