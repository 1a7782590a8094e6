import random
import signal

import pytest
from step_engine import answer
from world import PEER, World

from ktransformers.engine.protocol import Fault, Loading, Sampling, StepDone
from ktransformers.scheduler.protocol import Drain
from ktransformers.scheduler.stats import Pace
from ktransformers.scheduler.watchdog import Watchdog


def prompt(n, seed=0):
    rng = random.Random(seed)
    return [rng.randrange(1000) for _ in range(n)]


def test_one_request_is_answered_and_leaves_nothing():
    w = World()
    w.submit("a", prompt(10), max_tokens=5)
    w.run()
    assert w.ends == {"a": "length"}
    assert len(w.tokens["a"]) == 5
    w.check_drained()


def test_two_steps_are_in_flight_and_never_three():
    w = World()
    w.submit("a", prompt(3), max_tokens=10)
    assert len(w.to_do) == 2
    w.engine_step()
    assert len(w.to_do) == 2


def test_foreseen_end_plans_no_useless_step():
    w = World()
    w.submit("a", prompt(3), max_tokens=2)
    w.run()
    # Two that compute; the third only lets the slot go.
    assert w.status.steps == 3
    assert w.status.computed_tokens == 4


def test_stop_token_ends_and_the_step_in_flight_is_nobodys():
    tokens, _ = answer(prompt(5), Sampling(max_tokens=6))
    w = World()
    w.submit("a", prompt(5), max_tokens=50, stop_tokens=(tokens[3],))
    w.run()
    assert w.ends == {"a": "stop"}
    assert w.tokens["a"] == tokens[: tokens.index(tokens[3]) + 1]
    w.check_drained()


def test_first_event_tells_hits_and_queue_time():
    w = World()
    w.submit("a", prompt(20), max_tokens=3)
    w.run()
    w.submit("b", prompt(20), max_tokens=3)
    w.run()
    assert w.first["a"].cached_tokens == 0
    # 20 tokens are 5 full blocks of 4, but one token at least is computed.
    assert w.first["b"].cached_tokens == 16
    assert w.status.prefix_hit_tokens == 16
    assert w.status.prefix_query_tokens == 40


def test_scopes_share_nothing():
    w = World()
    w.submit("a", prompt(20), scope=b"one")
    w.run()
    w.submit("b", prompt(20), scope=b"two")
    w.run()
    assert w.first["b"].cached_tokens == 0


def test_whole_conversation_is_found_again():
    w = World()
    w.submit("a", prompt(10), max_tokens=10)
    w.run()
    w.submit("b", prompt(10) + w.tokens["a"] + prompt(3, 1))
    w.run()
    # All but the last drawn token, whose KV was never needed: 19 tokens, 4 blocks.
    assert w.first["b"].cached_tokens == 16


@pytest.mark.parametrize("budget", [16, 64, 512])
@pytest.mark.parametrize("reuse", [False, True])
def test_chunks_of_any_size_give_the_same_answers(budget, reuse):
    w = World(reuse=reuse, max_batch_tokens=budget, blocks=400, max_len=256, max_sequences=8)
    shared = prompt(60)
    for i in range(20):
        w.submit(f"r{i}", shared[: 5 + 3 * i] + prompt(i * 7, i), max_tokens=1 + i, seed=i)
    w.run()
    w.check_drained()
    assert set(w.ends.values()) == {"length"}


def test_first_come_first_served():
    w = World(max_sequences=1)
    for i in range(10):
        w.submit(f"r{i}", prompt(5, i), max_tokens=3)
    w.run()
    assert w.ended_in_order == [f"r{i}" for i in range(10)]


def test_cancel_frees_the_blocks_within_one_step():
    w = World()
    w.submit("a", prompt(30), max_tokens=60)
    w.engine_step()
    w.cancel("a")
    assert w.ends == {"a": "cancelled"}
    w.cancel("a")
    w.cancel("unknown")
    w.engine_step()
    assert w.status.blocks_used == 0
    w.run()
    w.check_drained()


def test_cancel_while_waiting():
    w = World(max_sequences=1)
    w.submit("a", prompt(5), max_tokens=30)
    w.submit("b", prompt(5))
    w.cancel("b")
    assert w.ends == {"b": "cancelled"}
    w.run()
    assert w.ends["a"] == "length"


