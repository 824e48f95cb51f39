import asyncio
import threading

import pytest

from sgt_titan.serving.turns import Full, Turns, Workers


def run(make):
    return asyncio.run(asyncio.wait_for(make(), 10))


def test_free_places_go_round_the_clients():
    async def go():
        turns, order = Turns(1), []

        async def work(client, n):
            async with turns.turn(client):
                order.append((client, n))
                await asyncio.sleep(0)

        async with turns.turn("first"):
            tasks = [asyncio.create_task(work("greedy", n)) for n in range(5)]
            await asyncio.sleep(0)
            tasks += [asyncio.create_task(work("late", 0)), asyncio.create_task(work("later", 0))]
            await asyncio.sleep(0)
            assert turns.waiting == 7
        await asyncio.gather(*tasks)
        assert turns.waiting == turns.active == 0
        return order

    order = run(go)
    assert order[:3] == [("greedy", 0), ("late", 0), ("later", 0)] and order[3:] == [("greedy", n) for n in range(1, 5)]


def test_the_largest_loses_his_newest():
    async def go():
        turns = Turns(1, waiting=3)
        await turns.take("x")
        greedy = [asyncio.create_task(turns.take("greedy")) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(Full):
            await turns.take("greedy")
        late = asyncio.create_task(turns.take("late"))
        await asyncio.sleep(0)
        with pytest.raises(Full):
            await greedy[2]
        assert turns.waiting == 3
        turns.give_back()
        await greedy[0]
        turns.give_back()
        await late
        greedy[1].cancel()
        with pytest.raises(asyncio.CancelledError):
            await greedy[1]
        turns.give_back()
        assert (turns.active, turns.waiting) == (0, 0)

    run(go)


def test_who_waits_too_long_leaves_no_trace():
    async def go():
        turns = Turns(1)
        await turns.take("a")
        with pytest.raises(TimeoutError):
            await turns.take("b", 0.01)
        turns.give_back()
        assert (turns.active, turns.waiting) == (0, 0)
        async with turns.turn("c", 0.01):
            pass

    run(go)


def test_work_whose_client_left_before_its_turn_is_never_begun():
    async def go():
        workers, begun, free = Workers(1), [], threading.Event()
        first = asyncio.create_task(workers.run("a", free.wait))
        await asyncio.sleep(0.01)
        second = asyncio.create_task(workers.run("b", begun.append, 1))
        await asyncio.sleep(0.01)
        second.cancel()
        first.cancel()  # a thread goes on: its place stays taken until it has ended
        third = asyncio.create_task(workers.run("c", begun.append, 2))
        await asyncio.sleep(0.01)
        assert begun == []
        free.set()
        await third
        workers.close()
        assert begun == [2]

    run(go)


def test_what_work_raises_is_raised():
    async def go():
        with pytest.raises(ZeroDivisionError):
            await Workers(1).run("a", lambda: 1 / 0)

    run(go)
