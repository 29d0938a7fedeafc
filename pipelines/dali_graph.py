"""The DALI graph: encoded images and drawn parameters in, views out. It holds no random state and no position.

On the CPU, DALI decodes and then calls our kernels (`view_kernels_numba`), which write each view straight into the tensor that
the consumer gets: copying views out of DALI's memory took longer than making them. On a GPU, DALI decodes, crops and resizes, and
`view_kernels_torch` does the rest.

DALI's resize needs help to match torchvision, which ignores what lies outside the box. Resizing with a region of interest mixes
in the pixels around the box; resizing a cropped box repeats its border when it shrinks, which is up to 15 levels off. So the box
is padded with zeros, and the result is divided by the weights that fell inside. The result stays float32: rounding to whole
levels would put views up to 6 levels off after a strong jitter.
"""

import functools
import io
from collections import deque

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
import torch
from nvidia.dali.pipeline import Pipeline
from PIL import Image

from pipelines.buffer_pool import BatchMemory
from pipelines.recipes import Recipe
from pipelines.view_kernels_numba import parameter_rows, view_step_at
from pipelines.view_kernels_torch import box_sizes, inside_weights, resize_margin, resized_view_batch
from pipelines.views import ViewParameters, draw_views

AHEAD = 2  # batches in the graph at once: one being made while the other is being used


# The hardware engine's pixels differ slightly from those of nvJPEG's kernels, and DALI would give it a share of each batch:
# then the batch size would decide a patch's pixels. Fancy upsampling of chroma is what libjpeg-turbo does on the CPU.
_GPU_DECODER = {"device": "mixed", "hw_decoder_load": 0.0, "jpeg_fancy_upsampling": True}


def _one_number(outs, ins):
    for i in range(len(outs[0])):
        outs[0][i][0] = 1


@functools.cache
def _view_operator():
    """The operator that DALI runs for each patch. Created once, since DALI compiles each operator's function: 1.5 s for a call by
    address, 3 s for the kernels themselves.

    rows: (V, COLUMNS), see `view_kernels_numba`; place: address of the patch's first view, bytes from one view to the next, S.
    """
    from nvidia.dali.plugin.numba import NumbaFunction  # not needed on a GPU

    step_at = view_step_at()

    def make_views(done, image, rows, place):
        done[0] = 1
        for view in range(rows.shape[0]):
            at = place[0] + view * place[1]
            done[0] &= step_at(at, image.ctypes, rows[view].ctypes, place[2], image.shape[0], image.shape[1])

    return NumbaFunction(
        run_fn=make_views,
        setup_fn=_one_number,
        in_types=[types.UINT8, types.FLOAT, types.INT64],
        ins_ndim=[3, 2, 1],
        out_types=[types.UINT8],
        outs_ndim=[1],
        batch_processing=False,
    )


