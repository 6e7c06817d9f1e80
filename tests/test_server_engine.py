import math
import os
import signal
import threading
import time
from dataclasses import replace

import pytest
from conftest import REASONER
from fake_server import EOS, FakeServer, free_port, reply_to

from trsd.decoding import Decoder
from trsd.engines import Continuation, Sampling, Written, one
from trsd.engines.endpoints import Endpoint, Patience, Trouble
from trsd.engines.folder import decoding_facts
from trsd.engines.server import ServerEngine, _difference
from trsd.errors import InputError

IMPATIENT = Patience(request_seconds=0.5, check_seconds=0.5, max_retries=3, backoff_seconds=0.01)
THOUGHT = Sampling(temperature=0.8, top_p=0.9)


@pytest.fixture
def engine_of(tokenizer):
    def engine_of(*servers, patience=IMPATIENT, **options):
        urls = [server if isinstance(server, str) else server.url for server in servers]
        return ServerEngine(urls, tokenizer, decoding_facts(REASONER, tokenizer), patience=patience, **options)

    return engine_of


def wish(*context, new=6, stops=(), seed=0):
    return Continuation(context_ids=list(context), max_new_tokens=new, stop_ids=stops, seed=seed)


def think_then_answer(number):
    """Writes once, then three times at once behind parts of it, with a stop token of its own."""
    (thought,) = yield [wish(5, number, new=8, seed=number)]
    cuts = [thought.ids[:cut] for cut in (1, 2, 3)]
    answers = yield [wish(5, number, *cut, new=5, stops=(9,), seed=number + 1) for cut in cuts]
    return thought, answers


def expected(number, sampling, weights=""):
    """What ``think_then_answer`` gets from a fake server."""

    def write(continuation):
        body = dict(
            prompt=list(continuation.context_ids),
            max_tokens=continuation.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            repetition_penalty=sampling.repetition_penalty,
            seed=continuation.seed,
            stop_token_ids=sorted({EOS, *continuation.stop_ids}),
        )
        return Written(*reply_to(body, weights)[:2])

    script = think_then_answer(number)
    written = [write(continuation) for continuation in next(script)]
    wanted = script.send(written)
    return written[0], [write(continuation) for continuation in wanted]


def run_all(engine, numbers, sampling=THOUGHT):
    return dict(engine.run([think_then_answer(number) for number in numbers], sampling))


@pytest.mark.parametrize("num_endpoints", [1, 3])
def test_scripts_get_what_the_servers_write_whichever_serves(engine_of, num_endpoints):
    servers = [FakeServer(delay=0.002) for _ in range(num_endpoints)]
    for server in servers:
        server.__enter__()
    results = run_all(engine_of(*servers, concurrency=6), range(30))
    for server in servers:
        server.__exit__()
    assert results == {number: expected(number, THOUGHT) for number in range(30)}
    assert all(len(server.bodies) > 10 for server in servers)


def test_greedy_results_do_not_depend_on_the_seed_and_sampled_ones_do(engine_of):
    with FakeServer() as server:
        engine = engine_of(server)

        def write(seed, sampling):
            ((_, written),) = engine.run([one(wish(5, 6, new=20, seed=seed))], sampling)
            return written.ids

        assert write(1, Sampling()) == write(2, Sampling())
        assert write(1, THOUGHT) == write(1, THOUGHT) != write(2, THOUGHT)


def test_a_script_stays_with_the_endpoint_whose_cache_holds_its_thinking(engine_of):
    with FakeServer(delay=0.002) as a, FakeServer(delay=0.002) as b:
        run_all(engine_of(a, b, concurrency=8), range(20))
        scripts = [{body["prompt"][1] for body in server.bodies if body["prompt"][0] == 5} for server in (a, b)]
    assert scripts[0] and scripts[1] and not scripts[0] & scripts[1]


def test_no_more_requests_are_under_way_than_allowed(engine_of):
    with FakeServer(delay=0.01) as server:
        run_all(engine_of(server, concurrency=4), range(12))
    assert 2 <= server.most_at_once <= 4


