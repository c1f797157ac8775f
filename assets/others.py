"""Other people's models beside ours, from their own code. Nothing of theirs is imported before it is asked for.

For `python assets/bench.py sam --against`, functions (backbone, state_dict) -> (encoder, predictor or None):

    assets/others.py:official           pip install segment-anything torchvision
    assets/others.py:transformers       pip install transformers

For `python evaluate.py --predictor`, classes with the official SamPredictor's `set_image` and `predict`. They are
started in the folder where the project's repository and its weights lie, under the names that these classes give:

    assets/others.py:HQ_SAM             github.com/SysCV/sam-hq in sam-hq/, sam_hq_vit_b.pth
    assets/others.py:RobustSAM          github.com/robustsam/RobustSAM in RobustSAM/, robustsam_checkpoint_b.pth
    assets/others.py:Restored           a restoration network before SAM: say which in `restoration`

`official`, `transformers`, HQ_SAM and RobustSAM were run with those projects' code on random weights, Restored with a
network that changes nothing.
"""
import sys

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# ---------------------------------------------------------------- other implementations of SAM, for bench.py

def official(backbone, weights):
    """The official code: encoder and predictor."""
    from segment_anything import SamPredictor, sam_model_registry

    sam = sam_model_registry[backbone]().eval()
    sam.load_state_dict(weights)
    return sam.image_encoder, SamPredictor(sam)


# Names of the encoder's parts: the official code's, and those in transformers.
NAMES_IN_TRANSFORMERS = {
    "image_encoder": "vision_encoder",
    "patch_embed.proj": "patch_embed.projection",
    "blocks": "layers",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "neck.0": "neck.conv1",
    "neck.1": "neck.layer_norm1",
    "neck.2": "neck.conv2",
    "neck.3": "neck.layer_norm2",
}


def transformers(backbone, weights):
    """The encoder of the package transformers, with PyTorch's fused attention."""
    from transformers import SamVisionConfig, SamVisionModel
    from sam import BACKBONES

    sizes = BACKBONES[backbone]
    config = SamVisionConfig(hidden_size=sizes["d"], num_hidden_layers=sizes["depth"], mlp_dim=4 * sizes["d"],
                             num_attention_heads=sizes["heads"], global_attn_indexes=list(sizes["global_layers"]))
    model = SamVisionModel._from_config(config, attn_implementation="sdpa").eval()

    renamed = {}
    for key, value in weights.items():
        if key.startswith("image_encoder"):
            for theirs, here in NAMES_IN_TRANSFORMERS.items():
                key = key.replace(theirs, here)
            renamed[key] = value
    model.load_state_dict(renamed)
    return lambda x: model(x).last_hidden_state, None


# ---------------------------------------------------------------- other models, for evaluate.py

def HQ_SAM():
    """HQ-SAM's own predictor."""
    sys.path.insert(0, "sam-hq")
    from segment_anything import SamPredictor, sam_model_registry

    return SamPredictor(sam_model_registry["vit_b"](checkpoint="sam_hq_vit_b.pth").to(DEVICE))


class RobustSAM:
    """RobustSAM's predictor runs plain SAM's branch; the robust one is behind `Sam.predict`, which is used here."""

    def __init__(self):
        sys.path.insert(0, "RobustSAM")
        from robust_segment_anything import sam_model_registry
        from robust_segment_anything.utils.transforms import ResizeLongestSide

        self.model = sam_model_registry["vit_b"](opt=None, checkpoint="robustsam_checkpoint_b.pth").to(DEVICE)
        self.resize = ResizeLongestSide(1024)

    def set_image(self, image):
        x = torch.from_numpy(image).permute(2, 0, 1)[None].float().to(DEVICE)
        self.input = dict(image=self.resize.apply_image_torch(x), original_size=image.shape[:2])

    def predict(self, point_coords=None, point_labels=None, box=None, multimask_output=False):
        prompt, size = dict(self.input), self.input["original_size"]
        if box is None:
            coords = self.resize.apply_coords(point_coords, size)
            prompt["point_coords"] = torch.from_numpy(coords)[None].to(DEVICE)
            prompt["point_labels"] = torch.from_numpy(point_labels)[None].to(DEVICE)
        else:
            boxes = self.resize.apply_boxes(box[None], size)
            prompt["boxes"] = torch.from_numpy(boxes).to(DEVICE)
        output = self.model.predict(None, [prompt], multimask_output=False)[0]
        return output["masks"][0].cpu().numpy(), None, None


def restoration():
    """The network that `Restored` runs: (1, 3, H, W) in 0..1 -> the same, in the range that it was trained with.

    Of AirNet (github.com/XLearning-SCU/2022-CVPR-AirNet) `lambda x: net(x_query=x, x_key=x)`, of URIE
    (github.com/taeyoungson/urie) `lambda x: net(x)[0]`.
    """
    return torch.nn.Identity()


class Restored:
    """Restores an image, then runs plain SAM on it."""

    def __init__(self):
        from sam import SamPredictor, build_sam

        self.net = restoration()
        self.predictor = SamPredictor(build_sam("vit_b", "sam_vit_b_01ec64.pth").to(DEVICE))
        self.predict = self.predictor.predict

    @torch.no_grad()
    def set_image(self, image):
        x = torch.from_numpy(image).permute(2, 0, 1)[None].to(DEVICE) / 255
        restored = self.net(x).clamp(0, 1)[0]
        self.predictor.set_image((255 * restored).round().byte().permute(1, 2, 0).cpu().numpy())
