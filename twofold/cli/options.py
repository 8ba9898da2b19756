"""The options that several commands share: which model, on what, in which formats, in how much memory."""

from typing import Annotated

import typer

from reference.kv_cache.cache import KV_FORMATS
from reference.linear.weight import WEIGHT_FORMATS
from twofold.errors import TwofoldError

Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help="SmolLM2 (the default), a folder, a .gguf file, or a hub name.", metavar="MODEL"
    ),
]
Backend = Annotated[
    str,
    typer.Option(help="reference, fast, plain_torch, or an importable module with some of the ops.", metavar="NAME"),
]
Device = Annotated[str | None, typer.Option(help="Where arrays live, as the backend names it.", metavar="NAME")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.", metavar="NAME")]
KVCacheDtype = Annotated[str, typer.Option(help=f"Format of the KV cache: {', '.join(KV_FORMATS)}.", metavar="NAME")]
KVWindow = Annotated[
    int | None, typer.Option(help="Newest tokens that kivi4 and kivi2 read in full; by default 128.", metavar="N")
]
Weights = Annotated[
    str,
    typer.Option(
        help=f"Format of the weights: auto, as-is (as the checkpoint has them), {', '.join(WEIGHT_FORMATS)}.",
        metavar="NAME",
    ),
]
LoraModules = Annotated[
    list[str] | None,
    typer.Option("--lora-modules", help="An adapter; the last one given is used.", metavar="NAME=PATH"),
]
Speculate = Annotated[
    str | None, typer.Option(help="Draft tokens: ngram:K (look-up in the text so far) or MODEL[:K].", metavar="HOW")
]
BlockSize = Annotated[int, typer.Option(help="Tokens in a KV block.", metavar="N")]
NumBlocks = Annotated[int | None, typer.Option(help="KV blocks in the pool.", metavar="N")]
MaxNumSeqs = Annotated[int | None, typer.Option(help="Sequences that run at once.", metavar="N")]
MaxModelLen = Annotated[int | None, typer.Option(help="Longest prompt plus answer, in tokens.", metavar="N")]
MaxNumBatchedTokens = Annotated[int | None, typer.Option(help="Token budget of a step.", metavar="N")]
GpuMemoryUtilization = Annotated[
    float, typer.Option(help="Share of the GPU's memory to use, where --num-blocks does not say.", metavar="X")
]
Load = Annotated[str, typer.Option(help="auto, or dummy: random weights from a config alone.", metavar="HOW")]
Preemption = Annotated[str, typer.Option(help="When the pool is full: recompute or swap.", metavar="HOW")]
SwapCoding = Annotated[str, typer.Option(help="Of swapped blocks: none or lossless.", metavar="HOW")]
Seed = Annotated[int | None, typer.Option(help="Of the draws; drawn and reported if not given.", metavar="N")]
MaxTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.", metavar="N")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.", metavar="X")]
TopP = Annotated[float, typer.Option(help="Keep the likeliest tokens that reach this mass.", metavar="X")]
TopK = Annotated[int, typer.Option(help="Keep this many tokens; 0 keeps all.", metavar="N")]
MinP = Annotated[float, typer.Option(help="Keep tokens at least this likely, relative to the likeliest.", metavar="X")]
System = Annotated[str | None, typer.Option(help="A system message for the chat template.", metavar="TEXT")]


def adapters(modules: list[str] | None) -> dict[str, str]:
    """``name=path`` options as a mapping."""
    pairs = [module.partition("=") for module in modules or []]
    for name, equals, path in pairs:
        if not (name and equals and path):
            raise TwofoldError(f"--lora-modules takes NAME=PATH, got {name + equals + path!r}")
    return {name: path for name, _, path in pairs}