def test_a_request_names_every_sampling_setting(engine_of):
    with FakeServer() as server:
        engine = engine_of(server)
        list(engine.run([one(wish(5, stops=(9,), seed=2**62))], Sampling(temperature=0.5, repetition_penalty=1.2)))
    (body,) = server.bodies
    assert body == dict(
        model="tiny",
        prompt=[5],
        max_tokens=6,
        temperature=0.5,
        top_p=1.0,
        top_k=-1,
        min_p=0.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        repetition_penalty=1.2,
        seed=2**62,
        stop_token_ids=[EOS, 9],
        skip_special_tokens=False,
        return_token_ids=True,
        logprobs=0,
        ignore_eos=True,
    )


def test_a_server_that_is_not_vllm_is_sent_nothing_of_vllms_alone(engine_of):
    with FakeServer(owner="sglang") as server:
        list(engine_of(server).run([one(wish(5))], Sampling()))
    assert server.bodies[0]["logprobs"] == 1 and "ignore_eos" not in server.bodies[0]


@pytest.mark.parametrize("fault", ["500", "503", "429", "408", "garbage", "nonsense", "abort", "bad ids", "hang up"])
def test_a_passing_fault_changes_nothing(engine_of, fault):
    with FakeServer(fault=lambda number: fault if number in (0, 3, 4) else None) as server:
        assert run_all(engine_of(server), range(5)) == {number: expected(number, THOUGHT) for number in range(5)}
        assert len(server.bodies) > 5 * 4


@pytest.mark.parametrize("fault", ["silence", "trickle"])
def test_a_reply_that_never_ends_is_cut_off_and_asked_for_again(engine_of, fault):
    patience = Patience(request_seconds=0.2, check_seconds=1, max_retries=3, backoff_seconds=0.01)
    with FakeServer(fault=lambda number: fault if number == 0 else None) as server:
        assert run_all(engine_of(server, patience=patience), range(3))[2] == expected(2, THOUGHT)


@pytest.mark.parametrize(
    "fault,words",
    [
        ("500", "HTTP 500: a fault number 500"),
        ("429", "HTTP 429: too many"),
        ("garbage", "a reply that is no JSON"),
        ("nonsense", "a reply that is no completion"),
        ("bad ids", "a reply whose token_ids are not 1 to 8 ids below 640"),
        ("silence", "no whole reply within 0.4 s"),
        ("trickle", "no whole reply within 0.4 s"),
        ("hang up", "RemoteProtocolError"),
    ],
)
def test_a_lasting_fault_ends_the_work_in_bounded_time_with_the_servers_words(engine_of, fault, words):
    patience = Patience(request_seconds=0.4, check_seconds=1, max_retries=2, backoff_seconds=0.01)
    with FakeServer(fault=lambda number: fault) as server:
        engine = engine_of(server, patience=patience, concurrency=2)
        began = time.monotonic()
        with pytest.raises(InputError, match=f"{server.url}: .*{words}"):
            run_all(engine, range(10))
        assert time.monotonic() - began < 5
        assert 3 <= len(server.bodies) <= 6


def test_a_refused_request_is_not_sent_again_and_the_servers_reason_is_told(engine_of):
    with FakeServer(fault=lambda number: "400") as server:
        with pytest.raises(InputError, match="refused a request, HTTP 400: a fault number 400"):
            list(engine_of(server).run([one(wish(5))], Sampling()))
        assert len(server.bodies) == 1


def test_when_one_endpoint_dies_half_way_another_does_all_the_work(engine_of):
    dying = FakeServer(fault=lambda number: "die" if number == 20 else None, delay=0.002)
    with FakeServer(delay=0.002) as alive, dying:
        results = run_all(engine_of(dying, alive, concurrency=4), range(30))
    assert results == {number: expected(number, THOUGHT) for number in range(30)}
    assert 20 < len(dying.bodies) < 30 and len(alive.bodies) > 80


def test_an_endpoint_that_fails_is_left_aside_and_tried_with_one_request_at_a_time(engine_of):
    patience = Patience(request_seconds=1, check_seconds=1, max_retries=3, backoff_seconds=0.1)
    broken = FakeServer(fault=lambda number: "500" if number else None)  # the first is the comparison at the start
    with FakeServer(delay=0.005) as fine, broken:
        results = run_all(engine_of(fine, broken, patience=patience, concurrency=8), range(40))
    assert results == {number: expected(number, THOUGHT) for number in range(40)}
    assert 3 <= len(broken.bodies) < 20


