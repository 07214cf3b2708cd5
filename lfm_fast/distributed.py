"""Ranks: who this process is, and the few collective operations that training and sampling need.

One process started by plain `python` is a world of one rank and touches no process group. Started by torchrun, ranks
talk over NCCL (CUDA) or gloo (CPU); small control messages always go over gloo, so that they never wait for the GPU.
Work is split by *sample number*: a rank takes a contiguous slice of the numbers, and since every random draw depends
on the number alone, any world size makes the same samples.
"""

import contextlib
import gc
import os
import pickle
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

CONTROL_TIMEOUT = timedelta(days=7)  # rank 0 may encode a whole data set; torchrun ends everybody if it dies
MEETING_TIMEOUT = timedelta(minutes=30)  # machines of a cluster start one by one

# Of all that gloo, NCCL and PyTorch's store complain of, what says that nobody answers at the other end
_GONE = ("Connection closed", "Connection reset", "Connection refused", "Connection was likely closed", "Broken pipe")
_GONE += ("aborted", "Timed out", "timed out", "wait timeout", "timeout caused pair closure", "remote process exit")


class PeerLost(RuntimeError):
    """Another rank has ended before its part was done: killed, or by an error of its own.

    `then` is what to do about it.
    """

    def __init__(self, then=None):
        super().__init__("another rank has ended before its part was done" + (f"; {then}" if then else ""))


def is_of_lost_peer(error: RuntimeError) -> bool:
    """Whether these are the transport's words for a rank that is not there any more: gloo's, NCCL's, or ours.

    Its other complaints, as of two ranks on one GPU or of other sizes, are causes that must be seen.
    """
    return isinstance(error, PeerLost) or (_is_of_transport(error) and any(words in str(error) for words in _GONE))


def _is_of_transport(error):
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


@dataclass
class World:
    """This process among its peers. `control` is the gloo group, None in a world of one."""

    rank: int = 0
    size: int = 1
    local_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    control: object = None

    @property
    def is_main(self):
        return self.rank == 0

    def bounds(self, count):
        """First and one-past-last position of this rank's slice of `count` items: contiguous, sizes within one."""
        return count * self.rank // self.size, count * (self.rank + 1) // self.size

    def shard(self, count, first=0):
        """The numbers first .. first + count - 1 that are this rank's: (n,) int64 on the CPU."""
        start, stop = self.bounds(count)
        return torch.arange(first + start, first + stop, dtype=torch.int64)

    def barrier(self):
        if self.size > 1:
            with _exchange():
                dist.barrier(group=self.control)

    def sum(self, tensor):
        """The sum of `tensor` over all ranks, the same on each; summed on the CPU."""
        if self.size == 1:
            return tensor
        total = tensor.detach().cpu().clone()
        with _exchange():
            dist.all_reduce(total, group=self.control)
        return total.to(tensor.device)

    def gather(self, tensor):
        """Every rank's (n_r, ...) joined along the first axis in rank order, (sum n_r, ...) on the CPU of each rank."""
        if self.size == 1:
            return tensor.detach().cpu()
        own = tensor.detach().cpu()
        counts = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with _exchange():
            dist.all_gather(counts, torch.tensor([own.shape[0]]), group=self.control)
        longest = max(int(count) for count in counts)
        padded = torch.zeros(longest, *own.shape[1:], dtype=own.dtype)
        padded[: own.shape[0]] = own
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        with _exchange():
            dist.all_gather(parts, padded, group=self.control)
        return torch.cat([part[: int(count)] for part, count in zip(parts, counts)])

    def from_main(self, make):
        """What `make()` returned on rank 0, on every rank. An error there is raised on every rank, so none waits."""
        if self.size == 1:
            return make()
        box = [None, None]
        if self.is_main:
            try:
                box[0] = make()
            except Exception as error:
                box[1] = error
            box[1] = box[1] and _portable(box[1])
        with _exchange():
            dist.broadcast_object_list(box, src=0, group=self.control)
        if box[1] is not None:
            raise box[1]
        return box[0]

    def main_first(self, make):
        """`make()` of every rank, after rank 0's: a note or a file that it leaves there saves the others their work."""
        made = []
        self.from_main(lambda: made.append(make()))
        return made[0] if made else make()

    def gather_objects(self, value):
        """Every rank's `value`, anything that pickles, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        with _exchange():
            dist.all_gather_object(values, value, group=self.control)
        return values

    def spread(self, work, count):
        """[work(0), ..., work(count - 1)] on every rank; rank r makes those of r, r + size, r + 2 size, ...

        An error ends the share of the rank that meets it, and is raised on every rank when all others have made theirs.
        """
        made, error = {}, None
        try:
            for number in range(self.rank, count, self.size):
                made[number] = work(number)
        except Exception as problem:
            error = problem
        parts = self.gather_objects((made, error and self.size > 1 and _portable(error)))
        if error is not None:
            raise error
        for part, problem in parts:
            made |= part
            if problem:
                raise problem
        return [made[number] for number in range(count)]

    def vote(self, ballot):
        """A started, not yet awaited sum of every rank's bool: call `.result()` for whether any said yes."""
        return Vote(self, bool(ballot))

    def close(self):
        """Leave the process group, and let nothing keep it: gloo's threads must end before the interpreter does.

        A thread that still holds a tensor then and wants to let it go aborts the process (status -6) after its work.
        """
        if self.size > 1 and dist.is_initialized():
            self.control = None
            gc.collect()  # DistributedDataParallel is part of a cycle and holds the group
            dist.destroy_process_group()


