"""The engine: add requests, step, abort, stream."""
