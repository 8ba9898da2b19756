"""A step's arrays: end to end, without padding, and of values in flight only the place where they will be."""

import numpy as np

from reference.batching.config import EngineConfig
from reference.batching.request import Request, SamplingParams
from reference.batching.scheduler import Scheduler
from twofold.conformance.strategies.batching import FakeModel, FakeRunner


def scheduler_of(requests, **settings):
    config = EngineConfig(**({"num_blocks": 40, "max_model_len": 40, "block_size": 4} | settings))
    scheduler = Scheduler(config)
    for request in requests:
        scheduler.add(request)
    return scheduler, FakeRunner(FakeModel(), config)


def test_prefill_chunks_and_decodes_in_one_step():
    """A decoding sequence takes one token, a prompt what the budget leaves; only whole prompts have logits."""
    long, short = list(range(1, 10)), [20, 21]
    scheduler, runner = scheduler_of(
        [Request("a", short, SamplingParams(seed=1)), Request("b", long, SamplingParams(seed=2))],
        max_num_batched_tokens=6,
    )
    first = scheduler.schedule()
    assert first.token_ids.tolist() == [20, 21, 1, 2, 3, 4]
    assert first.positions.tolist() == [0, 1, 0, 1, 2, 3]
    assert first.cu_seqlens_q.tolist() == [0, 2, 6]
    assert first.seq_lens.tolist() == [2, 4]
    assert first.block_tables[0].tolist() == [[0], [1]]
    assert first.slot_mappings[0].tolist() == [0, 1, 4, 5, 6, 7]
    assert first.logit_rows.tolist() == [1], "only the first prompt is whole"
    assert first.sampling.positions.tolist() == [2]
    assert first.sampling.seeds.tolist() == [1]
    scheduler.update(runner.launch(first).result())
    token = scheduler.running[0].live[0].token_ids[-1]

    second = scheduler.schedule()
    assert second.token_ids.tolist() == [token, 5, 6, 7, 8, 9]
    assert second.positions.tolist() == [2, 4, 5, 6, 7, 8]
    assert second.block_tables[0].tolist() == [[0, -1, -1], [1, 2, 3]]
    assert second.logit_rows.tolist() == [0, 5]
    assert second.adapter_ids is None


def test_what_is_in_flight_is_named_by_its_row():
    """A step that is scheduled before the last one is read names the rows of its tokens, and -1 in their place."""
    scheduler, runner = scheduler_of([Request("a", [1, 2]), Request("b", [3])], lookahead=1)
    first, second = scheduler.schedule(), scheduler.schedule()
    assert second.token_ids.tolist() == [-1, -1]
    assert second.token_sources.tolist() == [0, 1]
    assert second.positions.tolist() == [2, 1]
    scheduler.update(runner.launch(first).result())
    third = scheduler.schedule()
    assert third.token_ids.tolist() == [-1, -1], "the second step has not been read"
    runner.launch(second)
    scheduler.update(runner.execute_up_to(second.step))
    assert [len(request.live[0].token_ids) for request in scheduler.running] == [4, 3]


def test_a_batch_is_nobodys_scratch_paper():
    """What the scheduler does after a step is packed does not change the step."""
    scheduler, runner = scheduler_of([Request("a", [1, 2, 3]), Request("b", [4])])
    batch = scheduler.schedule()
    kept = [array.copy() for array in (batch.token_ids, batch.block_tables[0], batch.slot_mappings[0], batch.seq_lens)]
    scheduler.update(runner.launch(batch).result())
    scheduler.schedule()
    for before, after in zip(kept, (batch.token_ids, batch.block_tables[0], batch.slot_mappings[0], batch.seq_lens)):
        np.testing.assert_array_equal(before, after)


def test_histories_only_where_there_are_penalties():
    """A row with penalties has its tokens, one with a bias its bias; the others pay for nothing and change nothing."""
    penal = SamplingParams(repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.25, max_tokens=9)
    biased = SamplingParams(logit_bias={7: 1.5, 9: -2.0})
    plain, _ = scheduler_of([Request("a", [1, 2, 3])])
    assert plain.schedule().sampling.penalties is None

    requests = [Request("a", [1, 2, 3], penal), Request("b", [4, 5], biased), Request("c", [6] * 7)]
    scheduler, _ = scheduler_of(requests)
    penalties = scheduler.schedule().sampling.penalties
    assert penalties.history.tolist() == [[1, 2, 3], [4, 5, -1], [-1, -1, -1]]
    assert penalties.prompt_lens.tolist() == [3, 2, 3]
    assert penalties.repetition_penalty.tolist() == [1.5, 1.0, 1.0]
    assert penalties.presence_penalty.tolist() == [0.5, 0.0, 0.0]
    assert penalties.frequency_penalty.tolist() == [0.25, 0.0, 0.0]
    assert penalties.bias_ids.tolist() == [[-1, -1], [7, 9], [-1, -1]]
    assert penalties.bias_values[1].tolist() == [1.5, -2.0]


def test_parallel_samples_are_drawn_from_one_row():
    """The prompt is computed once; its last token's logits are asked for as often as there are samples."""
    scheduler, runner = scheduler_of([Request("a", [1, 2, 3], SamplingParams(n=3)), Request("b", [4])])
    batch = scheduler.schedule()
    assert batch.logit_rows.tolist() == [2, 2, 2, 3]
    assert batch.sampling.sample_indices.tolist() == [0, 1, 2, 0]
    scheduler.update(runner.launch(batch).result())
    batch = scheduler.schedule()
    assert len(batch.seq_ids) == 4
    assert batch.copies == ([(0, 2), (0, 3)],), "two copies of the shared block; the last sequence writes in place"
    assert batch.block_tables[0][:, 0].tolist() == [2, 3, 0, 1]
