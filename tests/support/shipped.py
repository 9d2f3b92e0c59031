"""A tiny quantized language model, ready to be written."""

from lightning_accel.language_models.shipped import shipped_model
from lightning_accel.quantization.weight_only.ptq import quantize_weights_
from tests.support.language import llama


def tiny_shipped(target="int4", model=None, exclude="lm_head", group=32):
    model = llama() if model is None else model
    if target is not None:
        quantize_weights_(model, target, exclude=exclude, group=group)
    return shipped_model(model)
