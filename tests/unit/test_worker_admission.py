"""Slots and the queue for them: never more than the limit, first come first served, and nobody lost however waiters come and go."""

from __future__ import annotations

import asyncio
import random

import pytest

from mesh.errors import Overloaded
from worker.admission import REMEMBERED, WEIGHTS, Admission, Priority


class Crowd:
    """Requests that hold a slot until they are told to leave."""

    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self.entered: list[int] = []
        self.refused: list[int] = []
        self.most = 0
        self._leave: dict[int, asyncio.Event] = {}
        self.tasks: dict[int, asyncio.Task[None]] = {}

    def come(self, number: int, priority: Priority = Priority.INTERACTIVE, project: str = "", *, cost: float = 1.0) -> asyncio.Task[None]:
        self._leave[number] = asyncio.Event()
        self.tasks[number] = asyncio.create_task(self._hold(number, priority, project, cost))
        return self.tasks[number]

    def leave(self, number: int) -> None:
        self._leave[number].set()

    async def _hold(self, number: int, priority: Priority, project: str, cost: float) -> None:
        try:
            async with self.admission.slot(priority, project, cost=cost):
                self.entered.append(number)
                self.most = max(self.most, self.admission.running)
                await self._leave[number].wait()
        except Overloaded:
            self.refused.append(number)


async def settle() -> None:
    for _ in range(6):
        await asyncio.sleep(0)


@pytest.fixture
async def crowd() -> Crowd:
    return Crowd(Admission(limit=2, queue_limit=3))


async def test_slots_are_given_in_the_order_of_coming(crowd: Crowd) -> None:
    for number in range(5):
        crowd.come(number)
    await settle()
    assert crowd.entered == [0, 1]
    assert (crowd.admission.running, crowd.admission.waiting) == (2, 3)
    for number in (1, 0, 2, 3, 4):
        crowd.leave(number)
        await settle()
    assert crowd.entered == [0, 1, 2, 3, 4]
    assert crowd.most == 2


async def test_one_too_many_is_refused_at_once_with_a_time_to_come_back(crowd: Crowd) -> None:
    for number in range(6):
        crowd.come(number)
    await settle()
    assert crowd.refused == [5]
    with pytest.raises(Overloaded) as caught:
        crowd.admission.check()
    assert caught.value.retry_after_s
    crowd.leave(0)
    await settle()
    crowd.admission.check()


async def test_newcomer_does_not_overtake_the_queue(crowd: Crowd) -> None:
    for number in range(3):
        crowd.come(number)
    await settle()
    crowd.leave(0)
    crowd.come(3)  # in the very turn in which a slot is handed over
    await settle()
    assert crowd.entered == [0, 1, 2]


async def test_no_queue_means_refused_at_the_limit() -> None:
    crowd = Crowd(Admission(limit=1, queue_limit=0))
    crowd.come(0)
    crowd.come(1)
    await settle()
    assert crowd.refused == [1]
    crowd.leave(0)
    await asyncio.wait_for(crowd.admission.idle(), 5)


async def test_cancelled_waiter_leaves_the_queue(crowd: Crowd) -> None:
    for number in range(4):
        crowd.come(number)
    await settle()
    crowd.tasks[2].cancel()
    await settle()
    assert crowd.admission.waiting == 1
    crowd.leave(0)
    await settle()
    assert crowd.entered == [0, 1, 3]


async def test_waiter_cancelled_in_the_turn_of_a_release_neither_keeps_nor_loses_a_slot(crowd: Crowd) -> None:
    for number in range(4):
        crowd.come(number)
    await settle()
    crowd.tasks[2].cancel()
    crowd.leave(0)
    await settle()
    assert crowd.tasks[2].cancelled()
    assert crowd.entered == [0, 1, 3]
    assert crowd.admission.running == 2


async def test_waiter_cancelled_before_a_release_reaches_it_is_passed_over(crowd: Crowd) -> None:
    for number in range(4):
        crowd.come(number)
    await settle()
    crowd.leave(0)
    await asyncio.sleep(0)  # the leaver is about to run: it will meet a waiter that was cancelled before it
    crowd.tasks[2].cancel()
    await settle()
    assert crowd.tasks[2].cancelled()
    assert crowd.entered == [0, 1, 3]
    assert (crowd.admission.running, crowd.admission.waiting) == (2, 0)


