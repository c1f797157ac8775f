"""An adapted SAM in the forms that other tools read: what `python gara.py export` and `merge` do.

`export` writes two graphs by PyTorch's own exporters: the image encoder with its gates, which decide for each image
anew, and all the rest of SAM, with inputs and outputs named and shaped as in the official code's ONNX model. FILE.onnx
takes the packages onnx and onnxscript, FILE.pt2 (for torch.export.load) none. `merge` writes LoRA as plain weights.
"""
import argparse
import contextlib
import importlib.util
import logging
import os
import sys
import tempfile
import warnings

import torch
import torch.nn as nn

import data
import gara
from sam import ENCODED_AT_ONCE, SCORES_AT_ONCE, build_sam, find_checkpoint, read_checkpoint, reason


class Encoder(nn.Module):
    """image (1, 3, side, side), as `Sam.preprocess` gives it -> image_embeddings (1, C, H, W); gates (1, decisions, r)
    bool, the components in use: a row for each layer, or for each of its windows where these decide."""

    def __init__(self, sam):
        super().__init__()
        self.encoder = sam.image_encoder

    def forward(self, image):
        embeddings = self.encoder(image)
        decisions = []
        for block in self.encoder.blocks:
            mask = block.attn.qkv.mask > 0.5
            decisions.append(mask.reshape(1, -1, mask.shape[-1]))
        return embeddings, torch.cat(decisions, dim=1)


class Decoder(nn.Module):
    """The official model for ONNX: one image's embedding and one prompt -> masks at the image's size.

    image_embeddings (1, C, H, W); point_coords (1, K, 2) in pixels of the scaled image; point_labels (1, K): 1 object,
    0 background, 2 and 3 a box's corners, -1 none (a prompt without a box ends with such a point); mask_input
    (1, 1, 4H, 4W), used where has_mask_input (1,) is 1; orig_im_size (2,): height and width of the image. float32.
    -> masks (1, M, height, width), iou_predictions (1, M), low_res_masks (1, M, 4H, 4W); M is 4, or with single 1.
    """

    def __init__(self, sam, single=False):
        super().__init__()
        self.prompt_encoder, self.mask_decoder = sam.prompt_encoder, sam.mask_decoder
        self.side, self.single = sam.image_encoder.img_size, single
        self.postprocess_masks = sam.postprocess_masks

    def forward(self, image_embeddings, point_coords, point_labels, mask_input, has_mask_input, orig_im_size):
        prompts = self.prompt_encoder
        sparse = prompts.embed_coords(point_coords, point_labels.long())
        no_mask = prompts.no_mask_embed.weight.view(1, -1, 1, 1)
        dense = torch.lerp(no_mask, prompts.mask_downscaling(mask_input), has_mask_input)
        low_res, scores = self.mask_decoder.predict_masks(image_embeddings, prompts.get_dense_pe(), sparse, dense)
        if self.single:
            low_res, scores = self.best(low_res, scores, point_coords.shape[1])

        scaled = torch.floor(orig_im_size * (self.side / orig_im_size.max()) + 0.5)
        masks = self.postprocess_masks(low_res, sizes(scaled, self.side), sizes(orig_im_size, 2**16))
        return masks, scores, low_res

    def best(self, low_res, scores, points):
        """The mask of a clear prompt if there are more than two points, the closing one counted, else the best of the
        other three: (1, 1, 4H, 4W) and (1, 1)."""
        ambiguous = torch.tensor([1000.0, 0, 0, 0]) * (points - 2.5)
        best = (scores + ambiguous).argmax(1)
        return low_res[:, best], scores[:, best]


def sizes(values, most):
    """The numbers in a tensor (2,) as sizes of others, from 1 to `most`, whose values the graph will learn when it
    runs."""
    found = []
    for value in values.long():
        size = value.item()
        torch._check(size >= 1)
        torch._check(size <= most)
        found.append(size)
    return found


def check_paths(method, *paths):
    """ValueError if a file cannot be written (None: is not asked for): another ending, no such folder, no exporter for
    ONNX, the same file twice, or a method whose decisions no graph can make."""
    if method == "gara_random":
        raise ValueError("gara_random tosses coins by a checksum of the image's pixels, which no graph computes")
    asked = [path for path in paths if path]
    for path in asked:
        folder = os.path.dirname(path) or "."
        if not path.endswith((".onnx", ".pt2")):
            raise ValueError(f"cannot write {path}: say FILE.onnx, or FILE.pt2 for torch.export's own form")
        if not os.path.isdir(folder):
            raise ValueError(f"cannot write {path}: there is no folder {folder}")
        lacking = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
        if path.endswith(".onnx") and lacking:
            raise ValueError(f"{path} needs PyTorch's ONNX exporter: pip install {' '.join(lacking)}; a .pt2 file "
                             "needs none")
    if len({os.path.abspath(path) for path in asked}) < len(asked):
        raise ValueError(f"--out and --decoder are the same file, {asked[0]}")


