"""The scheduler: continuous batching, chunked prefill, a token budget, first come first served, preemption."""
