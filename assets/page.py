"""SAM in a browser: click on an image, degrade it, and watch each model's masks and each adapter's gates.

    python assets/page.py --adapter runs/vit_t_gara/gara.pt          plain SAM beside this adapter, on demo scenes
    python assets/page.py --images photos/                           on your own images; one can also be dropped in
    python assets/page.py --backbone vit_b --data coco/ --split val  on a dataset, whose truth gives the IoU

It serves page.html, prints the address and opens nothing. It is also an example of how to build on this code: what
models are asked stands in `Workbench`, the rest is a web server that does not trust its visitors.

The protocol. A browser keeps what a person has chosen and says all of it each time; the server keeps the images and
what models made of the last few views. A POST carries JSON, only `upload` the bytes of a file.

    GET  /               page.html
    GET  /start          {"images": [{"name", "kind", "split"}], "models": [{"name", "file", "sets": [their sizes]}],
                         "corruptions": [name], "format": of prompts files, "max_upload": bytes}
    GET  /thumbnail?7    image 7, small, as PNG: images and models are called by their place in /start's lists
    POST /upload         a JPEG, PNG or WebP file -> {"image": its number}
    POST /image          VIEW -> the degraded image as PNG: the pixels that the models get
    POST /encode         VIEW, "model" -> {"layers": [{"open": [0 or 1 for each component], "chosen": [0 or 1 for each
                         set of components], "count": of open components}]}; where windows decide, shares and the mean
    POST /predict        VIEW, "model", "points": [[x, y, 1 object or 0 background]], "box": [x0, y0, x1, y1] or null,
                         "against": "truth" or "clear" -> {"masks": [PNG in base64], "scores": [predicted IoU],
                         "iou": [with the true object, or the mask on the clear image] or null, "object": number of the
                         true object that was asked for, or null}

VIEW is "image", "corruption" (a name or "none"), "strength" (0 to 2) and "noise" (0, 1, ...: which draw of it). Points
and boxes are in pixels of the image. A bad request gets {"error": one line} and a status from 400.
"""
import argparse
import base64
import contextlib
import copy
import io
import json
import os
import re
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from functools import lru_cache, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import data
import gara
from corruptions import CORRUPTIONS, OTHERS
from sam import BACKBONES, Sam, SamPredictor, build_sam, find_checkpoint, keep_freed_memory

PAGE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "page.html")
MAX_UPLOAD = 20 * 2**20  # bytes of an image file
MAX_JSON = 2**16         # bytes of any other request
MAX_PIXELS = 40 * 10**6  # of an uploaded image
MAX_SIDE = 1024          # longer side in pixels to which uploads and images of a folder are scaled down
MAX_POINTS = 64          # of a prompt
MOST_IMAGES = 200        # of a folder or dataset
KEPT_VIEWS = 12          # degraded images, and what models made of them: the nine of a sweep and some more
KEPT_UPLOADS = 8
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF")  # JPEG, PNG, WebP: Pillow reads forms that run programs


class BadRequest(Exception):
    """A visitor's mistake: the HTTP status, and a line that says what is wrong."""


def need(condition, message, status=400):
    """BadRequest unless the condition holds."""
    if not condition:
        raise BadRequest(status, message)


# ---------------------------------------------------------------- images

class Entry(NamedTuple):
    """An image to choose. kind and split: of its dataset, for a prompts file."""
    name: str
    read: Callable  # () -> uint8 HxWx3, {number: bool HxW} of its true objects, empty where the truth is not known
    kind: str = None
    split: str = None


def read_scaled(path):
    """An image file, scaled down to MAX_SIDE. SampleError, BadRequest."""
    image = Image.fromarray(data.read_image(path))
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    need(min(image.size) >= 16, f"{image.width} x {image.height} pixels: the image is too small or too narrow")
    return np.array(image), {}


def read_sample(sample):
    """A dataset's image with its objects. SampleError."""
    masks = sample.masks()
    return sample.image(), dict(zip(sample.indices, masks))


def read_scene(seed):
    """A demo scene with its objects."""
    image, masks = data.demo_scene(seed)
    return image, dict(enumerate(masks))


