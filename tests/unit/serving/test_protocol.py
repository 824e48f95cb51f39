"""When a connection is hung up on, by a clock that the test moves."""

import asyncio

import pytest
import uvicorn
from uvicorn.server import ServerState

from sgt_titan.serving.protocol import HEAD_SECONDS, KEEP_ALIVE_SECONDS, PatientProtocol

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 30\r\n\r\n"


class Started:
    def add_done_callback(self, _):
        pass


class Clock:
    """What of an event loop the protocol uses."""

    def __init__(self):
        self.now, self.timers = 0.0, []

    def time(self):
        return self.now

    def get_debug(self):
        return False

    def call_later(self, delay, what, *args):
        timer = asyncio.TimerHandle(self.now + delay, what, args, self)
        self.timers.append(timer)
        return timer

    def _timer_handle_cancelled(self, timer):
        pass

    def create_task(self, work, **_):
        work.close()
        return Started()

    def run(self, seconds):
        """As long as nothing stops it: each timer at its time."""
        until = self.now + seconds
        while due := [t for t in self.timers if not t.cancelled() and t.when() <= until]:
            self._call(min(due, key=lambda timer: timer.when()))
        self.now = until

    def stop(self, seconds):
        """The process does not run, and then all timers that are due are late."""
        self.now += seconds
        for timer in [t for t in self.timers if not t.cancelled() and t.when() <= self.now]:
            self._call(timer)

    def _call(self, timer):
        self.timers.remove(timer)
        self.now = max(self.now, timer.when())
        timer._run()


class Transport:
    def __init__(self):
        self.closed = False

    def close(self):
        self.closed = True

    def is_closing(self):
        return self.closed

    def write(self, data):
        pass

    def get_extra_info(self, name):
        return None

    def pause_reading(self):
        pass

    resume_reading = pause_reading


@pytest.fixture
def peer():
    async def app(scope, receive, send):
        pass

    class Peer:
        def __init__(self):
            self.clock, self.transport = Clock(), Transport()
            config = uvicorn.Config(app, log_config=None)
            self.protocol = PatientProtocol(config, ServerState(), {}, self.clock)
            self.protocol.connection_made(self.transport)

        @property
        def hung_up(self):
            return self.transport.closed

        def sends(self, data):
            self.protocol.data_received(data)

        def is_answered(self):
            for message in (
                {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]},
                {"type": "http.response.body", "body": b""},
            ):
                with pytest.raises(StopIteration):  # there is nothing to wait for
                    self.protocol.cycle.send(message).send(None)

    return Peer()


@pytest.mark.parametrize("sent", [[], [b"GET / HT"]])
def test_a_head_that_does_not_come(peer, sent):
    for data in sent:
        peer.sends(data)
    peer.clock.run(HEAD_SECONDS - 1)
    assert not peer.hung_up
    peer.clock.run(2)
    assert peer.hung_up


def test_a_byte_now_and_then_is_no_head(peer):
    for byte in b"GET / HTTP/1.1":
        peer.sends(bytes([byte]))
        peer.clock.run(2)
    assert peer.hung_up


def test_an_answer_may_take_its_time(peer):
    peer.sends(GET)
    peer.clock.run(1000)
    assert not peer.hung_up


def test_an_idle_connection(peer):
    peer.sends(GET)
    peer.is_answered()
    peer.clock.run(KEEP_ALIVE_SECONDS - 1)
    assert not peer.hung_up
    peer.clock.run(2)
    assert peer.hung_up


@pytest.mark.parametrize("begun", ["nothing", "half a head", "an answer"])
def test_time_in_which_the_proxy_did_not_run_does_not_count(peer, begun):
    """Else it would hang up, as soon as it goes on, on clients that were stopped with it and are just about to send."""
    patience = HEAD_SECONDS
    if begun == "half a head":
        peer.sends(b"GET / HT")
    elif begun == "an answer":
        peer.sends(GET)
        peer.is_answered()
        patience = KEEP_ALIVE_SECONDS
    for _ in range(3):
        peer.clock.run(1)
        peer.clock.stop(500)
        assert not peer.hung_up
    peer.clock.run(patience - 5)
    assert not peer.hung_up
    peer.clock.run(6)
    assert peer.hung_up, "and that is all that it gets"


def test_the_end_of_a_body_that_the_answer_did_not_wait_for_is_no_beginning(peer):
    peer.sends(POST + b"x" * 20)
    peer.is_answered()
    peer.sends(b"x" * 9)
    peer.clock.run(1)
    peer.sends(b"x")
    peer.clock.run(KEEP_ALIVE_SECONDS - 2)
    assert not peer.hung_up
    peer.clock.run(3)
    assert peer.hung_up


def test_nor_may_such_a_body_last(peer):
    peer.sends(POST)
    peer.is_answered()
    for _ in range(25):
        peer.sends(b"x")
        peer.clock.run(1)
    assert peer.hung_up
