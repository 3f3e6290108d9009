"""What processes tell each other, and what is told of one that is lost."""

from __future__ import annotations

import multiprocessing
import os
import socket

import pytest
import torch.distributed as dist

from mllm_audio.training.distributed import World, lost_contact


class Unsendable(ValueError):
    """Cannot be made again from its arguments."""

    def __init__(self, number, text):
        super().__init__(f"{number} {text}")


def fail(error):
    raise error


def told(call):
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def member(rank, port, queue):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    world = World(rank, 2, dist.new_group(backend="gloo"))
    queue.put((rank, "sum", world.sum([1.5 + rank, 2**40 + rank])))
    queue.put((rank, "first", told(lambda: world.first(lambda: {"rank": world.rank}))))
    queue.put((rank, "error", told(lambda: world.first(lambda: fail(OSError(28, "full"))))))
    broken = told(lambda: world.first(lambda: fail(Unsendable(3, "words"))))
    queue.put((rank, "unsendable", broken))
    second = told(lambda: world.each(lambda: fail(ValueError("mine")) if rank else None))
    queue.put((rank, "each", second))
    if rank == 0:
        queue.put((rank, "lost", told(lambda: world.sum([1.0]))))
    queue.close()
    queue.join_thread()
    os._exit(0)  # as a killed process: without leaving the group


@pytest.fixture(scope="module")
def answers():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    members = [context.Process(target=member, args=(rank, port, queue)) for rank in (0, 1)]
    for process in members:
        process.start()
    found = {}
    for _ in range(11):
        rank, name, value = queue.get(timeout=120)
        found[rank, name] = value
    for process in members:
        process.join(60)
    return found


def test_numbers_are_added_up_exactly(answers):
    assert answers[0, "sum"] == answers[1, "sum"] == [4.0, 2**41 + 1]


def test_the_first_answers_for_all_and_its_errors_reach_all(answers):
    assert answers[0, "first"] == answers[1, "first"] == {"rank": 0}
    assert answers[0, "error"] == answers[1, "error"] == "OSError: [Errno 28] full"
    assert answers[1, "unsendable"] == "RuntimeError: Unsendable: 3 words"


def test_an_error_of_one_process_is_raised_in_every_one(answers):
    assert answers[0, "each"] == answers[1, "each"] == "ValueError: mine"


def test_a_lost_process_is_told_in_one_line(answers):
    assert answers[0, "lost"].startswith("RuntimeError: lost contact with another process (")
    assert "\n" not in answers[0, "lost"]


def test_alone_there_is_nobody_to_ask():
    world = World()
    assert world.sum([1.0, 2.0]) == [1.0, 2.0]
    assert world.first(lambda: 3) == 3
    with pytest.raises(ValueError, match="mine"):
        world.each(lambda: fail(ValueError("mine")))
    with pytest.raises(RuntimeError, match="shapes"), lost_contact():
        raise RuntimeError("shapes do not match")
