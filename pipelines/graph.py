"""The DALI graph: encoded bytes and drawn parameters in, views out. It holds no random state and no position.

On the CPU DALI decodes, and the exact step that is ours (`colour`) makes the views of its pixels inside the graph. It writes them
where the consumer finds them: to copy them from DALI's memory into fresh memory took longer than to make them. On a GPU DALI cuts
out and resizes too, and the same step in torch follows.

For a GPU the box is cut out before the resize: DALI's resize of a box would mix in the pixels around it. And it hands on float32:
rounded to whole levels, views would be up to 6 levels off behind a strong jitter.
"""

import functools
import io
from collections import deque

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
import torch
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.plugin.pytorch import feed_ndarray, to_torch_type
from PIL import Image

from pipelines.colour import colour_batch, colour_rows, view_step_at
from pipelines.memory import BatchMemory
from pipelines.recipes import Recipe
from pipelines.views import ViewParameters, draw_views

AHEAD = 2  # batches in the graph at once: one being made while the other is being used


# The hardware engine's pixels differ slightly from those of nvJPEG's kernels, and DALI would give it a share of each batch:
# then the batch size would decide a patch's pixels. Fancy upsampling of chroma is what libjpeg-turbo does on the CPU.
_GPU_DECODER = {"device": "mixed", "hw_decoder_load": 0.0, "jpeg_fancy_upsampling": True}


def _one_number(outs, ins):
    for i in range(len(outs[0])):
        outs[0][i][0] = 1


@functools.cache
def _view_maker():
    """What DALI runs for each patch. DALI compiles what it is given for every graph anew: 3 s for the step itself, 1 s for a call
    of its address.

    rows: (V, 37), see `colour`; place: address of the patch's first view, bytes from one view to the next, side of a view.
    """
    step_at = view_step_at()

    def make_views(done, image, rows, place):
        for view in range(rows.shape[0]):
            step_at(place[0] + view * place[1], image.ctypes, rows[view].ctypes, place[2], image.shape[0], image.shape[1])
        done[0] = 1

    return make_views