def test_random_disconnects_leave_all_blocks_free():
    rng = random.Random(3)
    w = World(every_step=False, blocks=64)
    open_ids = []
    for i in range(1000):
        w.submit(f"r{i}", prompt(rng.randrange(1, 60), i % 7), max_tokens=rng.randrange(1, 40))
        open_ids.append(f"r{i}")
        for _ in range(rng.randrange(4)):
            w.engine_step()
        if rng.random() < 0.9:
            w.cancel(open_ids.pop(rng.randrange(len(open_ids))))
    w.run()
    w.check_drained()


def test_who_came_before_the_engine_died_still_came_first():
    """Two of one rank would each wait for the other to make room."""
    w = World(blocks=16, block_tokens=4)
    w.scheduler._estimate.prior = 0.0  # both are let in
    w.submit("a", prompt(8), max_tokens=50)
    w.kill_engine()
    w.start_engine()
    w.submit("b", prompt(8, 1), max_tokens=50)
    w.run()
    assert w.ends == {"a": "length", "b": "length"}


# ---- admission


def test_never_fit_is_refused_at_once():
    w = World(max_len=64)
    w.submit("a", prompt(64))
    assert w.ends == {"a": "context_length_exceeded"}
    w.submit("b", prompt(63), max_tokens=1000)
    w.run()
    assert (w.ends["b"], len(w.tokens["b"])) == ("length", 1)


def test_a_request_larger_than_the_pool_is_refused():
    w = World(blocks=5, block_tokens=4, max_len=1000)
    w.submit("a", prompt(20))
    w.submit("b", prompt(19), max_tokens=1)
    w.run()
    assert w.ends == {"a": "context_length_exceeded", "b": "length"}


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": -0.1},
        {"temperature": 101.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("nan")},
        {"repetition_penalty": 1e-4},
        {"repetition_penalty": 1e4},
        {"repetition_window": -1},
        {"presence_penalty": float("inf")},
        {"presence_penalty": 1e4},
        {"frequency_penalty": -1e4},
        {"frequency_penalty": float("nan")},
        {"logit_bias": ((1000, 1.0),)},
        {"logit_bias": ((-1, 1.0),)},
        {"logit_bias": ((1, float("nan")),)},
        {"logit_bias": ((1, 1e300),)},
        {"logit_bias": ((1, float("inf")),)},
        {"logit_bias": tuple((i, 0.0) for i in range(301))},
        {"seed": -1},
        {"seed": 1 << 63},
        {"stop_tokens": (1000,)},
        {"stop_tokens": (-1,)},
        {"stop_tokens": tuple(range(513))},
        {"min_tokens": -1},
        {"min_tokens": 9},
        {"max_tokens": 0},
        {"max_tokens": -1},
        {"logprobs": 21},
        {"logprobs": -2},
    ],
)
def test_bad_sampling_is_refused_by_name(bad):
    w = World()
    w.submit("a", prompt(5), **bad)
    assert w.ends == {"a": "invalid_request"}
    assert next(iter(bad)) in w.failures["a"].message
    assert w.status.steps == 0 and not w.to_do


def test_as_many_stop_tokens_as_a_client_may_name_and_the_models_own():
    w = World()
    w.submit("a", prompt(5), stop_tokens=tuple(range(100, 410)))
    w.run()
    assert w.ends["a"] in ("stop", "length")


def test_bad_envelopes_are_refused():
    w = World()
    w.submit("empty", [])
    w.submit("outside", [1, 1000])
    w.submit("negative", [1, -1])
    w.submit("scope", [1], scope=b"x" * 129)
    w.submit("deadline", [1], deadline=float("nan"))
    w.submit("i" * 129, [1])
    assert set(w.ends.values()) == {"invalid_request"} and len(w.ends) == 6


def test_a_ban_by_minus_infinity_is_allowed():
    w = World()
    w.submit("a", prompt(5), logit_bias=((1, float("-inf")),))
    w.run()
    assert w.ends == {"a": "length"}


def test_full_queue_is_overloaded_with_advice():
    w = World(max_sequences=1, settings={"max_waiting": 2})
    for i in range(5):
        w.submit(f"r{i}", prompt(5), max_tokens=30)
    assert list(w.ends.values()) == ["overloaded"] * 2
    assert all(1 <= f.retry_after <= 120 for f in w.failures.values())
    w.run()
    w.check_drained()