def list_entries(args):
    """The images that the command line names, else demo scenes: a list of Entry. DatasetError, OSError."""
    entries = []
    if args.images:
        files = [file for file in sorted(os.listdir(args.images)) if file.lower().endswith(data.IMAGE_ENDINGS)]
        files = [file for file in files if not file.startswith(".")]
        if not files:
            raise data.MissingError(f"{args.images}: no image in this folder")
        for file in data.spread(files, MOST_IMAGES):
            entries.append(Entry(file, partial(read_scaled, os.path.join(args.images, file))))
    if args.data:
        data.make_missing_demo(args.data)
        [dataset] = data.load_datasets([args.data], args.split)
        for sample in data.spread(dataset, MOST_IMAGES):
            entries.append(Entry(sample.name, partial(read_sample, sample), dataset.kind, dataset.split))
    if not entries:
        for k in range(12):
            entries.append(Entry(f"scene-{k + 1}", partial(read_scene, data.seed_of("page", k))))
    return entries


def png(image):
    """uint8 HxWx3 or bool HxW -> the bytes of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


# ---------------------------------------------------------------- models

class Model(NamedTuple):
    """Plain SAM, or SAM with an adapter. sets: the sizes of the adapter's sets of components, (4, 48) of GaRA's."""
    name: str
    file: str
    sets: tuple
    sam: Sam


def load_models(args):
    """Plain SAM, and one Model for each adapter; all share the frozen weights. ValueError, OSError."""
    contents = [gara.read_adapter(path) for path in args.adapter]
    first = contents[0] if contents else dict(backbone="vit_t", image_size=None)
    backbone = args.backbone or first["backbone"]
    base = build_sam(backbone, args.checkpoint or find_checkpoint(backbone), first["image_size"]).to(args.device)

    models = [Model("SAM", backbone, (), base)]
    frozen = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    for path, content in zip(args.adapter, contents):
        sam = copy.deepcopy(base, dict(frozen))  # the memo keeps the frozen tensors shared
        gara.load_adapter(sam, path)
        options = content["options"]
        sets = gara.ranks_of(options)
        name = f"{gara.METHODS[content['method']].title} {','.join(map(str, sets))}"
        if options.get("scope") == "window":
            name += " per window"
        file = "/".join(path.split(os.sep)[-2:])  # its folder tells runs apart
        models.append(Model(name, file, sets, sam.to(args.device).eval()))
    return models


def gate_layers(model):
    """What each layer's gate chose for the image that was just encoded, in the form of /encode."""
    layers = []
    for gate in gara.gates(model.sam) if model.sets else []:
        vectors = gate["vector"].flatten(0, -2).float()  # (1 or windows, r)
        spaces = F.one_hot(gate["space"].flatten(), len(model.sets)).float()  # (1 or windows, sets)
        count = gate["count"].float().mean().item()
        layers.append(dict(open=vectors.mean(0).tolist(), chosen=spaces.mean(0).tolist(), count=round(count, 1)))
    return layers


def ask(predictor, points, box):
    """Masks and predicted IoU for one prompt: three of each for a single point, which is ambiguous, else one."""
    coords = [(x, y) for x, y, _ in points]
    labels = [label for _, _, label in points]
    ambiguous = len(points) == 1 and box is None
    masks, scores, _ = predictor.predict(coords or None, labels or None, box, multimask_output=ambiguous)
    return masks, scores


def iou(a, b):
    """Intersection over union of two masks (bool HxW); 1 if both are empty."""
    union = (a | b).sum()
    return float((a & b).sum() / union) if union else 1.0


def asked_object(objects, points, box):
    """The number of the true object that a prompt asks for, or None: it holds the object's points and none of the
    background's. Of several it is the smallest or, with a box, the one whose own box is nearest, if that is near."""
    fitting = {}
    for number, mask in objects.items():
        if all(mask[int(y), int(x)] == label for x, y, label in points):
            fitting[number] = mask.sum() if box is None else np.abs(data.box_of(mask) - box).max()
    number = min(fitting, key=fitting.get, default=None)
    if number is not None and box is not None and fitting[number] > max(box[2] - box[0], box[3] - box[1]) / 4:
        return None
    return number


# ---------------------------------------------------------------- what is asked of them

