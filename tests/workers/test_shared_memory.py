"""Messages in shared memory, of which the other side may do anything."""

import gc
import mmap
import os
import socket
import sys

import pytest
import torch

from coded_torch.workers import shared_memory
from coded_torch.workers.shared_memory import _HEADER, Block, Blocks, Connection, Package, Pickled

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is sealed on Linux alone")
WAIT = 60.0


@pytest.fixture
def ends():
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    one, other = (Connection(each, Blocks()) for each in pair)
    yield one, other
    one.close()
    other.close()


def memories() -> list[int]:
    """The descriptors of this process that are shared memory of messages."""
    gc.collect()  # pools of other tests
    names = {int(n): f"/proc/self/fd/{n}" for n in os.listdir("/proc/self/fd")}
    return [n for n, at in names.items() if os.path.exists(at) and "memfd:coded" in os.readlink(at)]


def test_neither_side_can_change_the_size_of_the_memory(ends):
    one, other = ends
    one.send(0, 0, Pickled(torch.arange(50_000), one.blocks))
    *_, read = other.receive()
    assert len(memories()) == 3  # the mapping of the sender has a descriptor of its own
    for descriptor in memories():
        for size in (0, 1 << 30):
            with pytest.raises(PermissionError):
                os.ftruncate(descriptor, size)
    assert torch.equal(read(), torch.arange(50_000))


@pytest.mark.parametrize("kind", ["unsealable", "file"])
def test_memory_that_refuses_the_seals_is_not_read(ends, kind, tmp_path):
    one, other = ends
    flags = os.O_RDWR | os.O_CREAT
    is_file = kind == "file"
    descriptor = os.open(tmp_path / "file", flags) if is_file else os.memfd_create("coded_torch")
    before = len(os.listdir("/proc/self/fd"))
    os.ftruncate(descriptor, 1 << 16)
    socket.send_fds(one.socket, [_HEADER.pack(0, 0, 100, 0, 1, 0)], [descriptor])
    with pytest.raises(OSError, match=r"Operation not permitted|Invalid argument"):
        other.receive()
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(descriptor)


@pytest.mark.parametrize("length", [-1, (1 << 17) + 1, 1 << 62])
def test_a_message_longer_than_its_memory_is_not_read(ends, length):
    one, other = ends
    packed = Pickled(torch.arange(10_000), one.blocks)
    one.send(0, 0, packed)
    other.receive()
    one.socket.send(_HEADER.pack(0, 1, length, packed.block.number, 0, 0))
    with pytest.raises(ValueError, match=f"a message of {length} bytes came in 131072"):
        other.receive()
    one.socket.send(_HEADER.pack(0, 1, length, -1, 0, 0) + bytes(8))
    with pytest.raises(ValueError, match=f"a message of {length} bytes came in 8"):
        other.receive()


def test_a_block_is_written_again_once_no_large_tensor_reads_it(ends):
    one, other = ends
    packed = Pickled((torch.zeros(50_000), torch.ones(3)), one.blocks)
    one.send(0, 0, packed)
    value, small = other.receive()[2]()
    for kept in (True, False):
        other.send(0, 0)
        one.receive()
        again = Pickled(torch.ones(50_000), one.blocks)
        assert (again.block is packed.block) is not kept
        if kept:
            assert torch.equal(value, torch.zeros(50_000))
            del value
    assert torch.equal(small, torch.ones(3))


def test_a_block_that_a_fork_may_read_is_never_written_again(ends):
    one, other = ends
    first = Pickled(torch.zeros(50_000), one.blocks)
    one.send(0, 0, first)
    value = other.receive()[2]()
    if not (child := os.fork()):
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    del value
    for _ in range(3):
        other.send(0, 0)
        one.receive()
        again = Pickled(torch.ones(50_000), one.blocks)
        assert again.block is not first.block
        one.send(0, 0, again)
        other.receive()
    assert len(memories()) == 6  # two blocks, each with two mappings


def test_the_last_message_of_a_side_that_left_others_unread_is_read(ends):
    one, other = ends
    one.send(0, 0)
    other.send(7, 3)
    other.close()
    assert one.receive()[:2] == (7, 3)
    assert one.receive() is None


def test_messages_that_nobody_reads_hold_few_blocks(ends):
    one, other = ends
    messages = []
    for i in range(100):
        one.send(0, i, Pickled(torch.full((50_000,), float(i)), one.blocks))
        messages.append(other.receive())
        other.send(0, 0)
        one.receive()
    assert len(memories()) < 40
    assert [float(message[2]().max()) for message in messages] == list(range(100))


def test_kept_blocks_have_few_bytes(monkeypatch):
    monkeypatch.setattr(shared_memory, "_MOST_BYTES", 1 << 18)
    blocks = Blocks()
    for size in (1 << 16, 1 << 16, 1 << 17, 1 << 18):
        shared_memory._keep(blocks, size, Block(size))
    assert [*blocks] == [1 << 18]


def test_a_fork_while_a_package_is_written_does_not_keep_it_writable():
    reading, writing = os.pipe()
    children = []

    class Forking(Pickled):
        def write(self, memory):
            super().write(memory)
            if not (child := os.fork()):
                os.close(writing)
                os.read(reading, 1)  # until the test is over
                os._exit(0)
            children.append(child)

    Package(Forking(torch.ones(3)))
    os.close(writing)
    assert [os.waitpid(child, 0)[1] for child in children] == [0]
    os.close(reading)


def test_no_receiver_can_change_a_package_for_the_others(ends):
    one, other = ends
    package = Package(Pickled(torch.ones(3)))
    with pytest.raises(PermissionError):
        mmap.mmap(package.descriptor, 0)
    for _ in range(2):
        one.send(0, 0, package)
        tensor = other.receive()[2]()
        assert torch.equal(tensor, torch.ones(3))
        tensor.zero_()  # its own copy