def test_too_many_waiting_tokens(monkeypatch):
    monkeypatch.setattr("ktransformers.scheduler.config._MEAN_PROMPT", 10)
    w = World(max_sequences=1, settings={"max_waiting": 5})
    w.submit("a", prompt(60), max_tokens=30)
    w.submit("b", prompt(60), max_tokens=1)
    w.submit("c", prompt(10))
    assert w.ends == {"c": "overloaded"}
    w.run()
    w.check_drained()


def test_ended_requests_are_not_kept_for_their_deadline():
    w = World(every_step=False)
    for i in range(500):
        w.submit(f"r{i}", prompt(2), max_tokens=1, deadline=3600.0)
        w.run()
    assert len(w.scheduler._deadlines) <= 65


def test_deadline_waiting_and_running():
    w = World(max_sequences=1)
    w.submit("a", prompt(5), max_tokens=100, deadline=3.0)
    w.submit("b", prompt(5), deadline=2.0)
    w.submit("c", prompt(5), deadline=30.0)
    w.wait(2)
    assert w.ends == {"b": "deadline"}
    w.wait(1)
    assert w.ends == {"b": "deadline", "a": "deadline"}
    w.run()
    assert w.ends["c"] == "length"
    w.check_drained()


def test_drain_refuses_new_and_finishes_old():
    w = World()
    w.submit("a", prompt(5))
    w.scheduler.front(PEER, Drain(), w.now)
    w.submit("b", prompt(5))
    assert w.ends == {"b": "draining"}
    assert w.statuses[-1].draining
    w.run()
    assert w.ends["a"] == "length"


# ---- front ends


def test_a_silent_front_end_loses_its_requests():
    w = World()
    w.hello(b"other")
    w.submit("a", prompt(5), max_tokens=100, peer=b"other")
    w.submit("b", prompt(5), max_tokens=100)
    for _ in range(5):
        w.engine_step()
        w.wait(1)
    assert w.status.running == 1
    w.run()
    # It is told so all the same: if it only stood still, its clients wait for an end.
    assert w.ends == {"a": "internal", "b": "length"}


def test_a_scheduler_that_stood_still_loses_no_front_end():
    """What came in meanwhile is read after the clock: silence is judged by ticks, which know of the sleep."""
    w = World()
    w.submit("a", prompt(5), max_tokens=100)
    w.now += 60.0
    w.advance()
    assert w.status.running == 1
    w.wait(1)
    w.hello()
    w.run()
    assert w.ends == {"a": "length"}


def test_a_front_end_that_cannot_be_reached_loses_its_requests():
    w = World()
    w.submit("a", prompt(5), max_tokens=100)
    w.gone_peers.add(PEER)
    w.run()
    assert w.scheduler.open_requests == 0 and w.status.blocks_used == 0
    assert w.status.generated_tokens < 5


def test_a_scheduler_that_stood_still_blames_nobody():
    w = World()
    w.submit("a", prompt(5), max_tokens=100)
    w.now += 60.0
    w.scheduler.tick(w.now)
    w.advance()
    assert not w.signals and w.status.running == 1
    w.hello()
    w.run()
    assert w.ends == {"a": "length"}


def test_a_request_submitted_again_is_answered_once():
    w = World()
    w.submit("a", prompt(5), peer=b"before")
    w.engine_step()
    w.submit("a", prompt(5))
    w.tokens["a"].clear()
    w.run()
    w.check_drained()
    assert w.ends == {"a": "length"}


# ---- the engine


def test_not_ready_while_loading():
    w = World(start=False)
    w.scheduler.engine(Loading(1, 4), w.now)
    w.submit("a", prompt(5))
    assert w.ends == {"a": "not_ready"} and w.failures["a"].retry_after > 0
    assert w.status.detail == "loading 25%" and not w.status.ready


def test_what_came_before_the_first_word_of_the_engine_waits_for_it():
    w = World(start=False)
    w.submit("a", prompt(5))
    w.submit("b", prompt(500))
    w.submit("c", prompt(5))
    w.cancel("c")
    assert w.ends == {"c": "cancelled"}
    w.start_engine()
    w.run()
    assert w.ends == {"a": "length", "b": "context_length_exceeded", "c": "cancelled"}