async def test_slot_handed_to_a_waiter_that_is_cancelled_then_goes_to_the_next(crowd: Crowd) -> None:
    for number in range(4):
        crowd.come(number)
    await settle()
    crowd.admission.release()  # hands its slot to 2, which hears of it in the next turn of the loop
    crowd.tasks[2].cancel()
    await settle()
    assert crowd.entered == [0, 1, 3]


async def test_idle_waits_for_the_running_and_the_waiting(crowd: Crowd) -> None:
    await asyncio.wait_for(crowd.admission.idle(), 5)
    for number in range(3):
        crowd.come(number)
    await settle()
    waiting = asyncio.create_task(crowd.admission.idle())
    for number in (0, 1):
        crowd.leave(number)
        await settle()
        assert not waiting.done()
    crowd.leave(2)
    await asyncio.wait_for(waiting, 5)


async def test_failing_request_gives_its_slot_back() -> None:
    admission = Admission(limit=1, queue_limit=1)
    with pytest.raises(ZeroDivisionError):
        async with admission.slot():
            _ = 1 // 0
    assert admission.running == 0
    await asyncio.wait_for(admission.idle(), 5)


@pytest.mark.parametrize("seed", range(40))
async def test_nobody_is_lost_however_they_come_and_go(seed: int) -> None:
    rng = random.Random(seed)
    limit, queue_limit = rng.randint(1, 4), rng.randint(0, 5)
    crowd = Crowd(Admission(limit=limit, queue_limit=queue_limit))
    for number in range(200):
        crowd.come(number)
        for _ in range(rng.randint(0, 3)):
            other = rng.randint(0, number)
            if rng.random() < 0.5:
                crowd.leave(other)
            else:
                crowd.tasks[other].cancel()
            if rng.random() < 0.3:
                await asyncio.sleep(0)
        if rng.random() < 0.5:
            await asyncio.sleep(0)
        assert crowd.admission.running <= limit
        assert crowd.admission.waiting <= queue_limit
    for number in range(200):
        crowd.leave(number)
    results = await asyncio.gather(*crowd.tasks.values(), return_exceptions=True)
    assert all(result is None or isinstance(result, asyncio.CancelledError) for result in results)
    assert crowd.most <= limit
    assert (crowd.admission.running, crowd.admission.waiting) == (0, 0)
    await asyncio.wait_for(crowd.admission.idle(), 5)


# -- fairness


async def one_by_one(crowd: Crowd, holder: int, count: int) -> list[int]:
    """Let ``count`` waiters through, each leaving before the next enters; returns them in the order of entering."""
    order, leaving = [], holder
    for _ in range(count):
        before = len(crowd.entered)
        crowd.leave(leaving)
        await settle()
        (leaving,) = crowd.entered[before:]
        order.append(leaving)
    crowd.leave(leaving)
    await settle()
    return order


@pytest.fixture
async def busy() -> Crowd:
    """One slot, taken by number 0, and a long queue."""
    crowd = Crowd(Admission(limit=1, queue_limit=1000))
    crowd.come(0)
    await settle()
    return crowd


async def test_priorities_share_the_slots_by_weight_and_the_lowest_is_not_starved(busy: Crowd) -> None:
    names = {}
    for number in range(1, 301):
        names[number] = Priority(number % 3)
        busy.come(number, names[number])
    await settle()
    order = await one_by_one(busy, 0, 105)
    counts = {priority: sum(names[number] is priority for number in order) for priority in Priority}
    assert {priority: round(count / 5) for priority, count in counts.items()} == WEIGHTS
    assert any(names[number] is Priority.BATCH for number in order[:25])
    for task in busy.tasks.values():
        task.cancel()


async def test_projects_take_turns_within_a_priority_and_each_is_first_come_first_served(busy: Crowd) -> None:
    for number in range(1, 9):
        busy.come(number, project="large")
    busy.come(9, project="small")
    busy.come(10, project="small")
    await settle()
    order = await one_by_one(busy, 0, 10)
    assert set(order[:4]) == {1, 2, 9, 10}
    assert [number for number in order if number <= 8] == list(range(1, 9))


async def test_project_of_costly_requests_gets_fewer_of_them(busy: Crowd) -> None:
    for number in range(1, 41):
        busy.come(number, project="costly" if number % 2 else "cheap", cost=4.0 if number % 2 else 1.0)
    await settle()
    order = await one_by_one(busy, 0, 15)
    assert sum(number % 2 for number in order) == 3
    for task in busy.tasks.values():
        task.cancel()


