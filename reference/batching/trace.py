"""The trace: what happened in every step, as plain dictionaries.

One record a line (JSON Lines) makes a trace file, so that a run which is cut short leaves a valid one. Every record has
a ``kind``; times are seconds of the engine's clock, durations seconds.

``start``, first and once::

    {"kind": "start", "schema": "twofold.trace", "version": 1, "time": 12.5,
     "config": {"num_blocks": 512, "block_size": 16, ...}}          # every field of EngineConfig

``add``, when a request arrives::

    {"kind": "add", "time": 12.5, "request": "a", "prompt_tokens": 17, "sequences": 1}

``step``, when its result has been read::

    {"kind": "step", "step": 3, "time": 12.7,                        # when it was scheduled
     "schedule_time": 1e-4, "launch_time": 0.02, "wait_time": 0.0, "update_time": 1e-4,
     "device_time": null,                                            # of a GPU, behind the host's back
     "num_tokens": 18, "running": 2, "waiting": 0,                   # requests, after it was scheduled
     "admitted": ["b"], "preempted": [],                             # requests
     "sequences": [{"seq": 0, "request": "a", "sample": 0,
                    "start": 20, "tokens": 1, "drafts": 0,           # computed: positions start .. start + tokens
                    "blocks": [[4, 5]]}, ...],                       # a list a pool; -1: past the window, released
     "copies": [[[5, 9]]],                                           # a list a pool: [source, target] blocks
     "swaps_out": [{"key": 0, "pool": 0, "blocks": [1, 2]}], "swaps_in": [...],
     "pools": [{"used": 6, "shared": 1, "slots": 96, "empty_slots": 11}],
     "swapped": 0,                                                   # blocks on the host
     "output": [{"request": "a", "sample": 0, "tokens": [42], "finish_reason": null}, ...]}

``end``, when a request has ended::

    {"kind": "end", "time": 12.9, "request": "a", "error": null, "metrics": {...},    # RequestMetrics
     "outputs": [{"sample": 0, "tokens": 7, "finish_reason": "stop"}]}

Steps come in order. Of two engines with the same requests and settings everything but the times is the same, whatever
runs the steps.
"""

import json
from dataclasses import asdict
from typing import IO, Any

from reference.batching.config import EngineConfig
from reference.batching.metrics import StepRecord
from reference.batching.plan import StepPlan, Swap
from reference.batching.request import Request, RequestOutput, StepOutput
from reference.batching.scheduler import Scheduler

SCHEMA, VERSION = "twofold.trace", 1

Record = dict[str, Any]


class TraceWriter:
    """Writes records to an open text file, one a line: ``Engine(..., trace=TraceWriter(file))``."""

    def __init__(self, file: IO[str]):
        self.file = file

    def __call__(self, record: Record) -> None:
        self.file.write(json.dumps(record, separators=(",", ":")) + "\n")


def read_trace(file: IO[str]) -> list[Record]:
    """The records of a trace file. Raises ValueError if it is none, or of a later version than this."""
    records = [json.loads(line) for line in file if line.strip()]
    if not records or records[0].get("schema") != SCHEMA:
        raise ValueError(f"trace: expected a first record of schema {SCHEMA!r}")
    if records[0]["version"] != VERSION:
        raise ValueError(f"trace: expected version {VERSION}, got {records[0]['version']}")
    return records


def start_record(config: EngineConfig, now: float) -> Record:
    """The first record of a trace."""
    return {"kind": "start", "schema": SCHEMA, "version": VERSION, "time": now, "config": asdict(config)}


def add_record(request: Request, now: float) -> Record:
    """A request has come."""
    return {
        "kind": "add",
        "time": now,
        "request": request.request_id,
        "prompt_tokens": len(request.prompt_token_ids),
        "sequences": request.num_sequences,
    }


def step_record(plan: StepPlan, scheduler: Scheduler) -> Record:
    """A step has been scheduled: all that is known of it then."""
    return {
        "kind": "step",
        "step": plan.step,
        "num_tokens": plan.num_tokens,
        "running": len(scheduler.running),
        "waiting": len(scheduler.waiting),
        "admitted": plan.admitted,
        "preempted": plan.preempted,
        "sequences": [_sequence(plan, place) for place in range(len(plan.seqs))],
        "copies": [[list(copy) for copy in copies] for copies in plan.copies],
        "swaps_out": [_swap(swap) for swap in plan.swaps_out],
        "swaps_in": [_swap(swap) for swap in plan.swaps_in],
        "pools": [asdict(usage) for usage in scheduler.usage()],
        "swapped": sum(num_blocks for _, num_blocks in scheduler.space.swapped.values()),
    }


def _sequence(plan: StepPlan, place: int) -> Record:
    seq, num_new = plan.seqs[place], plan.num_new[place]
    return {
        "seq": seq.seq_id,
        "request": seq.request.request_id,
        "sample": seq.sample_index,
        "start": seq.num_computed - num_new,
        "tokens": num_new,
        "drafts": len(plan.drafts.get(place, ())),
        "blocks": [list(table.block_ids) for table in seq.tables],
    }


def _swap(swap: Swap) -> Record:
    return {"key": swap.key, "pool": swap.pool, "blocks": swap.block_ids}


def finish_step_record(record: Record, times: StepRecord, output: StepOutput) -> Record:
    """Its result has been read."""
    return record | {
        "time": times.start_time,
        "schedule_time": times.schedule_time,
        "launch_time": times.launch_time,
        "wait_time": times.wait_time,
        "update_time": times.update_time,
        "device_time": times.device_time,
        "output": [
            {"request": o.request_id, "sample": o.index, "tokens": o.new_token_ids, "finish_reason": o.finish_reason}
            for o in output.sequences
        ],
    }


def end_record(output: RequestOutput, now: float) -> Record:
    """A request has ended."""
    return {
        "kind": "end",
        "time": now,
        "request": output.request_id,
        "error": output.error,
        "metrics": asdict(output.metrics),
        "outputs": [
            {"sample": o.index, "tokens": len(o.token_ids), "finish_reason": o.finish_reason} for o in output.outputs
        ],
    }
