"""Where beams fork: recordings that come with the package, and how they were made.

SmolLM2-135M-Instruct answered eight short questions with 192 tokens each, and four long ones with 640 each, by beam
search with 2, 4 and 6 beams, going on past the end of its text: the lengths that are simulated are drawn otherwise.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from reference.memory.beam_forks import BeamForks, record
from twofold.llm import LLM

FOLDER = Path(__file__).parent
NUM_BEAMS = (2, 4, 6)
NUM_TOKENS = {"short": 192, "long": 640}

PROMPTS = {
    "short": (
        "Give three tips for staying healthy.",
        "Explain why the sky is blue.",
        "Write a short story about a lighthouse keeper.",
        "Describe how a bicycle stays upright.",
        "List the steps for planting a tree.",
        "What were the causes of the first world war?",
        "Write a letter that asks for a refund.",
        "Compare cats and dogs as pets.",
    ),
    "long": (
        "I am planning a trip of ten days through Portugal in October. I like old towns, good food and walking by the "
        "sea, and I do not want to drive. Please suggest a route, say for each day where I stay and what I do there, "
        "and explain how I get from one place to the next.",
        "Write a long story about a lighthouse keeper who finds a letter in a bottle. Tell where the letter comes "
        "from, what she does about it, whom she meets on the way, and how it ends.",
        "Explain to me how a computer runs a program, from the moment I press a key until something appears on the "
        "screen. I know a little about electricity and nothing about software. Take your time, and give an example "
        "for every new word.",
        "My neighbour and I share a garden wall which is falling down. He says it is mine, I say it is his. Write a "
        "letter to him that is friendly and firm, then tell me what I can do if he does not answer, and what it may "
        "cost.",
    ),
}


def load_forks() -> dict[str, BeamForks]:
    """The recordings that come with the package."""
    return {kind: BeamForks.load(FOLDER / f"beam_forks_{kind}.json") for kind in PROMPTS}


def record_forks(llm: LLM, on_progress: Callable[[str], None] = lambda what: None) -> Mapping[str, BeamForks]:
    """The same from another model. Takes minutes: 6 beams of 640 tokens are many steps."""
    recorded = {}
    for kind, prompts in PROMPTS.items():
        token_ids = [llm.render(prompt)["prompt_token_ids"] for prompt in prompts]
        searches = {}
        for num_beams in NUM_BEAMS:
            on_progress(f"{kind} answers, {num_beams} beams")
            searches[num_beams] = record(llm.engine, token_ids, num_beams=num_beams, num_tokens=NUM_TOKENS[kind])
        recorded[kind] = BeamForks(llm.checkpoint.name, searches)
    return recorded
