"""`twofold chat`: a conversation. Each turn finds the blocks of the turns before it in the prefix cache."""

import sys

from twofold.cli import options
from twofold.cli.generate import interruptible


def chat(
    model: options.Model = None,
    backend: options.Backend = "reference",
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    system: options.System = None,
    max_tokens: options.MaxTokens = 512,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    seed: options.Seed = None,
    kv_cache_dtype: options.KVCacheDtype = "auto",
    kv_window: options.KVWindow = None,
    weights: options.Weights = "auto",
    lora_modules: options.LoraModules = None,
    speculate: options.Speculate = None,
    block_size: options.BlockSize = 16,
    num_blocks: options.NumBlocks = None,
    max_model_len: options.MaxModelLen = None,
) -> int:
    """Talk with a model. Ctrl-C ends an answer, Ctrl-D the conversation; /reset forgets it."""
    from twofold.cli.show import progress, summary
    from twofold.llm import LLM, SamplingParams

    adapters = options.adapters(lora_modules)
    params = SamplingParams(
        temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, max_tokens=max_tokens, seed=seed
    )
    with progress() as on_progress:
        llm = LLM(
            model,
            backend=backend,
            device=device,
            dtype=dtype,
            kv_cache_dtype=kv_cache_dtype,
            kv_window=kv_window,
            weights=weights,
            lora_modules=adapters,
            speculate=speculate,
            block_size=block_size,
            num_blocks=num_blocks,
            max_model_len=max_model_len,
            on_progress=on_progress,
        )
    lora = list(adapters)[-1] if adapters else None
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    failed = False
    while (line := _read_line()) is not None:
        if line.strip() == "/reset":
            messages = list(start)
        elif line.strip():
            messages.append({"role": "user", "content": line})
            answer = _answer(llm, messages, params, lora)
            if llm.outputs and llm.outputs[0].error:  # nothing is lost: the turn is taken back, the rest goes on
                print(f"twofold: {llm.outputs[0].error}", file=sys.stderr)
                messages.pop()
                failed = True
            else:
                messages.append({"role": "assistant", "content": answer})
                print(summary(llm.metrics()), file=sys.stderr)
    return 2 if failed else 0


def _read_line() -> str | None:
    """The next line, or None at the end; the prompt sign is shown to people only."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None


def _answer(llm, messages: list[dict[str, str]], params, lora: str | None) -> str:
    """Stream one answer; Ctrl-C keeps what was said so far."""
    said = ""
    with interruptible(llm.stop):
        for chunk in llm.stream([llm.render(messages)], params, lora=lora):
            said += chunk.text
            print(chunk.text, end="", flush=True)
    print(flush=True)
    return said
