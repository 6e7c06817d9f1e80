"""Signals: noted where something must not be cut off, raised elsewhere, and the second ends at once."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from trsd.interruption import Interrupted, Interruption


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_raised_when_the_work_is_done(number):
    done = []
    with pytest.raises(Interrupted) as raised, Interruption() as interruption, interruption.deferred():
        os.kill(os.getpid(), number)
        assert interruption.signal == number
        done.append(True)
    assert done and raised.value.code == 128 + number and raised.value.name == number.name


def test_elsewhere_a_signal_is_raised_as_it_comes():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as raised, Interruption():
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("went on")
    assert raised.value.code == 143 and signal.getsignal(signal.SIGTERM) is before


def test_the_second_signal_ends_the_process_at_once():
    code = (
        "import os, signal, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from trsd.interruption import Interruption\n"
        "with Interruption() as interruption, interruption.deferred():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('once', flush=True)\n"
        "    time.sleep(2.1)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('twice', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "once\n")
    assert "ending at once" in done.stderr


def test_in_another_thread_signals_are_left_alone():
    found = []

    def work():
        with Interruption() as interruption:
            found.append(interruption.signal)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [None]


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGHUP)
            assert interruption.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)