class DaliGraph:
    """Batches of views by DALI: `put` the bytes and parameters of a batch, `get` its views, in the same order.

    device: "cpu", or "cuda" (decoding by nvJPEG and all augmentation on torch's current GPU).
    """

    def __init__(self, *, recipe: Recipe, batch_size: int, image_size: int, device: str, threads: int):
        self.recipe, self.image_size, self.device = recipe, image_size, device
        self._under_way: deque[tuple[np.ndarray, torch.Tensor | None]] = deque()  # rows, and on the CPU where the views go
        # One piece is with the consumer, and when it asks for more, it may still hold that.
        self._memory = BatchMemory(recipe.views * batch_size * 3 * image_size**2, keep=AHEAD + 1)
        self._pipeline = Pipeline(
            batch_size=batch_size,
            num_threads=threads,
            device_id=torch.cuda.current_device() if device == "cuda" else None,
            prefetch_queue_depth=AHEAD,
        )
        with self._pipeline:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            images = fn.decoders.image(
                encoded, output_type=types.RGB, **(_GPU_DECODER if device == "cuda" else {"device": "cpu"})
            )
            if device == "cpu":
                self._pipeline.set_outputs(self._done(images))
            else:
                self._pipeline.set_outputs(*(self._resized(images, view) for view in range(recipe.views)))
        self._warm_up()

    def _done(self, images):
        from nvidia.dali.plugin.numba.fn.experimental import numba_function  # a host with a GPU may do without Numba's part

        return numba_function(
            images,
            fn.external_source(name="rows", dtype=types.FLOAT, ndim=2),
            fn.external_source(name="place", dtype=types.INT64, ndim=1),
            run_fn=_view_maker(),
            setup_fn=_one_number,
            in_types=[types.UINT8, types.FLOAT, types.INT64],
            ins_ndim=[3, 2, 1],
            out_types=[types.UINT8],
            outs_ndim=[1],
            batch_processing=False,
        )

    def _resized(self, images, view):
        start = fn.external_source(name=f"start{view}", dtype=types.INT32, ndim=1)
        end = fn.external_source(name=f"end{view}", dtype=types.INT32, ndim=1)
        return fn.resize(
            fn.slice(images, device="gpu", start=start, end=end, axes=[0, 1]),
            device="gpu",
            size=[self.image_size, self.image_size],
            interp_type=types.INTERP_LINEAR,
            antialias=True,
            dtype=types.FLOAT,
        )

    def _warm_up(self):
        """Take the first AHEAD batches out of the way: DALI starts so many at once, more than a short epoch may have."""
        buffer = io.BytesIO()
        Image.new("RGB", (16, 16)).save(buffer, "JPEG")
        dot = [np.frombuffer(buffer.getvalue(), np.uint8)]
        parameters = draw_views(np.zeros(1, np.int64), seed=0, epoch=0, recipe=self.recipe, sizes=np.array([[16, 16]]))
        for _ in range(AHEAD):
            self._feed(dot, parameters)
        self._pipeline.schedule_run()
        for _ in range(AHEAD):
            self.get()

    def put(self, encoded: list[np.ndarray], parameters: ViewParameters) -> None:
        """Start on a batch of B patches and what was drawn for them. At most AHEAD batches may be under way."""
        assert len(self._under_way) < AHEAD, len(self._under_way)
        self._feed(encoded, parameters)
        self._pipeline.schedule_run()

    def _feed(self, encoded, parameters):
        feed, rows = self._pipeline.feed_input, colour_rows(parameters, self.recipe)
        feed("encoded", encoded)
        views = None
        if self.device == "cpu":
            views = self._memory.take((self.recipe.views, len(rows), 3, self.image_size, self.image_size))
            bytes_of_view, bytes_of_patch = (stride * views.element_size() for stride in views.stride()[:2])
            addresses = views.data_ptr() + bytes_of_patch * np.arange(len(rows), dtype=np.int64)
            feed("rows", rows)
            feed("place", np.stack([addresses, *np.broadcast_to([[bytes_of_view], [self.image_size]], (2, len(rows)))], axis=1))
        else:
            for view in range(self.recipe.views):
                box = parameters.box[:, view]
                feed(f"start{view}", np.ascontiguousarray(box[:, :2]))
                feed(f"end{view}", box[:, :2] + box[:, 2:])
        self._under_way.append((rows, views))

    def get(self) -> torch.Tensor:
        """Wait for the oldest batch: (V, B, 3, S, S) float32 on the device, which nobody else writes to while it is held.

        Raises RuntimeError when DALI cannot decode a patch; the graph is of no use after that: close it.
        """
        outputs = self._pipeline.share_outputs()
        rows, views = self._under_way.popleft()
        try:
            if views is not None:
                return views
            copies = [_copy_of(tensors) for tensors in outputs]
            return torch.stack([colour_batch(copy, rows[:, view]) for view, copy in enumerate(copies)])
        finally:
            self._pipeline.release_outputs()

    @property
    def pending(self) -> int:
        """Batches that were put and not yet got."""
        return len(self._under_way)

    def close(self) -> None:
        """End DALI's threads. Batches under way are given up, and only then the memory that they are written to."""
        self._pipeline._shutdown()  # as when it is deleted, which is some time later: DALI's objects refer to each other
        self._under_way.clear()

    def __del__(self):
        self.close()


def _copy_of(tensors) -> torch.Tensor:
    """DALI's GPU batch as a torch tensor of its own, ordered on torch's current stream."""
    dense = tensors.as_tensor()
    out = torch.empty(dense.shape(), dtype=to_torch_type[dense.dtype], device="cuda")
    feed_ndarray(dense, out, cuda_stream=torch.cuda.current_stream())
    return out
