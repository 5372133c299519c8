"""Ctrl-C as a request, then as an order. Real signals; see also test_resume.py."""

import os
import signal
import threading

import pytest

from flanmoe.training.interruption import stop_on_interrupt


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_the_first_is_a_request_and_the_second_an_order() -> None:
    with stop_on_interrupt() as stop:
        assert not stop.is_set
        press()
        assert stop.is_set
        with pytest.raises(KeyboardInterrupt):
            press()


def test_afterwards_ctrl_c_is_what_it_was() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop_on_interrupt():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before
    with pytest.raises(KeyboardInterrupt):
        press()


def test_other_threads_are_left_alone() -> None:
    found: list[bool] = []

    def run() -> None:
        with stop_on_interrupt() as stop:
            found.append(stop.is_set)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [False]
