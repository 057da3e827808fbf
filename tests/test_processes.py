"New processes find each other, add up, and name who is missing."

from threading import Thread
from time import sleep

import numpy as np
import processes_workers as workers
import pytest
import torch.distributed as dist

from po_book import processes
from po_book.processes import launch


@pytest.fixture(scope="module")
def seen():
    "What each of two processes has seen, all in one launch."
    return launch(workers.everything, 2)


def test_server_and_ring_find_the_mean_and_send_what_the_equation_says(seen):
    first, second = (seen[rank]["descent"] for rank in (0, 1))
    for how in "central_step", "ring_step":
        np.testing.assert_allclose(first[how][0], second[how][0], atol=1e-14)
    np.testing.assert_allclose(first["central_step"][0], first["ring_step"][0], atol=1e-14)
    assert np.abs(first["ring_step"][0]).max() > 1e-3
    assert [x["central_step"][1] for x in (first, second)] == [7 * 8 * 3] * 2
    assert sum(x["ring_step"][1] for x in (first, second)) == 2 * 7 * 8 * 3


def test_one_that_hangs_is_named(seen):
    assert "process 1 of 2 did not answer" in seen[0]["hangs"]
    assert seen[1]["hangs"] == "slept"


def test_what_a_process_raises_is_raised():
    with pytest.raises(ArithmeticError, match="no more numbers"):
        launch(workers.fails, 2)


@pytest.mark.parametrize("size", [0, -1])
def test_a_group_has_processes(size):
    with pytest.raises(ValueError, match="size must be positive"):
        launch(workers.fails, size)


def test_words_of_the_dead_mislead_nobody(tmp_path):
    "Two have met and died; of the next two the first comes before the second."
    store = dist.FileStore(str(tmp_path / "store"), 2)
    for _ in range(2):
        rooms = {}

        def meet(rank):
            own = dist.FileStore(str(tmp_path / "store"), 2)
            rooms[rank] = processes._room(own, rank, 2, 20.0)

        first, second = (Thread(target=meet, args=(rank,)) for rank in (0, 1))
        first.start()
        sleep(0.3)
        second.start()
        first.join(), second.join()
        assert not rooms[0].check(["word"])
        rooms[0].set("word", "new")
        assert rooms[1].get("word") == b"new"
    assert store.check(["here/1"])


def test_one_that_does_not_come_is_named(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 3)
    store.set("here/2", "long dead")
    with pytest.raises(ConnectionError, match="process 1, 2 of 3 did not come"):
        processes._room(store, 0, 3, 0.2)


def test_the_first_one_is_named_too(tmp_path):
    "By the others, who wait for it."
    stores = dist.FileStore(str(tmp_path / "store"), 2), dist.TCPStore("localhost", 0, is_master=True)
    for store in stores:
        with pytest.raises(ConnectionError, match="process 0 of 2 did not come"):
            processes._room(store, 1, 2, 0.2)