def test_an_endpoint_that_recovers_is_used_again(engine_of):
    patience = Patience(request_seconds=1, check_seconds=1, max_retries=3, backoff_seconds=0.02)
    shaky = FakeServer(fault=lambda number: "503" if 1 <= number < 6 else None, delay=0.004)
    with FakeServer(delay=0.004) as fine, shaky:
        engine = engine_of(fine, shaky, patience=patience, concurrency=4)
        for _ in engine.run([think_then_answer(number) for number in range(1000)], THOUGHT):
            if len(shaky.bodies) > 15:  # of which at most four are under way, so that some after the faults succeeded
                break
        assert len(shaky.bodies) > 15 and engine.pool.endpoints[1].failures == 0


def test_an_endpoint_that_fell_silent_costs_one_request_at_a_time(engine_of):
    patience = Patience(request_seconds=0.5, check_seconds=1, max_retries=3, backoff_seconds=0.01)
    silent = FakeServer(fault=lambda number: "silence" if number else None)  # the first is the comparison at the start
    with FakeServer(delay=0.005) as fine, silent:
        engine, began = engine_of(fine, silent, patience=patience, concurrency=8), time.monotonic()
        run_all(engine, range(60))
        trials = (time.monotonic() - began) / patience.request_seconds
    assert (
        len(silent.bodies) <= 1 + 5 + trials + 1
    )  # the comparison, what was under way when it fell silent, one by one


def test_a_request_that_always_fails_ends_the_work_though_others_succeed(engine_of):
    def answer(body):
        ids, log_probs, reason = reply_to(body)
        reason = "abort" if body["prompt"] == [5, 3] else reason
        return dict(text="", token_ids=ids, logprobs={"token_logprobs": log_probs}, finish_reason=reason)

    with FakeServer(answer=answer, delay=0.005) as a, FakeServer(answer=answer, delay=0.005) as b:
        with pytest.raises(InputError, match=r"a request failed 4 times \(max_retries\).*ended with 'abort'"):
            run_all(engine_of(a, b, concurrency=6), range(1000))
        assert [body["prompt"] for body in a.bodies + b.bodies].count([5, 3]) == 4


def test_failures_of_requests_that_were_under_way_together_count_once():
    endpoint, patience = Endpoint("http://a"), Patience(backoff_seconds=10)
    began = time.monotonic()
    for _ in range(64):
        endpoint.failed(Trouble("down"), began=began, patience=patience)
    assert endpoint.failures == 1 and not endpoint.ready(time.monotonic())
    assert 4 < endpoint.aside_until - time.monotonic() < 16
    assert endpoint.ready(endpoint.aside_until)


def test_retry_after_is_obeyed_within_reason():
    patience = Patience(backoff_seconds=0.01)
    assert patience.wait(1) < 0.1 and patience.wait(1, 7.0) == 7.0 and patience.wait(1, 1e6) == 60
    assert Patience(backoff_seconds=1).wait(50) <= 90


def test_endpoints_that_are_all_dead_are_named_with_their_reasons(engine_of):
    urls = [f"http://127.0.0.1:{free_port()}" for _ in range(2)]
    began = time.monotonic()
    with pytest.raises(InputError, match="no endpoint answers") as error:
        engine_of(*urls)
    assert time.monotonic() - began < 5
    assert all(f"{url}: ConnectError" in str(error.value) for url in urls)


def test_a_dead_endpoint_among_others_is_left_out_and_named(engine_of, capsys):
    url = f"http://127.0.0.1:{free_port()}"
    with FakeServer() as server:
        assert run_all(engine_of(server, url), range(3))[1] == expected(1, THOUGHT)
    assert f"an endpoint does not answer as it should and is left out: {url}" in capsys.readouterr().err


def test_a_wrong_model_name_is_refused_with_what_is_served(engine_of):
    with FakeServer(models=("one", "two")) as server:
        with pytest.raises(InputError, match="'three' is not served; served_model can be 'one', 'two'"):
            engine_of(server, served_model="three")
        with pytest.raises(InputError, match="several models are served; served_model can be 'one', 'two'"):
            engine_of(server)
        list(engine_of(server, served_model="two").run([one(wish(5))], Sampling()))
        assert server.bodies[0]["model"] == "two"


