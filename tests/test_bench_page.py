"""The results page and the comparison of two results files, from made-up lines."""

import json
import struct

import pytest

from bench import compare, page
from bench.lines import (
    AttentionLine,
    CeilingLine,
    DecodingLine,
    FillLine,
    LossLine,
    OverheadLine,
    StepLine,
    TrainingLine,
    TransferLine,
)
from bench.record import GIB, stored
from bench.results_files import NotResults, by_device, newest_of_each_device, read_suites

PAIR = "Qwen3-8B -> Qwen3-4B, 4096 tokens"
SHAPE = "4096 tokens, 151936 vocabulary, 2560 <- 4096, bfloat16"
TRUNK = "trunk of 8192, 8 branches of 256 at even cuts, 32/8 heads of 128"
REFERENCE, ONLINE = "LSP reference", "ours, teacher online"


def timed(milliseconds, reference=None, *, gib=None, reference_gib=None, spread=0.01):
    """The measured fields of a line; ``spread`` is half the interquartile range."""

    def quartiles(median):
        return median and (median * (1 - spread), median * (1 + spread))

    return dict(
        milliseconds=milliseconds,
        quartiles=quartiles(milliseconds),
        reference_milliseconds=reference,
        reference_quartiles=quartiles(reference),
        rounds=5,
        peak_bytes=gib and int(gib * GIB),
        reference_peak_bytes=reference_gib and int(reference_gib * GIB),
    )


def training(fraction, contender, *, pair=PAIR, **fields):
    names = dict(method="lsp", student="Qwen3-4B", teacher="Qwen3-8B", fraction=fraction)
    return TrainingLine(group=f"{pair}, f = {fraction:g}", contender=contender, **names, **fields)


def loss(contender, *, loss="ce+kl", head="trained", **fields):
    sizes = dict(num_tokens=4096, vocab_size=151936, student_hidden_size=2560, teacher_hidden_size=4096)
    names = dict(group=f"{SHAPE}, {loss}, {head} head", contender=contender, dtype="bfloat16", loss=loss, head=head)
    return LossLine(**names, **sizes, **fields)


def attention(contender, *, group=TRUNK, **fields):
    return AttentionLine(group=group, contender=contender, visible_pairs=1, num_tokens=8192, **fields)


def branched(num_branches, contender, **fields):
    names = dict(method="trsd", student="Qwen3-1.7B", teacher="Qwen3-1.7B", fraction=1.0, branches=num_branches)
    return TrainingLine(group=f"Qwen3-1.7B, {num_branches} cuts", contender=contender, **names, **fields)


TRAINING = [
    training(0.5, REFERENCE, **timed(1000, 1000, gib=40, reference_gib=40)),
    training(0.5, "LSP reference, best settings", **timed(800, 1000, gib=50, reference_gib=40)),
    training(0.5, ONLINE, **timed(550, 1100, gib=20, reference_gib=40), planned_bytes=19 * GIB),
    training(1.0, REFERENCE, outcome="out of memory"),
    training(1.0, ONLINE, **timed(1200, gib=30), planned_bytes=33 * GIB),
]
LOSSES = [
    loss("ours (tokens)", **timed(11, 10, gib=2, reference_gib=2), error=2e-3),
    loss("ours (vocab)", **timed(14, 10, gib=1, reference_gib=2)),
    loss("bare GEMMs", **timed(10, 10, gib=2, reference_gib=2)),
    loss("eager torch", outcome="out of memory"),
    loss("Liger chunked JSD", outcome="not measured: pip install liger-kernel==0.8.5 (No module named 'liger')"),
    loss("ours (cached vectors)", head="frozen", **timed(9, 10)),
]
BRANCHES = [
    attention("triton", **timed(5, 5, gib=0.3, reference_gib=0.3)),
    attention("triton, separate sequences", **timed(20, 5, gib=0.6, reference_gib=0.3)),
    attention("torch, separate sequences", **timed(15, 5, gib=0.9, reference_gib=0.3)),
]
SUITES = {
    "training": TRAINING,
    "linear_distill": LOSSES,
    "attention": BRANCHES,
    "trsd_step": [
        StepLine(group="32 sequences", contender="packed rows", **timed(100, 100, gib=1, reference_gib=1)),
        FillLine(group="packing", contender="both", fill_rate=0.98, num_tokens=1000, rows=1, milliseconds=5.0),
    ],
    "decoding": [DecodingLine(group="256 questions", contender="padded", num_tokens=9000, **timed(8000, 4000))],
    "teacher_caches": [TransferLine(group="64 traces", contender="hidden", moved_bytes=1e9, **timed(50, 40))],
    "overheads": [
        OverheadLine(
            group="before the optimizer",
            contender="guard",
            added_milliseconds=0.5,
            step_milliseconds=200.0,
            promised=0.01,
            **timed(3.0, 2.5),
        )
    ],
    "ceilings": [CeilingLine(group="products", contender="bf16", measured=731.0, stated=989.0, unit="TFLOP/s")],
}
ENVIRONMENT = {"date": "2026-11-25", "device": "NVIDIA H100", "threads": "8", "commit": "abc", "torch": "2.13.0"}


