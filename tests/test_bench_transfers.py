"""What the benchmarks move to disk and back: counted right, compared to the bit, and not timed where a bit is lost."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_model
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config

from bench import trained_model as trained_models
from bench import transfers
from bench.lines import TransferLine
from bench.measure import NotMeasured, Rounds, record_lines
from bench.record import Results
from bench.teacher_rows import BundledTeacher, RandomRows, Sizes, kinds_of, store_read, store_write
from bench.trained_model import TrainedModel, trained_model
from bench.transfers import (
    Transfer,
    ceiling_fields,
    fields_in_turn,
    file_read,
    file_system,
    file_write,
    num_bytes,
    owned,
    plain_read,
    plain_write,
    refuse_unlike,
    share_in_page_cache,
)
from trsd.errors import InputError
from trsd.row_shards import RowShards

SIZES = Sizes(16, torch.bfloat16, num_traces=6, shortest=2, longest=5, step_traces=4)
KINDS = kinds_of(SIZES.hidden_size, SIZES.dtype)


class FakeBenchmark:
    """Counts what it is asked to time."""

    rounds = 0

    def pedantic(self, work, *, setup=lambda: None, rounds):
        self.rounds = rounds
        for _ in range(rounds):
            setup()
            work()


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name)
def rows(request):
    return RandomRows(request.param, SIZES.rows_per_trace)


@pytest.fixture
def results(monkeypatch, tmp_path):
    monkeypatch.setenv("TRSD_BENCH_RESULTS", str(tmp_path / "results"))
    return Results("transfers", "what is moved")


def recorded(results, error, *transfers):
    """The outcome of the line that is recorded of work that raises ``error``."""
    line = partial(TransferLine, group="a group", contender="ours", rows=1, moved_bytes=1)
    with pytest.raises(error):
        record_lines(
            *(results, [line], lambda: [fields_in_turn(FakeBenchmark(), *transfers)]), out_of_time=lambda: False
        )
    return json.loads(results.path.read_text())["suites"]["transfers"]["lines"][0]["outcome"]


def flip_a_bit(path, place=-3):
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


def test_rows_and_bytes_are_those_of_the_tensors(rows, tmp_path):
    everything = range(SIZES.num_traces)
    assert rows.rows_of(everything) == sum(SIZES.rows_per_trace) == len(rows.tensors[next(iter(rows.tensors))])
    assert rows.bytes_of(everything) == num_bytes(rows.tensors.values())
    assert rows.bytes_of(SIZES.step) == num_bytes(rows.of(SIZES.step).values()) < rows.bytes_of(everything)
    rows.build(tmp_path / "store")
    on_disk = sum(num_bytes(load_file(path).values()) for path in (tmp_path / "store").glob("rows-*.safetensors"))
    assert on_disk == rows.bytes_of(everything)


def test_a_step_takes_traces_in_an_order_that_is_random_and_the_same_every_time(rows):
    assert SIZES.step == SIZES.step != sorted(SIZES.step) and len(set(SIZES.step)) == SIZES.step_traces
    taken, parts = rows.of(SIZES.step), [rows.of([index]) for index in SIZES.step]
    for name, tensor in taken.items():
        assert torch.equal(tensor, torch.cat([part[name] for part in parts]))


def test_stores_are_written_read_and_removed(rows, tmp_path):
    write = store_write(rows, tmp_path / "written")
    assert write.warm_up() > 0 and not list(tmp_path.iterdir())
    for open_anew in (False, True):
        read = store_read(rows, tmp_path / "store", SIZES.step, open_anew=open_anew)
        fields = fields_in_turn(FakeBenchmark(), read, plain_read(rows.of(SIZES.step), tmp_path / "plain", "cpu"))
        assert fields["rounds"] >= transfers.MIN_ROUNDS and fields["milliseconds"] > 0


@pytest.mark.parametrize("to_disk", [False, True])
def test_plain_files_are_written_and_removed(tmp_path, monkeypatch, to_disk):
    synced = []
    monkeypatch.setattr("os.fsync", synced.append)
    write = plain_write({"numbers": torch.arange(6.0)}, tmp_path / "plain", to_disk=to_disk)
    assert write.warm_up() > 0 and not list(tmp_path.iterdir())
    assert len(synced) == to_disk


def test_a_damaged_store_is_recorded_as_failed(rows, tmp_path, results):
    read = store_read(rows, tmp_path / "store", SIZES.step, open_anew=True)
    flip_a_bit(tmp_path / "store" / "rows-00000.safetensors")
    assert recorded(results, InputError, read, read).startswith("failed: InputError")


def test_a_reader_that_loses_a_bit_is_recorded_as_failed(rows, tmp_path, results, monkeypatch):
    right = RowShards.rows

    def wrong(self, traces):
        found = right(self, traces)
        found[0].view(torch.uint8)[-1, -1] ^= 1
        return found

    read = store_read(rows, tmp_path / "store", SIZES.step, open_anew=False)
    monkeypatch.setattr(RowShards, "rows", wrong)
    name = next(iter(rows.tensors))
    assert recorded(results, ValueError, read, read) == f"failed: ValueError: '{name} is not what was written'"


def test_a_reference_that_loses_a_bit_is_refused_too(rows, tmp_path, results):
    plain = plain_read(rows.tensors, tmp_path / "plain", "cpu")
    flip_a_bit(tmp_path / "plain")
    good = plain_read(rows.tensors, tmp_path / "good", "cpu")
    assert "is not what was written" in recorded(results, ValueError, good, plain)


ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    "other",
    [
        {},
        {"x": ONES, "y": ONES},
        {"x": ONES.double()},
        {"x": ONES.reshape(3, 2)},
        {"x": ONES.view(torch.int32)},
        {"x": torch.nextafter(ONES, 2 * ONES)},
    ],
)
def test_what_differs_in_name_type_shape_or_a_bit_is_refused(other):
    with pytest.raises(ValueError, match="on one side only|x is not what was written"):
        refuse_unlike(other, {"x": ONES})


def test_bits_are_compared_not_numbers():
    odd = {"x": torch.tensor([torch.nan, -0.0]), "y": torch.tensor(3.0)}
    refuse_unlike({name: tensor.clone() for name, tensor in odd.items()}, odd)
    with pytest.raises(ValueError, match="x is not"):
        refuse_unlike(odd | {"x": torch.tensor([torch.nan, 0.0])}, odd)


def test_what_is_owned_is_the_same_and_no_longer_that_of_the_mapped_file(tmp_path):
    wanted = {"x": torch.arange(5000.0), "y": torch.tensor(2)}
    save_file(wanted, tmp_path / "file")
    before = (tmp_path / "file").read_bytes()
    tensors = owned(load_file(tmp_path / "file"))
    assert (tmp_path / "file").read_bytes() == before
    with (tmp_path / "file").open("r+b") as stream:
        stream.write(bytes(len(before)))
    refuse_unlike(tensors, wanted)


def test_tensors_that_share_their_memory_are_counted_once():
    assert num_bytes([ONES, ONES.detach(), ONES.clone()]) == 2 * 24


def test_work_and_reference_take_turns_and_each_is_undone():
    order = []
    one, two = (
        Transfer(partial(order.append, name), check=lambda _: order.append("check"), undo=lambda: order.append("undo"))
        for name in ("ours", "theirs")
    )
    benchmark = FakeBenchmark()
    fields = fields_in_turn(benchmark, one, two)
    turn = ["theirs", "undo", "ours", "undo"]
    assert order == ["ours", "check", "undo", "theirs", "check", "undo", *turn * benchmark.rounds]
    assert fields["rounds"] == benchmark.rounds == len(one.seconds) == len(two.seconds)


@pytest.mark.parametrize("seconds,rounds", [(0.001, 30), (0.05, 10), (0.4, 3), (1.5, 2), (60.0, 1)])
def test_rounds_are_fewer_where_each_takes_long(monkeypatch, seconds, rounds):
    monkeypatch.setattr(Transfer, "warm_up", lambda self: seconds / 2)
    benchmark = FakeBenchmark()
    fields_in_turn(benchmark, *(Transfer(lambda: None, check=lambda _: None) for _ in range(2)))
    assert benchmark.rounds == rounds


def test_a_ceiling_is_the_amount_of_a_median_round():
    class FakeRounds(Rounds):
        def once(self):
            self.seconds.append(0.25)

    fields = ceiling_fields(FakeBenchmark(), FakeRounds(lambda: None, on_gpu=False), 3.0)
    assert fields == {"measured": pytest.approx(12.0), "rounds": 3}


CONTENT = bytes(range(256)) * 1024


def test_files_are_written_and_read_from_where_it_is_said(tmp_path):
    assert file_write(CONTENT, tmp_path / "file").warm_up() > 0 and not list(tmp_path.iterdir())
    try:
        file_read(CONTENT, tmp_path / "cached", from_disk=False).warm_up()
        assert share_in_page_cache(tmp_path / "cached") == 1
        file_read(CONTENT, tmp_path / "dropped", from_disk=True).warm_up()
        assert share_in_page_cache(tmp_path / "dropped") == 0
    except NotMeasured as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("from_disk", [False, True])
def test_a_file_that_is_read_otherwise_than_written_is_refused(tmp_path, monkeypatch, from_disk):
    monkeypatch.setattr(transfers, "share_in_page_cache", lambda path: float(not from_disk))
    read = file_read(CONTENT, tmp_path / "file", from_disk=from_disk)
    flip_a_bit(tmp_path / "file")
    with pytest.raises(ValueError, match="not what was written"):
        read.warm_up()


@pytest.mark.parametrize("from_disk,said", [(True, "leave the page cache"), (False, "stay in the page cache")])
def test_a_file_that_is_elsewhere_is_not_measured(tmp_path, monkeypatch, from_disk, said):
    monkeypatch.setattr(transfers, "share_in_page_cache", lambda path: 0.5)
    with pytest.raises(NotMeasured, match=f"{file_system(tmp_path)} does not let files {said}"):
        file_read(CONTENT, tmp_path / "file", from_disk=from_disk)


def test_the_file_system_is_that_of_the_innermost_mount():
    assert file_system(Path("/proc/self")) == "proc" != file_system(Path("/"))


@pytest.fixture
def trained(tokenizer):
    return TrainedModel(make_tiny_model(tokenizer))


def test_a_model_that_is_resumed_holds_the_same_bits(trained, tmp_path):
    checkpoint = trained.save(tmp_path)
    resumed = trained.resume(checkpoint)
    refuse_unlike(resumed, trained.tensors)
    names = [name for name, _ in trained.model.named_parameters()]
    states = {f"{key}/{name}" for key in ("exp_avg", "exp_avg_sq", "step") for name in names}
    assert states < resumed.keys() and all(resumed[f"exp_avg/{name}"].abs().sum() > 0 for name in names)


def test_bytes_of_a_trained_model_count_tied_weights_once(trained):
    weights = list(trained.model.parameters())
    assert num_bytes(trained.tensors.values()) == 3 * sum(x.nbytes for x in weights) + 4 * len(weights)


@pytest.mark.parametrize("file", ["model.safetensors", "state/optimizer.safetensors"])
def test_a_checkpoint_that_lost_a_bit_is_recorded_as_failed(trained, tmp_path, results, file):
    checkpoint = trained.save(tmp_path)
    flip_a_bit(checkpoint / file)
    resume = Transfer(lambda: trained.resume(checkpoint), check=partial(refuse_unlike, wanted=trained.tensors))
    assert "is not what was written" in recorded(results, ValueError, resume, resume)


def test_a_shape_is_trained_with_its_first_layers_alone(monkeypatch, tmp_path):
    def config_of(name):
        sizes = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
        return Qwen3Config(vocab_size=640, num_hidden_layers=3, tie_word_embeddings=True, pad_token_id=0, **sizes)

    monkeypatch.setattr(trained_models, "config_of", config_of)
    trained = trained_model("a shape", device="cpu", num_layers=2)
    assert len(trained.model.get_decoder().layers) == 2 and trained.model.dtype == torch.float32
    refuse_unlike(trained.resume(trained.save(tmp_path)), trained.tensors)


def test_a_teachers_rows_are_kept_as_it_says_them(tmp_path):
    teacher = BundledTeacher([5, 3, 9], max_tokens=12)
    hidden = teacher.hidden_states()["hidden_states"]
    assert hidden.shape == (5 + 3 + 9, 192)
    for transfer in (teacher.cached(tmp_path / "store"), teacher.plainly_saved(tmp_path / "plain")):
        assert transfer.warm_up() > 0 and not list(tmp_path.iterdir())
