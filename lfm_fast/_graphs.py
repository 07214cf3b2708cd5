"""A CUDA graph of a function: recorded once, replayed in one launch. Never run on a GPU so far, so nothing takes it
unless asked to.

Replaying runs the same kernels on the same memory, so that the function has to read what changes from tensors that
stay where they are, read nothing back from the device, and depend on nothing else that changes.
"""

import torch

WARM_UPS = 3  # calls before recording: libraries start, kernels are chosen and measured, tables are made


def why_not(device):
    """Why there are no CUDA graphs on a device, as a sentence without full stop, or None."""
    return None if device.type == "cuda" else f"a CUDA graph needs a CUDA device, and this is a {device.type}"


class CudaGraph:
    """`function()` recorded on a CUDA device: calling it does again what the function did, and returns what that had
    returned, whose memory the next replay writes again.

    warm_up: called beforehand in its place, where the function itself would leave traces. pool: memory to share with
    other graphs (`torch.cuda.graph_pool_handle`), of which one at a time is replayed and its results are used.

    Raises RuntimeError where the function does what no graph can hold, such as reading a value back.
    """

    def __init__(self, function, device, warm_up=None, pool=None):
        with torch.cuda.device(device):
            before, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(before)
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    (warm_up or function)()
            before.wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            try:
                # another thread, one that reads images ahead, may go on allocating meanwhile
                with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
                    self._result = function()
            except RuntimeError as error:
                raise RuntimeError(
                    f"A CUDA graph cannot hold this: {str(error).partition(chr(10))[0].rstrip('.')}; do without it."
                ) from error

    def __call__(self):
        self._graph.replay()
        return self._result


def new_pool(device):
    """Memory that graphs of one device share."""
    with torch.cuda.device(device):
        return torch.cuda.graph_pool_handle()