def test_something_else_behind_the_url_is_refused(engine_of, monkeypatch):
    with FakeServer() as server, pytest.raises(InputError, match="HTTP 404: no such page"):
        engine_of(f"{server.url}/elsewhere")


def test_endpoints_with_other_weights_under_the_same_name_are_refused(engine_of):
    with (
        FakeServer() as a,
        FakeServer(weights="of another training") as b,
        pytest.raises(InputError, match=f"{a.url} and {b.url} do not serve the same weights"),
    ):
        engine_of(a, b)


def test_the_context_is_the_servers_where_it_says_and_is_checked_before_anything_is_sent(engine_of):
    with FakeServer(max_model_len=100) as server:
        engine = engine_of(server)
        assert engine.context_limit == 100
        with pytest.raises(InputError, match="a prompt has 60 tokens and 50 may follow, but the model's context holds"):
            list(engine.run([one(wish(*[5] * 60, new=50))], Sampling()))
        assert not server.bodies
    with FakeServer(max_model_len=None, owner="other") as server:
        assert engine_of(server).context_limit == 2048


def text_only(text, reason="stop", **more):
    return lambda body: dict(text=text, finish_reason=reason) | more


def write_one(engine, *context, **options):
    ((_, written),) = engine.run([one(wish(*context or (5,), **options))], Sampling())
    return written


def test_text_without_ids_is_tokenized_again_and_that_is_said_once(engine_of, tokenizer, capsys):
    ids = tokenizer("Mia has 3 shells.", add_special_tokens=False).input_ids
    logprobs = {"token_logprobs": [-0.5]}
    with FakeServer(owner="other", answer=text_only("Mia has 3 shells.", logprobs=logprobs)) as server:
        engine = engine_of(server)
        for _ in range(2):
            written = write_one(engine, new=50)
            assert written.ids == [*ids, EOS] and all(map(math.isnan, written.log_probs))
            assert len(written.log_probs) == len(written.ids)
    assert capsys.readouterr().err.count("tokenized again") == 1


def test_text_that_is_cut_off_gets_no_eos_and_text_behind_a_stop_is_dropped(engine_of, tokenizer):
    said = text_only("Mia has 3", "length")
    with FakeServer(answer=said) as server:
        ids = tokenizer("Mia has 3", add_special_tokens=False).input_ids
        assert write_one(engine_of(server), new=len(ids)).ids == ids
    with FakeServer(answer=text_only("Mia<|im_end|>has 3", "length")) as server:
        assert write_one(engine_of(server), new=9).ids == tokenizer("Mia<|im_end|>", add_special_tokens=False).input_ids
    with FakeServer(answer=text_only("Mia", stop_reason=11)) as server:
        assert write_one(engine_of(server), new=9, stops=(11,)).ids[-1] == 11


def test_ids_without_log_probabilities_have_nan(engine_of, capsys):
    with FakeServer(answer=lambda body: dict(text="", token_ids=[7, EOS], finish_reason="stop")) as server:
        written = write_one(engine_of(server))
    assert written.ids == [7, EOS] and all(map(math.isnan, written.log_probs))
    assert "no log-probabilities" in capsys.readouterr().err


@pytest.mark.parametrize("values", [[-1.0], [-1.0, "x"], "x"])
def test_log_probabilities_that_do_not_fit_the_tokens_are_refused(engine_of, values):
    choice = dict(text="", token_ids=[7, EOS], finish_reason="stop", logprobs={"token_logprobs": values})
    with FakeServer(answer=lambda body: choice) as server, pytest.raises(InputError, match="token_logprobs"):
        write_one(engine_of(server))


def test_a_server_that_stops_early_at_its_own_limit_is_not_believed(engine_of):
    choice = dict(text="", token_ids=[7, 8], finish_reason="length")
    with FakeServer(answer=lambda body: choice) as server:
        assert write_one(engine_of(server), new=2).ids == [7, 8]
        with pytest.raises(InputError, match="stopped after 2 of 6 tokens behind a prompt of 1"):
            write_one(engine_of(server), new=6)


