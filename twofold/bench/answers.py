"""The real model's answers on two backends, which may be on two machines: every KV format and every weight format.

`python -m twofold.bench.answers make FILE` lets one backend (the reference) answer 8 prompts, greedily, and writes its
tokens with their margins: how much likelier each was than the next best. `... check FILE --backend fast` feeds another
backend those tokens one after another (teacher-forced: one slip does not spoil what follows), asks at every place what
it would have said, and counts where that differs. Where the margin is below rounding, either answer is right.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from reference.batching.request import SamplingParams
from reference.kv_cache.formats import KV_FORMATS
from reference.linear.weight import WEIGHT_FORMATS
from twofold.bench.report import gpu_name, save
from twofold.llm import LLM
from twofold.outputs import RequestOutput

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a village by the sea,",
    "Q: What is 17 + 25?\nA:",
    "Die Hauptstadt von Deutschland heißt",
    "Three rules of good writing:\n1.",
    "Water boils at 100 degrees Celsius because",
    "Dear Sir or Madam,\n\nI am writing to",
]
NUM_TOKENS = 64

# What stands before the prompts where a format keeps a window of tokens as they are: without it nothing is quantized.
LONG_AGO = """\
When in the Course of human events, it becomes necessary for one people to dissolve the political bands which
have connected them with another, and to assume among the powers of the earth, the separate and equal station to which
the Laws of Nature and of Nature's God entitle them, a decent respect to the opinions of mankind requires that they
should declare the causes which impel them to the separation.

We hold these truths to be self-evident, that all men are created equal, that they are endowed by their Creator with
certain unalienable Rights, that among these are Life, Liberty and the pursuit of Happiness.--That to secure these
rights, Governments are instituted among Men, deriving their just powers from the consent of the governed, --That
whenever any Form of Government becomes destructive of these ends, it is the Right of the People to alter or to abolish
it, and to institute new Government, laying its foundation on such principles and organizing its powers in such form, as
to them shall seem most likely to effect their Safety and Happiness.

"""


@dataclass(frozen=True)
class Setting:
    """What an LLM is asked to store in which format."""

    kv_cache_dtype: str = "auto"
    weights: str = "auto"

    def llm(self, model: str | None, **options: Any) -> LLM:
        return LLM(model, max_model_len=512, **asdict(self), **options)

    def prompts(self) -> list[str]:
        """Short ones, or long enough for something to leave the format's window."""
        has_window = KV_FORMATS[self.kv_cache_dtype].window is not None
        return [LONG_AGO + prompt for prompt in PROMPTS] if has_window else PROMPTS


def settings() -> list[Setting]:
    """Each KV format with ordinary weights, and each weight format with an ordinary cache."""
    kv = [Setting(kv_cache_dtype=name) for name in KV_FORMATS if name != "auto"]
    return [Setting(), *kv, *(Setting(weights=name) for name in ("as-is", *WEIGHT_FORMATS))]


def make(model: str | None, backend: str) -> list[dict[str, Any]]:
    """The tokens of each setting, and their margins in natural log-probability."""
    answers = []
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=2)
    for setting in settings():
        outputs = setting.llm(model, backend=backend).generate(setting.prompts(), params)
        answers.append({"setting": asdict(setting), "answers": [answer(output) for output in outputs]})
        print(setting, file=sys.stderr)
    return answers


def answer(output: RequestOutput) -> dict[str, Any]:
    """Prompt, tokens and margins of one output."""
    said = output.outputs[0]
    assert said.logprobs is not None
    tops = [sorted((best.logprob for best in place.values()), reverse=True) for place in said.logprobs]
    return {
        "prompt_token_ids": list(output.prompt_token_ids),
        "token_ids": list(said.token_ids),
        "margins": [round(top[0] - top[1], 6) for top in tops],
    }


def check(answers: list[dict[str, Any]], model: str | None, **options: Any) -> Iterator[dict[str, Any]]:
    """For each setting, how many tokens the backend would not have said, and with which margins."""
    for record in answers:
        llm = Setting(**record["setting"]).llm(model, **options)
        places = [(a, i) for a in record["answers"] for i in range(len(a["token_ids"]))]
        prefixes = [{"prompt_token_ids": a["prompt_token_ids"] + a["token_ids"][:i]} for a, i in places]
        outputs = llm.generate(prefixes, SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True))
        margins = [
            a["margins"][i] for (a, i), out in zip(places, outputs) if out.outputs[0].token_ids != [a["token_ids"][i]]
        ]
        yield record["setting"] | {"tokens": len(places), "differ": len(margins), "margins": sorted(margins)}


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compare the real model's answers on two backends.")
    parser.add_argument("what", choices=["make", "check"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--backend", default="reference")
    parser.add_argument("--dtype", default=["auto"], nargs="+")
    parser.add_argument("--json", type=Path, help="where `check` writes what it found")
    options = parser.parse_args(arguments)
    if options.what == "make":
        options.file.write_text(json.dumps(make(options.model, options.backend)))
        return 0
    answers = json.loads(options.file.read_text())
    wide = {"max_num_seqs": 512, "max_num_batched_tokens": 8192, "num_blocks": 2048}  # all places in a few steps
    command = " ".join(["python -m twofold.bench.answers", *(sys.argv[1:] if arguments is None else arguments)])
    device = gpu_name() if options.backend == "fast" and torch.cuda.is_available() else None
    results = []
    for dtype in options.dtype:
        for result in check(answers, options.model, backend=options.backend, dtype=dtype, **wide):
            results.append({"dtype": dtype} | result)
            print(results[-1], flush=True)
            if options.json:  # each time: what is there stays, whatever happens next
                save(options.json, command, {"settings": results}, device=device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
