"""The results as tables: for the terminal, and for the documentation's page."""

from typing import Any

from twofold.bench.report import Table

COLUMNS = ("perplexity", "change, %", "+/-", "KL divergence", "same greedy token, %")
LOSSLESS = "* Lossless by construction: the baseline's weights were rounded so before. No evidence of quality."
WINDOW = "+ and what a window of full precision takes, once for each sequence."


def tables(results: dict[str, Any]) -> list[Table]:
    """All of them that have a row."""
    return [
        table for table in (show(results) for show in (weights, pruning, cache, sides, heads, known_models)) if table[2]
    ]


def weights(results: dict[str, Any]) -> Table:
    """Formats of the weights."""
    cases = _of_kind(results, "weights")
    rows = [
        (case["name"] + "*" * case["lossless"], *_figures(case), f"{case['bytes_per_weight']:.3f}") for case in cases
    ]
    notes = [LOSSLESS] if any(case["lossless"] for case in cases) else []
    return _title(results, "Weights"), ("format", *COLUMNS, "bytes a weight"), rows, notes


def pruning(results: dict[str, Any]) -> Table:
    """Weights left out."""
    rows = [(case["name"], *_figures(case), f"{case['bytes_per_weight']:.3f}") for case in _of_kind(results, "pruning")]
    return _title(results, "Pruning"), ("left out", *COLUMNS, "bytes a weight"), rows, []


def cache(results: dict[str, Any]) -> Table:
    """Formats of the KV cache."""
    cases = _of_kind(results, "cache")
    rows = [
        (
            case["name"],
            *_figures(case),
            f"{case['bytes_per_token']:,.0f}" + (f" + {case['window_bytes']:,.0f}" if case["window_bytes"] else ""),
        )
        for case in cases
    ]
    notes = [WINDOW] if any(case["window_bytes"] for case in cases) else []
    return _title(results, "KV cache"), ("format", *COLUMNS, "bytes a token"), rows, notes


def sides(results: dict[str, Any]) -> Table:
    """Keys or values alone."""
    rows = [(case["name"], *_figures(case)) for case in _of_kind(results, "sides")]
    return _title(results, "Keys alone, values alone, rounded"), ("rounded", *COLUMNS), rows, []


def heads(results: dict[str, Any]) -> Table:
    """KV heads averaged in groups."""
    rows = [(case["name"], *_figures(case), f"{case['bytes_per_token']:,.0f}") for case in _of_kind(results, "heads")]
    return _title(results, "KV heads, averaged and not trained again"), ("heads", *COLUMNS, "bytes a token"), rows, []


def known_models(results: dict[str, Any]) -> Table:
    """What a token of known models takes."""
    models = results["known_models"]
    formats = list(models[0]["bytes_per_token"]) if models else []
    rows = [
        (
            f"{model['model']} ({model['kind']}, {model['num_kv_heads']} of {model['num_heads']} heads)",
            *(f"{model['bytes_per_token'][name] / 1024:,.0f}" for name in formats),
            f"{model['with_full_heads'] / 1024:,.0f}",
        )
        for model in models
    ]
    return "KV cache of known models, KiB a token", ("model", *formats, "bfloat16, all heads"), rows, []


def _title(results: dict[str, Any], of_what: str) -> str:
    baseline = results["settings"]["baseline"]
    return f"{of_what}, beside {baseline} (perplexity {results['baseline']['perplexity']:.4g})"


def _of_kind(results: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [case for case in results["cases"] if case["kind"] == kind]


def _figures(case: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{case['perplexity']:.5g}",
        f"{case['change']:+.3f}",
        f"{case['change_error']:.3f}",
        f"{case['divergence']:.2e}",
        f"{case['agreement']:.2f}",
    )
