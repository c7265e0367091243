"""Every edit is undone exactly, and a patch on top of ours is reported."""

from __future__ import annotations

import pytest

import tensortap
from tensortap.undo import SharedPatch, Undo


class Thing:
    kept = 1


def test_what_was_there_comes_back_and_what_was_absent_goes():
    thing, mapping = Thing(), {"a": 1}
    thing.own = "mine"
    undo = Undo()
    undo.replace(thing, "own", "ours")
    undo.replace(thing, "kept", 2)
    undo.set_item(mapping, "a", 5)
    undo.set_item(mapping, "b", 6)
    assert (thing.own, thing.kept, mapping) == ("ours", 2, {"a": 5, "b": 6})
    undo.run()
    assert (vars(thing), mapping) == ({"own": "mine"}, {"a": 1})
    undo.run()
    assert vars(thing) == {"own": "mine"}


def test_an_error_in_the_block_undoes_all_of_it():
    thing = Thing()
    with pytest.raises(KeyError), Undo() as undo:
        undo.replace(thing, "x", 1)
        raise KeyError("no")
    assert vars(thing) == {}


def test_one_failing_inverse_does_not_stop_the_others():
    thing, undo = Thing(), Undo()
    undo.replace(thing, "x", 1)
    undo.call(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        undo.run()
    assert vars(thing) == {}


def test_a_later_patch_by_others_is_left_alone_and_reported():
    thing, mapping, undo = Thing(), {}, Undo()
    undo.replace(thing, "x", "ours")
    undo.set_item(mapping, "k", "ours")
    thing.x = mapping["k"] = "theirs"
    with pytest.warns(tensortap.CaptureWarning, match="patched again") as caught:
        undo.run()
    assert (thing.x, mapping) == ("theirs", {"k": "theirs"})
    assert len(caught) == 2


def test_a_shared_patch_goes_with_its_last_user():
    thing = Thing()
    patch = SharedPatch(lambda undo: undo.replace(thing, "x", "patched"))
    first, second = Undo(), Undo()
    patch.acquire(first)
    patch.acquire(second)
    first.run()
    assert thing.x == "patched"
    second.run()
    assert vars(thing) == {}
    patch.acquire(third := Undo())
    assert thing.x == "patched"
    third.run()
    assert vars(thing) == {}