class View(NamedTuple):
    """An image as models see it: the protocol's VIEW."""
    image: int
    corruption: str
    strength: float
    noise: int


class Workbench:
    """Images, models, and what the latter made of the last few views. One thread at a time: who holds `lock`.

    From `page` on: a query, JSON or a file's bytes -> HTML, a dict or PNG. BadRequest, DatasetError.
    """

    def __init__(self, entries, models):
        self.lock = threading.Lock()
        self.entries = dict(enumerate(entries))
        self.given = len(entries)
        self.models = models
        self.read = lru_cache(4)(self.read)
        self.degraded = lru_cache(KEPT_VIEWS)(self.degraded)
        self.encoded = lru_cache(KEPT_VIEWS * len(models))(self.encoded)

    def read(self, number):
        """An entry's image, uint8 HxWx3, and its true objects."""
        return self.entries[number].read()

    def degraded(self, view):
        """What the models get: uint8 HxWx3. Noise 0 is the evaluation's; strength 0 leaves the image as it is."""
        image, _ = self.read(view.image)
        if view.corruption == "none" or view.strength == 0:
            return image
        names = [self.entries[view.image].name, view.corruption]
        if view.noise:
            names.append(view.noise)
        return data.degrade(image, f"{view.corruption}@{view.strength}", data.seed_of(*names))

    def encoded(self, view, number):
        """A predictor that has encoded the view, and what the gates chose."""
        model = self.models[number]
        predictor = SamPredictor(model.sam)
        predictor.set_image(self.degraded(view))
        return predictor, gate_layers(model)

    def page(self, _):
        with open(PAGE, encoding="utf-8") as file:
            return file.read()

    def start(self, _):
        entries = list(self.entries.values())[:self.given]
        images = [dict(name=entry.name, kind=entry.kind, split=entry.split) for entry in entries]
        models = [dict(name=model.name, file=model.file, sets=model.sets) for model in self.models]
        return dict(images=images, models=models, corruptions=[*CORRUPTIONS, *OTHERS], format=data.PROMPTS_FORMAT,
                    max_upload=MAX_UPLOAD)

    def thumbnail(self, query):
        number = int(query) if re.fullmatch("[0-9]{1,9}", query) else None
        need(number in self.entries, "there is no such image", 404)
        image, _ = self.read(number)
        small = Image.fromarray(image)
        small.thumbnail((192, 192))
        return png(np.array(small))

    def upload(self, content):
        need(content.startswith(SIGNATURES), "this is no JPEG, PNG or WebP image")
        with tempfile.NamedTemporaryFile() as file:
            file.write(content)
            file.flush()
            try:
                height, width = data.image_size(file.name)
                need(height * width <= MAX_PIXELS, f"{width} x {height} pixels are too many: scale it down", 413)
                image = read_scaled(file.name)
            except data.SampleError as error:
                raise BadRequest(400, str(error).removeprefix(f"{file.name}: ")) from None
        number = max(self.entries) + 1
        self.entries[number] = Entry(f"upload-{number}", lambda: image)
        if number - KEPT_UPLOADS >= self.given:
            del self.entries[number - KEPT_UPLOADS]
        return dict(image=number)

    def image(self, request):
        return png(self.degraded(self.view_in(request)))

    def encode(self, request):
        _, layers = self.encoded(self.view_in(request), self.model_in(request))
        return dict(layers=layers)

    def predict(self, request):
        view, model = self.view_in(request), self.model_in(request)
        image, objects = self.read(view.image)
        points, box = prompt_in(request, *image.shape[:2])
        predictor, _ = self.encoded(view, model)
        masks, scores = ask(predictor, points, box)

        number = asked_object(objects, points, box)
        like = []  # what the masks are held against
        if request.get("against") == "clear":
            predictor, _ = self.encoded(View(view.image, "none", 0, 0), model)
            like, _ = ask(predictor, points, box)
        elif number is not None:
            like = [objects[number]] * len(masks)
        return dict(
            masks=[base64.b64encode(png(mask)).decode() for mask in masks],
            scores=scores.tolist(),
            iou=[iou(*pair) for pair in zip(masks, like)] or None,
            object=None if number is None else str(number))

    def view_in(self, request):
        """The View that a request names. BadRequest."""
        view = View(*(request.get(name) for name in View._fields))
        need(type(view.image) is int and view.image in self.entries, "there is no such image", 404)
        need(view.corruption in ("none", *CORRUPTIONS, *OTHERS), "corruption: none has this name")
        need(is_number(view.strength) and 0 <= view.strength <= 2, "strength: it should be a number from 0 to 2")
        need(type(view.noise) is int and 0 <= view.noise < 2**32, "noise: it should be a whole number from 0")
        return view

    def model_in(self, request):
        """The number of the model that a request names. BadRequest."""
        number = request.get("model")
        need(type(number) is int and 0 <= number < len(self.models), "there is no such model", 404)
        return number


