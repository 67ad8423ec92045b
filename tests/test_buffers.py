"""Memory that is used again when nothing refers to it, and only then."""

import copy
import pickle
import threading

import pytest
import torch

from coded_torch._buffers import Buffers, host_memory

HOLDERS = {
    "the tensor": lambda x: x,
    "a view": lambda x: x[4:6].view(torch.int16),
    "an array": lambda x: x.numpy(),
    "a graph": lambda x: (x.view(torch.float32) * torch.ones(16, requires_grad=True)).sum(),
    "a detached view": lambda x: x.view(torch.float32).detach()[::2],
    "the base of a view": lambda x: x._base,
    "a storage": lambda x: x[1:].untyped_storage(),
}


@pytest.mark.parametrize("holder", HOLDERS.values(), ids=HOLDERS.keys())
def test_memory_is_used_again_when_the_last_that_refers_to_it_is_gone(holder):
    buffers = Buffers(host_memory, most=1)
    memory = buffers.take(64).fill_(1)
    address, held = memory.data_ptr(), holder(memory)
    del memory
    assert buffers.take(64) is None
    del held
    assert buffers.take(64).data_ptr() == address


def test_of_what_is_free_the_smallest_that_is_large_enough_is_taken():
    buffers = Buffers(host_memory, most=3)
    addresses = {}
    held = []
    for size in (100, 300, 200):
        held.append(buffers.take(size))
        addresses[size] = held[-1].data_ptr()
    held.clear()
    assert buffers.take(150).data_ptr() == addresses[200]
    assert buffers.take(100).shape == (100,)
    assert buffers.take(100).data_ptr() == addresses[100]


def test_too_small_memory_is_replaced():
    made = []

    def make(place, num_bytes):
        made.append((place, num_bytes))
        return host_memory(place, num_bytes)

    buffers = Buffers(make, most=2)
    held = buffers.take(10)
    buffers.take(20)
    assert buffers.take(30).shape == (30,)
    assert buffers.take(25).shape == (25,)
    assert made == [(0, 10), (1, 20), (1, 30)]
    assert len(held) == 10


def test_what_is_small_is_left_to_the_allocator():
    buffers = Buffers(host_memory, most=1, least=100)
    assert buffers.take(99) is None
    assert buffers.take(100).shape == (100,)


def test_memory_of_inference_mode_can_be_written_outside_of_it():
    buffers = Buffers(host_memory, most=1)
    with torch.inference_mode():
        buffers.take(8).fill_(1)
    buffers.take(8).fill_(2)


def test_threads_never_get_the_same():
    buffers = Buffers(host_memory, most=64)
    wrong = []

    def work(number):
        for _ in range(300):
            memory = buffers.take(256).fill_(number)
            wrong.extend(memory[memory != number].tolist())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("travel", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_have_memory_of_their_own(travel):
    buffers = Buffers(host_memory, most=1)
    address = buffers.take(8).data_ptr()
    there = travel(buffers).take(8)
    assert there.data_ptr() != address
    assert buffers.take(8).data_ptr() == address
