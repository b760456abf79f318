"""Images by family: the tokens and tensors of one image in a model, and the limit that keeps it small."""

from .families import FAMILIES
from .limits import largest_images, limit_image_tokens
from .llava import check_counting
from .measured import placeholder_of

__all__ = ["FAMILIES", "check_counting", "largest_images", "limit_image_tokens", "placeholder_of"]