def is_number(value):
    """Whether a value of JSON is one, not true or false. It may be NaN, which no comparison lets pass."""
    return type(value) in (int, float)


def prompt_in(request, height, width):
    """Points [[x, y, label]] and box, or None, that ask about an image of this size. BadRequest."""
    points, box = request.get("points"), request.get("box")
    need(isinstance(points, list) and len(points) <= MAX_POINTS, f"points: it should be a list of up to {MAX_POINTS}")
    need(points or box is not None, "points, box: nothing is asked for")
    for point in points:
        check_pixels("points", point, (width, height, 2))
        need(point[2] in (0, 1), "points: the third number is 1 (object) or 0 (background)")
    if box is not None:
        check_pixels("box", box, (width, height, width, height))
        need(box[0] < box[2] and box[1] < box[3], "box: x0 < x1 and y0 < y1 are needed")
    return points, box


def check_pixels(name, values, ends):
    """BadRequest unless these are as many numbers, each from 0 to below its end."""
    need(isinstance(values, list) and len(values) == len(ends), f"{name}: {len(ends)} numbers are needed")
    for value, end in zip(values, ends):
        need(is_number(value) and 0 <= value < end, f"{name}: numbers within the image are needed")


# ---------------------------------------------------------------- the web server

HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src 'self' data: blob:; "
                               "script-src 'unsafe-inline'; style-src 'unsafe-inline'; frame-ancestors 'none'",
}
GONE = (ConnectionError, TimeoutError)  # a visitor who has left or keeps silent: no fault
TYPES = {str: "text/html; charset=utf-8", dict: "application/json", bytes: "image/png"}
ROUTES = {
    "GET": {"/": Workbench.page, "/start": Workbench.start, "/thumbnail": Workbench.thumbnail},
    "POST": {"/upload": Workbench.upload, "/image": Workbench.image, "/encode": Workbench.encode,
             "/predict": Workbench.predict},
}


class Handler(BaseHTTPRequestHandler):
    """Answers one request; each has a connection and a thread of its own."""
    server_version, sys_version = "GaRA-SAM", ""
    timeout = 30  # seconds that a visitor may keep silent

    def do_GET(self):
        self.unread = 0  # bytes of the request's body
        try:
            self.reply(200, self.content())
        except BadRequest as error:
            self.send_error(*error.args)
        except data.DatasetError as error:  # it names a path, which is not for visitors
            print(f"error: {error}", file=sys.stderr)
            self.send_error(400, "this image cannot be read: the server's terminal says why")
        except GONE:
            raise
        except Exception as error:
            traceback.print_exc()
            self.send_error(500, f"{type(error).__name__}: the server's terminal says why")
        left = min(self.unread, 4 * MAX_UPLOAD)
        while left > 0 and self.rfile.read(min(left, 2**16)):  # a browser that still sends does not listen
            left -= 2**16

    do_POST = do_GET

    def content(self):
        """What is asked for: HTML, a dict or PNG. BadRequest, DatasetError."""
        length = self.headers.get("Content-Length", "0")
        need(re.fullmatch("[0-9]{1,12}", length), "Content-Length: it should be a number")
        self.unread = int(length)
        self.check_visitor()
        path, _, request = self.path.partition("?")
        route = ROUTES[self.command].get(path)
        need(route, "there is no such address", 404)
        if self.command == "POST":
            most = MAX_UPLOAD if path == "/upload" else MAX_JSON
            need(self.unread <= most, f"at most {most:,} bytes are taken", 413)
            request = self.rfile.read(self.unread)
            self.unread = 0
            if path != "/upload":
                request = from_json(request)
        with self.server.bench.lock:
            return route(self.server.bench, request)

    def check_visitor(self):
        """BadRequest for other people's pages, which reach this machine through the browser of whoever visits them:
        under a name of their own that they let point here (DNS rebinding), or from another origin."""
        host = self.headers.get("Host", "")
        name = re.sub(":[0-9]*$", "", host).lower()  # any port: it may come through a tunnel
        known = name in ("127.0.0.1", "localhost", self.server.host)
        if self.server.host == "0.0.0.0":
            known = known or re.fullmatch("[0-9.]+", name)  # an address is nobody's name
        need(known, "this Host is not served here", 403)
        need(self.headers.get("Origin") in (None, f"http://{host}"), "only this server's own page may ask", 403)

    def reply(self, status, content):
        kind = TYPES[type(content)]
        if isinstance(content, dict):
            content = json.dumps(content)
        if isinstance(content, str):
            content = content.encode()
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def send_error(self, code, message=None, explain=None):
        """Also for what http.server itself finds wrong, which it would say in HTML."""
        message = message or self.responses[code][0]
        self.reply(code, dict(error=message.splitlines()[0]))

    def log_message(self, *_):
        """The terminal is for faults."""


