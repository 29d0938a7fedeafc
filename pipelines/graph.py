"""The DALI graph: encoded bytes and drawn parameters in, views out. It holds no random state and no position.

Decoding, crop with resize, and flip are DALI's operators, which equal torchvision's; the colour step is ours (`colour`).
On the CPU it runs inside the graph. On a GPU the graph ends with uint8 pixels and the torch colour step follows.
"""

import io
from collections import deque

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
import torch
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.plugin.numba.fn.experimental import numba_function
from PIL import Image

from pipelines.colour import ROW, colour_batch, colour_step
from pipelines.views import ViewParameters

AHEAD = 2  # batches in the graph at once: one being made while the other is being used


def _colour_shapes(outs, ins):
    for i in range(len(outs[0])):
        outs[0][i][0] = 3
        outs[0][i][1] = ins[0][i][0]
        outs[0][i][2] = ins[0][i][1]


def _colour(out, image, row):
    colour_step(out, image, row)  # DALI compiles what it is given, so it is given this and not the compiled step


class DaliGraph:
    """Batches of views by DALI: `put` the bytes and parameters of a batch, `get` its views, in the same order.

    device: "cpu", or "cuda" (decoding by nvJPEG and all augmentation on torch's current GPU).
    """

    def __init__(self, *, views: int, batch_size: int, image_size: int, device: str, threads: int):
        self.views, self.image_size, self.device = views, image_size, device
        self._rows: deque[np.ndarray] = deque()
        place = "gpu" if device == "cuda" else "cpu"
        self._pipeline = Pipeline(
            batch_size=batch_size,
            num_threads=threads,
            device_id=torch.cuda.current_device() if device == "cuda" else None,
            prefetch_queue_depth=AHEAD,
        )
        with self._pipeline:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            images = fn.decoders.image(encoded, device="mixed" if device == "cuda" else "cpu", output_type=types.RGB)
            outputs = []
            for view in range(views):
                x = fn.resize(
                    images,
                    device=place,
                    size=[image_size, image_size],
                    roi_start=fn.external_source(name=f"start{view}", dtype=types.FLOAT, ndim=1),
                    roi_end=fn.external_source(name=f"end{view}", dtype=types.FLOAT, ndim=1),
                    interp_type=types.INTERP_LINEAR,
                    antialias=True,
                )
                x = fn.flip(x, device=place, horizontal=fn.external_source(name=f"flip{view}", dtype=types.INT32, ndim=0))
                if device == "cpu":
                    x = numba_function(
                        x,
                        fn.external_source(name=f"colour{view}", dtype=types.FLOAT, ndim=1),
                        run_fn=_colour,
                        setup_fn=_colour_shapes,
                        in_types=[types.UINT8, types.FLOAT],
                        ins_ndim=[3, 1],
                        out_types=[types.FLOAT],
                        outs_ndim=[3],
                        batch_processing=False,
                    )
                outputs.append(x)
            self._pipeline.set_outputs(*outputs)
        self._warm_up(views)

    def _warm_up(self, views):
        """Take the first AHEAD batches out of the way: DALI starts so many at once, more than a short epoch may have."""
        buffer = io.BytesIO()
        Image.new("RGB", (16, 16)).save(buffer, "JPEG")
        dot = [np.frombuffer(buffer.getvalue(), np.uint8)]
        whole = np.tile(np.array([0, 0, 16, 16], np.int32), (1, views, 1))
        none = np.full((1, views, 4), -1, np.int8)
        no = np.zeros((1, views), bool)
        parameters = ViewParameters(whole, no, none, np.zeros((1, views, 4), np.float32), no)
        rows = np.full((1, views, ROW), -1, np.float32)
        for _ in range(AHEAD):
            self._feed(dot, parameters, rows)
        self._pipeline.schedule_run()
        for _ in range(AHEAD):
            self.get()

    def put(self, encoded: list[np.ndarray], parameters: ViewParameters, rows: np.ndarray) -> None:
        """Start on a batch. rows: (B, V, 15) of `colour.colour_rows`. At most AHEAD batches may be under way."""
        assert len(self._rows) < AHEAD and rows.shape == (len(encoded), self.views, ROW), (len(self._rows), rows.shape)
        self._feed(encoded, parameters, rows)
        self._pipeline.schedule_run()

    def _feed(self, encoded, parameters, rows):
        feed = self._pipeline.feed_input
        feed("encoded", encoded)
        for view in range(self.views):
            box = parameters.box[:, view].astype(np.float32)
            feed(f"start{view}", np.ascontiguousarray(box[:, :2]))
            feed(f"end{view}", np.ascontiguousarray(box[:, :2] + box[:, 2:]))
            feed(f"flip{view}", parameters.flip[:, view].astype(np.int32))
            if self.device == "cpu":
                feed(f"colour{view}", np.ascontiguousarray(rows[:, view]))
        self._rows.append(rows)

    def get(self) -> torch.Tensor:
        """Wait for the oldest batch: (V, B, 3, S, S) float32 on the device, the caller's own memory.

        Raises RuntimeError when DALI cannot decode a patch; the graph is of no use after that.
        """
        rows = self._rows.popleft()
        outputs = self._pipeline.share_outputs()
        try:
            if self.device == "cpu":
                views = torch.empty((self.views, len(rows), 3, self.image_size, self.image_size))
                for view, tensors in enumerate(outputs):
                    views[view].numpy()[...] = np.asarray(tensors.as_tensor())
                return views
            return torch.stack([colour_batch(_copy_of(tensors), rows[:, view]) for view, tensors in enumerate(outputs)])
        finally:
            self._pipeline.release_outputs()

    @property
    def pending(self) -> int:
        """Batches that were put and not yet got."""
        return len(self._rows)


def _copy_of(tensors) -> torch.Tensor:
    """DALI's GPU batch as a torch tensor of its own, ordered on torch's current stream."""
    from nvidia.dali.plugin.pytorch import feed_ndarray

    dense = tensors.as_tensor()
    out = torch.empty(dense.shape(), dtype=torch.uint8, device="cuda")
    feed_ndarray(dense, out, cuda_stream=torch.cuda.current_stream())
    return out