def test_an_engine_that_never_comes_is_told_of():
    w = World(start=False)
    w.submit("a", prompt(5))
    w.wait(62)
    w.submit("b", prompt(5))
    assert w.ends == {"a": "not_ready", "b": "not_ready"}


def test_engine_death_restarts_what_has_not_begun_and_ends_the_rest():
    w = World(max_sequences=2, max_batch_tokens=16)
    w.submit("begun", prompt(5), max_tokens=20)
    w.engine_step()
    w.submit("prompt", prompt(40, 1), max_tokens=20)
    w.submit("waits", prompt(5, 2))
    w.engine_step()
    w.engine_step()
    assert w.status.running == 2
    w.kill_engine()
    assert w.ends == {"begun": "engine_restarted"}
    assert not w.status.ready and not w.statuses[-1].ready
    w.start_engine()
    assert w.statuses[-1].ready
    w.run()
    assert w.ended_in_order[1:] == ["waits", "prompt"] or w.ended_in_order[1:] == ["prompt", "waits"]
    w.check_drained()
    assert w.status.engine_restarts == 1


def test_a_request_at_two_crashes_in_a_row_is_quarantined():
    w = World(max_sequences=1)
    w.submit("poison", prompt(5))
    w.submit("good", prompt(5, 1))
    w.kill_engine()
    w.start_engine()
    w.kill_engine()
    assert w.ends == {"poison": "internal"} and w.failures["poison"].message == "quarantined"
    w.start_engine()
    w.run()
    assert w.ends["good"] == "length"


def test_submits_during_a_restart_wait():
    w = World()
    w.kill_engine()
    w.submit("a", prompt(5))
    assert not w.ends
    w.scheduler.engine(Loading(1, 2), w.now)
    w.submit("b", prompt(5))
    w.start_engine()
    w.run()
    assert w.ends == {"a": "length", "b": "length"}


def test_a_restart_that_does_not_come_ends_what_waits():
    w = World()
    w.kill_engine()
    w.submit("a", prompt(5))
    w.wait(62)
    assert w.ends == {"a": "not_ready"}


def test_a_new_engine_finds_no_old_blocks():
    w = World()
    w.submit("a", prompt(40))
    w.run()
    w.kill_engine()
    w.start_engine()
    w.submit("b", prompt(40))
    w.run()
    assert w.first["b"].cached_tokens == 0


def test_an_engine_replaced_unnoticed_is_noticed_by_its_pid():
    w = World()
    w.submit("a", prompt(5), max_tokens=50)
    w.to_do.clear()
    w.ready = type(w.ready)(*[2 if f == "pid" else getattr(w.ready, f) for f in w.ready.__struct_fields__])
    w.start_engine()
    w.run()
    assert w.ends == {"a": "length"} and w.status.engine_restarts == 1


def test_a_hang_is_aborted_then_killed():
    w = World()
    w.submit("warm", prompt(5))
    w.run()
    w.wait(100)
    assert not w.signals, "idle is no hang"
    w.submit("a", prompt(5))
    w.wait(29)
    assert not w.signals and w.status.ready
    w.wait(2)
    assert w.signals == [(1, signal.SIGABRT)] and not w.status.ready
    w.wait(4)
    assert len(w.signals) == 1
    w.wait(2)
    assert w.signals[1:] == [(1, signal.SIGKILL)]
    w.kill_engine()
    w.start_engine()
    w.run()
    assert w.ends["a"] == "length"


def test_a_move_without_an_answer_is_a_hang():
    """It holds blocks for as long. That nobody looked meanwhile does not count."""
    asked = [100.0]
    dog = Watchdog(Pace(), lambda: asked[0])
    assert dog.check(700.0, 0) is None
    dog.slept(500.0)
    assert dog.check(1200.0, 0) is None
    assert dog.check(1201.0, 0) is signal.SIGABRT and dog.condemned
    dog = Watchdog(Pace(), lambda: asked[0])
    dog.slept(500.0)
    asked[0] = None
    assert dog.check(1201.0, 0) is None
    asked[0] = 1201.0
    assert dog.check(1802.0, 0) is signal.SIGABRT