def from_json(content):
    """bytes -> dict. BadRequest."""
    try:
        request = json.loads(content)
    except (ValueError, RecursionError):
        request = None
    need(isinstance(request, dict), "the request is no JSON object")
    return request


class Server(ThreadingHTTPServer):
    """Serves a Workbench. server_close() waits until the last thread has ended."""
    daemon_threads = False

    def __init__(self, host, port, bench):
        self.host = host
        self.bench = bench
        self.connections = set()
        super().__init__((host, port), Handler)

    def get_request(self):
        connection, address = super().get_request()
        self.connections.add(connection)
        return connection, address

    def shutdown_request(self, connection):
        self.connections.discard(connection)
        super().shutdown_request(connection)

    def server_close(self):
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RD)  # browsers open some that they do not use
        super().server_close()

    def handle_error(self, request, address):
        if not isinstance(sys.exc_info()[1], GONE):
            super().handle_error(request, address)


def parse(argv):
    """The command line."""
    parser = argparse.ArgumentParser(description="SAM and adapters in a browser: click, degrade, compare.")
    parser.error = lambda message: parser.exit(2, f"error: {message} (see --help)\n")
    add = parser.add_argument
    add("--adapter", nargs="+", default=[], metavar="FILE", help="adapter files that train.py wrote")
    add("--backbone", choices=BACKBONES, help="default: the first adapter's, else vit_t")
    add("--checkpoint", help="SAM weights; default: assets/, checkpoints/, the torch hub cache, else downloaded")
    add("--images", metavar="FOLDER", help="images to choose from; default: demo scenes")
    add("--data", metavar="ROOT", help="a dataset to choose from, of any kind that data.py reads")
    add("--split", default="test", help="of --data (test)")
    add("--host", default="127.0.0.1", help="address to listen at (127.0.0.1: this machine alone)")
    add("--port", type=int, default=8000, help="0: any free one (8000)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if not 0 <= args.port < 2**16:
        parser.error(f"--port {args.port}: it should be 0 to 65535")
    return args


def make_server(args):
    """A Server with images and models, which listens; serve_forever() answers. ValueError, OSError, DatasetError."""
    bench = Workbench(list_entries(args), load_models(args))
    try:
        return Server(args.host, args.port, bench)
    except OSError as error:
        raise ValueError(f"cannot listen at {args.host}, port {args.port} ({error.strerror}): choose another "
                         "--port; 0 takes a free one") from None


def main(argv=None):
    """Serves until Ctrl-C; returns the exit code. A user's mistake ends in one line."""
    data.plain_output()
    args = parse(argv)
    keep_freed_memory()
    try:
        with make_server(args) as server:
            print(f"http://{args.host}:{server.server_port} (Ctrl-C ends)", flush=True)
            server.serve_forever()
    except KeyboardInterrupt:
        print("\nended")
    except (data.DatasetError, ValueError, OSError, RuntimeError, AssertionError) as error:
        print(f"error: {data.line_of(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
