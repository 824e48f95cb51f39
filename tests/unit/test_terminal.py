import pytest

from sgt_titan import terminal


@pytest.mark.parametrize(("seconds", "text"), [(5, "5 s"), (89, "89 s"), (600, "10 min"), (9000, "2.5 h")])
def test_clock(seconds, text):
    assert terminal.clock(seconds) == text


def test_control_characters_do_not_reach_the_terminal():
    assert terminal.printable("a\x1b[31mb\nc") == "a\ufffd[31mb\nc"


def test_progress_is_not_what_was_asked_for(capsys):
    terminal.say("half done")
    assert capsys.readouterr() == ("", "half done\n")