def test_a_slow_first_step_is_no_hang():
    w = World()
    w.submit("a", prompt(5))
    w.wait(290)
    assert not w.signals
    w.wait(20)
    assert w.signals


def test_a_failed_step_ends_the_engine_not_the_scheduler():
    w = World()
    w.submit("a", prompt(5))
    w.scheduler.engine(Fault(1, "bad_step", "slot 3 is occupied"), w.now)
    w.wait(1)
    assert w.signals == [(1, signal.SIGABRT)]
    w.kill_engine()
    w.start_engine()
    w.run()
    assert w.ends == {"a": "length"}


def test_an_answer_to_another_step_is_not_believed():
    w = World()
    w.submit("a", prompt(5))
    w.scheduler.engine(StepDone(7, [], 0.1, 3), w.now)
    w.wait(1)
    assert w.signals and not w.status.ready


def test_a_numerical_error_ends_one_request_and_its_blocks_are_not_found():
    w = World()
    w.submit("bad", prompt(20))
    w.submit("good", prompt(20, 1))
    w.engine_step()
    w.engine.poison.add(0)
    w.run()
    assert w.ends == {"bad": "numerical_error", "good": "length"}
    w.submit("again", prompt(20))
    w.run()
    assert w.first["again"].cached_tokens == 0
    w.check_drained()


def test_ready_is_a_heartbeat():
    w = World()
    w.submit("a", prompt(5))
    w.engine_step()
    w.scheduler.engine(w.ready, w.now)
    w.run()
    assert w.ends == {"a": "length"} and w.status.engine_restarts == 0


# ---- memory


@pytest.mark.parametrize("outputs", ["fixed", "known", "unknown", "long tail", "two kinds"])
def test_quarter_pool_recomputes_little(outputs, capsys):
    """64 streams want four times the blocks that there are, in five kinds of output lengths."""
    rng = random.Random(5)
    lengths = {
        "fixed": [150] * 256,
        "known": [rng.randrange(20, 200) for _ in range(256)],
        # max_tokens says nothing: a stop token decides.
        "unknown": [rng.randrange(20, 200) for _ in range(256)],
        "two kinds": [rng.choice([10, 10, 10, 390]) for _ in range(256)],
        "long tail": [min(390, 2 + round(rng.expovariate(1 / 60))) for _ in range(256)],
    }[outputs]
    need = sum(-(-(100 + n) // 16) for n in lengths[:64])
    size = {"block_tokens": 16, "max_len": 512, "max_sequences": 64, "max_batch_tokens": 512}
    w = World(every_step=False, blocks=need // 4, **size)
    for i, n in enumerate(lengths):
        p = prompt(100, i)
        if outputs in ("fixed", "known"):
            w.submit(f"r{i}", p, max_tokens=n, advance=False)
        else:
            stop = answer(p, Sampling(max_tokens=n))[0][-1]
            w.submit(f"r{i}", p, max_tokens=400, stop_tokens=(stop,), advance=False)
    w.advance()
    used = []
    while w.engine_step():
        used.append(w.status.blocks_used / w.status.blocks_total)
    w.check_drained()
    s = w.status
    share = s.recomputed_tokens / s.computed_tokens
    with capsys.disabled():
        filled = sum(used) / len(used)
        print(f"\n  {outputs}: {s.steps} steps, {filled:.0%} of the pool used on the average", end="")
        print(f", {s.preemptions} preemptions, {share:.2%} recomputed")
    assert share <= 0.05


def test_forced_preemption_changes_nothing():
    """Everybody is thought to stop early, and nobody does."""
    w = World(blocks=24, block_tokens=4, max_len=90, max_sequences=8, max_batch_tokens=32)
    w.scheduler._estimate.prior = 0.0
    for i in range(12):
        w.submit(f"r{i}", prompt(8, i), max_tokens=60, seed=i)
    w.run()
    w.check_drained()
    assert set(w.ends.values()) == {"length"}
    assert w.status.preemptions > 0
    # The oldest is never the one to give way.
    assert w.ended_in_order[0] == "r0"
    # Each token but the last of each was computed once, and again only what is said to be.
    once = sum(8 + 60 - 1 - w.first[f"r{i}"].cached_tokens for i in range(12))
    assert w.status.recomputed_tokens > 0
    assert w.status.computed_tokens == w.engine.computed == once + w.status.recomputed_tokens