async def test_project_that_always_has_just_one_waiting_does_not_get_every_turn(busy: Crowd) -> None:
    for number in range(1, 11):
        busy.come(number, project="patient")
    busy.come(100, project="eager")
    await settle()
    served, leaving = [], 0
    for again in range(101, 115):
        before = len(busy.entered)
        busy.leave(leaving)
        await settle()
        (leaving,) = busy.entered[before:]
        served.append(leaving)
        if leaving >= 100:
            busy.come(again, project="eager")
            await settle()
    assert 6 <= sum(number < 100 for number in served) <= 8
    for task in busy.tasks.values():
        task.cancel()


async def test_full_queue_sheds_the_newest_of_the_lowest_priority_for_a_higher_one() -> None:
    crowd = Crowd(Admission(limit=1, queue_limit=3))
    for number, priority in enumerate((0, 2, 2, 1)):
        crowd.come(number, Priority(priority), project="p")
    await settle()
    crowd.come(4, Priority.INTERACTIVE)
    await settle()
    assert crowd.refused == [2]
    crowd.come(5, Priority.BATCH)
    await settle()
    assert crowd.refused == [2, 5], "as low as the lowest: nobody makes room for it"
    crowd.admission.check(Priority.STANDARD)
    with pytest.raises(Overloaded):
        crowd.admission.check(Priority.BATCH)
    crowd.come(6, Priority.STANDARD, "p")
    crowd.come(7, Priority.INTERACTIVE)
    await settle()
    assert crowd.refused == [2, 5, 1, 6]
    assert crowd.admission.waiting == 3
    for task in crowd.tasks.values():
        task.cancel()
    await asyncio.gather(*crowd.tasks.values(), return_exceptions=True)
    assert (crowd.admission.running, crowd.admission.waiting) == (0, 0)


async def test_full_queue_of_one_project_makes_room_for_another_until_they_have_the_same() -> None:
    crowd = Crowd(Admission(limit=1, queue_limit=6))
    for number in range(7):
        crowd.come(number, project="greedy")
    await settle()
    with pytest.raises(Overloaded):
        crowd.admission.check(Priority.INTERACTIVE, "greedy")
    crowd.admission.check(Priority.INTERACTIVE, "modest")
    for number in range(7, 12):
        crowd.come(number, project="modest")
        await settle()
    assert crowd.refused == [6, 5, 4, 10, 11], "three each: then the queue is full for both"
    with pytest.raises(Overloaded):
        crowd.admission.check(Priority.BATCH, "third")
    for task in crowd.tasks.values():
        task.cancel()


async def test_projects_that_come_and_go_leave_little_behind(busy: Crowd) -> None:
    for number in range(1, REMEMBERED * 2):
        busy.come(number, project=f"p{number}").cancel()
        if number % 50 == 0:
            await settle()
        busy.tasks[number].cancel()
    await settle()
    assert busy.admission.waiting == 0
    assert all(len(queue._gone) <= REMEMBERED for queue in busy.admission._classes.values())


@pytest.mark.parametrize("seed", range(40))
async def test_nobody_is_lost_or_starved_in_any_priority_or_project(seed: int) -> None:
    rng = random.Random(seed)
    limit, queue_limit = rng.randint(1, 4), rng.randint(0, 12)
    crowd = Crowd(Admission(limit=limit, queue_limit=queue_limit))
    for number in range(200):
        crowd.come(number, Priority(rng.randint(0, 2)), f"p{rng.randint(0, 3)}", cost=rng.choice((1.0, 5.0, 64.0)))
        for _ in range(rng.randint(0, 3)):
            other = rng.randint(0, number)
            if rng.random() < 0.6:
                crowd.leave(other)
            else:
                crowd.tasks[other].cancel()
            if rng.random() < 0.3:
                await asyncio.sleep(0)
        if rng.random() < 0.5:
            await asyncio.sleep(0)
        assert crowd.admission.running <= limit
        assert crowd.admission.waiting <= queue_limit
        assert crowd.admission.waiting == sum(queue.waiting for queue in crowd.admission._classes.values())
    for number in range(200):
        crowd.leave(number)
    results = await asyncio.gather(*crowd.tasks.values(), return_exceptions=True)
    assert all(result is None or isinstance(result, asyncio.CancelledError) for result in results)
    assert crowd.most <= limit
    assert (crowd.admission.running, crowd.admission.waiting) == (0, 0)
    await asyncio.wait_for(crowd.admission.idle(), 5)