def wait_until(condition, seconds=2.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def engine_threads():
    return [thread for thread in threading.enumerate() if thread.name == "trsd-server-engine"]


def test_closing_the_iterator_stops_the_work(engine_of):
    with FakeServer(delay=0.02) as server:
        results = engine_of(server, concurrency=2).run([think_then_answer(n) for n in range(50)], THOUGHT)
        next(results)
        results.close()
        assert not engine_threads()
        asked = len(server.bodies)
        time.sleep(0.1)
        assert len(server.bodies) <= asked + 2 < 50


def test_an_interrupt_ends_the_waiting_at_once(engine_of):
    patience = Patience(request_seconds=60, check_seconds=1)
    with FakeServer(fault=lambda number: "silence") as server:
        engine = engine_of(server, patience=patience)
        threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            list(engine.run([one(wish(5))], Sampling()))
        assert time.monotonic() - began < 5 and not engine_threads()


def test_an_error_in_a_script_reaches_whoever_runs_it(engine_of):
    def script():
        yield [wish(5)]
        raise ZeroDivisionError("a script's own")

    with FakeServer() as server, pytest.raises(ZeroDivisionError, match="a script's own"):
        list(engine_of(server).run([script(), think_then_answer(1)], THOUGHT))


def test_scripts_that_want_nothing_or_nothing_yet_finish(engine_of):
    def idle():
        assert (yield []) == []
        return "idle"

    def empty():
        return "empty"
        yield

    with FakeServer() as server:
        assert dict(engine_of(server).run([idle(), empty()], Sampling())) == {0: "idle", 1: "empty"}
        assert list(engine_of(server).run([], Sampling())) == [] and not server.bodies


def test_an_engine_runs_again_after_it_failed(engine_of):
    with FakeServer(fault=lambda number: "500" if number < 4 else None) as server:
        engine = engine_of(server)
        with pytest.raises(InputError):
            write_one(engine)
        assert run_all(engine, [1]) == {0: expected(1, THOUGHT)}


@pytest.mark.parametrize("key,sent", [(None, None), ("sesame", "Bearer sesame")])
def test_a_key_in_the_environment_goes_along(engine_of, monkeypatch, key, sent):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    if key:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    with FakeServer() as server:
        run_all(engine_of(server), range(2))
    assert server.keys == {sent}


def test_a_server_without_log_probs_gives_no_confidence(engine_of, tokenizer, think):
    def without(body):
        ids, _, reason = reply_to(body, "")
        return dict(text="?", token_ids=ids, logprobs=None, finish_reason=reason, stop_reason=None)

    for answer, gives in ((without, False), (None, True)):
        with FakeServer(answer=answer) as server:
            assert Decoder(engine_of(server), tokenizer, think).gives_confidence([5, 6]) is gives


def test_endpoints_that_are_sure_of_different_tokens_serve_other_weights():
    sure, tied = [math.log(0.99)] * 2, [math.log(0.45)] * 2
    assert _difference(Written([7, 8], sure), Written([7, 9], sure)) == "token 1 is 8 and 9"
    assert _difference(Written([7, 8], tied), Written([7, 9], tied)) is None


@pytest.mark.parametrize("fault", ["500", "garbage", "nonsense", "404", "silence"])
def test_an_endpoint_that_cannot_write_is_left_out_from_the_start(engine_of, capsys, fault):
    with FakeServer() as good, FakeServer(fault=lambda number: fault) as bad:
        engine = engine_of(good, bad, patience=replace(IMPATIENT, request_seconds=0.2, max_retries=1))
        assert run_all(engine, range(4)) == {number: expected(number, THOUGHT) for number in range(4)}
    assert f"left out: {bad.url}" in capsys.readouterr().err


def test_an_endpoint_that_serves_nothing_that_is_wanted_is_left_out_while_another_does(engine_of, capsys):
    with FakeServer() as good, FakeServer(models=("other",)) as bad:
        engine = engine_of(bad, good, served_model="tiny")
        assert run_all(engine, range(2)) == {number: expected(number, THOUGHT) for number in range(2)}
    assert f"left out: {bad.url}" in capsys.readouterr().err
