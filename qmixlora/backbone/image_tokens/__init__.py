"""Images by family: what one image is in a model, its tokens and tensors, and how to keep it small."""

from .families import FAMILIES
from .limits import largest_images, limit_image_tokens

__all__ = ["FAMILIES", "largest_images", "limit_image_tokens"]