@pytest.fixture
def write(tmp_path):
    """Writes suites of lines as a results file and returns its path."""

    def write(suites, name="results.json", **environment):
        facts = ENVIRONMENT | {"trl": "not installed", "liger-kernel": "not installed"} | environment
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        held = {
            suite: dict(title=f"title of {suite}", environment=facts, lines=[stored(line) for line in lines])
            for suite, lines in suites.items()
        }
        path.write_text(json.dumps({"suites": held}))
        return path

    return write


@pytest.fixture
def make_page(write, tmp_path):
    """Makes the page of suites of lines and returns its text."""

    def make(suites, **environment):
        page.main([str(write(suites, **environment)), "--output", str(tmp_path / "RESULTS.md")])
        return (tmp_path / "RESULTS.md").read_text()

    return make


def rows_of(text, first_cell):
    """Every table row that begins so, as cells."""
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:1] == "|"]
    return [row for row in cells if row[0] == first_cell]


def fails(capsys, main, *arguments):
    """What a command says that exits with code 2."""
    with pytest.raises(SystemExit) as stopped:
        main([str(each) for each in arguments])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_every_kind_of_line_is_in_a_table_and_every_picture_is_there(make_page, tmp_path):
    text = make_page(SUITES)
    for suite, lines in SUITES.items():
        assert f"### {suite}: title of {suite}" in text
        for line in lines:
            assert line.contender in text
            if line.outcome == "ok":
                assert " | ".join(line.cells()) in text
    assert ["missing: not installed", "trl, liger-kernel"] in rows_of(text, "missing: not installed")
    assert "make bench-page" in text and "off by" in text and str(tmp_path) not in text

    plots = tmp_path / "plots" / "nvidia-h100"
    assert {path.name for path in plots.iterdir()} == {
        "fractions-qwen3-8b-qwen3-4b-4096-tokens.png",
        "loss-4096-tokens-151936-vocabulary-2560-4096-bfloat16.png",
        "branches-attention.png",
    }
    for path in plots.iterdir():
        assert f"](plots/nvidia-h100/{path.name})" in text
        content = path.read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n" and 10_000 < len(content) < 500_000
        width, height = struct.unpack(">II", content[16:24])
        assert width == 1440 and 300 < height < 1500


def test_an_overhead_is_a_share_of_the_step_beside_its_promise(make_page):
    text = make_page({"overheads": SUITES["overheads"]})
    assert rows_of(text, "guard")[0][1:] == ["3.000", "1.0", "2.500", "200.0", "0.250", "1", "5"]
    assert page.EXPLANATIONS["overheads"] in text
    assert OverheadLine(group="g", contender="c", outcome="out of memory").share is None


def test_outcomes_stand_in_the_table_and_their_reasons_below_it(make_page):
    text = make_page({"linear_distill": LOSSES})
    assert rows_of(text, "eager torch")[0][1:3] == ["out of memory", ""]
    assert rows_of(text, "Liger chunked JSD")[0][1] == "not measured"
    assert "- Liger chunked JSD: not measured: pip install liger-kernel==0.8.5" in text