@contextlib.contextmanager
def _exchange():
    """The transport's words for a rank that is not there any more, in ours; any other error stays as it is."""
    try:
        yield
    except RuntimeError as error:
        if not is_of_lost_peer(error):
            raise
        raise PeerLost() from error


def _portable(error):
    """`error`, or what it says in an error that another process can be sent."""
    with contextlib.suppress(Exception):
        if str(pickle.loads(pickle.dumps(error))) == str(error):
            return error
    return RuntimeError(f"{type(error).__name__}: {error}")


class Vote:
    """An all-reduce in flight. Awaiting it one step later costs nothing and gives every rank the same answer."""

    def __init__(self, world, ballot):
        self.count, self.work = torch.tensor([int(ballot)]), None
        if world.size > 1:
            with _exchange():
                self.work = dist.all_reduce(self.count, group=world.control, async_op=True)

    def result(self):
        if self.work is not None:
            with _exchange():
                self.work.wait()
            self.work = None
        return bool(self.count)


def start(device="auto"):
    """Join the world torchrun describes in the environment (or be the only rank) and return the `World`.

    `device` is "auto" (CUDA where there is one), "cuda" or "cpu". Raises ValueError for a device that is not there.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", size))
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise ValueError("device is cuda, but this PyTorch sees no CUDA device; use --device cpu")
    if cuda and device != "cpu":
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"{local_size} ranks were started here but there are {torch.cuda.device_count()} CUDA devices; "
                "start one rank per device (torchrun --nproc-per-node)"
            )
        chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)
    else:
        chosen = torch.device("cpu")
    _set_threads(local_size)
    world = World(rank=rank, size=size, local_size=local_size, device=chosen)
    if size > 1:
        meeting = None if dist.is_initialized() else _meet(size, gloo=chosen.type == "cpu")
        world.control = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
        if meeting is not None:  # all are past it, since all are in the other; a peer is a socket of each
            dist.destroy_process_group(meeting)
    return world


def _meet(size, gloo):
    """Join the process group of all ranks; returns the group made for that alone, None with gloo.

    Raises OSError where they do not all come in time, and leaves no group behind.
    """
    try:
        dist.init_process_group("gloo" if gloo else "nccl", timeout=MEETING_TIMEOUT if gloo else None)
        # NCCL meets at its first use; this wait is for all who come to be there for the group that waits for days
        meeting = None if gloo else dist.new_group(backend="gloo", timeout=MEETING_TIMEOUT)
        dist.barrier(group=meeting or dist.group.WORLD)
    except RuntimeError as error:
        if dist.is_initialized():
            dist.destroy_process_group()
        if not _is_of_transport(error):
            raise
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        said = str(error).partition("\n")[0]
        raise OSError(f"the {size} ranks have not all met at {place}; start all of them again ({said})") from error
    return meeting


def _set_threads(local_size):
    """Give each rank its share of this machine's cores, unless the user said otherwise.

    torchrun sets OMP_NUM_THREADS=1 for several ranks where the user set nothing, so under it a 1 is no wish.
    """
    wish = os.environ.get("OMP_NUM_THREADS")
    from_torchrun = "TORCHELASTIC_RUN_ID" in os.environ and local_size > 1 and wish == "1"
    if local_size > 1 and (wish is None or from_torchrun):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // local_size))
