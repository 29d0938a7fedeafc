"""The DALI graph: encoded bytes and drawn parameters in, views out. It holds no random state and no position.

Decoding, crop with resize, flip and normalising are DALI's operators, which equal torchvision's; the colour step is ours
(`colour`). On the CPU it runs inside the graph. On a GPU the graph ends with uint8 pixels and the torch colour step follows.
A recipe without colours does without that step: DALI alone makes its views.
"""

import io
from collections import deque

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
import torch
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.plugin.pytorch import feed_ndarray, to_torch_type
from PIL import Image

from pipelines.colour import colour_batch, colour_rows, colour_step
from pipelines.recipes import Recipe
from pipelines.views import ViewParameters, draw_views

AHEAD = 2  # batches in the graph at once: one being made while the other is being used


# The hardware engine's pixels differ slightly from those of nvJPEG's kernels, and DALI would give it a share of each batch:
# then the batch size would decide a patch's pixels. Fancy upsampling of chroma is what libjpeg-turbo does on the CPU.
_GPU_DECODER = {"device": "mixed", "hw_decoder_load": 0.0, "jpeg_fancy_upsampling": True}


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

    def __init__(self, *, recipe: Recipe, batch_size: int, image_size: int, device: str, threads: int):
        self.recipe, self.image_size, self.device = recipe, image_size, device
        self._rows: deque[np.ndarray] = deque()
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
            self._pipeline.set_outputs(*(self._view(images, view) for view in range(recipe.views)))
        self._warm_up()

    def _view(self, images, view):
        place = "gpu" if self.device == "cuda" else "cpu"
        x = fn.resize(
            images,
            device=place,
            size=[self.image_size, self.image_size],
            roi_start=fn.external_source(name=f"start{view}", dtype=types.FLOAT, ndim=1),
            roi_end=fn.external_source(name=f"end{view}", dtype=types.FLOAT, ndim=1),
            interp_type=types.INTERP_LINEAR,
            antialias=True,
        )
        flip = fn.external_source(name=f"flip{view}", dtype=types.INT32, ndim=0)
        if not self.recipe.has_colour:
            return fn.crop_mirror_normalize(
                x,
                device=place,
                mirror=flip,
                mean=[255 * value for value in self.recipe.mean],
                std=[255 * value for value in self.recipe.std],
                dtype=types.FLOAT,
                output_layout="CHW",
            )
        x = fn.flip(x, device=place, horizontal=flip)
        if self.device == "cuda":
            return x
        from nvidia.dali.plugin.numba.fn.experimental import numba_function  # a host with a GPU may do without Numba's part

        return numba_function(
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
        assert len(self._rows) < AHEAD, len(self._rows)
        self._feed(encoded, parameters)
        self._pipeline.schedule_run()

    def _feed(self, encoded, parameters):
        feed, rows = self._pipeline.feed_input, colour_rows(parameters, self.recipe)
        feed("encoded", encoded)
        for view in range(self.recipe.views):
            box = parameters.box[:, view].astype(np.float32)
            feed(f"start{view}", np.ascontiguousarray(box[:, :2]))
            feed(f"end{view}", np.ascontiguousarray(box[:, :2] + box[:, 2:]))
            feed(f"flip{view}", parameters.flip[:, view].astype(np.int32))
            if self.recipe.has_colour and self.device == "cpu":
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
                views = torch.empty((self.recipe.views, len(rows), 3, self.image_size, self.image_size))
                for view, tensors in enumerate(outputs):
                    views[view].numpy()[...] = np.asarray(tensors.as_tensor())
                return views
            copies = [_copy_of(tensors) for tensors in outputs]
            if self.recipe.has_colour:
                copies = [colour_batch(copy, rows[:, view]) for view, copy in enumerate(copies)]
            return torch.stack(copies)
        finally:
            self._pipeline.release_outputs()

    @property
    def pending(self) -> int:
        """Batches that were put and not yet got."""
        return len(self._rows)


def _copy_of(tensors) -> torch.Tensor:
    """DALI's GPU batch as a torch tensor of its own, ordered on torch's current stream."""
    dense = tensors.as_tensor()
    out = torch.empty(dense.shape(), dtype=to_torch_type[dense.dtype], device="cuda")
    feed_ndarray(dense, out, cuda_stream=torch.cuda.current_stream())
    return out