def test_headlines_are_ratios_of_the_lines(make_page):
    text = make_page(SUITES)
    # Whole against halves: 1200 / 1000 ms (1200 / 800), 30 / 40 GiB (30 / 50). Halves: 550 / 1100, 20 GiB.
    whole, halves = ["1.20 (1.50)", "0.75 (0.60)"], ["0.50 (0.62)", "0.50 (0.40)"]
    assert rows_of(text, f"training: {PAIR}") == [[f"training: {PAIR}", ONLINE, *whole, *halves]]
    row = rows_of(text, f"attention: {TRUNK}")[0]
    assert row[1:] == ["triton", "torch, separate sequences", "0.33", "0.33"]
    time, memory = (
        next(x for x in text.splitlines() if x.startswith(f"- {name} of")) for name in ("Time", "Peak memory")
    )
    assert "at best **0.90** times (ours (cached vectors)" in time and "at worst **1.40** times (ours (vocab)" in time
    assert "3 lines of linear_distill" in time
    assert "at best **0.50** times (ours (vocab)" in memory and "2 lines" in memory
    assert "is **0.95** to **1.10** times the measured one, over 2 lines of training" in text


def test_headlines_say_who_ran_out_of_memory_and_nothing_that_was_not_measured(make_page):
    lines = [
        training(0.5, REFERENCE, outcome="out of memory"),
        training(0.5, ONLINE, **timed(500, gib=20)),
        training(1.0, ONLINE, outcome="out of memory"),
    ]
    row = rows_of(make_page({"training": lines}), f"training: {PAIR}")[0]
    assert row[2:] == ["ours out of memory"] * 2 + ["reference out of memory"] * 2
    assert "In short" not in make_page({"decoding": SUITES["decoding"]})
    assert "In short" not in make_page({"training": [training(0.3, ONLINE, **timed(500))]})


def test_fractions_of_a_setting_share_a_table_and_missing_ones_are_no_fault(make_page, tmp_path):
    lines = [
        training(fraction, name, **timed(1000 * fraction, 1000))
        for fraction in (1.0, 0.2, 0.4)
        for name in (REFERENCE, ONLINE)
        if (fraction, name) != (0.4, REFERENCE)
    ]
    text = make_page({"training": [*lines, training(0.5, ONLINE, pair="another", **timed(1))]})
    assert [rows_of(text, each)[0][1:3] for each in ("0.2", "0.4")] == [[REFERENCE, "200.0"], [ONLINE, "400.0"]]
    assert f"**{PAIR}**" in text and f"{PAIR}, f =" not in text and "**another, f = 0.5**" in text
    assert [path.name for path in tmp_path.rglob("*.png")] == ["fractions-qwen3-8b-qwen3-4b-4096-tokens.png"]


def test_who_is_compiled_looks_like_who_is_not_and_the_legend_fits_the_picture(make_page, monkeypatch):
    plain = [REFERENCE, "LSP reference, best settings", ONLINE, f"{ONLINE}, lean", "ours, teacher cached"]
    names = [*plain, *(f"{name}, compiled" for name in plain)]
    figures = []
    monkeypatch.setattr("bench.page_curves.save", lambda figure, path: figures.append(figure))
    make_page({"training": [training(f, name, **timed(1000 * f, 1000)) for f in (0.5, 1.0) for name in names]})
    (figure,) = figures
    figure.canvas.draw()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width and {text.get_text() for text in legend.texts} == set(names)
    handles = {handle.get_label(): handle for handle in legend.legend_handles}
    looks = {(handle.get_color(), handle.get_marker()) for name, handle in handles.items() if name in plain}
    assert len(looks) == len(plain)
    for name in plain:
        compiled = handles[f"{name}, compiled"]
        assert compiled.get_color() == handles[name].get_color() and compiled.get_linestyle() == "--"


def test_settings_at_several_numbers_of_branches_are_curves(make_page, tmp_path):
    lines = [
        branched(2, "ours, branches", **timed(100, 100)),
        branched(2, "ours, separate sequences", **timed(200, 100)),
        branched(8, "ours, branches", **timed(150, 150)),
        branched(8, "ours, separate sequences", outcome="out of memory"),
    ]
    text = make_page({"training": lines})
    assert [path.name for path in tmp_path.rglob("*.png")] == ["branches-by-k-training-qwen3-1-7b-k-cuts.png"]
    assert rows_of(text, "training: Qwen3-1.7B, 2 cuts")[0][3:] == ["0.50", "-"]
    assert rows_of(text, "training: Qwen3-1.7B, 8 cuts")[0][3:] == ["out of memory", "out of memory"]


