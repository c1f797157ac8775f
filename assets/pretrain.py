"""What `train.py --pretrain` does otherwise: it varies images and prompts, and its loss is for all of SAM's outputs.

Only the project's own tiny SAM was trained that way, a whole model, from scratch, on clear images. Adapters see every
image as it is and learn from the single mask.
"""
import numpy as np
import torch


def vary(image, masks, rng):
    """The image (H, W, 3) and its masks (N, H, W) transposed, mirrored, with colour channels exchanged, at random."""
    if rng.random() < 0.5:
        image, masks = image.swapaxes(0, 1), masks.swapaxes(1, 2)
    for axis in (0, 1):
        if rng.random() < 0.5:
            image, masks = np.flip(image, axis), np.flip(masks, axis + 1)
    image = image[..., rng.permutation(3)]
    return np.ascontiguousarray(image), np.ascontiguousarray(masks)


def loosen(labels, boxes, rng):
    """Prompts as people give them: of an object's three labels (M, 3) one to three stay, the rest become -1, "no
    point"; boxes (M, 4) are inexact."""
    keep = rng.integers(1, 4, len(labels))
    labels = np.where(np.arange(3) < keep[:, None], labels, -1)
    sides = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    shifts = sides * rng.normal(0, 0.03, boxes.shape).clip(-0.1, 0.1)
    return labels, (boxes + shifts).astype(np.float32)


def pretrain_loss(sam, embeddings, image_index, points, boxes, targets, mask_loss, mask_iou):
    """Each mask from one prompt kind, in turn; all four outputs learn, and the predicted IoU.

    The single mask answers every prompt; of the three for ambiguous prompts, only the best learns (as in SAM).
    Arguments are as in `Losses.forward` of train.py, whose mask_loss and mask_iou these are.
    """
    coords, labels = points
    prompts = {"point": ((coords[::2], labels[::2]), None, None), "box": (None, boxes[1::2], None)}
    losses, ious = [], {}
    for first, kind in enumerate(prompts):
        sparse, dense = sam.prompt_encoder(*prompts[kind])
        logits, scores = sam.mask_decoder.predict_masks(
            embeddings[image_index[first::2]], sam.prompt_encoder.get_dense_pe(), sparse, dense)
        logits = logits.float()
        truth = targets[first::2, None].expand_as(logits)
        loss, iou = mask_loss(logits, truth), mask_iou(logits, truth)  # (P / 2, 4)
        losses.append(loss[:, 0] + loss[:, 1:].amin(1) + (scores.float() - iou).square().mean(1))
        ious[kind] = iou[:, 0].mean()
    return torch.cat(losses).mean(), ious