class DaliGraph:
    """Batches of views by DALI: `put` the bytes and parameters of a batch, `get` its views, in the same order.

    device: "cpu", or "cuda" (decoding by nvJPEG and all augmentation on torch's current GPU).
    step: which kernels make the views, "numba" (CPU) or "torch" (both; on a CPU it is slow and shows what a GPU computes).
    """

    def __init__(self, *, recipe: Recipe, batch_size: int, image_size: int, device: str, threads: int, step: str | None = None):
        self.recipe, self.image_size, self.device = recipe, image_size, device
        self.step = step or ("numba" if device == "cpu" else "torch")
        assert self.step == "torch" or (self.step == "numba" and device == "cpu"), (step, device)
        self._in_flight: deque[tuple[np.ndarray, torch.Tensor | None]] = deque()  # rows, and on the CPU the views' tensor
        # The consumer may still hold one batch when it asks for the next.
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
            if self.step == "numba":
                self._pipeline.set_outputs(self._done(images))
            else:
                self._pipeline.set_outputs(*(self._resized(images, view) for view in range(recipe.views)))
        self._warm_up()

    def _done(self, images):
        rows = fn.external_source(name="rows", dtype=types.FLOAT, ndim=2)
        return _view_operator()(images, rows, fn.external_source(name="place", dtype=types.INT64, ndim=1))

    def _resized(self, images, view):
        place = "gpu" if self.device == "cuda" else "cpu"

        def drawn(name, dtype=types.INT32):
            return fn.external_source(name=f"{name}{view}", dtype=dtype, ndim=1)

        box = fn.slice(images, device=place, start=drawn("start"), end=drawn("end"), axes=[0, 1])
        widened = {"start": drawn("wide_start"), "end": drawn("wide_end"), "axes": [0, 1]}
        return fn.resize(
            fn.slice(box, device=place, out_of_bounds_policy="pad", fill_values=0, **widened),
            device=place,
            size=[self.image_size, self.image_size],
            roi_start=drawn("roi_start", types.FLOAT),
            roi_end=drawn("roi_end", types.FLOAT),
            interp_type=types.INTERP_LINEAR,
            antialias=True,
            dtype=types.FLOAT,
        )

    def _warm_up(self):
        """Run AHEAD dummy batches: DALI starts this many at once, more than a short epoch may have."""
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
        """Start a batch of B patches with their parameters. At most AHEAD batches may be in flight.

        If anything is raised, the graph is closed: DALI would join the part of the batch that it has with the next one.
        """
        assert len(self._in_flight) < AHEAD, len(self._in_flight)
        try:
            self._feed(encoded, parameters)
            self._pipeline.schedule_run()
        except BaseException:
            self.close()
            raise

    def _feed(self, encoded, parameters):
        feed, rows = self._pipeline.feed_input, parameter_rows(parameters, self.recipe)
        views = None
        if self.step == "numba":
            views = self._memory.take((self.recipe.views, len(rows), 3, self.image_size, self.image_size))
        self._in_flight.append((rows, views))  # before DALI has the address: the memory must not return to the pool
        feed("encoded", encoded)
        if views is not None:
            bytes_of_view, bytes_of_patch = (stride * views.element_size() for stride in views.stride()[:2])
            addresses = views.data_ptr() + bytes_of_patch * np.arange(len(rows), dtype=np.int64)
            feed("rows", rows)
            feed("place", np.stack([addresses, *np.broadcast_to([[bytes_of_view], [self.image_size]], (2, len(rows)))], axis=1))
        else:
            for view in range(self.recipe.views):
                top_left, size = parameters.box[:, view, :2], parameters.box[:, view, 2:]
                margin = resize_margin(size, self.image_size)
                feed(f"start{view}", np.ascontiguousarray(top_left))
                feed(f"end{view}", top_left + size)
                feed(f"wide_start{view}", -margin)
                feed(f"wide_end{view}", size + margin)
                feed(f"roi_start{view}", margin.astype(np.float32))
                feed(f"roi_end{view}", (size + margin).astype(np.float32))

    def get(self) -> torch.Tensor:
        """Wait for the oldest batch: (V, B, 3, S, S) float32 on the device, whose memory is not reused while it is referenced.

        Raises RuntimeError if a patch cannot be decoded or lacks a part of a box; the graph is then unusable and must be closed.
        """
        # On a GPU the host does not wait: torch's stream waits for DALI's, and DALI reuses its memory after torch's stream.
        outputs = self._pipeline.share_outputs(torch.cuda.current_stream() if self.device == "cuda" else None)
        rows, views = self._in_flight.popleft()
        try:
            if views is not None:
                if not (done := np.asarray(outputs[0].as_tensor())).all():
                    raise RuntimeError(f"image {done.argmin()} of the batch is smaller than the box to crop from it")
                return views
            return torch.stack([self._finished(sums, rows[:, view]) for view, sums in enumerate(outputs)])
        finally:
            self._pipeline.release_outputs()

    def _finished(self, sums, rows_BR):
        sums_BSS3 = torch.from_dlpack(sums.as_tensor())  # DALI's own memory, which the first operation reads from
        down_BS, across_BS = inside_weights(box_sizes(rows_BR), self.image_size, sums_BSS3.device)
        return resized_view_batch(sums_BSS3 / down_BS[:, :, None, None] / across_BS[:, None, :, None], rows_BR)

    @property
    def pending(self) -> int:
        """Number of batches in flight."""
        return len(self._in_flight)

    @property
    def is_closed(self) -> bool:
        return self._pipeline._pipe is None

    def close(self) -> None:
        """End DALI's threads, dropping batches in flight; only then free the memory that they are written to."""
        self._pipeline._shutdown()  # what deletion does, but DALI's reference cycles delay that
        self._in_flight.clear()

    def __del__(self):
        if "_pipeline" in vars(self):  # __init__ succeeded
            self.close()
