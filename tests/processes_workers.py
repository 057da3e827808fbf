"What the processes of test_processes.py do: a new process must find it by its name."

import time
from datetime import timedelta

import torch
import torch.distributed as dist

from po_book.processes import Peers, shared_descent


def fails():
    "In the second process."
    if dist.get_rank():
        raise ArithmeticError("no more numbers")
    return "fine"


def hangs():
    "The second process sleeps while the first waits."
    short = dist.new_group(timeout=timedelta(seconds=1))
    if dist.get_rank():
        time.sleep(5)
        return "slept"
    peers, Peers.patience = Peers(), 1.0
    try:
        peers.call(dist.all_reduce, torch.zeros(1), group=short)
    except ConnectionError as error:
        return str(error)


def everything():
    "All that two processes are asked; what breaks the group comes last."
    return {"descent": shared_descent(7, 3), "hangs": hangs()}