def write_encoder(sam, path):
    """The image encoder of a SAM with an adapter."""
    side = sam.image_encoder.img_size
    write(Encoder(sam), dict(image=torch.zeros(1, 3, side, side)), ["image_embeddings", "gates"], path)


def write_decoder(sam, path, single=False):
    """All of a SAM but its image encoder."""
    C, size = sam.prompt_encoder.C, sam.prompt_encoder.size
    inputs = dict(
        image_embeddings=torch.zeros(1, C, size, size),
        point_coords=torch.zeros(1, 5, 2),
        point_labels=torch.ones(1, 5),
        mask_input=torch.zeros(1, 1, 4 * size, 4 * size),
        has_mask_input=torch.zeros(1),
        orig_im_size=torch.tensor([480.0, 640.0]))
    write(Decoder(sam, single), inputs, ["masks", "iou_predictions", "low_res_masks"], path)


@torch.no_grad()
def write(model, inputs, outputs, path):
    """A model's graph for inputs (by name) as these, whole or not at all. Where there are `point_coords`, any number
    of points."""
    K = torch.export.Dim("num_points", min=1)
    dynamic = {"point_coords": {1: K}, "point_labels": {1: K}}
    shapes = tuple(dynamic.get(name) for name in inputs)
    model.eval().requires_grad_(False)
    with few_large_products(), quiet():
        program = torch.export.export(model, tuple(inputs.values()), dynamic_shapes=shapes, strict=False)
        program = program.run_decompositions({})  # nothing in place
        folder = os.path.dirname(path) or "."
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            part = os.path.join(temporary, os.path.basename(path))
            if path.endswith(".pt2"):
                torch.export.save(program, part)
            else:
                graph = torch.onnx.export(program, (), input_names=list(inputs), output_names=outputs, verbose=False,
                                          opset_version=18)
                graph.save(part)
            for name in sorted(os.listdir(temporary), reverse=True):  # beyond 2 GB weights are a file: FILE.onnx.data
                os.replace(os.path.join(temporary, name), os.path.join(folder, name))


@contextlib.contextmanager
def few_large_products():
    """Pieces that fit this machine's caches would be thousands of nodes in a graph that runs elsewhere."""
    kept = ENCODED_AT_ONCE["cpu"], SCORES_AT_ONCE["cpu"]
    ENCODED_AT_ONCE["cpu"], SCORES_AT_ONCE["cpu"] = 2**17, 2**26
    try:
        yield
    finally:
        ENCODED_AT_ONCE["cpu"], SCORES_AT_ONCE["cpu"] = kept


@contextlib.contextmanager
def quiet():
    """The exporters speak of packages that are not there and not needed, and of adapters that keep their decisions."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


# ---------------------------------------------------------------- python gara.py export | merge

def parse(argv):
    """The command line."""
    parser = argparse.ArgumentParser(description="An adapted SAM in the forms that other tools read.")
    parser.error = lambda message: parser.exit(2, f"error: {message} (see --help)\n")
    add = parser.add_argument
    add("task", choices=["export", "merge"],
        help="export: the image encoder and its gates as a graph; merge: LoRA added to SAM's own checkpoint")
    add("adapter", help="an adapter file that train.py wrote")
    add("--checkpoint", help="the SAM weights it was trained on; default: as for sam.py")
    add("--out", required=True, help="FILE.onnx or FILE.pt2 (torch.export); of merge FILE.pth")
    add("--decoder", metavar="FILE", help="export: also the rest of SAM, with the official ONNX model's inputs and "
        "outputs: FILE.onnx or FILE.pt2")
    add("--return-single-mask", action="store_true", help="the decoder chooses among its four masks")
    args = parser.parse_args(argv)
    if args.task == "merge" and args.decoder:
        parser.error("--decoder belongs to export")
    return args


def convert(args):
    """Do what the command line says, and print a line about it."""
    content = gara.read_adapter(args.adapter)
    backbone, method, size = content["backbone"], content["method"], content["image_size"]
    if args.task == "merge":
        gara.check_mergeable(method)
    else:
        check_paths(method, args.out, args.decoder)
    checkpoint = args.checkpoint or find_checkpoint(backbone)
    sam = build_sam(backbone, checkpoint, size)
    gara.load_adapter(sam, args.adapter)

    if args.task == "merge":
        gara.save_whole(gara.merge(sam, read_checkpoint(checkpoint, backbone)), args.out)
        print(f"{args.out}: a SAM checkpoint of {backbone}, adapted at image size {size}")
        return
    write_encoder(sam, args.out)
    print(f"{args.out}: image (1, 3, {size}, {size}) -> image_embeddings, gates")
    if args.decoder:
        write_decoder(sam, args.decoder, args.return_single_mask)
        print(f"{args.decoder}: the official ONNX model's inputs and outputs")


def main(argv=None):
    """Convert an adapter from the command line; returns the exit code. A user's mistake ends in one line."""
    data.plain_output()
    args = parse(argv)
    try:
        convert(args)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {reason(error)}", file=sys.stderr)
        return 2
    return 0