def test_by_default_the_newest_file_of_each_device_is_taken(write, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRSD_BENCH_RESULTS", str(tmp_path / "results"))
    ceilings = {"ceilings": SUITES["ceilings"]}
    write({"decoding": SUITES["decoding"]}, "results/nvidia-h100-2026-11-24.json", date="2026-11-24")
    newest = write(ceilings, "results/a-newer-one.json")
    cpu = write(ceilings, "results/cpu-2026-11-23.json", device="CPU", date="2026-11-23")
    (tmp_path / "results" / "linear_distill-errors-cpu.json").write_text('{"environment": {}, "errors": []}')
    assert newest_of_each_device(tmp_path / "results") == [cpu, newest]
    page.main(["--output", str(tmp_path / "RESULTS.md")])
    text = (tmp_path / "RESULTS.md").read_text()
    assert text.index("## NVIDIA H100") < text.index("## CPU")
    assert "(results/cpu-2026-11-23.json)" in text and "decoding" not in text.split("## NVIDIA")[1]


def test_files_of_one_device_are_put_together(write):
    old = write({"decoding": SUITES["decoding"], "ceilings": []}, "old.json", date="2026-11-24")
    new = write({"ceilings": SUITES["ceilings"]}, "new.json")
    for order in ((old, new), (new, old)):
        suites = by_device([read_suites(path) for path in order])["NVIDIA H100"]
        assert set(suites) == {"decoding", "ceilings"} and suites["ceilings"].lines


def test_no_results_and_files_that_are_none_are_said(write, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRSD_BENCH_RESULTS", str(tmp_path / "results"))
    assert "no results in" in fails(capsys, page.main, "--output", tmp_path / "x.md")
    assert "no results in" in fails(capsys, page.main, write({"training": []}), "--output", tmp_path / "x.md")
    broken = tmp_path / "results" / "broken.json"
    broken.parent.mkdir()
    broken.write_text('{"suites": ')
    assert f"{broken}: not JSON" in fails(capsys, page.main, "--output", tmp_path / "x.md")
    broken.write_text(
        '{"suites": {"training": {"title": "", "environment": {"device": "x", "date": ""}, "lines": [{}]}}}'
    )
    assert "--output" in fails(
        capsys, page.main, write({"training": [training(1.0, "ours")]}), "--output", broken / "x.md"
    )
    assert f"{broken}: suite 'training'" in fails(capsys, page.main, "--output", tmp_path / "x.md")
    broken.write_text("[]")
    assert str(broken) in fails(capsys, page.main, broken)
    assert "No such file" in fails(capsys, page.main, tmp_path / "nowhere.json")
    assert not (tmp_path / "x.md").exists()
    with pytest.raises(NotResults, match="broken.json"):
        read_suites(broken)


@pytest.fixture
def compared(write, capsys):
    """Compares two lists of lines, or two sets of suites, and returns (exit code, output)."""

    def run(before, after, *flags, **environment):
        files = []
        for name, lines, facts in (("before.json", before, {}), ("after.json", after, environment)):
            files.append(str(write(lines if isinstance(lines, dict) else {"suite": lines}, name, **facts)))
        code = 0
        try:
            compare.main([*files, *flags])
        except SystemExit as stopped:
            code = stopped.code
        return code, capsys.readouterr().out

    return run


def verdict(output, contender):
    """(what was compared, ratio, noise, verdict) of the contender's row."""
    row = next(line for line in output.splitlines() if line.startswith(f"{contender}  "))
    cells = [cell.strip() for cell in row.removeprefix(contender).split("  ") if cell.strip()]
    return cells[2], cells[3], cells[4], cells[-1]


@pytest.mark.parametrize(
    "milliseconds,said,without_noise",
    [(104, "same", "slower"), (106, "slower", "slower"), (96, "same", "faster"), (94, "faster", "faster")],
)
def test_what_differs_by_less_than_the_noise_is_the_same(compared, milliseconds, said, without_noise):
    before, after = (StepLine(group="g", contender="c", **timed(ms, spread=0)) for ms in (100, milliseconds))
    assert verdict(compared([before], [after])[1], "c") == ("ms", f"{milliseconds / 100:.3f}", "±5.0 %", said)
    assert verdict(compared([before], [after], "--noise", "0")[1], "c")[3] == without_noise
    opposite = {"slower": "faster", "faster": "slower", "same": "same"}
    assert verdict(compared([after], [before])[1], "c")[3] == opposite[said]


def test_quartiles_widen_the_noise(compared):
    before = StepLine(group="g", contender="c", **timed(100, spread=0.06))
    after = StepLine(group="g", contender="c", **timed(109, spread=0.08))
    assert verdict(compared([before], [after])[1], "c") == ("ms", "1.090", "±10.0 %", "same")


def test_ratios_to_a_reference_of_others_cancel_drift(compared):
    before = [loss("ours (tokens)", **timed(11, 10)), loss("bare GEMMs", **timed(10, 10.2))]
    after = [loss("ours (tokens)", **timed(16.5, 15)), loss("bare GEMMs", **timed(15, 15.1))]
    _, output = compared(before, after)
    assert verdict(output, "ours (tokens)") == ("x ref", "1.000", "±5.0 %", "same")
    assert verdict(output, "bare GEMMs") == ("ms", "1.500", "±5.0 %", "slower")
    assert "took 1.500 times as long" in output
    # The ratio's noise is that of both times of both lines.
    _, output = compared([loss("ours (tokens)", **timed(11, 10, spread=0.04))], after)
    assert verdict(output, "ours (tokens)")[2] == "±5.8 %"


def test_a_reference_of_ours_that_becomes_faster_makes_nothing_else_slower(compared):
    before = [attention("triton", **timed(10, 10)), attention("torch", **timed(20, 10))]
    after = [attention("triton", **timed(5, 5)), attention("torch", **timed(20, 5))]
    code, output = compared(before, after, "--fail-on-slower")
    assert verdict(output, "triton") == ("ms", "0.500", "±5.0 %", "faster")
    assert verdict(output, "torch") == ("ms", "1.000", "±5.0 %", "same")
    assert code == 0


def test_memory_is_judged_beside_time(compared):
    before, after = (StepLine(group="g", contender="c", **timed(100, gib=gib)) for gib in (1.0, 1.5))
    _, output = compared([before], [after])
    assert verdict(output, "c")[3] == "same, more memory" and "1.500" in output and "1 with more memory" in output


def test_rates_are_better_when_they_are_higher(compared):
    before, after = (CeilingLine(group="g", contender="c", measured=x, unit="GB/s") for x in (100.0, 80.0))
    assert verdict(compared([before], [after])[1], "c") == ("GB/s", "0.800", "±5.0 %", "slower")


def test_lines_that_one_file_has_are_listed(compared):
    line, other = (StepLine(group="g", contender=name, **timed(100)) for name in ("both", "one"))
    assert "only before:\n  suite: g: one" in compared([line, other], [line])[1]
    assert "only after:\n  suite: g: one" in compared([line], [line, other])[1]
    assert "no line was measured" in compared([line], [other])[1]


def test_other_devices_threads_and_versions_are_warned_of(compared):
    lines = [StepLine(group="g", contender="c", **timed(100))]
    assert "warning" not in compared(lines, lines, date="2026-11-26", commit="def")[1]
    _, output = compared(lines, lines, device="NVIDIA H200", threads="4", torch="2.14.0")
    for fact in ("device differs: NVIDIA H100 before, NVIDIA H200 after", "threads differs", "torch differs"):
        assert f"warning: {fact}" in output
    assert "not comparable" in output


def test_fail_on_slower_exits_with_1_where_something_is_slower_or_no_longer_runs(compared):
    line = StepLine(group="g", contender="c", **timed(100))
    slower = StepLine(group="g", contender="c", **timed(200))
    failed, skipped = (
        StepLine(group="g", contender="c", outcome=outcome) for outcome in ("out of memory", "not measured: no time")
    )
    flag = "--fail-on-slower"
    assert [compared([line], [each], flag)[0] for each in (line, slower, failed, skipped)] == [0, 1, 1, 0]
    assert [compared([slower], [line], flag)[0], compared([failed], [line], flag)[0]] == [0, 0]
    code, output = compared([line], [failed])
    assert code == 0 and "out of memory" in output and "fails now" in output


def test_compare_names_files_that_it_cannot_read(write, tmp_path, capsys):
    good = write({"decoding": SUITES["decoding"]})
    assert "nowhere.json" in fails(capsys, compare.main, good, tmp_path / "nowhere.json")
    assert "--noise" in fails(capsys, compare.main, good, good, "--noise", "-1")
