"""Messages in shared memory, of which the other side may do anything."""

import contextlib
import gc
import mmap
import os
import socket
import struct
import sys
import threading

import pytest
import torch
from torch.utils import _pytree as pytree

from coded_torch._extension import lane
from coded_torch._table import Part, Units
from coded_torch._torch import positional
from coded_torch.workers._base import Task
from coded_torch.workers._shared_memory import PartsInMemory, Pickled, joined, pack, unpack

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is sealed on Linux alone")
WAIT = 60.0
HEADER = struct.Struct("<6q")  # as csrc/lane/connection.h says


class End:
    """One end of a connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.blocks = lane.Blocks()
        self.socket = sock.dup()  # by which it may send anything
        self.connection = lane.Connection(sock.detach(), self.blocks)

    def send(self, number: int = 0, *values: object) -> None:
        messages = [pack(value, self.blocks) for value in values]
        self.connection.send(0, number, *messages)

    def receive(self):
        return self.connection.receive()

    def close(self) -> None:
        self.socket.close()
        self.connection.close()


@pytest.fixture
def ends():
    one, other = map(End, socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
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
    one.send(0, torch.arange(50_000))
    received = other.receive()
    assert len(memories()) == 1  # the receiver keeps none
    for size in (0, 1 << 30):
        with pytest.raises(PermissionError):
            os.ftruncate(memories()[0], size)
    assert torch.equal(unpack(received), torch.arange(50_000))


@pytest.mark.parametrize("kind", ["unsealable", "file", "empty"])
def test_memory_that_refuses_the_seals_is_not_read(ends, kind, tmp_path):
    one, other = ends
    flags = os.O_RDWR | os.O_CREAT
    sealable = os.MFD_ALLOW_SEALING if kind == "empty" else 0
    is_file = kind == "file"
    file = tmp_path / "file"
    descriptor = os.open(file, flags) if is_file else os.memfd_create("coded_torch", sealable)
    before = len(os.listdir("/proc/self/fd"))
    os.ftruncate(descriptor, 0 if kind == "empty" else 1 << 16)
    socket.send_fds(one.socket, [HEADER.pack(0, 0, 100, 0, 1, 0)], [descriptor])
    refusal = r"Operation not permitted|Invalid argument|empty memory"
    with pytest.raises((OSError, ValueError), match=refusal):
        other.receive()
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(descriptor)


@pytest.mark.parametrize("length", [-1, (1 << 17) + 1, 1 << 62])
def test_a_message_longer_than_its_memory_is_not_read(ends, length):
    one, other = ends
    one.send(0, torch.arange(10_000, dtype=torch.float64))
    other.receive()
    number = pack(torch.zeros(1), one.blocks).number
    assert number == -1  # no block: it is short
    block = pack(torch.arange(10_000, dtype=torch.float64), one.blocks).number - 1
    one.socket.send(HEADER.pack(0, 1, length, block, 0, 0))
    with pytest.raises(ValueError, match=f"a message of {length} bytes came in 131072"):
        other.receive()
    one.socket.send(HEADER.pack(0, 1, length, -1, 0, 0) + bytes(8))
    with pytest.raises(ValueError, match=f"a message of {length} bytes came in 8"):
        other.receive()


@pytest.mark.parametrize(
    ("packet", "refusal"),
    [
        (bytes(7), "without a header"),
        (HEADER.pack(0, 0, 0, -1, 0, 1), "other numbers of blocks"),
        (HEADER.pack(0, 0, 0, -1, 0, -1), "other numbers of blocks"),
        (HEADER.pack(0, 0, 0, -1, 0, 1 << 62), "other numbers of blocks"),
        (HEADER.pack(0, 0, 0, -1, 0, 1) + bytes(8), "names block 0, which was not sent"),
        (HEADER.pack(0, 0, 0, 99, 0, 0), "in block 99, which is not known"),
        (HEADER.pack(0, 0, 0, -1, 1, 0), "Too many open files"),
    ],
)
def test_a_packet_that_breaks_the_rules_is_refused(ends, packet, refusal):
    one, other = ends
    one.socket.send(packet)
    with pytest.raises((OSError, ValueError), match=refusal):
        other.receive()
    one.send(5)  # what follows is read
    assert other.receive().number == 5


def test_descriptors_that_nobody_asked_for_are_closed(ends):
    one, other = ends
    before = len(os.listdir("/proc/self/fd"))
    for count in (1, 2, 20):
        some = [one.socket.fileno()] * count
        socket.send_fds(one.socket, [HEADER.pack(0, 7, 0, -1, 0, 0)], some)
        if count < 20:
            assert other.receive().number == 7
        else:
            with pytest.raises(OSError, match="Too many open files"):
                other.receive()
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_message_that_is_not_sent_changes_nothing(ends):
    one, other = ends
    os.set_blocking(one.connection.fileno(), False)
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while sent < 10_000:
            one.send(sent)
            sent += 1
    assert sent < 10_000
    with pytest.raises(BlockingIOError):
        one.send(0, torch.ones(50_000))
    assert [other.receive().number for _ in range(sent)] == [*range(sent)]
    one.send(0, torch.ones(50_000))  # its block comes along
    assert torch.equal(unpack(other.receive()), torch.ones(50_000))


def number_of(blocks, size: int) -> int:
    """The number of the block of the next message of a size."""
    return pack(torch.zeros(size), blocks).number


def test_a_block_is_written_again_once_no_large_tensor_reads_it(ends):
    one, other = ends
    packed = pack((torch.zeros(50_000), torch.ones(3)), one.blocks)
    one.connection.send(0, 0, packed)
    value, small = unpack(other.receive())
    for kept in (True, False):
        other.send()
        one.receive()
        assert (number_of(one.blocks, 50_000) == packed.number) is not kept
        if kept:
            assert torch.equal(value, torch.zeros(50_000))
            del value
    assert torch.equal(small, torch.ones(3))


def test_a_block_that_a_fork_may_read_is_never_written_again(ends):
    one, other = ends
    first = pack(torch.zeros(50_000), one.blocks)
    one.connection.send(0, 0, first)
    value = unpack(other.receive())
    if not (child := os.fork()):
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    del value
    for _ in range(3):
        other.send()
        one.receive()
        again = pack(torch.ones(50_000), one.blocks)
        assert again.number != first.number
        one.connection.send(0, 0, again)
        other.receive()
    del again
    assert len(memories()) == 2


def test_the_last_message_of_a_side_that_left_others_unread_is_read(ends):
    one, other = ends
    one.send()
    other.send(3)
    other.close()
    assert one.receive().number == 3
    assert one.receive() is None


def test_messages_that_nobody_reads_hold_few_blocks(ends):
    one, other = ends
    messages = []
    for i in range(100):
        one.send(i, torch.full((50_000,), float(i)))
        messages.append(other.receive())
        other.send()
        one.receive()
    assert len(memories()) < 40
    assert [float(unpack(message).max()) for message in messages] == list(range(100))


def test_kept_blocks_have_few_bytes():
    blocks = lane.Blocks(most_bytes=1 << 18)
    one, other = map(End, socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    messages = [pack(torch.zeros(count), blocks) for count in (20_000, 20_000, 20_000, 50_000)]
    one.connection = lane.Connection(os.dup(one.socket.fileno()), blocks)
    for message in messages:  # of 128 KB, and one of 256
        one.connection.send(0, 0, message)
        other.receive()
        other.send()
        one.receive()
    assert len(blocks) == 1
    one.close()
    other.close()


@pytest.mark.parametrize(
    "value",
    [
        (True, torch.arange(6.0).view(2, 3)),
        (b"head", None, ((torch.ones(3), torch.zeros(2, dtype=torch.int8)), {})),
        (True, (torch.ones(2, 3).t(), torch.tensor(5))),
        (True, {"a": [torch.ones(2), 3, "text"]}),
        (False, torch.zeros(0, 3)),
        (True, torch.view_as_complex(torch.ones(2, 2)).conj()),
    ],
)
def test_an_object_comes_as_it_was_however_often_its_form_came(ends, value):
    one, other = ends
    for number in range(3):
        one.send(number, value)
        leaves, spec = pytree.tree_flatten(value)
        received, form = pytree.tree_flatten(unpack(other.receive()))
        assert form == spec
        for read, sent in zip(received, leaves, strict=True):
            same = torch.equal(read, sent) if isinstance(sent, torch.Tensor) else read == sent
            assert same


def test_a_tensor_that_an_object_has_twice_is_one_tensor(ends):
    one, other = ends
    for first, second in [(0, 1), (0, 0), (0, 1), (0, 0)]:
        tensors = torch.ones(3), torch.ones(3)
        one.send(0, (True, (tensors[first], tensors[second])))
        _, (left, right) = unpack(other.receive())
        assert (left is right) is (first == second)


def test_a_fork_while_a_package_is_written_does_not_keep_it_writable():
    reading, writing = os.pipe()
    module = torch.nn.Linear(3000, 3000)
    started, over = threading.Event(), threading.Event()
    children = []

    def fork():
        started.set()
        while not over.is_set() and len(children) < 20:
            if not (child := os.fork()):
                os.close(writing)
                os.read(reading, 1)  # until the test is over
                os._exit(0)
            children.append(child)

    thread = threading.Thread(target=fork)
    thread.start()
    assert started.wait(WAIT)
    try:
        for _ in range(10):
            Pickled(module, has_storages=True).message()
    finally:
        over.set()
        thread.join(WAIT)
        os.close(writing)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * len(children)
    os.close(reading)


def test_no_receiver_can_change_a_package_for_the_others(ends):
    one, other = ends
    package = Pickled(torch.ones(3), has_storages=True).message()
    with pytest.raises(PermissionError):
        mmap.mmap(package.descriptor, 0)
    for _ in range(2):
        one.connection.send(0, 0, package)
        tensor = unpack(other.receive())
        assert torch.equal(tensor, torch.ones(3))
        tensor.zero_()  # its own copy


def replied(ends, value):
    """Return what a worker replies that has succeeded, of a form that is known."""
    one, other = ends
    for _ in range(2):
        one.send(0, (True, value))
        received = other.receive()
        unpack(received)
    return received


def joined_of(values, *units, num_units=7, rows=1):
    task = Task([], [], None, num_units, rows, torch.device("cpu"))
    return joined(values, [Units(each) for each in units], task)


NUMBERS = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)) * 9
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.int64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_of_parts_are_joined_bit_for_bit(ends, dtype):
    rows = NUMBERS.to(dtype)
    units = (0, 1, 5), (6,), (2, 3, 4)
    parts = [rows[list(places)] for places in units]
    whole = joined_of([replied(ends, part) for part in parts], *units)
    assert whole.dtype == dtype
    assert torch.equal(whole, rows)
    pairs = [replied(ends, (part, part.to(torch.bool))) for part in parts]
    both = joined_of(pairs, *units)
    assert type(both) is tuple
    assert torch.equal(both[0], rows)
    assert torch.equal(both[1], rows.to(torch.bool))


@pytest.mark.parametrize("asked", [(0, 1, 2, 3), (3, 0), (3, 1, 2)], ids=str)
def test_columns_are_joined_in_their_order(ends, asked):
    columns = NUMBERS[:6].view(3, 2, 3).repeat(2, 1, 1)[:4] + torch.arange(4)[:, None, None]
    values = [replied(ends, columns[column]) for column in asked]
    units = [(column,) for column in asked]
    whole = joined_of(values, *units, num_units=4, rows=2)
    assert torch.equal(whole, columns[sorted(asked)].flatten(0, 1))
    assert joined_of(values, *units, num_units=4, rows=3) is None


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES[:-1], ids=str)
def test_values_that_are_not_finite_are_not_joined(ends, dtype, odd):
    for place in ((0, 0), (3, 1), (6, 2)):
        rows = NUMBERS.to(dtype)
        rows[place] = odd
        values = [replied(ends, rows[:4]), replied(ends, rows[4:])]
        assert joined_of(values, range(4), range(4, 7)) is None
    most = torch.full((7, 3), torch.finfo(dtype).max, dtype=dtype)
    values = [replied(ends, most[:4]), replied(ends, most[4:])]
    assert torch.equal(joined_of(values, range(4), range(4, 7)), most)


@pytest.mark.parametrize(
    "other",
    [
        NUMBERS[:2],
        NUMBERS[:3, :2],
        NUMBERS[:3].double(),
        (NUMBERS[:3],),
        ((NUMBERS[:3],), NUMBERS[:3]),
        NUMBERS[0, 0],
        [NUMBERS[:3]],
        "text",
    ],
    ids=str,
)
def test_values_of_other_forms_are_not_joined(ends, other):
    values = [replied(ends, NUMBERS[:4]), replied(ends, other)]
    for order in (1, -1):
        units = (range(4), range(4, 7))[::order]
        assert joined_of(values[::order], *units) is None


def test_a_value_in_a_message_that_is_too_short_is_not_joined(ends):
    one, other = ends
    whole = replied(ends, NUMBERS[:4])
    stream = replied(ends, NUMBERS[4:]).pickle
    for behind in (0, 8):  # bytes
        one.socket.send(HEADER.pack(0, 0, len(stream), -1, 0, 0) + stream + bytes(behind))
        short = other.receive()
        assert joined_of([whole, short], range(4), range(4, 7)) is None
        with pytest.raises(ValueError, match="buffer"):
            unpack(short)


def test_parts_in_memory_are_as_parts_that_are_packed(ends):
    one, other = ends
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    shared = torch.arange(3)
    spec = positional(2)[0]
    task = Task([x, shared], [0, None], spec, 9, 1, x.device)
    parts = PartsInMemory(task, b"head")
    for units in ((0, 1, 2), (0, 4, 8), (3, 4, 7), Units((5, 6, 7)), (8,)):
        message = parts.message(Part(0, units), one.blocks)
        one.connection.send(0, 0, message)
        head, fault, ((rows, whole), named) = unpack(other.receive())
        assert (head, fault, named) == (b"head", None, {})
        assert torch.equal(rows, x[list(units)])
        assert torch.equal(whole, shared)
    for units in ((9,), (-1,), (7, 8, 9)):
        with pytest.raises(ValueError, match="there is no such unit"):
            parts.message(Part(0, units), one.blocks)


@pytest.mark.parametrize(
    "leaves",
    [
        [torch.zeros(9, 4).T.contiguous().T],
        [torch.zeros(9, 0)],
        [torch.zeros(9, dtype=torch.complex64).conj()],
        [torch.nn.Parameter(torch.zeros(9, 2))],
        [1, torch.zeros(9)],
    ],
    ids=str,
)
def test_parts_of_other_leaves_have_to_be_packed(leaves):
    spec = positional(len(leaves))[0]
    dims = [0 if isinstance(x, torch.Tensor) else None for x in leaves]
    task = Task(leaves, dims, spec, 9, 1, torch.device("cpu"))
    assert PartsInMemory(task, b"").message(Part(0, (0,)), lane.Blocks()) is None
